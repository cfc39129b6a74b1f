"""Bad and odd input, a line each: what it is, how it comes about, what is run, what is said.

`bad` input ends the run with that sentence, before anything is trained, and leaves the files of an
earlier run as they were. `good` input only looks bad: the run ends well, and says that.
"""

import contextlib
import csv
import functools
import json
import os
import pickle
import runpy
import shlex
import shutil
import struct
import sys
import zlib
from pathlib import Path
from unittest import mock

from data.errors import DataError
from data.store import open_store
from tests.conftest import ROOT
from utils.run import identity
from utils.run.checkpoint import FORMAT, KEYS

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

SENSORS, CLASSES = ("EO", "SAR"), ("sedan", "SUV", "van", "bus")
EARLIER = ("pretrain", "sar_feature", "finetune", "results")
QUICK = {
    "pretrain.py": "DATA_ROOT=data EPOCHS=1 BATCH_SIZE=8 IMAGE_SIZE=16 TRAIN_SCALES=1",
    "sar_feature.py": "EPOCHS=1 BATCH_SIZE=8 TRAIN_SCALES=1",
    "finetune.py": "EPOCHS=1 BATCH_SIZE=8 ALL_VIEWS=False",
    "results.py": "ROTATIONS=0 SCALES=1 REPORT=False",
}
CHIP, SAR_CHIP = "data/EO/bus/0.png", "data/SAR/bus/0.png"
VALIDATION, TEST = "data/val/Gotcha101.png", "data/test/reference.csv"
TEACHER, STUDENT, FINAL = (f"runs/{stage}/best.pt" for stage in EARLIER[:3])
LISTED = "pretrain.py ENTITIES=entities.csv"
HEADER = "image_id,class,OOD_flag\n"
ROWS = [f"Gotcha{n},{CLASSES[n % 4]},{int(n > 106)}\n" for n in range(101, 109)]  # two are unknown
GIVEN = "".join(ROWS)
LOCKS = contextlib.ExitStack()
SOURCE_DIGEST = functools.cache(identity.source_digest)  # the code does not change while the tests run


# How the input comes about: each gives a function that is called in the folder of the case.


def write(path, content):
    def change():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def chip(path, level=None, size=(12, 12)):
    """A chip of noise, or of one level."""

    def change():
        levels = np.random.default_rng(list(os.fsencode(path))).integers(1, 256, size[::-1], np.uint8)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(levels if level is None else np.full_like(levels, level)).save(path)

    return change


def array(path, levels):
    """A chip's file is replaced by an array."""

    def change():
        Path(path).unlink()
        np.save(Path(path).with_suffix(".npy"), levels)

    return change


def by_class(folder, **named):
    """Chips without a reference, one in each class folder; `named`: other names of some folders."""

    def change():
        shutil.rmtree(folder)
        for i, name in enumerate(CLASSES):
            chip(f"{folder}/{named.get(name, name)}/Gotcha{i}.png")()

    return change


def numbers_for_names():
    """Class folders get numbers that are not their positions in CLASSES=1,0,2,3."""
    for sensor in SENSORS:
        for i, name in enumerate(CLASSES):
            os.rename(f"data/{sensor}/{name}", f"data/{sensor}/{i}")


def lock(path):
    """Another process holds a lock file until the end of the test."""
    return lambda: LOCKS.enter_context(FileLock(path))


def remove(*paths):
    return lambda: [shutil.rmtree(p) if os.path.isdir(p) else os.unlink(p) for p in paths]


def move(path, to):
    return lambda: shutil.move(path, to)


def copy(path, to):
    return lambda: (shutil.copytree if os.path.isdir(path) else shutil.copy)(path, to)


def link(path, to):
    def change():
        Path(path).unlink(missing_ok=True)
        os.symlink(to, path)

    return change


def cut(path, size):
    return lambda: os.truncate(path, size)


def empty(folder):
    """All chips below a folder become black."""
    return lambda: [chip(str(path), 0)() for path in Path(folder).rglob("*.png")]


def emptied(folder):
    """All files below a folder are cut to nothing."""
    return lambda: [os.truncate(path, 0) for path in Path(folder).rglob("*.png")]


def ran(command):
    return lambda: run(command)


def reference(rows=GIVEN, header=HEADER, **coding):
    return lambda: Path(TEST).write_bytes((header + rows).encode(**coding))


