"""The classifier: a timm backbone on one grey channel, and a linear head."""

import difflib

import timm
import torch
from timm.models import load_state_dict
from torch import nn


class BackboneError(ValueError):
    """A backbone that cannot be built, or weights that do not fit it; the message says why."""


class Classifier(nn.Module):
    """Backbone (pooled features) and linear head (logits) of a chip classifier.

    Args:
        backbone: a timm model name.
        classes: number of classes, C.
        image_size: side of the square input, px; only used to build and to check.
        weights: "" for random weights, "timm" for timm's pretrained ones from the hub, else
            a file: timm's or torchvision's state dict, or a checkpoint of this project.

    Raises:
        BackboneError: unknown name, unfit input size, or weights that cannot be had.
    """

    def __init__(self, backbone, classes, image_size, weights=""):
        super().__init__()
        self.frozen = False
        self.backbone, self.width = _build(backbone, image_size, weights)
        self.head = nn.Linear(self.width, classes)

    def features(self, images):
        """Pooled features [N, D] of images [N, 1, S, S]."""
        return self.backbone(images)

    def forward(self, images):
        """Logits [N, C] of images [N, 1, S, S]."""
        return self.head(self.features(images))

    def freeze(self):
        """Stop the backbone from learning: no gradient, and its batch norm stays in eval mode."""
        self.frozen = True
        self.backbone.requires_grad_(False).eval()
        return self

    @torch.no_grad()
    def check_sizes(self, sizes):
        """Raise BackboneError unless the backbone takes square inputs of all these sides, px."""
        training, weight = self.training, self.head.weight
        self.eval()
        for size in sizes:
            try:
                self(torch.zeros(1, 1, size, size, device=weight.device, dtype=weight.dtype))
            except (AssertionError, RuntimeError, ValueError) as error:
                raise BackboneError(
                    f"this backbone does not take inputs of {size} px ({error}); "
                    "give other scales, or 1 alone"
                ) from error
        self.train(training)

    def train(self, mode=True):
        """Training mode; a frozen backbone stays in eval mode, or its buffers would drift."""
        if not self.frozen:
            return super().train(mode)
        self.training = mode
        self.head.train(mode)
        return self


def _build(name, image_size, weights):
    """timm model without head, and the width of its pooled features."""
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.4)
        raise BackboneError(
            f"timm {timm.__version__} knows no backbone {name!r}; near: {', '.join(near) or 'none'}"
        )
    source = _source(name, image_size, weights)
    reason = None
    # Transformers are built for one size; those that can, are told to accept others (TTA scales).
    for extra in ({}, {"img_size": image_size, "dynamic_img_size": True}, {"img_size": image_size}):
        try:
            model = timm.create_model(name, in_chans=1, num_classes=0, **source, **extra)
            device = next(model.parameters()).device
            with torch.no_grad():
                width = model.eval()(torch.zeros(1, 1, image_size, image_size, device=device))
            return model.train(), width.shape[1]
        except Exception as error:
            # A model whose constructor lacks the option, or whose input size is another one.
            reason = reason if isinstance(error, TypeError) and reason else error
            if weights == "timm" and not isinstance(error, (TypeError, AssertionError)):
                raise BackboneError(
                    f"the pretrained weights of {name} could not be had from the hub "
                    f"({type(error).__name__}). On a machine with a network, run\n"
                    f"  python -c \"import timm, torch; torch.save(timm.create_model('{name}', "
                    f"pretrained=True).state_dict(), '{architecture}.pt')\"\n"
                    f"copy the file here and set WEIGHTS={architecture}.pt"
                ) from error
    if weights and "loading state_dict" in str(reason):
        wrong = str(reason).splitlines()[-1].strip()
        raise BackboneError(f"{weights} does not hold the weights of {name}: {wrong}")
    raise BackboneError(
        f"backbone {name} does not take {image_size} px chips: {reason}; set another IMAGE_SIZE, "
        "such as a multiple of 16 or 32, or another BACKBONE"
    )


def _source(name, image_size, weights):
    """Arguments of timm.create_model that say where the weights come from."""
    if weights in ("", "timm"):
        return {"pretrained": weights == "timm"}
    try:
        state = dict(load_state_dict(weights))
        state = {str(key): value for key, value in state.items() if torch.is_tensor(value)}
    except FileNotFoundError as error:
        raise BackboneError(f"there is no weights file {weights}") from error
    except Exception as error:  # a damaged file fails in many ways
        raise BackboneError(
            f"{weights} is not a file of weights: it is damaged, holds code, which is never run, or "
            f"something else ({type(error).__name__}); save a model's state_dict() with torch.save"
        ) from error
    ours = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    state = ours or state
    wanted = timm.create_model(name, in_chans=1, num_classes=0).state_dict()
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    if missing:
        raise BackboneError(
            f"{weights} does not hold the weights of {name}: {len(missing)} of {len(wanted)} "
            f"entries are missing, the first is {missing[0]}"
        )
    for key, value in wanted.items():
        # Grey chips have one channel: a convolution over several becomes the sum over them.
        if value.ndim == 4 and value.shape[1] == 1 and state[key].ndim == 4:
            state[key] = state[key].sum(dim=1, keepdim=True)
    overlay = {"state_dict": state, "input_size": (1, image_size, image_size)}
    return {"pretrained": True, "pretrained_cfg_overlay": overlay}
