"""The four scripts as their users run them."""

import csv
import json
import math
import re
import runpy
import shutil
import sys
import zipfile
from collections import Counter

from data.augment import to_input, turn
from data.entities import find_entities
from data.labelled import find_chips
from data.layouts import find_pairs, find_unlabelled
from data.sampler import BalancedStream, WeightedStream
from data.split import choose_labelled, split_pairs
from data.store import ChipStore, open_store
from tests.conftest import ROOT, TINY, load, must, run_script, same
from utils.predict.tta import predict
from utils.run.checkpoint import build_model

import numpy as np
import pytest
import torch
import torch.nn.functional as F


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


STAGES = ("pretrain", "sar_feature", "finetune")


def test_every_stage_writes_its_outputs_and_says_what_comes_next(pipeline):
    cwd, printed = pipeline
    for stage, then in zip(STAGES, ("sar_feature.py", "finetune.py", "results.py"), strict=True):
        out = cwd / "runs" / stage
        names = {path.name for path in out.iterdir()}
        assert names == {"best.pt", "last.pt", "last.previous.pt", "history.csv", "curves.png"}
        assert len(list(csv.DictReader(open(out / "history.csv")))) == 2
        assert f"next: python {then}" in printed[stage] and "epoch 2/2: loss" in printed[stage]
        assert "EPOCHS = 2\n" in printed[stage]
        assert load(out / "best.pt")["settings"]["EPOCHS"] == 2


def test_a_run_of_few_steps_says_how_many_epochs_make_enough(pipeline):
    cwd, printed = pipeline
    for stage in STAGES[:2]:
        steps = load(cwd / f"runs/{stage}/last.pt")["run"]["steps"] // 2
        epochs = math.ceil(1000 / steps)
        wanted = f"\n{2 * steps} steps in all are few to train a network with; EPOCHS={epochs} takes {epochs * steps}\n"
        assert wanted in printed[stage]
    assert "steps in all" not in printed["finetune"]  # a head needs fewer


def test_results(pipeline, tiny_demo):
    cwd, printed = pipeline
    out = cwd / "runs" / "results"
    with zipfile.ZipFile(out / "submission.zip") as archive:
        archive.extractall(cwd / "unpacked")
    assert (cwd / "unpacked" / "readme.txt").read_text().count(" : ") == 4
    rows = list(csv.DictReader(open(cwd / "unpacked" / "results.csv")))
    chips = {p.stem.removeprefix("Gotcha") for p in (tiny_demo / "test").glob("*.png")}
    assert {row["image_id"] for row in rows} == chips and len(rows) == len(chips)
    # Official indices of sedan, SUV, van and bus, though the folders' order is another.
    assert {int(row["class_id"]) for row in rows} <= {0, 1, 3, 7}
    for word in ("accuracy", "AUROC", "total", "one view", "+ TTA", "+ vote", "+ cluster score"):
        assert word in printed["results"]
    assert {"metrics.json", "confusion.csv", "confusion.png", "steps.csv"} <= {p.name for p in out.iterdir()}


def test_scores_follow_from_the_submission(pipeline, tiny_demo):
    from data.layouts import OFFICIAL_CLASSES

    cwd, _ = pipeline
    guess = {
        r["image_id"]: int(r["class_id"]) for r in csv.DictReader(open(cwd / "runs/results/results.csv"))
    }
    truth = list(csv.DictReader(open(tiny_demo / "test" / "test_reference.csv")))
    right = [
        guess[row["image_id"].removeprefix("Gotcha")] == OFFICIAL_CLASSES.index(row["class"])
        for row in truth
        if row["OOD_flag"] == "0"
    ]
    steps = list(csv.DictReader(open(cwd / "runs/results/steps.csv")))
    assert float(steps[-1]["accuracy"]) == pytest.approx(np.mean(right))


def test_the_report_is_one_page_that_needs_nothing_else(pipeline):
    cwd, printed = pipeline
    page = (cwd / "runs/results/report.html").read_text()
    assert "http" not in page and "<script" not in page
    linked = re.findall(r'(?:src|srcset|href)="(data:image/png;base64,)?', page)
    assert len(linked) == 8 and all(linked)
    pictures = {path.stem for path in (cwd / "runs/results").glob("*.png")}
    assert len(pictures) == 8 and all(name.replace("_", " ") in page for name in pictures)
    # Its figures are those of the table, and what the vote changed adds up.
    accuracy = float(json.loads((cwd / "runs/results/metrics.json").read_text())["accuracy"])
    assert f"<b>{accuracy:.3f}</b>" in page
    before, after = (
        np.array([float(x) for x in row.split("</td><td>")[1:]])
        for row in re.findall(r"<tr><td>\+ (?:TTA|vote)(.*?)</td></tr>", page)
    )
    counts = list(csv.reader(open(cwd / "runs/results/confusion.csv")))[1:]
    known = sum(int(count) for row in counts for count in row[1:])
    assert after[0] - before[0] == pytest.approx((after[4] - after[3]) / known, abs=2e-3)


