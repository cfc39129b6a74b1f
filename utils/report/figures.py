"""Figures of matplotlib without pyplot: they need no window and do not change the user's backend."""

import contextlib
import os
import sys


def _import_matplotlib():
    """Import matplotlib even where MPLBACKEND names a backend that is not installed.

    A notebook hands its MPLBACKEND to the scripts that it starts. A name that matplotlib does not know
    stops its import, in a training run only when the curves are drawn, at the end.
    """
    if "matplotlib" in sys.modules:
        return
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend  # as its import would have done


_import_matplotlib()
from matplotlib.figure import Figure  # noqa: E402

# Okabe and Ito, "Color Universal Design", 2008: distinct for colour-blind readers.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#999999")


def subplots(rows=1, columns=1, size=None, **options):
    """A new figure and its axes.

    Args:
        rows, columns: of axes.
        size: width and height of the figure, inch.
        options: of `matplotlib.figure.Figure.subplots`.
    """
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def save_png(figure, file):
    """Write a figure as a PNG of 100 pixels per inch into a binary file."""
    figure.savefig(file, format="png", dpi=100)