def edit(path, **entries):
    """A checkpoint with other entries; None takes one out."""

    def change():
        saved = torch.load(path, weights_only=True) | entries
        torch.save({key: value for key, value in saved.items() if value is not None}, path)

    return change


def entities(rows):
    return write("entities.csv", "".join(f"{row}\n" for row in ["chip,entity", *rows]))


def only(*names):
    """These test chips and no others, with a reference."""

    def change():
        shutil.rmtree("data/test")
        os.mkdir("data/test")
        for name in names:
            chip(f"data/test/{name}")()
        with open(TEST, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([HEADER.strip().split(",")] + [[n, "bus", 0] for n in names])

    return change


def classes(count):
    """A data set of so many classes, two pairs each."""

    def change():
        shutil.rmtree("data")
        for i in range(count):
            for sensor in SENSORS:
                for name in ("a", "b"):
                    chip(f"data/{sensor}/c{i:04}/{name}{i}.png")()

    return change


def bomb(width, height):
    """A PNG whose header promises so many pixels."""
    parts = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT" + zlib.compress(b""))
    framed = (struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p)) for p in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


class Code:
    def __reduce__(self):
        return os.mkdir, ("code_ran",)


def without_permission():
    """Read one chip of three as a user who may not; root is not asked."""
    Path(CHIP).chmod(0)
    Path().chmod(0o777)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        os.mkdir("store")
        # The lock goes by its absolute path, through pytest's folder, which this user may not enter.
        with mock.patch("data.store.locked", contextlib.nullcontext):
            open_store(sorted(Path("data/EO/bus").iterdir()), "store")
    except DataError as error:
        raise SystemExit(str(error)) from None
    finally:
        os.seteuid(user)


def bad(name, change, command, message, marks=()):
    return pytest.param(change, command, message, True, None, id=name, marks=marks)


def good(name, change, command, message, holds=None):
    # A training run draws its curves, which takes a second.
    trains = command.split()[0] in list(QUICK)[:3]
    marks = pytest.mark.slow if trains else ()
    return pytest.param(change, command, message, False, holds, id=name, marks=marks)


def submitted():
    with open("runs/results/results.csv", newline="", encoding="utf-8") as file:
        return {row["image_id"] for row in csv.DictReader(file)}


def total():
    return json.loads(Path("runs/results/metrics.json").read_text())["total"]


NAMES = ("a 1.png", "Gotcha, 2.png", "größe_3.png", "line\n4.png", 'quote"5.png')
ALL_KNOWN = "".join(f"Gotcha{n},bus,0\n" for n in range(101, 109))
ALL_UNKNOWN = "".join(f"Gotcha{n},tank,1\n" for n in range(101, 109))

