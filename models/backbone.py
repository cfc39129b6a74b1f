"""The classifier: a timm backbone on one grey channel, and a linear head."""

import difflib

import timm
import torch
from timm.models import load_state_dict
from torch import nn


class BackboneError(ValueError):
    """The backbone cannot be built, or the weights do not fit it; the message says why and what to do."""


class Head(nn.Linear):
    """Linear layer that computes in float32, also under autocast: bf16 would round the logits, and so the energy."""

    def forward(self, features):
        """Logits float32 [N, C] of features [N, D]."""
        if not torch.is_autocast_enabled(features.device.type):
            return super().forward(features.to(self.weight.dtype))
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.to(self.weight.dtype))


class Classifier(nn.Module):
    """Chip classifier: a timm backbone that gives pooled features, and a linear head that gives logits.

    Args:
        backbone: name of a timm model.
        classes: number of classes, C.
        image_size: side of the square input, px; only used to build and to check the backbone.
        weights: "" for random weights, "timm" for timm's pretrained weights from the hub, else the path of
            a file: a state dict of timm or torchvision, or a checkpoint of this project. Weights for
            several input channels are summed over the channels.

    Attributes:
        backbone: module, [N, 1, S, S] -> [N, D].
        head: linear layer, [N, D] -> [N, C].
        width: D, number of features.
        frozen: whether the backbone is frozen.

    Raises:
        BackboneError: the name is unknown, the backbone does not take this input size, or the weights cannot
            be loaded.
    """

    def __init__(self, backbone, classes, image_size, weights=""):
        super().__init__()
        self.frozen = False
        self.backbone, self.width = _build(backbone, image_size, weights)
        self.head = Head(self.width, classes)

    def features(self, images):
        """Pooled features [N, D] of images [N, 1, S, S]."""
        return self.backbone(images.to(memory_format=torch.channels_last))

    def forward(self, images):
        """Logits [N, C] of images [N, 1, S, S]."""
        return self.head(self.features(images))

    def no_weight_decay(self):
        """Names of parameters that the optimizer does not decay, such as position embeddings."""
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, "no_weight_decay") else ()
        return {f"backbone.{name}" for name in names}

    def freeze(self):
        """Freeze the backbone: it gets no gradient, and its batch norm stays in eval mode. Returns self."""
        self.frozen = True
        self.backbone.requires_grad_(False).eval()
        return self

    @torch.no_grad()
    def check_sizes(self, sizes):
        """Raise BackboneError unless the backbone takes square inputs of all these sides, px. Returns self."""
        training, weight = self.training, self.head.weight
        self.eval()
        for size in sizes:
            try:
                self(torch.zeros(1, 1, size, size, device=weight.device, dtype=weight.dtype))
            except (AssertionError, RuntimeError, ValueError) as error:
                raise BackboneError(
                    f"this backbone does not take inputs of {size} px ({error}); "
                    "set other scales, or only the scale 1"
                ) from error
        return self.train(training)

    def train(self, mode=True):
        """Set training mode. A frozen backbone stays in eval mode, because batch norm changes its buffers."""
        if not self.frozen:
            return super().train(mode)
        self.training = mode
        self.head.train(mode)
        return self


def _build(name, image_size, weights):
    """Build the timm model without its head; returns it and the number of its pooled features."""
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.4)
        raise BackboneError(
            f"timm {timm.__version__} knows no backbone {name!r}; near: {', '.join(near) or 'none'}"
        )
    source = _source(name, image_size, weights)
    reason = None
    # A transformer is built for one input size. dynamic_img_size lets it take others, which the views of
    # several scales need; not every transformer has this option.
    for extra in ({}, {"img_size": image_size, "dynamic_img_size": True}, {"img_size": image_size}):
        try:
            model = timm.create_model(name, in_chans=1, num_classes=0, **source, **extra)
            device = next(model.parameters()).device
            with torch.no_grad():
                width = model.eval()(torch.zeros(1, 1, image_size, image_size, device=device))
            return model.train(), width.shape[1]
        except Exception as error:
            # The constructor lacks the option (TypeError), or the model has another input size.
            reason = reason if isinstance(error, TypeError) and reason else error
            if weights == "timm" and not isinstance(error, (TypeError, AssertionError)):
                raise BackboneError(
                    f"the pretrained weights of {name} could not be loaded from the hub "
                    f"({type(error).__name__}). On a machine with a network, run\n"
                    f"  python -c \"import timm, torch; torch.save(timm.create_model('{name}', "
                    f"pretrained=True).state_dict(), '{architecture}.pt')\"\n"
                    f"copy the file here and set WEIGHTS={architecture}.pt"
                ) from error
    if weights and "loading state_dict" in str(reason):
        details = str(reason).splitlines()[-1].strip()
        raise BackboneError(f"{weights} does not hold the weights of {name}: {details}")
    raise BackboneError(
        f"backbone {name} does not take {image_size} px chips: {reason}; set another IMAGE_SIZE, "
        "such as a multiple of 16 or 32, or another BACKBONE"
    )


def _source(name, image_size, weights):
    """Arguments of timm.create_model for the weights: none, timm's from the hub, or those of a file."""
    if weights in ("", "timm"):
        return {"pretrained": weights == "timm"}
    try:
        state = dict(load_state_dict(weights))
        state = {str(key): value for key, value in state.items() if torch.is_tensor(value)}
    except FileNotFoundError as error:
        raise BackboneError(f"there is no weights file {weights}; correct WEIGHTS") from error
    except Exception as error:  # a damaged file raises one of many exceptions
        raise BackboneError(
            f"{weights} is not a file of weights ({type(error).__name__}): it is damaged, or it holds code, "
            "which is never run, or other data; save a model's state_dict() with torch.save"
        ) from error
    # In a checkpoint of this project the names start with "backbone."; its head is left out.
    ours = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    state = ours or state
    expected = timm.create_model(name, in_chans=1, num_classes=0).state_dict()
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    if missing:
        raise BackboneError(
            f"{weights} does not hold the weights of {name}: {len(missing)} of {len(expected)} "
            f"entries are missing, the first is {missing[0]}"
        )
    for key, value in expected.items():
        # Chips have one channel. A first convolution over several channels is summed over them, which
        # gives the same output as equal channels.
        if value.ndim == 4 and value.shape[1] == 1 and state[key].ndim == 4:
            state[key] = state[key].sum(dim=1, keepdim=True)
    overlay = {"state_dict": state, "input_size": (1, image_size, image_size)}
    return {"pretrained": True, "pretrained_cfg_overlay": overlay}
