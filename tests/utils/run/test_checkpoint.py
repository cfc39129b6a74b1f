import pickle

from models.backbone import Classifier
from utils.run.checkpoint import FORMAT, build_model, load_checkpoint, save_checkpoint
from utils.run.settings import CheckpointError

import pytest
import torch


@pytest.fixture
def checkpoint():
    return {
        "format": FORMAT, "stage": "pretrain", "sensor": "EO", "settings": {"EPOCHS": 1, "SCALES": (1.0,)},
        "backbone": "test_resnet", "image_size": 32, "classes": ("a", "b"), "class_ids": (0, 1),
        "counts": (5, 3), "scales": (1.0,), "grey": (0.4, 0.1), "data_root": "x", "val_fraction": 0.1,
        "model": Classifier("test_resnet", 2, 32).state_dict(),
    }  # fmt: skip


def test_written_read_and_rebuilt(tmp_path, checkpoint):
    path = tmp_path / "best.pt"
    save_checkpoint(path, checkpoint)
    assert [p.name for p in tmp_path.iterdir()] == ["best.pt"]
    plain = torch.load(path, weights_only=True)
    assert plain["classes"] == ("a", "b")
    model = build_model(load_checkpoint(path, "pretrain.py", "EO"))
    assert not model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, checkpoint["model"][key])


def test_a_failed_write_leaves_the_old_one(tmp_path, checkpoint):
    path = tmp_path / "best.pt"
    save_checkpoint(path, checkpoint)
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(path, checkpoint | {"settings": lambda: 0})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["best.pt"]


class Evil:
    def __reduce__(self):
        return (open, ("evil", "w"))


def test_refused(tmp_path, checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "best.pt"
    with pytest.raises(CheckpointError, match="run first: python pretrain.py"):
        load_checkpoint(path, "pretrain.py")
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        load_checkpoint(path, "pretrain.py")
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        load_checkpoint(path, "pretrain.py")
    assert not (tmp_path / "evil").exists()
    for change, message in (
        ({"format": FORMAT + 1}, "newer version"),
        ({"sensor": "SAR"}, "SAR checkpoint of pretrain.py"),
        ({"stage": "finetune"}, "checkpoint of finetune.py"),
    ):
        save_checkpoint(path, checkpoint | change)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path, "pretrain.py", "EO", ("pretrain",))
    save_checkpoint(path, {"model": checkpoint["model"]})
    with pytest.raises(CheckpointError, match="not a checkpoint of this project"):
        load_checkpoint(path, "pretrain.py")