def test_finetune_moves_the_head_alone(pipeline):
    cwd, _ = pipeline
    before, after = load(cwd / "runs/sar_feature/best.pt"), load(cwd / "runs/finetune/last.pt")
    for key, value in after["model"].items():
        assert torch.equal(value, before["model"][key]) == key.startswith("backbone."), key


@pytest.fixture
def captured(pipeline, monkeypatch):
    """What a script hands to its training loop: learner, batches, validate, run, contents."""
    cwd, _ = pipeline
    monkeypatch.chdir(cwd)

    def capture(script, *settings):
        arguments = []
        monkeypatch.setattr("utils.train.loop.fit", lambda *handed_over: arguments.extend(handed_over))
        monkeypatch.setattr(sys, "argv", [script, "OUT_DIR=other", "BATCH_SIZE=24", *settings])
        runpy.run_path(str(ROOT / script), run_name="__main__")
        return arguments

    return capture


def test_best_is_the_best_epoch_and_of_equal_ones_the_later(pipeline, monkeypatch):
    values = iter((0.2, 0.9, 0.9, 0.5))
    score = lambda *_: {"accuracy": 0.0, "mean per-class accuracy": next(values)}  # noqa: E731
    monkeypatch.setattr("utils.train.validation.Validation.__call__", score)
    monkeypatch.chdir(pipeline[0])
    monkeypatch.setattr(sys, "argv", ["finetune.py", "OUT_DIR=scored", "EPOCHS=4", "ALL_VIEWS=False"])
    runpy.run_path(str(ROOT / "finetune.py"), run_name="__main__")
    assert [load(f"scored/{name}.pt")["epoch"] for name in ("best", "last")] == [3, 4]


def by_hand(source, images, batch):
    """Logits of a checkpoint's network on chips in the views of a batch, turned one by one."""
    turned = [np.rot90(np.fliplr(chip) if view > 3 else chip, view % 4).copy()
              for chip, view in zip(images, batch.host_views, strict=True)]  # fmt: skip
    mean, std = source["grey"]
    inputs = torch.from_numpy(np.stack(turned)[:, None]).float() / 255
    side = source["image_size"]
    inputs = F.interpolate((inputs - mean) / std, size=(side, side), mode="bilinear", antialias=True)
    return inputs


def training_chips(paths, cwd, tiny_demo, held_out=0.0):
    pairs = find_pairs(tiny_demo)
    train, _ = split_pairs(pairs, find_entities(pairs, cwd / "runs/chips"), held_out)
    return np.array(open_store(getattr(pairs, paths), cwd / "runs/chips")[train]), pairs.labels[train]


PLAIN = ("JITTER=0", "SPECKLE=0", "ROTATION=0", "TRAIN_SCALES=1")


