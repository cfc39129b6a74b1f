"""The classifier: a timm backbone on one grey channel, and a linear head."""

import contextlib
import difflib

import timm
import torch
import torch.nn.functional as F
from timm.models import load_state_dict
from torch import nn

CHIPS = {"in_chans": 1, "num_classes": 0}  # of timm.create_model: one grey channel, no head
PATCH_STEPS = (8, 14, 16, 32)  # px; a backbone that cannot be built for IMAGE_SIZE is tried with multiples of these
REACH = 32  # px; how far from the side of an image the backbone's input size is searched


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

    Images of a size that the backbone does not take are resized to the nearest that it takes. A size at which a
    convolution with kernel = stride (such as ConvNeXt's 2x2 downsampling) would leave out the last row of a map is
    taken only if there is no other. A ConvNeXt gets multiples of 32 px, and so one size for all scales of small chips.
    Pooling may leave out the last row of an odd map.

    Args:
        backbone: name of a timm model.
        classes: number of classes, C.
        image_size: side of the square input, px. A backbone that is built for one size is built for this one, or for
            the nearest that it can be built for; later images may have other sizes.
        weights: "" for random weights, "timm" for timm's pretrained weights from the hub, else the path of
            a file: a state dict of timm or torchvision, or a checkpoint of this project. Weights for
            several input channels are summed over the channels.

    Attributes:
        backbone: module, [N, 1, S, S] -> [N, D], for the sizes S that `input_size` returns.
        head: linear layer, [N, D] -> [N, C].
        width: D, number of features.
        frozen: whether the backbone is frozen.

    Raises:
        BackboneError: the name is unknown, the backbone takes no input of about this size, or the weights cannot
            be loaded.
    """

    def __init__(self, backbone, classes, image_size, weights=""):
        super().__init__()
        self.frozen = False
        self._name, self._input_sizes, self._reach = backbone, {}, REACH
        self.backbone, self._built_size = _build(backbone, image_size, weights)
        size = self.input_size(image_size)
        if abs(size - image_size) > REACH:  # a backbone of one size: search no other, which takes long
            self._reach = 0
        self.width = _probe(self.backbone.eval(), size).shape[1]
        self.backbone.train()
        # The backward pass of a 1x1 convolution with stride on one channel in channels_last corrupts memory on the CPU
        # (torch 2.4 to 2.14). RepVGG, MobileOne and FastViT begin with such a convolution.
        convolutions = [m for m in self.backbone.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 1]
        is_unsafe = any(m.kernel_size == (1, 1) and m.stride != (1, 1) for m in convolutions)
        self._memory_format = torch.contiguous_format if is_unsafe else torch.channels_last
        self.head = Head(self.width, classes)

    def input_size(self, side):
        """Side of the backbone's input for images of this side, px: the nearest that it takes, the larger of two.

        The first call for a side tries sizes on the backbone, which waits for the device; `check_sizes` does so before
        training. The result depends on the backbone's name, image_size and side alone, so that a model
        that is built again from a checkpoint takes the same sizes.

        Raises:
            BackboneError: the backbone takes no size near this one.
        """
        if side not in self._input_sizes:
            training = [module for module in self.backbone.modules() if module.training]
            self.backbone.eval()
            try:
                size = _nearest_size(self.backbone, self._name, side, self._built_size, self._reach)
            finally:
                for module in training:
                    module.training = True
            self._input_sizes[side] = size
        return self._input_sizes[side]

    def features(self, images):
        """Pooled features [N, D] of images [N, 1, S, S] of any side S."""
        side = images.shape[-1]
        size = self.input_size(side)
        if size != side:
            images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=size < side)
        return self.backbone(images.to(memory_format=self._memory_format))

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

    def check_sizes(self, sizes):
        """Find the backbone's input size for images of all these sides, px, before the work. Returns self.

        Raises:
            BackboneError: the backbone takes no size near one of them.
        """
        for side in sizes:
            self.input_size(side)
        return self

    def train(self, mode=True):
        """Set training mode. A frozen backbone stays in eval mode, because batch norm changes its buffers."""
        if not self.frozen:
            return super().train(mode)
        self.training = mode
        self.head.train(mode)
        return self


def _build(name, image_size, weights):
    """Build the timm model without its head; returns it, and the size that it was built for, px."""
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.4)
        raise BackboneError(
            f"timm {timm.__version__} knows no backbone {name!r}; near: {', '.join(near) or 'none'}. The file of a "
            "backbone of your own is imported in models/backbone.py"
        )
    model, options, size = _build_for_size(name, image_size)
    if not weights:
        return model, size
    is_own = not timm.model_entrypoint(architecture).__module__.startswith("timm.")
    if weights == "timm" and not hasattr(model, "default_cfg"):
        raise BackboneError(f"timm has no weights of your own backbone {name}; set WEIGHTS to a file, or to nothing")
    try:
        if weights == "timm":
            return timm.create_model(name, **CHIPS, pretrained=True, **options), size
        state = _state(name, model, weights)
        if is_own:  # only timm's own functions are sure to load what they are given
            model.load_state_dict(state, strict=False)
            return model, size
        overlay = {"state_dict": state}
        return timm.create_model(name, **CHIPS, pretrained=True, pretrained_cfg_overlay=overlay, **options), size
    except (BackboneError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a failed download raises one of many exceptions
        if "loading state_dict" in str(error) and not is_own:
            default = model.default_cfg["input_size"][-1]
            details = str(error).splitlines()[-1].strip()
            raise BackboneError(
                f"WEIGHTS={weights} does not hold the weights of {name} for inputs of {size} px: {details}; set "
                f"IMAGE_SIZE={default}, for which timm's weights are, or another file"
            ) from error
        if weights != "timm":
            raise BackboneError(f"WEIGHTS={weights} does not hold the weights of {name}: {error}") from error
        raise BackboneError(
            f"the pretrained weights of {name} could not be loaded from the hub "
            f"({type(error).__name__}). On a machine with a network, run\n"
            f"  python -c \"import timm, torch; torch.save(timm.create_model('{name}', "
            f"pretrained=True).state_dict(), '{architecture}.pt')\"\n"
            f"copy the file here and set WEIGHTS={architecture}.pt"
        ) from error


def _build_for_size(name, image_size):
    """Build the timm model so that it takes inputs of image_size px, or else of a size near it.

    Returns:
        the model, in eval mode with random weights; the options of timm.create_model that made it; the size that it
        was built for, px. They depend on the arguments alone, so that a checkpoint's model can be built again.
    """
    near = {max(1, (2 * image_size + step) // (2 * step)) * step for step in PATCH_STEPS} - {image_size}
    # A transformer is built for one input size. dynamic_img_size lets it take others, which the views of
    # several scales need; not every transformer has this option.
    choices = [({}, image_size)]
    for size in (image_size, *sorted(near, key=lambda size: (abs(size - image_size), -size))):
        choices += [({"img_size": size, "dynamic_img_size": True}, size), ({"img_size": size}, size)]
    as_timm_builds_it = None
    for options, size in choices:
        try:
            model = timm.create_model(name, **CHIPS, **options).eval()
            as_timm_builds_it = as_timm_builds_it or model
            _probe(model, size)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # the constructor lacks the option, or the model does not take the size: many exceptions
            continue
        return model, options, size
    if as_timm_builds_it is None:
        try:
            timm.create_model(name, **CHIPS)  # raises what is wrong with the model itself
        except TypeError as error:
            raise BackboneError(
                f"BACKBONE={name} cannot be built: {error}. The function of a backbone of your own takes pretrained, "
                "in_chans, num_classes and **options"
            ) from error
    own_size = getattr(as_timm_builds_it, "default_cfg", {}).get("input_size", [image_size])[-1]
    return as_timm_builds_it, {}, own_size


def _nearest_size(model, name, side, built_size, reach):
    """The size nearest to `side`, within `reach`, that a backbone in eval mode takes, px; else `built_size`."""
    near = sorted(range(max(1, side - reach), side + reach + 1), key=lambda size: (abs(size - side), -size))
    tiling = [layer for layer in model.modules() if _is_tiling(layer)]
    choices = [(size, tiling) for size in near if tiling] + [(size, []) for size in (*near, built_size)]
    reason = None
    for size, without_remainder in choices:
        try:
            with _refuse_remainders(without_remainder):
                _probe(model, size)
            return size
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # models refuse a size with one of many exceptions
            reason = reason or error
    raise BackboneError(
        f"BACKBONE={name} takes no inputs of about {side} px, nor of {built_size} px ({reason}); set another "
        "IMAGE_SIZE, other scales, or another BACKBONE"
    ) from reason


def _is_tiling(layer):
    """Whether a layer cuts its input into tiles: what is left beyond the last complete tile is not used."""
    is_plain = type(layer) is nn.Conv2d  # timm's subclasses pad their input
    return is_plain and layer.padding == (0, 0) and layer.kernel_size == layer.stride != (1, 1)


@contextlib.contextmanager
def _refuse_remainders(layers):
    """Within this, a pass through one of these layers raises ValueError if their tiles leave rows or columns over."""

    def check(layer, inputs):
        if any(side % tile for side, tile in zip(inputs[0].shape[-2:], layer.kernel_size, strict=True)):
            raise ValueError(f"a layer would not use the last rows or columns of a map {list(inputs[0].shape[-2:])}")

    hooks = [layer.register_forward_pre_hook(check) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _probe(model, size):
    """Features [1, D] that a backbone in eval mode gives for one image of size x size pixels.

    All pixels are zero, but the last is NaN. It makes the features NaN if the backbone uses it, whatever the weights
    are. Patch embeddings do not use the last rows and columns of a size that is no multiple of their patch.

    Raises:
        ValueError: the backbone does not use all pixels, or gives no pooled features.
        Exception: the model does not take the size.
    """
    weight = next(model.parameters())
    image = torch.zeros(1, 1, size, size, device=weight.device, dtype=weight.dtype)
    image[..., -1, -1] = torch.nan
    features = model.forward(image)  # not model(image), which would compile the backbone for each size under COMPILE
    if features.ndim != 2:
        raise ValueError(f"it gives no pooled features [N, D] but {list(features.shape)}")
    # Fake tensors, of another type, have no values.
    if type(features) is torch.Tensor and not features.isnan().any():
        raise ValueError("it would not use the last rows and columns")
    return features


def _state(name, model, weights):
    """The state dict in the file `weights` as the backbone `model` takes it."""
    expected = model.state_dict()
    try:
        state = dict(load_state_dict(weights, weights_only=True))  # timm's default was False once
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
    return state
