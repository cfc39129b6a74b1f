import base64
import csv
import json
import re

from tests.utils.report.example import make_prediction
from utils.report.page import remove_old_scores, save_scores, table, write_report

import numpy as np
import pytest

PICTURES = {"confusion", "recall", "reliability", "confidence", "feature_map", "clusters", "roc", "mistakes"}
WITHOUT_TRUTH = {"confidence", "feature_map", "clusters"}
ODD_NAMES = ("a$b$c", "$x", "caf\udce9", "<b>&")  # formulas, a file name that is not UTF-8, HTML


def report(folder, prediction):
    """The page, and the names of the pictures in the folder."""
    write_report(folder, prediction)
    page = (folder / "report.html").read_text(encoding="utf-8")
    return page, {path.stem for path in folder.glob("*.png")}


@pytest.fixture(scope="module")
def full_report(tmp_path_factory):
    """A prediction with everything on the page, its folder, the page, and the names of the pictures."""
    folder, prediction = tmp_path_factory.mktemp("report"), make_prediction()
    return prediction, folder, *report(folder, prediction)


def test_the_page_contains_every_picture_and_no_link(full_report):
    _, folder, page, pictures = full_report
    assert pictures == PICTURES
    embedded = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)">', page)
    assert {alt.replace(" ", "_") for _, alt in embedded} == PICTURES
    for data, alt in embedded:
        assert base64.b64decode(data) == (folder / f"{alt.replace(' ', '_')}.png").read_bytes()
    assert page.count("<img") == len(PICTURES)
    assert not re.search(r"https?:|<script|<link|href=|srcset=|url\(|@import", page)
    assert "$body" not in page and page.rstrip().endswith("</html>")


CASES = {
    "no truth": ({"truth": False}, WITHOUT_TRUTH),
    "no known chips": ({"ood": "all"}, WITHOUT_TRUTH),
    "no unknown chips": ({"ood": "none"}, PICTURES - {"roc"}),
    "one cluster": ({"groups": 1}, PICTURES),
    "no class means": ({"nearest": None}, PICTURES),
    "1001 classes": ({"classes": tuple(map(str, range(1001)))}, PICTURES),
    "odd names": ({"classes": ODD_NAMES}, PICTURES),
    "one known chip": ({"count": 1, "groups": 1, "ood": "none"}, PICTURES - {"roc"}),
    "one unknown chip": ({"count": 1, "groups": 1, "ood": "all"}, WITHOUT_TRUTH),
    "one chip": ({"count": 1, "groups": 1, "truth": False}, WITHOUT_TRUTH),
}


QUICK = ("no truth", "one chip")


@pytest.mark.parametrize(
    ("options", "expected"),
    [pytest.param(*case, id=name, marks=[] if name in QUICK else pytest.mark.slow) for name, case in CASES.items()],
)
def test_what_a_prediction_lacks_is_left_out(tmp_path, options, expected):
    prediction = make_prediction(**options)
    page, pictures = report(tmp_path, prediction)
    assert pictures == expected and page.count("<img") == len(expected)
    assert ("What each step changed" in page) == ("recall" in expected)
    if prediction.truth is not None:
        save_scores(tmp_path, prediction)
        final = json.loads((tmp_path / "metrics.json").read_text())
        assert (final["accuracy"] is None) == ("recall" not in expected)
        assert (final["AUROC"] is None) == ("roc" not in expected)


@pytest.mark.slow
def test_no_mistake_no_picture_of_mistakes(tmp_path):
    prediction = make_prediction(ood="none")
    prediction.steps["+ vote"] = prediction.truth.labels, prediction.confidence
    assert report(tmp_path, prediction)[1] == PICTURES - {"roc", "mistakes"}


def test_settings_and_scores_on_the_page(full_report):
    prediction, _, page, _ = full_report
    assert "DATA_ROOT = &#x27;data/&lt;a &amp; b&gt;&#x27;" in page
    for value in prediction.scores["+ vote"].values():
        assert f"<b>{value:.3f}</b>" in page
    cells = re.search(r"<tr><td>\+ vote(.*?)</td></tr>", page)[1].split("</td><td>")[1:]
    accuracy, auroc, changed, right_to_wrong, wrong_to_right = map(float, cells)
    before, after = prediction.scores["one view"], prediction.scores["+ vote"]
    assert accuracy == pytest.approx(after["accuracy"], abs=5e-4)
    assert auroc == pytest.approx(after["AUROC"], abs=5e-4)
    assert changed == (prediction.labels != prediction.labels_before_vote).sum() > 0
    known = prediction.in_distribution.sum()
    assert (wrong_to_right - right_to_wrong) / known == pytest.approx(after["accuracy"] - before["accuracy"])


def test_files_of_scores(tmp_path):
    prediction = make_prediction(classes=ODD_NAMES)
    save_scores(tmp_path, prediction)
    with open(tmp_path / "steps.csv", newline="", encoding="utf-8") as file:
        steps = list(csv.DictReader(file))
    assert [step["step"] for step in steps] == ["one view", "+ vote"]
    for step in steps:
        for name, value in prediction.scores[step["step"]].items():
            assert float(step[name]) == value
    assert json.loads((tmp_path / "metrics.json").read_text()) == prediction.scores["+ vote"]
    with open(tmp_path / "confusion.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        header, *rows = csv.reader(file)
    assert tuple(header[1:]) == tuple(row[0] for row in rows) == ODD_NAMES
    assert np.array_equal([[int(cell) for cell in row[1:]] for row in rows], prediction.confusion)


@pytest.mark.slow
def test_old_scores_are_removed_and_nothing_else(tmp_path):
    prediction = make_prediction()
    write_report(tmp_path, prediction)
    save_scores(tmp_path, prediction)
    (tmp_path / "results.csv").touch()
    remove_old_scores(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]


def test_table():
    text = table({"a": {"x": 0.5, "long": float("nan")}, "bcd": {"x": 1.0, "long": 0.12345}}, ["x", "long"])
    assert [line.split() for line in text.splitlines()] == [
        ["x", "long"], ["a", "0.500", "-"], ["bcd", "1.000", "0.123"]
    ]  # fmt: skip