def test_pretrain_trains_with_focal_loss_on_turned_chips(pipeline, captured, tiny_demo):
    cwd, _ = pipeline
    learner, batches, _, _, contents = captured("pretrain.py", f"DATA_ROOT={tiny_demo}", "GAMMA=3", *PLAIN)
    chips, labels = training_chips("eo", cwd, tiny_demo, contents["val_fraction"])
    assert batches.draw(1)[0].tolist() == WeightedStream(labels, 24, 0.5, 0).batch(1)[0].tolist()  # its BALANCE
    model = learner.model.eval()
    for batch in batches.between(0, 2):
        loss, logits, truth = learner.modules.loss_of(batch)
        wanted = model(by_hand(contents, chips[batch.indices], batch))
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
        assert truth.tolist() == labels[batch.indices].tolist()
        p = wanted.softmax(1).gather(1, truth[:, None])
        torch.testing.assert_close(loss, (-((1 - p) ** 3) * p.log()).mean(), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_no_stage_trains_on_an_entity_that_is_held_out(pipeline, captured, tiny_demo, tmp_path, monkeypatch):
    """Without val/ all stages, also the baseline, hold out the same whole entities, though only the first is told."""
    demo = tmp_path / "demo"
    demo.mkdir()
    (demo / "train").symlink_to(tiny_demo / "train")
    pairs = find_pairs(demo)
    vehicles = [f"{label}_{index // 5}" for index, label in enumerate(pairs.labels)]
    names = ["/".join(path[:-4].split("/")[-2:]) for path in pairs.eo]
    listed, rows = tmp_path / "entities.csv", map(",".join, zip(names, vehicles, strict=True))
    listed.write_text("\n".join(["chip,entity", *rows]))
    splits = []

    def capture(*arguments):
        splits.append(split_pairs(*arguments))
        return splits[-1]

    monkeypatch.setattr("data.split.split_pairs", capture)
    teacher, student = (load(pipeline[0] / f"runs/{stage}/best.pt") for stage in ("pretrain", "sar_feature"))
    torch.save(teacher | {"entities": str(listed)}, tmp_path / "teacher.pt")
    torch.save(student | {"entities": str(listed)}, tmp_path / "student.pt")
    root, by_entity = f"DATA_ROOT={demo}", ["BALANCE_ENTITIES=1", *PLAIN]
    runs = [
        captured("pretrain.py", root, f"ENTITIES={listed}", *by_entity),
        captured("pretrain.py", root, f"ENTITIES={listed}", "SENSOR=SAR", *by_entity),
        captured("sar_feature.py", root, f"TEACHER={tmp_path}/teacher.pt", *by_entity),
        captured("finetune.py", root, f"STUDENT={tmp_path}/student.pt", "BALANCE_ENTITIES=1", "ALL_VIEWS=False"),
    ]
    (train, held_out), *others = splits
    assert len(held_out) and not {vehicles[i] for i in train} & {vehicles[i] for i in held_out}
    for other in others:
        assert other[0].tolist() == train.tolist() and other[1].tolist() == held_out.tolist()
    for arguments in runs:
        batches, contents = arguments[1], arguments[4]
        assert len(batches.labels) == len(train) and contents["entities"] == str(listed)
        # The sedan of which three chips are there is drawn as often as those of five.
        drawn = train[np.concatenate([batches.draw(step)[0] for step in range(400)])]
        counts = Counter(vehicles[i] for i in drawn if pairs.labels[i] == 0)
        assert len(counts) > 5 and min(counts.values()) > 0.75 * max(counts.values())


@pytest.mark.parametrize("script, settings", [
    ("pretrain.py", ["SENSOR=SAR"]), ("sar_feature.py", []), ("finetune.py", ["ALL_VIEWS=False"]),
])  # fmt: skip
def test_where_labelled_chips_validate_no_pair_is_held_out(pipeline, captured, tiny_demo, script, settings):
    _, batches, validate, *_ = captured(script, f"DATA_ROOT={tiny_demo}", *settings)
    (reference,) = (tiny_demo / "val").glob("*.csv")
    known = [row for row in csv.DictReader(reference.read_text().splitlines()) if row["OOD_flag"] == "0"]
    assert len(batches.labels) == sum(TINY.values()) and len(validate.labels) == len(known)


@pytest.mark.parametrize("cached", [True, False])
def test_sar_feature_distils_the_teacher_in_the_same_view(pipeline, captured, tiny_demo, cached):
    """T^2 KL(teacher || student) in one view, and focal loss on the labels; the student starts as the teacher."""
    cwd, _ = pipeline
    settings = ["KL_WEIGHT=0.7", "LABEL_WEIGHT=0.4", "GAMMA=1", "TEMPERATURE=3", f"CACHE_TEACHER={cached}", *PLAIN]
    learner, batches, _, _, contents = captured("sar_feature.py", *settings)
    source = load(cwd / "runs/pretrain/best.pt")
    teacher, student = build_model(source), learner.model.eval()
    assert same(student.state_dict(), teacher.state_dict())
    student.head.weight.data += 0.1 * torch.randn(student.head.weight.shape)  # or KL would be that of equal networks
    eo, labels = training_chips("eo", cwd, tiny_demo)
    sar, _ = training_chips("sar", cwd, tiny_demo)
    assert batches.draw(1)[0].tolist() == WeightedStream(labels, 24, 1.0, 0).batch(1)[0].tolist()
    for batch in batches.between(0, 2):
        loss, logits, truth = learner.modules.loss_of(batch)
        wanted = student(by_hand(contents, sar[batch.indices], batch))
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
        taught = teacher(by_hand(source, eo[batch.indices], batch)).detach()
        taught = taught + (0.5 - 1) * torch.tensor(source["counts"]).log()  # drawn with BALANCE=0.5 and 1
        log_q, log_p = (wanted / 3).log_softmax(1), (taught / 3).log_softmax(1)
        kl = 9 * (log_p.exp() * (log_p - log_q)).sum(1).mean()
        p = wanted.softmax(1).gather(1, torch.from_numpy(labels[batch.indices])[:, None])
        focal = (-(1 - p) * p.log()).mean()
        torch.testing.assert_close(loss, 0.7 * kl + 0.4 * focal, atol=2e-3, rtol=2e-3)
        assert set(batch.host_views) - {0}


def test_pairs_without_labels_teach_by_the_teacher_alone(pipeline, captured, tiny_demo, tmp_path):
    cwd, _ = pipeline
    shutil.copytree(tiny_demo, tmp_path / "data")
    pairs = find_pairs(tiny_demo)
    for side in ("EO", "SAR"):
        (tmp_path / "data/unlabelled" / side).mkdir(parents=True)
        for path in getattr(pairs, side.lower())[::9]:
            shutil.copy(path, tmp_path / "data/unlabelled" / side)
    root = f"DATA_ROOT={tmp_path / 'data'}"
    learner, batches, _, _, contents = captured("sar_feature.py", root, "LABELLED_SHARE=0.5", "GAMMA=0", *PLAIN)
    assert contents["labelled_share"] == 0.5
    source = load(cwd / "runs/pretrain/best.pt")
    _, labels = training_chips("sar", cwd, tiny_demo)
    has_label = choose_labelled(labels, 0.5)
    assert len(batches.labels) == len(labels) + len(pairs.eo[::9])
    assert (batches.labels[: len(labels)][has_label] == labels[has_label]).all()
    eo, _ = training_chips("eo", cwd, tiny_demo)
    teacher = build_model(source)
    seen = ChipStore(eo[~has_label], torch.device("cpu"))
    seen = predict(teacher, seen, source["image_size"], source["grey"])[0].argmax(1).numpy()
    assert (batches.labels[: len(labels)][~has_label] == seen).all()
    has_label = np.concatenate((has_label, np.zeros(len(pairs.eo[::9]), bool)))
    without_kl = captured("sar_feature.py", root, "LABELLED_SHARE=0.5", "GAMMA=0", "KL_WEIGHT=0", *PLAIN)[1]
    assert without_kl.labels.tolist() == labels[has_label[: len(labels)]].tolist()
    for batch in batches.between(0, 2):
        loss, logits, truth = learner.modules.loss_of(batch)
        kl = loss - F.cross_entropy(logits[has_label[batch.indices]], truth[has_label[batch.indices]])
        assert kl.item() == pytest.approx(kl_by_hand(batch, learner, source, root, logits, cwd), abs=2e-3)


@pytest.mark.parametrize("script", ["sar_feature.py", "finetune.py"])
def test_a_reference_may_name_the_classes_by_their_official_numbers(captured, tiny_demo, tmp_path, script):
    shutil.copytree(tiny_demo, tmp_path / "data")
    (reference,) = (tmp_path / "data/val").glob("*.csv")
    pairs, text = find_pairs(tiny_demo), reference.read_text()
    for name, number in zip(pairs.classes, pairs.class_ids, strict=True):
        text = text.replace(f",{name},", f",{number},")
    assert ",7," in text  # a bus, which is the last of four classes here
    reference.write_text(text)
    by_name, by_number = (captured(script, f"DATA_ROOT={root}")[2] for root in (tiny_demo, tmp_path / "data"))
    assert by_number.labels.tolist() == by_name.labels.tolist()


@pytest.mark.parametrize("script, name", [("sar_feature.py", "TEACHER"), ("finetune.py", "STUDENT")])
def test_entities_are_found_in_the_photographs_as_the_first_stage_read_them(
    pipeline, captured, tmp_path, monkeypatch, script, name
):
    readings = []

    def capture(*arguments):
        readings.append(arguments[4])
        return find_entities(*arguments)

    monkeypatch.setattr("data.entities.find_entities", capture)
    stage, other = ("pretrain" if name == "TEACHER" else "sar_feature"), (40, (10.0, 200.0))
    torch.save(load(pipeline[0] / f"runs/{stage}/best.pt") | {"eo_reading": other}, tmp_path / "source.pt")
    contents = captured(script, f"{name}={tmp_path}/source.pt")[4]
    assert readings == [other] and contents["eo_reading"] == other


def test_a_chip_that_one_member_cannot_read_is_predicted_by_none(pipeline, tiny_demo, tmp_path, monkeypatch):
    cwd, _ = pipeline
    checkpoint = load(cwd / "runs/finetune/best.pt")
    torch.save(checkpoint | {"grey_range": (0.0, 200.0)}, tmp_path / "other.pt")
    bad = iter((np.array([3]), np.array([5])))
    monkeypatch.setattr("data.store.unreadable", lambda chips: next(bad))
    monkeypatch.chdir(cwd)
    settings = [f"CHECKPOINT=runs/finetune/best.pt,{tmp_path}/other.pt", "OUT_DIR=union", "TTA=False", "REPORT=False"]
    monkeypatch.setattr(sys, "argv", ["results.py", *settings])
    runpy.run_path(str(ROOT / "results.py"), run_name="__main__")
    names = [path.stem.removeprefix("Gotcha") for path in find_chips(tiny_demo / "test")]
    with open("union/results.csv", newline="") as file:
        rows = [row["image_id"] for row in csv.DictReader(file)]
    assert rows == [name for i, name in enumerate(names) if i not in (3, 5)]


def test_without_kl_the_teacher_is_not_asked(captured, monkeypatch):
    monkeypatch.setattr("utils.predict.tta.view_features", None)
    learner, batches, *_ = captured("sar_feature.py", "KL_WEIGHT=0", "GAMMA=0", *PLAIN)
    (batch,) = batches.between(0, 1)
    loss, logits, truth = learner.modules.loss_of(batch)
    torch.testing.assert_close(loss, F.cross_entropy(logits, truth))


@pytest.mark.parametrize("settings, message", [
    (["KL_WEIGHT=0", "LABELLED_SHARE=0"], "there is nothing to learn"),
    (["KL_WEIGHT=0", "FEATURE_WEIGHT=1", "LABELLED_SHARE=0", "INIT="], "nothing trains the head"),
])  # fmt: skip
def test_a_student_that_cannot_learn_is_refused(pipeline, settings, message):
    process = run_script("sar_feature.py", pipeline[0], "OUT_DIR=nothing", *settings)
    assert process.returncode == 1 and message in process.stderr


def test_the_scales_are_compared_by_the_head_of_the_student(pipeline, captured, monkeypatch):
    heads = []
    monkeypatch.setattr(
        "utils.train.validation.Validation.leave_out_scales",
        lambda self, model: heads.append(model.head.weight.detach().clone()),
    )
    learner, *_ = captured("finetune.py", "NEW_HEAD=True")
    student = load(pipeline[0] / "runs/sar_feature/best.pt")["model"]["head.weight"]
    assert torch.equal(heads[0], student) and not torch.equal(learner.model.head.weight, student)


def test_photographs_without_a_radar_chip_teach_the_first_stage(captured, tiny_demo, tmp_path):
    shutil.copytree(tiny_demo, tmp_path / "data")
    pairs = find_pairs(tiny_demo)
    for path, label in list(zip(pairs.eo, pairs.labels, strict=True))[::5]:
        folder = tmp_path / "data/unpaired/EO" / pairs.classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    root = f"DATA_ROOT={tmp_path / 'data'}"
    _, without, _, _, contents = captured("pretrain.py", f"DATA_ROOT={tiny_demo}")
    _, batches, validate, _, with_them = captured("pretrain.py", root)
    more = pairs.labels[::5].tolist()
    assert batches.labels.tolist() == without.labels.tolist() + more
    assert with_them["counts"] == np.bincount([*pairs.labels, *more]).tolist() != contents["counts"] == pairs.counts
    eo = open_store(pairs.eo, "runs/chips")
    assert torch.equal(batches.store[np.array([-1])][0], torch.from_numpy(np.array(eo[::5][-1])))
    assert len(validate.labels) == len(pairs.labels) - len(without.labels)
    for script, sensor in (("pretrain.py", "SENSOR=SAR"), ("sar_feature.py", "KL_WEIGHT=1")):
        _, batches, *_, contents = captured(script, root, sensor)
        assert len(batches.labels) == len(pairs.labels) and contents["counts"] == pairs.counts


def kl_by_hand(batch, learner, source, root, logits, cwd):
    """The KL term of sar_feature.py at its default T on a batch, from EO files that are read again."""
    data = root.removeprefix("DATA_ROOT=")
    pairs = find_pairs(data)
    eo = np.array(open_store(pairs.eo + find_unlabelled(data)[0], cwd / "runs/chips", side=source["chip_side"]))
    taught = build_model(source)(by_hand(source, eo[batch.indices], batch))
    taught = taught - 0.5 * torch.tensor(source["counts"]).log()
    log_q, log_p = (logits / 2).log_softmax(1), (taught / 2).log_softmax(1)
    return (4 * (log_p.exp() * (log_p - log_q)).sum(1).mean()).item()


@pytest.mark.slow
def test_the_head_is_trained_on_the_labels_that_the_student_had(pipeline, captured):
    cwd, _ = pipeline
    must(run_script("sar_feature.py", cwd, "EPOCHS=1", "LABELLED_SHARE=0.3", "OUT_DIR=share"))
    everything = captured("finetune.py")[1]
    some = captured("finetune.py", "STUDENT=share/best.pt")[1]
    assert some.labels.tolist() == everything.labels[choose_labelled(everything.labels, 0.3)].tolist()
    printed = must(run_script("sar_feature.py", cwd, "EPOCHS=1", "LABELLED_SHARE=0", "OUT_DIR=none"))
    assert "next: python results.py CHECKPOINT=none/best.pt" in printed
    refused = run_script("finetune.py", cwd, "STUDENT=none/best.pt")
    assert refused.returncode == 1 and "results.py CHECKPOINT=none/best.pt" in refused.stderr


def test_finetune_features_are_those_of_the_long_way(pipeline, captured, tiny_demo):
    """Batch for batch: the cached features give the logits of the frozen network on the views."""
    cwd, _ = pipeline
    learner, batches, *_ = captured("finetune.py")
    trained = [parameter for group in learner.optimizer.param_groups for parameter in group["params"]]
    assert set(map(id, trained)) == set(map(id, learner.model.head.parameters()))
    source = load(cwd / "runs/sar_feature/best.pt")
    sar, labels = training_chips("sar", cwd, tiny_demo)
    model, chips = build_model(source), torch.from_numpy(sar)
    stream = BalancedStream(labels, 24, 0)
    for step, batch in enumerate(batches.between(0, 3)):
        indices, views = map(torch.from_numpy, stream.batch(step))
        _, logits, truth = learner.modules.loss_of(batch)
        size = round(source["image_size"] * source["scales"][step])
        images = to_input(turn(chips[indices], views), size, *source["grey"])
        torch.testing.assert_close(logits, model(images), atol=1e-4, rtol=1e-4)
        assert truth.tolist() == labels[indices].tolist()


@pytest.mark.slow
def test_teacher_stays_bit_for_bit(pipeline, monkeypatch):
    cwd, _ = pipeline
    teachers = []

    def capture(*arguments):
        teachers.append(build_model(*arguments))
        return teachers[-1]

    monkeypatch.setattr("utils.run.checkpoint.build_model", capture)
    monkeypatch.chdir(cwd)
    settings = ["EPOCHS=1", "OUT_DIR=other", "FEATURE_WEIGHT=1", "WEIGHT_DECAY=0.5"]
    monkeypatch.setattr(sys, "argv", ["sar_feature.py", *settings])
    runpy.run_path(str(ROOT / "sar_feature.py"), run_name="__main__")
    assert not teachers[0].training and not any(p.requires_grad for p in teachers[0].parameters())
    assert same(teachers[0].state_dict(), load(cwd / "runs/pretrain/best.pt")["model"])
    assert not same(teachers[0].state_dict(), load(cwd / "other/last.pt")["model"])


@pytest.mark.parametrize("extra", [slow([]), slow(["FEATURE_WEIGHT=1", "LABEL_WEIGHT=0"])])
def test_the_cached_teacher_makes_the_same_student(pipeline, extra):
    """To within the half precision in which its answers are kept."""
    cwd, _ = pipeline
    for cached in (True, False):
        settings = [f"CACHE_TEACHER={cached}", f"OUT_DIR={cached}", "EPOCHS=2", *extra]
        must(run_script("sar_feature.py", cwd, *settings))
    outs = ("True/last.pt", "False/last.pt", "runs/pretrain/best.pt")
    one, two, start = (load(cwd / out)["model"] for out in outs)
    apart = sum((one[k] - two[k]).square().sum() for k in one if k.endswith("weight")) ** 0.5
    moved = sum((one[k] - start[k]).square().sum() for k in one if k.endswith("weight")) ** 0.5
    assert apart < 0.02 * moved, (apart, moved)


@pytest.mark.parametrize("script", [slow("pretrain.py"), slow("sar_feature.py"), slow("finetune.py")])
def test_the_weights_are_the_same_wherever_the_chips_are_kept(pipeline, tiny_demo, script):
    cwd, _ = pipeline
    for out, memory in (("near", 0), ("far", 1e-6)):
        settings = [f"CHIP_MEMORY_GB={memory}", f"OUT_DIR={out}", f"DATA_ROOT={tiny_demo}", "EPOCHS=1"]
        must(run_script(script, cwd, *settings))
    assert same(load(cwd / "near/last.pt")["model"], load(cwd / "far/last.pt")["model"])


@pytest.mark.parametrize(
    "script, extra", [slow("pretrain.py", ["EMA=0.9"]), slow("sar_feature.py", []), slow("finetune.py", [])]
)
def test_the_seed_fixes_every_bit(pipeline, tiny_demo, script, extra):
    cwd, _ = pipeline
    extra = [*extra, f"DATA_ROOT={tiny_demo}", "EPOCHS=1"]
    for out in ("one", "two", "three"):
        must(run_script(script, cwd, f"OUT_DIR={out}", f"SEED={4 if out == 'three' else 3}", *extra))
    one, two, three = (load(cwd / out / "last.pt")["model"] for out in ("one", "two", "three"))
    assert same(one, two) and not same(one, three)


@pytest.mark.slow
def test_another_student_with_feature_distillation(pipeline):
    cwd, _ = pipeline
    settings = ["BACKBONE=test_byobnet", "INIT=", "FEATURE_WEIGHT=0.5", "EPOCHS=1", "OUT_DIR=student"]
    must(run_script("sar_feature.py", cwd, *settings))
    must(
        run_script("finetune.py", cwd, "STUDENT=student/best.pt", "EPOCHS=1", "OUT_DIR=head", "NEW_HEAD=True")
    )
    must(run_script("results.py", cwd, "CHECKPOINT=head/best.pt", "OUT_DIR=new", "SCALES=1"))
    process = run_script("sar_feature.py", cwd, "BACKBONE=test_byobnet")
    assert process.returncode == 1 and "set INIT=" in process.stderr


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    ["CLUSTER_BY=features", "VOTE=soft", "CLUSTER_SCORE=features"],
    ["CLUSTER_BY=sequence", "OOD_SCORE=energy", "CLUSTER_SCORE=none", "VOTE_MIN_SHARE=0.6"],
    ["CLUSTER_BY=none", "TTA=False"],
])  # fmt: skip
def test_results_in_other_ways(pipeline, settings):
    cwd, _ = pipeline
    out = must(run_script("results.py", cwd, "OUT_DIR=other_results", "SCALES=1", "REPORT=False", *settings))
    assert "total" in out
    if "CLUSTER_BY=none" in settings:
        steps = list(csv.DictReader(open(cwd / "other_results/steps.csv")))
        assert steps[0]["total"] == steps[-1]["total"]
        assert [step["step"] for step in steps] == ["one view", "+ vote", "+ cluster score"] and "+ TTA" not in out


