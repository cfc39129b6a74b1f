"""Several ranks do together what one process would do alone with as many chips a step."""

import csv
import shutil

from data.batches import Batches
from data.sampler import BalancedStream, WeightedStream
from models.backbone import Classifier
from tests.conftest import ROOT, load, must, run_ranks, run_script

import numpy as np
import pytest
import torch

# Two ranks with half a batch of batch norm each, and whether their weights are the same.
WORKER = """
import sys
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import nn
from utils.run.ranks import (
    distributed, gather_over_ranks, max_over_ranks, on_rank_0, rank, share_of_rank, synchronised,
)
with distributed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), BatchNormAct2d(4), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2))
    images, wanted = torch.randn(6, 1, 9, 9) + 3, torch.randn(6, 2, 5, 5)
    rows = [slice(0, 4), slice(4, 6)][rank()]
    both = synchronised(model)
    share = len(images[rows]) / 6
    (((both(images[rows]) - wanted[rows]) ** 2).mean() * share * 2).backward()
    of_ranks = [None, None]
    gradients_and_buffers = [p.grad for p in model.parameters()] + list(model.buffers())
    dist.all_gather_object(of_ranks, [x.tolist() for x in gradients_and_buffers])
    assert of_ranks[0] == of_ranks[1]
    assert max_over_ranks(rank(), 5 - rank()) == (1, 5) and on_rank_0(lambda: rank() + 7) == 7
    assert gather_over_ranks(torch.from_numpy(share_of_rank(5)), 5).tolist() == [0, 1, 2, 3, 4]
    if rank() == 0:
        torch.save(gradients_and_buffers, sys.argv[1])
"""


