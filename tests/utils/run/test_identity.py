"""What a run is made from goes by content: a changed pixel, label, weight or line of code is another run."""

from data.layouts import Pairs
from utils.run.identity import checkpoint_digest, digest, made_from, source_digest

import numpy as np
import pytest
import torch

CHECKPOINT = {
    "backbone": "test_resnet", "image_size": 32, "classes": ("a", "b"), "grey": (0.4, 0.1), "val_fraction": 0.1,
    "scales": (1.0,), "data_root": "here", "settings": {"OUT_DIR": "here"}, "model": {"w": torch.ones(2, 3)},
}  # fmt: skip


def test_a_checkpoint_is_its_weights_and_how_chips_become_inputs():
    same = checkpoint_digest(CHECKPOINT)
    assert checkpoint_digest(CHECKPOINT | {"data_root": "there", "settings": {}}) == same
    for change in ({"grey": (0.4, 0.2)}, {"classes": ("b", "a")}, {"model": {"w": torch.zeros(2, 3)}},
                   {"model": {"w": torch.ones(3, 2)}}, {"model": {"v": torch.ones(2, 3)}},
                   {"model": {"w": torch.ones(2, 3, dtype=torch.float64)}}):  # fmt: skip
        assert checkpoint_digest(CHECKPOINT | change) != same


def test_digests_tell_their_parts_apart():
    assert digest("a", b"b") == digest("a", b"b") != digest("b", b"a")
    assert digest("ab", "c") != digest("a", "bc")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A script that imports one module of the project's, which imports another."""
    monkeypatch.setattr("utils.run.identity.ROOT", tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/loss.py").write_text("from models.parts import gain\n\n\ndef loss(x):\n    return x * gain\n")
    (tmp_path / "models/parts.py").write_text("gain = 2\n")
    (tmp_path / "models/unused.py").write_text("a = 1\n")
    (tmp_path / "script.py").write_text("from models.loss import loss\n\nEPOCHS = 3  # passes\nprint(loss(1))\n")
    return tmp_path


@pytest.mark.parametrize("path, before, after, other", [
    ("models/loss.py", "x * gain", "x * 0", True),
    ("models/parts.py", "gain = 2", "gain = 3", True),
    ("script.py", "loss(1)", "loss(2)", True),
    ("script.py", "EPOCHS = 3", "EPOCHS = 4", False),  # compared as a setting
    ("script.py", "# passes", "# rounds", False),
    ("models/loss.py", "def loss(x):\n", "def loss(x):\n    \"\"\"Of x.\"\"\"\n", False),
    ("models/unused.py", "a = 1", "a = 2", False),
])  # fmt: skip
def test_code_is_what_a_stage_runs(project, path, before, after, other):
    digest_before = source_digest(project / "script.py")
    text = (project / path).read_text()
    assert before in text
    (project / path).write_text(text.replace(before, after))
    assert (source_digest(project / "script.py") != digest_before) == other


def test_the_class_of_a_chip_that_is_no_pair_counts(project):
    pairs = Pairs([], [], np.zeros(0, np.int64), ("a", "b"), (0, 1))
    entries = [
        made_from(project / "script.py", pairs, [], pairs.labels, further=np.array(labels)) for labels in ([0], [1], [])
    ]
    assert len({entry["data"] for entry in entries}) == 3
    assert made_from(project / "script.py", pairs, [], pairs.labels) == entries[2]


def test_initial_weights_are_told_apart_by_their_word_or_their_content(project):
    pairs = Pairs([], [], np.zeros(0, np.int64), ("a", "b"), (0, 1))
    for name, content in (("one.pt", b"1"), ("same.pt", b"1"), ("other.pt", b"2")):
        (project / name).write_bytes(content)
    weights = ["", "timm", "teacher", *(str(project / f"{name}.pt") for name in ("one", "other"))]
    entries = [made_from(project / "script.py", pairs, [], pairs.labels, weights=value) for value in weights]
    assert len({entry["weights"] for entry in entries}) == len(weights)
    assert made_from(project / "script.py", pairs, [], pairs.labels, weights=str(project / "same.pt")) == entries[3]