def test_chips_without_numbers_are_told_of_before_the_work(pipeline, tiny_demo, tmp_path):
    cwd, _ = pipeline
    for source, name in zip(
        sorted((tiny_demo / "test").glob("*.png")), ("a.png", "b.png", "c d.png"), strict=False
    ):
        shutil.copy(source, tmp_path / name)
    process = run_script("results.py", cwd, f"TEST_DIR={tmp_path}", "OUT_DIR=unnamed", "CLUSTER_BY=both")
    assert process.returncode == 1 and "has no number in its name" in process.stderr
    settings = ["OUT_DIR=unnamed", "CLUSTER_BY=features", "REPORT=False"]
    must(run_script("results.py", cwd, f"TEST_DIR={tmp_path}", *settings))
    rows = list(csv.DictReader(open(cwd / "unnamed/results.csv")))
    assert [row["image_id"] for row in rows] == ["a", "b", "c d"]


@pytest.mark.slow
def test_plain_sar_baseline(pipeline, tiny_demo):
    cwd, _ = pipeline
    settings = ["SENSOR=SAR", "GAMMA=0", "BALANCE=0", "EPOCHS=1", "OUT_DIR=plain", f"DATA_ROOT={tiny_demo}"]
    must(run_script("pretrain.py", cwd, *settings))
    must(run_script("results.py", cwd, "CHECKPOINT=plain/best.pt", "OUT_DIR=plain_results", "REPORT=False"))
    settings = ["CHECKPOINT=plain/best.pt", "OUT_DIR=plain_results", "REPORT=False", "OOD_SCORE=knn"]
    process = run_script("results.py", cwd, *settings)
    assert process.returncode == 1 and "knn" in process.stderr