CASES = [
    # The data set
    bad("no DATA_ROOT", None, "pretrain.py DATA_ROOT=nowhere", "DATA_ROOT nowhere is not a folder"),
    bad("DATA_ROOT is a file", None, f"pretrain.py DATA_ROOT={CHIP}", "is not a folder"),
    bad("DATA_ROOT loops", link("loop", "loop"), "pretrain.py DATA_ROOT=loop", "is not a folder"),
    bad("DATA_ROOT has moved", move("data", "elsewhere"), "finetune.py",
        f"the data set's folder in the checkpoint {STUDENT}, DATA_ROOT data, is not a folder here"),
    bad("DATA_ROOT has moved since", move("data", "elsewhere"), "results.py",
        f"the data set's folder in the checkpoint {FINAL}, DATA_ROOT data, is not a folder here"),
    bad("no layout", write("other/x/0.png", b""), "pretrain.py DATA_ROOT=other",
        "the README shows the layouts, and _find_sides in data/layouts.py takes further ones"),
    bad("empty class", lambda: os.mkdir("data/EO/truck"), "pretrain.py",
        "EO/truck holds no chips; fill or remove"),
    bad("misspelt class", [move("data/EO/sedan", "data/EO/sedna"), move("data/SAR/sedan", "data/SAR/sedna")],
        "pretrain.py", "sedna (sedan?). Rename them, or take them as they are: CLASSES=sedna,SUV,van,bus ("),
    bad("strange class", [copy("data/EO/bus", "data/EO/tank"), copy("data/SAR/bus", "data/SAR/tank")],
        "pretrain.py", "beside such that are: tank. Rename"),
    good("misspelt class that is meant",
        [move("data/EO/sedan", "data/EO/sedna"), move("data/SAR/sedan", "data/SAR/sedna")],
        "pretrain.py CLASSES=SUV,bus,sedna,van", "next: python"),
    bad("CLASSES twice", None, "pretrain.py CLASSES=SUV,bus,bus,sedan,van", "asked for twice: bus"),
    bad("EO without SAR", remove(SAR_CHIP, "data/SAR/bus/2.png"), "pretrain.py",
        "2 EO chips without SAR (0, 2)"),
    bad("SAR without EO", [chip(f"data/SAR/bus/x{i}.png") for i in range(7)], "sar_feature.py",
        "7 SAR chips without EO (x0, x1, x2, x3, x4 and 2 more)"),
    bad("a sensor is missing", remove("data/SAR"), "pretrain.py", "SAR is missing, its counterpart"),
    bad("unlabelled EO without SAR", [chip("data/unlabelled/EO/a.png"), chip("data/unlabelled/SAR/b.png")],
        "sar_feature.py", "data/unlabelled: 1 EO chips without SAR (a), 1 SAR chips without EO (b)"),
    bad("unlabelled without SAR", chip("data/unlabelled/EO/a.png"), "sar_feature.py", "has no folder SAR"),
    bad("unlabelled, broken", [chip("data/unlabelled/EO/a.png"), write("data/unlabelled/SAR/a.png", b"no")],
        "sar_feature.py", "1 files are no readable images: data/unlabelled/SAR/a.png"),
    bad("photographs of another class", chip("data/unpaired/EO/tank/a.png"), "pretrain.py",
        "data/unpaired/EO: no classes of the pairs: tank; rename them to"),
    bad("photographs without class folders", chip("data/unpaired/EO/a.png"), "pretrain.py", "holds no class folders"),
    bad("no prefixes", [write(f"old/train_images/{i}/1.png", b"") for i in (0, 1)],
        "pretrain.py DATA_ROOT=old", "old, class sedan: no chip is named EO_<number> or SAR_<number>"),
    bad("a pair in two classes",
        [copy(CHIP, "data/EO/van/twin.png"), copy(SAR_CHIP, "data/SAR/van/twin.png"),
         move(CHIP, "data/EO/bus/twin.png"), move(SAR_CHIP, "data/SAR/bus/twin.png")],
        "pretrain.py", "1 pairs lie in two classes: twin (van, bus); keep each in its own"),
    bad("two files of one name", copy(CHIP, "data/EO/bus/0.jpg"), "pretrain.py", "two files of one name: 0"),
    good("a class of one chip", remove(*(f"data/{s}/bus/{i}.png" for s in SENSORS for i in (1, 2, 3))),
        "pretrain.py", "next: python sar_feature.py"),
    bad("each class of one chip",
        remove(*(f"data/{s}/{c}/{i}.png" for s in SENSORS for c in CLASSES for i in (1, 2, 3))),
        "pretrain.py", "no class has two chips, so none is left to validate on; add chips"),
    good("each class of one entity", entities(f"{c}/{i},{c}" for c in CLASSES for i in range(4)), LISTED,
        "pairs are held out chip by chip"),
    bad("one class alone", remove(*(f"data/{s}/{c}" for s in SENSORS for c in CLASSES[1:])), "pretrain.py",
        "there is one class alone, sedan; a classifier needs two"),
    good("1,001 classes", classes(1001), "pretrain.py BATCH_SIZE=256", "next: python sar_feature.py"),

    # Entities
    good("a class of one entity", entities(f"bus/{i},a" for i in range(4)), LISTED,
        "classes of one entity keep it for training, so that they cannot be validated on pairs: bus"),
    bad("no ENTITIES", None, LISTED, "ENTITIES entities.csv is not a file; set it to a CSV with"),
    bad("no entity column", write("entities.csv", "chip,vehicle\nbus/0,a\n"), LISTED,
        "entities.csv has no column entity; a list of entities starts with the line chip,entity"),
    bad("entities of no chip", entities(["bus/0,a", "bus/9,a"]), LISTED,
        "entities.csv, line 3: there is no training chip 'bus/9'; write names such as sedan/0"),
    bad("entities of several chips", entities(["0,a"]), LISTED,
        "line 2: several classes have a chip '0'; write <class>/0"),
    bad("an entity twice", entities(["bus/0,a", "bus/0.png,b"]), LISTED, "line 3: bus/0.png stands there twice"),
    bad("an empty entity", entities(["bus/0,"]), LISTED, "line 2: bus/0 has no entity; write one, or remove the row"),
    bad("cells of an entity", entities(["bus/0,a,b"]), LISTED, "line 2: 3 cells where the header has 2"),
    bad("entities in UTF-16", lambda: Path("entities.csv").write_text("chip,entity\n", "utf-16"), LISTED,
        "entities.csv is no CSV in UTF-8"),
    bad("the teacher's ENTITIES", [entities(["bus/0,a"]), ran(f"{LISTED} OUT_DIR=x"), remove("entities.csv")],
        "sar_feature.py TEACHER=x/best.pt", "in the checkpoint x/best.pt, ENTITIES entities.csv, is not a file",
        pytest.mark.slow),

    # Files of chips
    bad("zero bytes, cut off, no image",
        [write(CHIP, b""), write("data/EO/van/0.png", b"hello"), cut("data/EO/SUV/0.png", 60)],
        "pretrain.py", "3 files are no readable images: data/EO/SUV/0"),
    bad("more than twenty", [write(f"data/{s}/bus/x{i:02}.png", b"") for s in SENSORS for i in range(30)],
        "pretrain.py", "x19.png (cannot identify image file) and 10 more; replace them"),
    bad("decompression bomb", write(CHIP, bomb(60_000, 60_000)), "pretrain.py", "decompression bomb"),
    bad("a scene", chip(CHIP, 9, (30_000, 600)), "pretrain.py", "30000 x 600 px are no chip"),
    good("30,000 px wide", chip(CHIP, size=(30_000, 8)), "pretrain.py", "next: python"),
    bad("vanished after the store was built", [ran("pretrain.py OUT_DIR=x"), remove(CHIP)], "pretrain.py",
        "1 SAR chips without EO (0)", pytest.mark.slow),
    bad("changed after the store was built", [ran("pretrain.py OUT_DIR=x"), write(CHIP, b"else")],
        "pretrain.py", f"1 files are no readable images: {CHIP}"),
    *(good(f"{script} without bad chips", [cut(path, 9) for path in (CHIP, SAR_CHIP, VALIDATION)],
        f"{script} SKIP_BAD=True", "left out, no readable images: data/") for script in list(QUICK)[:3]),
    good("results.py without a bad chip", cut("data/test/Gotcha101.png", 40), "results.py SKIP_BAD=True",
        "1 of 8 files left out", lambda: submitted() == {str(n) for n in range(102, 109)}),
    bad("SKIP_BAD of another run", [cut(CHIP, 40), ran("pretrain.py SKIP_BAD=True OUT_DIR=runs/other")],
        "pretrain.py", f"no readable images: {CHIP}", pytest.mark.slow),
    bad("no chip is left", emptied("data/EO"), "pretrain.py SKIP_BAD=True",
        "16 files are no readable images"),
    bad("no permission", None, without_permission, f"{CHIP} (Permission denied)"),
    bad("file loops", link(CHIP, "0.png"), "pretrain.py", f"links that lead nowhere: {CHIP}; mend or remove"),
    good("folder loops", link("data/EO/bus/up", ".."), "pretrain.py", "next: python"),
    bad("folder links to its parent", link("data/EO/up", "."), "pretrain.py", "EO/up holds no chips"),
    good("upper case", [move(CHIP, "data/EO/bus/0.PNG"), move(SAR_CHIP, "data/SAR/bus/0.Png")], "pretrain.py",
        "next: python"),
    good("left aside", [write(f"data/EO/bus/{name}", b"x") for name in ("._0.png", "Thumbs.db", ".DS_Store")],
        "pretrain.py", "next: python"),
    good("some are black", [chip(CHIP, 0), chip(SAR_CHIP, 0), chip("data/test/Gotcha101.png", 0)],
        "pretrain.py", "next: python"),
    bad("all EO is black", empty("data/EO"), "pretrain.py", "all training chips are empty"),
    bad("all SAR is black", empty("data/SAR"), "sar_feature.py", "all training chips are empty"),
    bad("an array with channels", array(CHIP, np.zeros((3, 12, 12))), "pretrain.py",
        "data/EO/bus/0.npy (it holds float64 [3, 12, 12]; a chip is an array [H, W] of real numbers)"),
    bad("an empty array", array(CHIP, np.zeros((0, 12))), "pretrain.py", "it holds float64 [0, 12]"),
    bad("an array of objects", array(CHIP, np.array([[Code()]])), "pretrain.py",
        "Object arrays cannot be loaded when allow_pickle=False"),
    good("an array among images", [array(CHIP, np.eye(12, dtype=np.uint8)), array(SAR_CHIP, np.eye(12) > 0)],
        "pretrain.py", "next: python"),
    bad("a range that 8-bit levels lie outside of", array(CHIP, np.arange(144.0).reshape(12, 12) + 300),
        "pretrain.py GREY_RANGE=0,255",
        "nearly all of its levels, 300 to 443, are outside GREY_RANGE=0,255; train with GREY_RANGE=300.143,442.857"),
    bad("all SAR is black since", empty("data/SAR"), "finetune.py",
        "all training chips have the same features"),

    # Test chips and their reference
    good("odd names", only(*NAMES), "results.py", "5 chips",
        lambda: submitted() == {name[:-4] for name in NAMES}),
    good("a name that is no text", lambda: chip(os.fsdecode(b"data/test/\xff109.png"))() or os.unlink(TEST),
        "results.py", "9 chips", lambda: b"\n\xff109," in Path("runs/results/results.csv").read_bytes()),
    good("a number beyond 64 bits", only("1.png", "9" * 40 + ".png"), "results.py", "2 chips"),
    bad("no number", only("a.png", "b².png"), "results.py CLUSTER_BY=both", "'a.png' has no number in its name"),
    good("no number, auto", only("a.png", "b².png"), "results.py", "auto: features; some file names hold no number"),
    good("digits that are none", only("1²2.png", "٣.png"), "results.py CLUSTER_BY=features", "2 chips"),
    bad("no TEST_DIR", None, "results.py TEST_DIR=nowhere", "there is no folder of chips nowhere"),
    bad("no test folder", remove("data/test"), "results.py", "no folder test or test_images; set TEST_DIR"),
    bad("no test chips", only(), "results.py", "data/test holds no chips"),
    good("one test chip", only("Gotcha1.png"), "results.py", "1 chips, 1 clusters"),
    good("fewer chips than clusters", only("1.png", "2.png", "3.png"),
        "results.py CLUSTER_BY=features CLUSTERS=50", "3 chips, 3 clusters"),
    bad("no class column", reference(header="image_id,label,OOD_flag\n"), "results.py",
        "has no column class; a ref"),
    bad("no column at all", reference(header=""), "results.py",
        "no column image_id and no class and no OOD_flag"),
    bad("unknown class", reference("Gotcha101,tank,0\n"), "results.py",
        "line 2: Gotcha101 has the unknown class 'tank'"),
    bad("no class", reference("Gotcha101,,0\n"), "results.py",
        "has the unknown class ''; the classes are sedan, SUV"),
    bad("an id twice", reference(GIVEN + ROWS[0]), "results.py", "line 10: Gotcha101 stands there twice"),
    bad("an id is missing", reference("".join(ROWS[1:])), "results.py",
        "has no row for 1 chips: Gotcha101.png"),
    bad("an id too many", reference(GIVEN + "Gotcha9,bus,0\n"), "results.py",
        "names 1 chips that are not there: 9"),
    bad("chips of one number", copy("data/test/Gotcha101.png", "data/test/SAR_101.png"), "results.py",
        "has no row for 1 chips: SAR_101.png"),
    bad("chips of one name", [by_class("data/test"), copy("data/test/bus/Gotcha3.png", "data/test/van"), reference()],
        "results.py", "cannot tell the chips of one name apart: Gotcha3"),
    good("two rows of one number", [copy("data/test/Gotcha101.png", "data/test/SAR_101.png"),
        reference(GIVEN + "SAR_101,bus,0\n")], "results.py CLUSTER_BY=none", "9 chips"),
    good("BOM", reference(header="\ufeff" + HEADER), "results.py", "written:", lambda: total() is not None),
    good("CRLF", reference(GIVEN.replace("\n", "\r\n")), "results.py", "written:"),
    good("blank lines", reference("\n".join(ROWS) + "\n,,\n", "\n" + HEADER), "results.py", "written:"),
    good("ids bare and with .png", reference(GIVEN.replace("Gotcha", "").replace("3,", "3.png,")),
        "results.py", "written:"),
    bad("too many cells", reference("Gotcha101,bus,with trailer,0\n"), "results.py",
        "line 2: 4 cells where the header has 3"),
    bad("too few cells", reference("Gotcha101,bus\n"), "results.py",
        "line 2: 2 cells where the header has 3"),
    bad("semicolons", reference("", HEADER.replace(",", ";")), "results.py",
        "a reference starts with the line image_id,"),
    bad("not UTF-8", reference("größe,bus,0\n", encoding="latin-1"), "results.py", "is no CSV in UTF-8"),
    bad("UTF-16", reference(encoding="utf-16"), "results.py", "is no CSV in UTF-8"),
    bad("a NUL byte", reference("Gotcha101,bus\0,0\n"), "results.py", "NUL"),
    bad("no line end", reference('"Gotcha101,' + "x" * 200_000), "results.py",
        "field larger than field limit"),
    bad("empty reference", write(TEST, b""), "results.py", "has no column image_id"),
    bad("OOD_flag", reference("Gotcha101,bus,maybe\n"), "results.py",
        "OOD_flag of Gotcha101 is 'maybe'; write 0 or 1"),
    bad("two references", copy(TEST, "data/test/b.csv"), "results.py",
        "several reference CSVs: b.csv, reference.csv"),
    good("another CSV", write("data/test/sample.csv", "image_id,class_id,score\n"), "results.py", "written:"),
    good("nothing unknown", reference(ALL_KNOWN), "results.py", "AUROC, FPR and total are undefined (-)",
        lambda: total() is None),
    good("nothing known", reference(ALL_UNKNOWN), "results.py", "all scores are undefined (-)",
        lambda: total() is None),
    good("class folders", by_class("data/test"), "results.py", "0 of 4 chips are out of distribution"),
    good("class folders of unknown classes", by_class("data/test", bus="-1", van="tank"), "results.py",
        "2 of 4 chips are out of distribution, those in the subfolders -1, tank"),
    bad("misspelt class folder", by_class("data/test", sedan="Sedan"), "results.py",
        "data/test, subfolder Sedan: it is the class sedan; rename it so"),
    bad("misspelt class folder in the validation", by_class("data/val", SUV="S-U-V"), "sar_feature.py",
        "data/val, subfolder S-U-V: it is the class SUV; rename it so"),
    bad("ambiguous class folder", [by_class("data/test", sedan="0"), edit(FINAL, classes=tuple("1023"))],
        "results.py", "subfolder 0: '0' is the name of one class and the number of another one in a submission"),
    bad("ambiguous class folder in the validation", [by_class("data/val", SUV="1"), numbers_for_names],
        "pretrain.py SENSOR=SAR CLASSES=1,0,2,3", "data/val, subfolder 1: '1' is the name of one class and"),
    bad("in the validation", write("data/val/v.csv", HEADER), "sar_feature.py",
        "v.csv has no row for 8 chips"),

    # Checkpoints
    bad("no checkpoint", remove(FINAL), "results.py",
        f"there is no checkpoint {FINAL}; run first: python finetune.py"),
    bad("wrong stage", None, f"sar_feature.py TEACHER={FINAL}", "is the SAR checkpoint of finetune.py"),
    bad("wrong sensor", None, f"finetune.py STUDENT={TEACHER}", "is the EO checkpoint of pretrain.py"),
    bad("no fit of the score", None, f"results.py CHECKPOINT={STUDENT} OOD_SCORE=knn", "knn"),
    good("no fit of any score", None, f"results.py CHECKPOINT={STUDENT}", "written:"),
    bad("other classes", [move("data/EO/bus", "data/EO/boat"), move("data/SAR/bus", "data/SAR/boat")],
        "finetune.py", "only asked for: bus; only folders: boat"),
    bad("other classes of the teacher", remove("data/EO/bus", "data/SAR/bus"), "sar_feature.py",
        "set the DATA_ROOT that the checkpoint was trained on"),
    bad("another backbone", None, "sar_feature.py BACKBONE=test_efficientnet", "set INIT="),
    bad("INIT of another backbone", None, f"sar_feature.py BACKBONE=test_efficientnet INIT={TEACHER}",
        "does not hold the weights of test_efficientnet"),
    bad("weights of another backbone", edit(FINAL, backbone="test_efficientnet"), "results.py",
        f"the weights in {FINAL} are not those of a test_efficientnet with 4 classes"),
    bad("weights of other classes",
        [remove(TEST), edit(FINAL, classes=CLASSES[:3], class_ids=(0, 1, 2), counts=(4, 4, 4))], "results.py",
        "are not those of a test_resnet with 3 classes"),
    bad("backbone that timm lacks", edit(FINAL, backbone="resnet81"), "results.py",
        "knows no backbone 'resnet81'"),
    bad("newer version", edit(TEACHER, format=FORMAT + 1, classes=None), "sar_feature.py",
        "written by a newer version"),
    bad("code", lambda: Path(TEACHER).write_bytes(pickle.dumps(Code(), 2)), "sar_feature.py",
        "code in it, which is not run"),
    bad("older version", edit(TEACHER, format=FORMAT - 1), "sar_feature.py", "written by an older version"),
    bad("code in a checkpoint", lambda: torch.save({"format": Code()}, TEACHER), "sar_feature.py",
        "which is not run"),
    bad("code in weights", lambda: torch.save(Code(), "w.pt"), "pretrain.py WEIGHTS=w.pt",
        "code, which is never run"),
    bad("empty checkpoint", write(STUDENT, b""), "finetune.py", f"{STUDENT} is no readable checkpoint"),
    bad("checkpoint cut off", cut(STUDENT, 5000), "finetune.py",
        "make it anew: python sar_feature.py"),
    bad("a folder", None, "finetune.py STUDENT=runs", "runs is no readable checkpoint (Is a directory)"),
    bad("another dictionary", lambda: torch.save({"a": 1}, STUDENT), "finetune.py",
        "is not a checkpoint of this project"),
    bad("a tensor", lambda: torch.save(torch.ones(1), STUDENT), "finetune.py",
        "is not a checkpoint of this project"),
    *(bad(f"{key} is missing", edit(STUDENT, **{key: None}), "finetune.py",
        "not a checkpoint") for key in KEYS if key not in ("eo_reading", "held_out")),  # older checkpoints have neither
    *(bad(f"{key} is a tensor", edit(STUDENT, **{key: torch.ones(3)}), "finetune.py",
        "not a checkpoint", pytest.mark.slow) for key in KEYS),
    *(bad(f"{key} is nan", edit(STUDENT, **{key: float("nan")}), "finetune.py",
        "not a checkpoint", pytest.mark.slow) for key in KEYS),
    bad("fit on other features", edit(FINAL, ood={"gaussian_energy": {"white": torch.ones(2, 2)}}), "results.py",
        f"{FINAL}"),
    bad("weights that are not finite", edit(STUDENT, model={"head.weight": torch.full((2, 2), torch.nan)}),
        "finetune.py", "not finite, so its training failed; run again with a lower LEARNING_RATE"),

    # Settings and the machine
    *(bad(setting, None, f"pretrain.py {setting}", f"{setting.split('=')[0]} is ") for setting in (
        "EPOCHS=0", "EPOCHS=-1", "EPOCHS=1e3", "BATCH_SIZE=0", "IMAGE_SIZE=0", "SEED=-1",
        "SEED=99999999999999999999", "LEARNING_RATE=nan", "LEARNING_RATE=inf", "LEARNING_RATE=1e400",
        "LEARNING_RATE=0", "WEIGHT_DECAY=-1", "WARMUP_EPOCHS=-1", "WARMUP_EPOCHS=1e308", "CLIP=-1", "EMA=1",
        "EMA=-0.1", "VAL_FRACTION=0", "VAL_FRACTION=1", "GAMMA=-1", "BALANCE=-1", "BALANCE=1000",
        "GREY_RANGE=1", "GREY_RANGE=0,1,2", "GREY_RANGE=0,1e400", "GREY_RANGE=x,y",
        "JITTER=-1", "SPECKLE=nan", "ROTATION=181", "CLASS_WEIGHTS=", "CLASS_WEIGHTS=-1", "CLASS_WEIGHTS=nan",
        "TRAIN_SCALES=", "TRAIN_SCALES=0", "TRAIN_SCALES=1e400", "CHIP_MEMORY_GB=-1")),
    *(bad(setting, None, f"sar_feature.py {setting}", f"{setting.split('=')[0]} is ") for setting in (
        "TEMPERATURE=0", "FEATURE_TEMPERATURE=-1", "KL_WEIGHT=-1", "LABEL_WEIGHT=1e400",
        "FEATURE_WEIGHT=nan", "FEATURE_LOSS=l1")),
    *(bad(setting, None, f"results.py {setting}", f"{setting.split('=')[0]} is ") for setting in (
        "SCALES=-1", "BATCH_SIZE=0", "CLUSTERS=-1", "SEQUENCE_GAP=-1", "VOTE_MIN_SHARE=2",
        "OOD_TEMPERATURE=0", "ROTATIONS=1e400", "CLUSTER_BY=all")),
    bad("no loss", None, "sar_feature.py KL_WEIGHT=0 LABEL_WEIGHT=0", "are all 0; nothing would be learned"),
    *(bad(f"{script} from white to black", None, f"{script} GREY_RANGE=255,0",
        "black and white, the first below the second, not (255.0, 0.0)") for script in list(QUICK)[:2]),
    *(bad(f"a second {stage}.py", lock(f"runs/{stage}.lock"), f"{stage}.py",
        f"another process writes into OUT_DIR runs/{stage} at this moment") for stage in EARLIER),
    bad("one value a channel", None, "pretrain.py BATCH_SIZE=1 OUT_DIR=other",
        "a batch norm needs more than one value a channel, but this step has 1 chips on each rank"),
    bad("no class weighs", None, "pretrain.py CLASS_WEIGHTS=0", "CLASS_WEIGHTS are all 0"),
    bad("too few CLASS_WEIGHTS", None, "pretrain.py CLASS_WEIGHTS=1,2", "CLASS_WEIGHTS needs 1 or 4 numbers"),
    bad("OUT_DIR is a file", write("file", b""), "pretrain.py OUT_DIR=file",
        "OUT_DIR file cannot be used: file is no"),
    bad("OUT_DIR in a file", write("file", b""), "results.py OUT_DIR=file/a/b",
        "file is no folder; move it or set"),
    bad("STORE_DIR is a file", write("file", b""), "finetune.py STORE_DIR=file",
        "STORE_DIR file cannot be used"),
    bad("unknown backbone", None, "pretrain.py BACKBONE=resnet81",
        "knows no backbone 'resnet81'; near: resnet1"),
    good("a size that the backbone does not take", None, "pretrain.py BACKBONE=test_vit IMAGE_SIZE=57", "written:"),
    good("a scale that it does not take", None, "pretrain.py BACKBONE=test_vit IMAGE_SIZE=32 TRAIN_SCALES=0.9",
        "written:"),
    *(good(f"{script} BATCH_SIZE=200", None, f"{script} BATCH_SIZE=200", "written:") for script in QUICK),
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small data set, and the outputs of the four scripts on it."""
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(sys, "argv", [])
        paths = [f"data/{sensor}/{name}/{i}.png" for sensor in SENSORS for name in CLASSES for i in range(4)]
        paths += [f"data/{part}/Gotcha{n}.png" for part in ("val", "test") for n in range(101, 109)]
        for path in paths:
            chip(path)()
        reference()()
        for script in QUICK:
            run(script)
        shutil.rmtree("runs/chips")
    return root


def run(command):
    script, *settings = shlex.split(command)
    sys.argv = [script, *QUICK[script].split(), *settings]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def copy_or_link(source, target):
    """The large last.pt is never written in place, by no case and no script."""
    (os.link if Path(source).name.startswith("last.") else shutil.copy)(source, target)


def earlier_files():
    return {p: p.read_bytes() for stage in EARLIER for p in Path("runs", stage).rglob("*") if p.is_file()}


@pytest.mark.parametrize("change, command, message, refused, holds", CASES)
def test_input(world, tmp_path, monkeypatch, capsys, change, command, message, refused, holds):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(identity, "source_digest", SOURCE_DIGEST)
    case = world
    if change or not refused:  # a refused run changes nothing, so it needs no copy of its own
        case = shutil.copytree(world, tmp_path / "case", ignore=lambda *_: ["chips"], copy_function=copy_or_link)
    monkeypatch.chdir(case)
    for one in change if isinstance(change, list) else [change or (lambda: None)]:
        one()
    before = earlier_files()
    capsys.readouterr()
    try:
        with LOCKS:
            command() if callable(command) else run(command)
        stopped = None
    except SystemExit as error:
        stopped = error.code
    said = capsys.readouterr()
    if refused:
        assert isinstance(stopped, str) and message in stopped, stopped
        assert "epoch 1" not in said.out + said.err and earlier_files() == before
    else:
        assert stopped is None and message in said.out, stopped
        assert holds is None or holds()
    assert "Traceback" not in said.out + said.err and not Path("code_ran").exists()
