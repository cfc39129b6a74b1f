"""The device that a script runs on."""

import os

from data.errors import reason
from utils.run.ranks import world_size
from utils.run.settings import SettingError

import torch


def choose_device(name):
    """The device of DEVICE: "auto" is CUDA if there is one, else the CPU; under torchrun each rank's own GPU.

    On CUDA this also turns on TF32 and cuDNN's search for the fastest convolutions.

    Raises:
        SettingError: there is no such device.
    """
    try:
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("the scripts compute on cpu or cuda only")
        if device.type == "cuda":
            if world_size() > 1 and device.index is None:
                device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            if device.index is not None:
                torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingError(
            f"DEVICE {name} cannot be used: {reason(error).partition('. ')[0]}; set auto, cpu, cuda or cuda:1"
        ) from error
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    return device


def compile_backbone(model, device):
    """Pass the backbone through torch.compile.

    Raises:
        SettingError: it does not work on this machine, which a small function shows at once.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # a missing compiler fails in many ways
        raise SettingError(
            f"COMPILE=True cannot be used on this machine ({str(error).strip().splitlines()[0][:120]}); install a C++ "
            "compiler, or set COMPILE=False"
        ) from error
    model.backbone.compile()