@pytest.mark.parametrize("script, message", [
    ("sar_feature.py", "run first: python pretrain.py"),
    ("finetune.py", "run first: python sar_feature.py"),
    ("results.py", "run first: python finetune.py"),
])  # fmt: skip
def test_a_missing_predecessor_is_named(tmp_path, script, message):
    process = run_script(script, tmp_path)
    assert process.returncode == 1 and message in process.stderr and "Traceback" not in process.stderr


@pytest.mark.parametrize("settings, message", [
    (["EPOCS=3"], "nearest is EPOCHS"),
    (["EPOCHS=three"], "EPOCHS is a whole number"),
    (["DATA_ROOT=nowhere"], "DATA_ROOT nowhere is not a folder"),
    (["DEVICE=tpu9"], "DEVICE tpu9 cannot be used"),
    (["DEVICE=mps"], "DEVICE mps cannot be used: the scripts compute on cpu or cuda only; set auto, cpu,"),
    (["BACKBONE=resnet81"], "knows no backbone 'resnet81'"),
])  # fmt: skip
def test_wrong_settings_end_with_a_sentence(tmp_path, tiny_demo, settings, message):
    process = run_script("pretrain.py", tmp_path, f"DATA_ROOT={tiny_demo}", *settings)
    assert process.returncode == 1 and message in process.stderr and "Traceback" not in process.stderr


