"""Every stage on a CUDA device, without one: fake tensors carry device and dtype, and raise on mix-ups.

The scripts themselves run up to their training loop; in its place the test calls their loss,
sets the gradients by hand and takes an optimizer step.
"""

import runpy
import sys
from unittest.mock import ANY

from data.augment import _positions
from data.store import ChipStore
from models.backbone import Classifier
from tests.conftest import ROOT
from utils.predict.ood import confidence, log_densities
from utils.predict.tta import autocast, predict, tta_views

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def forward_and_step(model, loss_of, validate, *, clip=0.0, also_trained=(), **options):
    modules = torch.nn.ModuleList([model, *also_trained]).train()
    trained = [p for p in modules.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    for step in range(2):
        with autocast(trained[0].device):
            loss, logits, labels = loss_of(step)
        assert {t.device.type for t in (loss, logits, labels)} == {"cuda"}
        assert loss.shape == () and len(logits) == len(labels)
        for p in trained:
            assert p.device.type == "cuda"
            p.grad = torch.ones_like(p)
        if clip:
            torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
    forward_and_step.ran = True


@pytest.fixture(autouse=True, scope="module")
def fake_cuda():
    """Older torch (2.9 does) asks for a CUDA driver even for fake tensors."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            torch.zeros(1).to("cuda")
    except RuntimeError as error:
        pytest.skip(f"fake tensors of torch {torch.__version__} need a CUDA driver: {error}"[:120])


@pytest.fixture(autouse=True)
def forget_fake_positions():
    """A fake tensor belongs to its mode; none may be kept for the next test."""
    yield
    _positions.cache_clear()


@pytest.fixture(autouse=True)
def move_by_replacing(monkeypatch):
    """Module.to swaps the tensors of its parameters, which fake ones refuse: replace them."""

    def to(module, device, memory_format=torch.preserve_format):
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is not None:
                    kind = memory_format if p.ndim == 4 else torch.preserve_format
                    moved = p.detach().to(device, memory_format=kind)
                    part._parameters[name] = torch.nn.Parameter(moved, p.requires_grad)
            for name, b in part._buffers.items():
                part._buffers[name] = None if b is None else b.to(device)
        return module

    monkeypatch.setattr(torch.nn.Module, "to", to)


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("script, settings", [
    ("pretrain.py", ["CLASS_WEIGHTS=1,2,3,4", "SPECKLE=0.1"]),
    ("sar_feature.py", ["FEATURE_WEIGHT=1", "BACKBONE=test_efficientnet", "INIT="]),
    ("sar_feature.py", []),
    ("finetune.py", []),
])  # fmt: skip
def test_stage(pipeline, tiny_demo, monkeypatch, script, settings):
    cwd, _ = pipeline
    forward_and_step.ran = False
    monkeypatch.setattr("utils.train.loop.fit", forward_and_step)
    # These need numbers, which fake tensors do not have.
    monkeypatch.setattr("utils.run.checkpoint._finite", lambda tensors: True)
    monkeypatch.setattr("utils.run.checkpoint.checksum", lambda value: ANY)
    monkeypatch.setattr("utils.predict.ood.fit_gaussians", lambda features, labels, counts: {})
    monkeypatch.setattr("utils.run.resume.made_from", lambda pairs, source=None: "")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (2**33, 2**34))
    monkeypatch.chdir(cwd)
    arguments = [script, f"DATA_ROOT={tiny_demo}", "DEVICE=cuda", "OUT_DIR=fake", *settings]
    monkeypatch.setattr(sys, "argv", arguments)
    with FakeTensorMode(allow_non_fake_inputs=True):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert forward_and_step.ran


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_prediction_and_confidence():
    with FakeTensorMode(allow_non_fake_inputs=True):
        device = torch.device("cuda")
        model = Classifier("test_resnet", 5, 56).eval().to(device, memory_format=torch.channels_last)
        store = ChipStore(np.zeros((9, 56, 56), np.uint8), device)
        logits, features = predict(model, store, 56, (0.4, 0.1), tta_views((0, 90), (0.9, 1.0)), 4)
        assert logits.shape == (9, 5) and logits.device.type == features.device.type == "cuda"
        width = model.width
        gaussians = {
            "mean": torch.zeros(5, width), "precision": torch.eye(width),
            "log_prior": torch.zeros(5), "log_det": torch.zeros(()),
        }  # fmt: skip
        gaussians = {name: value.to(device, torch.float64) for name, value in gaussians.items()}
        found = confidence(log_densities(features, gaussians, 0.75))
        assert found.shape == (9,) and found.device.type == "cuda"
