"""Export a checkpoint as one program: uint8 chips in, logits, features and OOD confidence out.

python -m utils.predict.export [NAME=VALUE ...]   writes OUT: *.pt2 for torch.export.load, or *.onnx

Input: uint8 [N, S, S] for any N >= 1, with S the side that is printed. Outputs, each with N rows: logits
[N, C], features [N, D], confidence [N], higher = more in distribution. Normalisation, resizing and views
are in the program.
"""

from importlib.util import find_spec
from pathlib import Path

from data.errors import reason
from utils.predict.members import choose_score, load_members, set_views
from utils.predict.ood import SCORES
from utils.predict.tta import scaled
from utils.run.files import atomic_file
from utils.run.settings import SettingError, check, read_settings
from utils.run.start import run

import torch
import torch.nn.functional as F
from torch import nn

CHECKPOINT = "runs/finetune/best.pt"  # SAR checkpoint, of finetune.py in the method
OUT = "student.pt2"  # file to write: *.pt2 (torch.export) or *.onnx
TTA = False  # True averages over the checkpoint's views; False predicts from each chip as it is
OOD_SCORE = ""  # a name in utils/predict/ood.py; empty: "gaussian_energy", or "energy" if it was not fitted


class ChipProgram(nn.Module):
    """A member with its input and its OOD score, in operations that torch.export and ONNX know.

    Args:
        member: `utils.predict.members.Member` on the CPU.
        score_name: name in `utils.predict.ood.SCORES`.
    """

    def __init__(self, member, score_name):
        super().__init__()
        checkpoint = member.checkpoint
        self.score = SCORES[score_name].score
        # In one memory format, or torch.export.save warns.
        self.model = member.model.requires_grad_(False).to(memory_format=torch.contiguous_format)
        mean, std = checkpoint["grey"]
        self.gain, self.offset, self.views = 1 / (255 * std), mean / std, {}
        side = checkpoint["chip_side"]
        for view, scale in member.views:
            self.views.setdefault(scaled(checkpoint["image_size"], scale), []).append(view)
        self.count = len(member.views)
        for size in self.views:
            self.register_buffer(f"resize_{size}", _resize_matrix(side, size) if size != side else None)
        self.fitted_names = list(checkpoint["ood"][score_name]) if SCORES[score_name].fit else []
        for name in self.fitted_names:
            self.register_buffer(f"fitted_{name}", checkpoint["ood"][score_name][name].clone())

    def forward(self, chips):
        """Logits [N, C], features [N, D] and confidence [N] of uint8 chips [N, S, S]."""
        images, sums = chips.float() * self.gain - self.offset, []
        for size, views in self.views.items():
            matrix = getattr(self, f"resize_{size}")
            turned = torch.cat([_turned(images, view) for view in views])
            resized = turned if matrix is None else matrix @ turned @ matrix.T
            features = self.model.features(resized[:, None])
            sums.append(features.view(len(views), chips.shape[0], -1).sum(0))
        features = sum(sums) / self.count
        logits = self.model.head(features)
        fitted = {name: getattr(self, f"fitted_{name}") for name in self.fitted_names}
        return logits, features, self.score(logits, features, fitted)


def main():
    read_settings(globals())
    suffix = Path(OUT).suffix
    check(suffix in (".pt2", ".onnx"), f"OUT ends with .pt2 or .onnx; {OUT} does not")
    if suffix == ".onnx":
        missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
        install = f"pip install {' '.join(missing)}"
        check(not missing, f"OUT={OUT} needs the packages {' and '.join(missing)}: {install}")
        version = tuple(map(int, torch.__version__.split(".")[:2]))
        check(version >= (2, 6), f"OUT={OUT} needs torch 2.6 or newer, not {torch.__version__}")
    members = load_members(CHECKPOINT, torch.device("cpu"))
    check(len(members) == 1, "CHECKPOINT is one file here; export the members of an ensemble one by one")
    members = set_views(members, tta=TTA)
    score = choose_score(OOD_SCORE, members)
    side = members[0].checkpoint["chip_side"]
    program = export_program(members[0], score)
    Path(OUT).parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(OUT, "wb") as file:
        if suffix == ".pt2":
            torch.export.save(program, file)
        else:
            file.write(_onnx(program))
    black, white = members[0].checkpoint["grey_range"]
    print(
        f"written: {OUT}, which takes uint8 chips [N, {side}, {side}], black 0 and white 255 (in files with more than "
        f"8 bits: {black:g} and {white:g}); OOD score: {score}"
    )


def export_program(member, score_name):
    """`torch.export.ExportedProgram` of a member; the number of chips is free.

    Raises:
        SettingError: torch.export does not know an operation of the backbone.
    """
    side = member.checkpoint["chip_side"]
    # Two chips, because torch.export takes a size of 1 for a constant.
    example = torch.zeros(2, side, side, dtype=torch.uint8)
    chips = {0: torch.export.Dim("chips", min=1, max=2**30)}  # torch 2.4 needs a maximum
    program = ChipProgram(member, score_name).eval()
    try:
        with torch.no_grad():
            return torch.export.export(program, (example,), dynamic_shapes=(chips,))
    except Exception as error:  # it fails in many ways
        raise SettingError(
            f"torch.export {torch.__version__} cannot export the backbone "
            f"{member.checkpoint['backbone']}: {reason(error)}"
        ) from error


def _onnx(program):
    """The bytes of an ONNX model of an exported program."""
    outputs = ["logits", "features", "confidence"]
    model = torch.onnx.export(
        program, input_names=["chips"], output_names=outputs, dynamo=True, verbose=False
    )
    return model.model_proto.SerializeToString()


def _resize_matrix(side, size):
    """[size, side]; matrix @ image @ matrix.T is `data.augment.resize` of the image, which is separable."""
    identity = torch.eye(side)[None, None]
    return F.interpolate(identity, size=(size, side), mode="bilinear", antialias=True)[0, 0]


def _turned(images, view):
    """Images [N, S, S] in a view 0..7, as `data.augment.turn`, without indices."""
    return torch.rot90(images.flip(2) if view >= 4 else images, view % 4, (1, 2))


if __name__ == "__main__":
    run(main)