def test_paths_that_the_terminal_cannot_print(tmp_path, tiny_demo):
    """As on a Windows console of Western Europe."""
    environment = {"PYTHONIOENCODING": "cp1252"}
    process = run_script("pretrain.py", tmp_path, "DATA_ROOT=图像", environment=environment)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert r"DATA_ROOT \u56fe\u50cf is not a folder" in process.stderr


@pytest.mark.slow
def test_a_run_in_folders_that_the_terminal_cannot_print(tmp_path, tiny_demo):
    (tmp_path / "图像").symlink_to(tiny_demo)
    settings = ["DATA_ROOT=图像", "OUT_DIR=结果", "EPOCHS=1"]
    process = run_script("pretrain.py", tmp_path, *settings, environment={"PYTHONIOENCODING": "cp1252"})
    assert r"written: \u7ed3\u679c/best.pt" in must(process) and (tmp_path / "结果/best.pt").exists()
    assert "%|" not in process.stderr


@pytest.mark.slow
def test_a_log_has_no_progress_bars(pipeline):
    cwd, _ = pipeline
    settings = ["ROTATIONS=0", "SCALES=1", "REPORT=False", "OUT_DIR=logged", "STORE_DIR=logged/chips"]
    process = run_script("results.py", cwd, *settings)
    assert "one view" in must(process) and "%|" not in process.stderr


