"""Checkpoints that are ready to predict: one, or the members of an ensemble."""

import os
from dataclasses import dataclass, replace

from models.backbone import Classifier
from utils.predict.ood import DEFAULT, NO_FIT, SCORES
from utils.predict.pipeline import Output, ood_confidence
from utils.predict.tta import IDENTITY, predict, replace_views, scaled
from utils.run.checkpoint import build_model, load_checkpoint
from utils.run.settings import CheckpointError, SettingError, check

import torch


@dataclass(frozen=True)
class Member:
    """A checkpoint with its network.

    path: its file; checkpoint: of `load_checkpoint`; model: in eval mode, on the device.
    views: tuple of (view, scale) to predict with.
    """

    path: str
    checkpoint: dict
    model: Classifier
    views: tuple

    @property
    def reading(self):
        """(side, px; (black, white)) of `data.decode.decode`: how the member's chips are read from their files."""
        return self.checkpoint["chip_side"], tuple(self.checkpoint["grey_range"])

    def output(self, stores, batch_size=256, views=None, progress=""):
        """The member's `Output` for N chips.

        Args:
            stores: {`reading`: ChipStore of the chips}, with the member's own.
            batch_size, progress: of `utils.predict.tta.predict`.
            views: other views than the member's.
        """
        store, image_size = stores[self.reading], self.checkpoint["image_size"]
        grey, views = self.checkpoint["grey"], views or self.views
        results = predict(self.model, store, image_size, grey, views, batch_size, progress)
        return Output(*results, self.model.head, self.checkpoint["ood"], self.checkpoint["validation"])


def load_members(checkpoints, device):
    """The members of an ensemble, a list of `Member`; one checkpoint gives a list of one.

    They may differ in backbone, image size, chip side, grey range, views and grey levels, but not in classes.

    Args:
        checkpoints: path, several paths in a string with commas between them, or list of paths.
        device: torch device.

    Raises:
        SettingError: no checkpoint is named.
        CheckpointError: of `load_checkpoint`, or the classes differ.
    """
    paths = checkpoints.split(",") if isinstance(checkpoints, str) else checkpoints
    paths = [paths] if isinstance(paths, os.PathLike) else paths
    paths = [os.path.expanduser(os.fspath(path).strip()) for path in paths]
    check(paths and all(paths), "CHECKPOINT names no file; give one checkpoint or several, a.pt,b.pt")
    members = []
    for path in paths:
        checkpoint = load_checkpoint(path, "finetune.py", sensor="SAR")
        first = members[0].checkpoint if members else checkpoint
        for key in ("classes", "class_ids"):
            if list(checkpoint[key]) != list(first[key]):
                raise CheckpointError(
                    f"{paths[0]} and {path} cannot predict together, their {key} differ: "
                    f"{', '.join(map(str, first[key]))} and {', '.join(map(str, checkpoint[key]))}; "
                    "give checkpoints of the same classes in the same order"
                )
        model = build_model(checkpoint, path).to(device, memory_format=torch.channels_last)
        views = tuple((view, scale) for view, scale in checkpoint["views"])
        members.append(Member(path, checkpoint, model, views))
    return members


def set_views(members, rotations=(), scales=(), tta=True):
    """The members with other views; where these differ from the checkpoint's, it prints both.

    Args:
        members: list of Member.
        rotations, scales: of `replace_views`; empty = those of the member's checkpoint.
        tta: False = each chip as it is.

    Raises:
        SettingError: of `replace_views`.
        BackboneError: a backbone does not take a scale.
    """
    changed = []
    for member in members:
        views = replace_views(member.views, rotations, scales) if tta else IDENTITY
        member.model.check_sizes({scaled(member.checkpoint["image_size"], scale) for _, scale in views})
        if set(views) != set(member.views):
            print(
                f"{member.path}: its head and its OOD scores were fitted for {_describe(member.views)}; the settings "
                f"ask for {_describe(views)}"
            )
        changed.append(replace(member, views=views))
    return changed


def choose_score(name, members):
    """Name of the OOD score for these members: `name`, or if it is empty the best that all of them can give.

    Raises:
        SettingError: there is no such score, or a checkpoint holds no fit of it.
        CheckpointError: the fit in a checkpoint does not fit its features.
    """
    check(name in ("", *SCORES), f"OOD_SCORE is empty or one of {', '.join(SCORES)}, not {name!r}")
    if not name:
        name = DEFAULT if all(DEFAULT in member.checkpoint["ood"] for member in members) else NO_FIT
    for member in members if SCORES[name].fit else ():
        if name not in member.checkpoint["ood"]:
            raise SettingError(
                f"{member.path} holds no fit of the OOD score {name}; run finetune.py, or set "
                f"OOD_SCORE={NO_FIT}"
            )
        head, ood = member.model.head, member.checkpoint["ood"]
        zeros = [torch.zeros(1, size, device=head.weight.device) for size in head.weight.shape]
        try:
            # Twice, as in an ensemble, so that all entries of the fit are used.
            valid = ood_confidence([Output(*zeros, head, ood, {})] * 2, name).isfinite().all()
        except Exception:  # a wrong fit fails in many ways
            valid = False
        if not valid:
            raise CheckpointError(
                f"the fit of the OOD score {name} in {member.path} does not fit the features of its "
                "network; run again: python finetune.py"
            )
    return name


def _describe(views):
    """Views in words."""
    turns, scales = sorted({view for view, _ in views}), sorted({scale for _, scale in views})
    degrees = ", ".join(str(angle) for angle in sorted({view % 4 * 90 for view in turns}))
    flip = ", as it is and flipped" if any(view >= 4 for view in turns) else ""
    count = f"{len(views)} views" if len(views) > 1 else "1 view"
    return f"{count} (rotations {degrees} degrees{flip}; scales {', '.join(f'{s:g}' for s in scales)})"
