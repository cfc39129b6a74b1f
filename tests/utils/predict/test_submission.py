import csv
import io
import zipfile

from utils.predict.submission import write_submission

import numpy as np


def test_read_back_by_an_independent_reader(tmp_path):
    scores = [0.9999999, np.float32(-3.500000238)]
    path = write_submission(tmp_path / "out", ["17", "5"], [7, 0], scores, 0.0125, False, "words, here")
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["results.csv", "readme.txt"]
        rows = list(csv.DictReader(io.TextIOWrapper(archive.open("results.csv"), "utf-8")))
        readme = archive.read("readme.txt").decode().splitlines()
    assert list(rows[0]) == ["image_id", "class_id", "score"]
    assert [tuple(r.values()) for r in rows] == [("17", "7", "0.9999999"), ("5", "0", "-3.50000024")]
    assert readme == [
        "runtime per image [s] : 0.012500",
        "CPU[1] / GPU[0] : 1",
        "Extra Data [1] / No Extra Data [0] : 0",
        "Other description : words, here",
    ]
    assert (tmp_path / "out" / "results.csv").exists()