def test_ranks_that_no_torchrun_started(tmp_path):
    process = run_script("pretrain.py", tmp_path, environment={"WORLD_SIZE": "4", "RANK": "0"})
    assert process.returncode == 1 and process.stderr.count("\n") == 1
    assert "has WORLD_SIZE=4 but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT; start several ranks" in process.stderr


@pytest.mark.slow
def test_compile_without_a_compiler(tmp_path, tiny_demo):
    environment = dict.fromkeys(("CC", "CXX", "PATH"), "/nowhere") | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    settings = [f"DATA_ROOT={tiny_demo}", "EPOCHS=1", "COMPILE=True"]
    process = run_script("pretrain.py", tmp_path, *settings, environment=environment)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert "COMPILE=True cannot be used on this machine (" in process.stderr
    assert "install a C++ compiler, or set COMPILE=False" in process.stderr
    assert not (tmp_path / "runs/pretrain").exists()


def test_sar_checkpoint_is_no_teacher(pipeline):
    cwd, _ = pipeline
    process = run_script("sar_feature.py", cwd, "TEACHER=runs/finetune/best.pt")
    assert process.returncode == 1 and "SAR checkpoint of finetune.py" in process.stderr


@pytest.mark.slow
def test_pipeline_on_real_radar(mstar, tmp_path):
    """MSTAR chips: class names that are not the challenge's, test chips from a folder of their own."""
    must(run_script("pretrain.py", tmp_path, f"DATA_ROOT={mstar}", "EPOCHS=4"))
    must(run_script("sar_feature.py", tmp_path, "EPOCHS=4"))
    must(run_script("finetune.py", tmp_path, "EPOCHS=2"))
    out = must(run_script("results.py", tmp_path, f"TEST_DIR={mstar}/val", "SCALES=1"))
    assert "1133 chips" in out
    steps = list(csv.DictReader(open(tmp_path / "runs/results/steps.csv")))
    assert float(steps[-1]["accuracy"]) > 0.3 and float(steps[-1]["AUROC"]) > 0.7
    rows = list(csv.DictReader(open(tmp_path / "runs/results/results.csv")))
    assert {int(r["class_id"]) for r in rows} <= set(range(8)) and len(rows) == 1133


def test_unlabelled_real_chips_give_a_valid_submission(pipeline, unicorn):
    cwd, _ = pipeline
    chips = cwd / "unicorn"
    shutil.copytree(unicorn, chips)
    (cwd / "unicorn_results").mkdir()
    (cwd / "unicorn_results" / "metrics.json").write_text("of an earlier run")
    must(run_script("results.py", cwd, f"TEST_DIR={chips}", "OUT_DIR=unicorn_results"))
    rows = list(csv.DictReader(open(cwd / "unicorn_results/results.csv")))
    assert {r["image_id"] for r in rows} == {p.stem.removeprefix("SAR_") for p in chips.glob("*.png")}
    assert all(np.isfinite(float(r["score"])) for r in rows)
    assert not (cwd / "unicorn_results" / "metrics.json").exists()
    # What needs labels is left out, and the rest of the report stands.
    pictures = {path.stem for path in (cwd / "unicorn_results").glob("*.png")}
    assert pictures == {"confidence", "feature_map", "clusters"}
    assert "Confusion" not in (cwd / "unicorn_results/report.html").read_text()
