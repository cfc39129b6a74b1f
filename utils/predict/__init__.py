"""Prediction: views, OOD scores, clusters, vote, submission, and `Predictor` for use from Python."""


def __getattr__(name):
    # Imported on first use: the training loop imports utils.predict.tta and with it this file, but the
    # Predictor needs scikit-learn's clustering, which takes a second to import.
    if name == "Predictor":
        from utils.predict.predictor import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
