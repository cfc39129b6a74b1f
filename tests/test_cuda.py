"""Every stage on a CUDA device, without one: fake tensors carry device and dtype, and raise on mix-ups.

The scripts run up to their training loop; in its place the test takes the learner's own steps. Fake tensors have no
backward pass, so that the gradients are set by hand, and no streams, which are replaced by ones that count.
The last test runs the four scripts on a GPU, if there is one.
"""

import contextlib
import csv
import math
import runpy
import sys
from concurrent.futures import Future

from data.augment import _positions
from data.store import ChipStore
from models.backbone import Classifier
from tests.conftest import GPU, ROOT, must, run_script
from utils.predict.ood import SCORES, fit_scores
from utils.predict.tta import predict, tta_views

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


class Stream:
    """In place of torch.cuda.Stream; an event is the stream that recorded it."""

    waits = 0

    def __init__(self, device=None):
        pass

    def record_event(self):
        return self

    def wait_event(self, event):
        Stream.waits += 1

    def query(self):
        return True


class InThisThread:
    """In place of ThreadPoolExecutor, since fake tensors exist in one thread only."""

    def __init__(self, workers):
        pass

    def submit(self, work, *arguments):
        future = Future()
        future.set_result(work(*arguments))
        return future

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


class Loop:
    """In place of `fit`: takes two steps."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.steps = monkeypatch, 0

    def __call__(self, learner, batches, validate, run, contents):
        def set_gradients(loss):
            assert loss.device.type == "cuda" and loss.shape == ()
            for parameter in learner.parameters:
                assert parameter.device.type == "cuda"
                parameter.grad = torch.ones_like(parameter)

        self.monkeypatch.setattr(torch.Tensor, "backward", set_gradients)
        learner.modules.train()
        for batch in batches.between(0, 2):
            assert {t.device.type for t in (batch.views, batch.labels)} == {"cuda"}
            learner.step(batch)
            learner.meter.copy = None
            self.steps += 1
        assert learner.meter.sums.device.type == "cuda" and learner.meter.steps == 2
        state = learner.state_dict()["optimizer"]["state"]
        moments = [t for entry in state.values() for t in entry.values() if t.ndim]  # others count steps, on the host
        assert {t.device.type for t in moments} == {"cuda"}


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


@pytest.fixture
def streams(monkeypatch):
    """Streams, pinned memory and a small free memory, as a GPU has them."""
    Stream.waits = 0
    monkeypatch.setattr("data.batches.ThreadPoolExecutor", InThisThread)
    monkeypatch.setattr("torch.cuda.Stream", Stream)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device=None: Stream())
    monkeypatch.setattr("torch.cuda.stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (2**33, 2**34))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, device=None: self)
    monkeypatch.setattr("data.store._pinned", lambda shape, dtype: torch.empty(shape, dtype=dtype))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("script, settings", [
    ("pretrain.py", ["CLASS_WEIGHTS=1,2,3,4", "SPECKLE=0.1"]),
    ("pretrain.py", ["CHIP_MEMORY_GB=1e-6"]),
    ("pretrain.py", ["OPTIMIZER=nadam"]),
    ("sar_feature.py", ["FEATURE_WEIGHT=1", "FEATURE_LOSS=relations", "BACKBONE=test_efficientnet", "INIT="]),
    ("sar_feature.py", ["FEATURE_WEIGHT=1", "FEATURE_LOSS=wasserstein"]),
    ("sar_feature.py", []),
    ("finetune.py", ["CHOOSE_SCALES=False"]),  # the choice needs numbers
])  # fmt: skip
def test_stage(pipeline, tiny_demo, monkeypatch, streams, script, settings):
    cwd, _ = pipeline
    loop = Loop(monkeypatch)
    monkeypatch.setattr("utils.train.loop.fit", loop)
    # These need numbers, which fake tensors do not have.
    monkeypatch.setattr("utils.run.checkpoint._are_finite", lambda tensors: True)
    monkeypatch.setattr("utils.predict.ood.fit_scores", lambda *rest: {})
    monkeypatch.setattr("utils.run.identity.made_from", lambda *rest, **options: {})
    monkeypatch.chdir(cwd)
    arguments = [script, f"DATA_ROOT={tiny_demo}", "DEVICE=cuda", "OUT_DIR=fake", *settings]
    monkeypatch.setattr(sys, "argv", arguments)
    with FakeTensorMode(allow_non_fake_inputs=True):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert loop.steps == 2
    assert Stream.waits == (2 if "CHIP_MEMORY_GB=1e-6" in settings else 0)


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_prediction_and_confidence():
    random = np.random.default_rng(0)
    width = Classifier("test_resnet", 5, 56).width
    fits = fit_scores(random.normal(size=(50, width)), np.arange(50) % 5, np.full(5, 10))
    with FakeTensorMode(allow_non_fake_inputs=True):
        device = torch.device("cuda")
        model = Classifier("test_resnet", 5, 56).eval().to(device, memory_format=torch.channels_last)
        store = ChipStore(np.zeros((9, 56, 56), np.uint8), device)
        logits, features = predict(model, store, 56, (0.4, 0.1), tta_views((0, 90), (0.9, 1.0)), 4)
        assert logits.shape == (9, 5) and logits.device.type == features.device.type == "cuda"
        for name, score in SCORES.items():
            fit = {key: value.to(device) for key, value in fits.get(name, {}).items()}
            confidence = score.score(logits, features, fit)
            assert confidence.shape == (9,) and confidence.device.type == "cuda", name


@pytest.mark.skipif(not GPU, reason="no GPU")
def test_the_four_scripts_on_a_gpu(tiny_demo, tmp_path):
    for script, *settings in (
        ("pretrain.py", f"DATA_ROOT={tiny_demo}", "EPOCHS=2"), ("sar_feature.py", "EPOCHS=2"),
        ("finetune.py", "EPOCHS=2"), ("results.py",),
    ):  # fmt: skip
        must(run_script(script, tmp_path, "DEVICE=cuda", *settings, environment={"CUDA_VISIBLE_DEVICES": GPU}))
    with open(tmp_path / "runs/results/results.csv", newline="") as file:
        scores = [float(row["score"]) for row in csv.DictReader(file)]
    assert len(scores) == len(list((tiny_demo / "test").glob("*.png"))) and all(map(math.isfinite, scores))
