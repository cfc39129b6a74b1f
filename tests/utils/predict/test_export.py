import re
import sys

from utils.predict import Predictor, export

import numpy as np
import pytest
import torch

# torch.export.save of torch 2.4 and torch.onnx use what newer Python deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6)


def exported(monkeypatch, *settings):
    for name in ("CHECKPOINT", "OUT", "TTA", "OOD_SCORE"):
        monkeypatch.setattr(export, name, getattr(export, name))  # as they are now, after the test
    monkeypatch.setattr(sys, "argv", ["export", *settings])
    export.main()


def same(outputs, predictions):
    logits, features, confidence = (np.asarray(output) for output in outputs)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert len(features) == len(predictions) and features.ndim == 2
    np.testing.assert_allclose(probabilities, predictions.probabilities, atol=1e-5)
    np.testing.assert_allclose(confidence, predictions.confidence, rtol=1e-5, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("tta, score, size", [(False, "", 32), (True, "knn", 40)])
def test_the_program_gives_what_the_predictor_gives(make_checkpoint, chips, tmp_path, monkeypatch, tta, score, size):
    path, out = make_checkpoint(image_size=size), tmp_path / "new/student.pt2"
    exported(monkeypatch, f"CHECKPOINT={path}", f"OUT={out}", f"TTA={tta}", f"OOD_SCORE={score}")
    predictor = Predictor.load(path, device="cpu", tta=tta, ood_score=score)
    program = torch.export.load(out).module()
    for count in (1, 5):
        same(program(torch.from_numpy(chips[:count])), predictor(chips[:count]))


@pytest.mark.slow
@pytest.mark.skipif(OLD, reason="ONNX needs torch 2.6 or newer")
def test_onnx_gives_what_the_predictor_gives(make_checkpoint, chips, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    path, out = make_checkpoint(), tmp_path / "student.onnx"
    exported(monkeypatch, f"CHECKPOINT={path}", f"OUT={out}")
    session, predictor = onnxruntime.InferenceSession(out), Predictor.load(path, device="cpu", tta=False)
    for count in (1, 5):
        same(session.run(None, {"chips": chips[:count]}), predictor(chips[:count]))


@pytest.mark.parametrize("size", [32, 24, 56, 224])
def test_the_resize_matrix_is_the_resize_of_the_network(size):
    from data.augment import resize

    images = torch.randn(2, 1, 32, 32)
    matrix = export._resize_matrix(32, size)
    torch.testing.assert_close(matrix @ images @ matrix.T, resize(images, size), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("view", range(8))
def test_turned_is_turn(chips, view):
    from data.augment import turn

    images = torch.from_numpy(chips)
    assert torch.equal(export._turned(images, view), turn(images, torch.full((5,), view)))


def test_wrong_settings_are_refused(make_checkpoint, tmp_path, monkeypatch):
    one = make_checkpoint()
    for settings, message in (
        (["OUT=a.pt"], "OUT ends with .pt2 or .onnx; a.pt does not"),
        ([f"CHECKPOINT={one},{one}", f"OUT={tmp_path}/a.pt2"], "CHECKPOINT is one file here"),
        ([f"CHECKPOINT={one}", "OOD_SCORE=entropy"], "OOD_SCORE is empty or one of"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            exported(monkeypatch, *settings)
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the packages onnx and onnxscript: pip install onnx onnxscript"):
        exported(monkeypatch, "OUT=a.onnx")