@pytest.mark.slow
def test_gradients_and_batch_statistics_are_those_of_the_whole_batch(tmp_path):
    from timm.layers import BatchNormAct2d
    from torch import nn

    (tmp_path / "worker.py").write_text(WORKER)
    must(run_ranks(2, tmp_path / "worker.py", tmp_path, tmp_path / "gradients.pt"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), BatchNormAct2d(4), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2))
    images, wanted = torch.randn(6, 1, 9, 9) + 3, torch.randn(6, 2, 5, 5)
    ((model(images) - wanted) ** 2).mean().backward()
    gradients_and_buffers = [p.grad for p in model.parameters()] + list(model.buffers())
    for found, expected in zip(load(tmp_path / "gradients.pt"), gradients_and_buffers, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("balance_entities", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", [WeightedStream, BalancedStream])
def test_ranks_draw_together_what_one_process_draws(kind, balance_entities, ranks):
    labels = np.repeat([0, 1, 2], [50, 20, 3])
    entities = np.repeat(np.arange(9), [20, 20, 4, 3, 3, 10, 9, 1, 3])
    options = (0.5, 7) if kind is WeightedStream else (7,)
    options += (entities, balance_entities)
    stream, cpu = kind(labels, 16, *options), torch.device("cpu")
    one_process = Batches(stream, labels, cpu, 1, paths=range(73))
    ranks_ = [Batches(stream, labels, cpu, 1, ranks=(i, ranks)) for i in range(ranks)]
    for step in range(40):
        drawn = zip(*(batches.draw(step) for batches in ranks_), strict=True)
        for one, several in zip(one_process.draw(step), drawn, strict=True):
            assert (np.concatenate(several) == one).all()
        assert one_process.names(step) == list(one_process.draw(step)[0])


SMALL_STEPS = ("OPTIMIZER=sgd", "LEARNING_RATE=0.001")


@pytest.mark.slow
def test_two_ranks_train_and_predict_as_one_process(tiny_demo, tmp_path):
    """With batch norm over both and class weights; small steps, or rounding grows."""
    settings = {
        "pretrain.py": [f"DATA_ROOT={tiny_demo}", "EPOCHS=1", "CLASS_WEIGHTS=1,2,5,20", *SMALL_STEPS],
        "sar_feature.py": ["EPOCHS=1", "FEATURE_WEIGHT=1", *SMALL_STEPS],
        "finetune.py": ["EPOCHS=2"],
    }
    torch.manual_seed(0)
    start = flat(Classifier("test_resnet", 4, 56).state_dict())
    for script, own in settings.items():
        must(run_script(script, tmp_path, *own, "BATCH_SIZE=32"))
        printed = must(run_ranks(2, script, tmp_path, *own, "BATCH_SIZE=16", "OUT_DIR=two"))
        assert printed.count("epoch 1/") == 1  # only rank 0 prints
        one, two = (flat(load(tmp_path / out / "last.pt")["model"]) for out in (f"runs/{script[:-3]}", "two"))
        moved = (one - start).norm()  # from the weights that the stage starts from
        assert (two - one).norm() < 1e-2 * moved, (script, (two - one).norm() / moved)
        start = flat(load(tmp_path / f"runs/{script[:-3]}/best.pt")["model"])
        shutil.rmtree(tmp_path / "two")
    must(run_script("results.py", tmp_path, "REPORT=False"))
    must(run_ranks(2, "results.py", tmp_path, "REPORT=False", "OUT_DIR=two"))
    one, two = (read(tmp_path / out / "results.csv") for out in ("runs/results", "two"))
    assert [row[:2] for row in one] == [row[:2] for row in two] and len(one) > 50


def flat(state):
    """All learned weights of a state dict in one row; running statistics are not learned."""
    return torch.cat([v.flatten() for k, v in state.items() if k.endswith(("weight", "bias"))])


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


# A script that tells a hash of each rank's weights at its end.
HASHED = """
import runpy, sys
import torch.distributed as dist
import utils.train.loop
from utils.run.identity import checkpoint_digest
fit = utils.train.loop.fit
def hashing(learner, batches, validate, run, contents):
    rows = fit(learner, batches, validate, run, contents)
    hashes = [None] * dist.get_world_size()
    dist.all_gather_object(hashes, checkpoint_digest(contents | {"model": learner.model.state_dict()}))
    print("hashes", *hashes)
    return rows
utils.train.loop.fit = hashing
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_the_ranks_weights_are_the_same_bit_for_bit_and_another_number_goes_on(tiny_demo, tmp_path):
    (tmp_path / "hashed.py").write_text(HASHED)
    settings = [f"DATA_ROOT={tiny_demo}", "BATCH_SIZE=8", "EPOCHS=3", "SPECKLE=0.1"]
    for seed in 0, 1:  # the second run sets the first one aside, on all ranks
        out = must(run_ranks(3, tmp_path / "hashed.py", tmp_path, ROOT / "pretrain.py", *settings, f"SEED={seed}"))
        hashes = next(line for line in out.splitlines() if line.startswith("hashes")).split()[1:]
        assert len(hashes) == 3 and len(set(hashes)) == 1
    assert (tmp_path / "runs/pretrain.1/best.pt").exists()
    # Stopped on two ranks, it goes on with one, and ends as without a stop.
    stop = write(tmp_path / "stop.py", STOPPED.format(after=2))
    process = run_ranks(2, stop, tmp_path, ROOT / "pretrain.py", *settings, "OUT_DIR=a")
    assert process.returncode and "stopped at step" in process.stderr
    resumed = must(run_script("pretrain.py", tmp_path, *settings, "OUT_DIR=a"))
    assert "goes on from step" in resumed and load(tmp_path / "a/last.pt")["run"]["batch"] == 16
    must(run_script("pretrain.py", tmp_path, *settings[:1], "BATCH_SIZE=16", *settings[2:], "OUT_DIR=b"))
    found, wanted = (load(tmp_path / out / "last.pt") for out in "ab")
    assert found["epoch"] == wanted["epoch"] == 3
    assert found["run"]["steps"] == wanted["run"]["steps"]


# One of the ranks gets a signal; all leave at the same step.
STOPPED = """
import os, runpy, signal, sys
from utils.run.ranks import rank
from utils.train.learner import Learner
take = Learner.step
def step(self, batch):
    if batch.step == {after} and rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return take(self, batch)
Learner.step = step
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def write(path, text):
    path.write_text(text)
    return path


# An error of the second rank alone, while the first waits for it.
FAILING = """
import runpy, sys
from utils.run.ranks import rank
from data.errors import DataError
from utils.train.validation import Validation
validate = Validation.__call__
def fails(self, model):
    if rank() == 1:
        raise DataError("chip 7 of rank 1 is gone")
    return validate(self, model)
Validation.__call__ = fails
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_one_ranks_error_ends_all_with_its_message(tiny_demo, tmp_path):
    script = write(tmp_path / "failing.py", FAILING)
    process = run_ranks(2, script, tmp_path, ROOT / "pretrain.py", f"DATA_ROOT={tiny_demo}", "EPOCHS=1")
    assert process.returncode and process.stderr.count("chip 7 of rank 1 is gone") == 1
    # The same error of all ranks is told once.
    process = run_ranks(2, "pretrain.py", tmp_path, "DATA_ROOT=nowhere")
    assert process.returncode and process.stderr.count("nowhere") == 1, process.stderr
