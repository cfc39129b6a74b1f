import pickle

from models.backbone import Classifier
from utils.run.checkpoint import FORMAT, build_model, load_checkpoint, save_checkpoint
from utils.run.settings import CheckpointError

import pytest
import torch

LABELLED = {"features": torch.ones(4, 3), "labels": torch.zeros(4)}


@pytest.fixture
def checkpoint():
    return {
        "stage": "pretrain", "sensor": "EO", "settings": {"EPOCHS": 1, "SCALES": (1.0,)}, "image_size": 32,
        "backbone": "test_resnet", "chip_side": 30, "classes": ("a", "b"), "class_ids": (0, 1), "counts": (5, 3),
        "scales": (1.0,), "views": ((0, 1.0),), "grey_range": (0.0, 255.0), "grey": (0.4, 0.1), "data_root": "x",
        "entities": "", "labelled_share": 1.0, "val_fraction": 0.1,
        "ood": {}, "validation": {}, "model": Classifier("test_resnet", 2, 32).state_dict(),
    }  # fmt: skip


def test_written_read_and_rebuilt(tmp_path, checkpoint):
    path = tmp_path / "best.pt"
    save_checkpoint(path, checkpoint)
    assert [p.name for p in tmp_path.iterdir()] == ["best.pt"]
    plain = torch.load(path, weights_only=True)
    assert plain["classes"] == ("a", "b")
    read = load_checkpoint(path, "pretrain.py", "EO")
    assert read["eo_reading"] == ()  # as in a checkpoint from before there was one
    model = build_model(read)
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


def test_the_one_before_is_kept(tmp_path, checkpoint):
    for epoch in (1, 2, 3):
        save_checkpoint(tmp_path / "last.pt", checkpoint | {"epoch": epoch}, keep_previous=True)
    epochs = {p.name: torch.load(p, weights_only=True)["epoch"] for p in tmp_path.iterdir()}
    assert epochs == {"last.pt": 3, "last.previous.pt": 2}


def test_any_damaged_byte_of_the_weights_is_noticed(tmp_path, checkpoint):
    path = tmp_path / "best.pt"
    save_checkpoint(path, checkpoint)
    content = path.read_bytes()
    for tenth in range(1, 10):
        damaged = bytearray(content)
        damaged[len(content) * tenth // 10] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"best\.pt is (damaged|no readable)"):
            load_checkpoint(path, "pretrain.py")


class Evil:
    def __reduce__(self):
        return (open, ("evil", "w"))


def test_refused(tmp_path, checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "best.pt"
    with pytest.raises(CheckpointError, match="run first: python pretrain.py"):
        load_checkpoint(path, "pretrain.py")
    for content in (b"", pickle.dumps(Evil())):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="no readable checkpoint"):
            load_checkpoint(path, "pretrain.py")
    torch.save(Evil(), path)
    with pytest.raises(CheckpointError, match="code in it, which is not run"):
        load_checkpoint(path, "pretrain.py")
    assert not (tmp_path / "evil").exists()
    for change, message in (
        ({"sensor": "SAR"}, "SAR checkpoint of pretrain.py"),
        ({"stage": "finetune"}, "checkpoint of finetune.py"),
        ({"views": ((9, 1.0),)}, "views missing or wrong"),
        ({"ood": {"energy": 3}}, "ood missing or wrong"),
        ({"validation": {"features": torch.ones(2, 3)}}, "validation missing or wrong"),
        ({"validation": LABELLED | {"counts": torch.ones(3)}}, "validation missing or wrong"),
        ({"validation": LABELLED | {"counts": torch.tensor([1.0, torch.nan])}}, "validation missing or wrong"),
        *(({"grey_range": x}, "grey_range missing or") for x in ((), (1, 0), (0, 0), (0, float("inf")), (0, 1, 2))),
    ):
        save_checkpoint(path, checkpoint | change)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path, "pretrain.py", "EO", ("pretrain",))
    for version, message in ((FORMAT + 1, "a newer version; update"), (FORMAT - 1, "an older version; make it")):
        torch.save(checkpoint | {"format": version}, path)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path, "pretrain.py")
    save_checkpoint(path, {"model": checkpoint["model"]})
    with pytest.raises(CheckpointError, match="not a checkpoint of this project"):
        load_checkpoint(path, "pretrain.py")
