"""What a run shows: training curves, confusion matrix, tables of scores."""

import csv
import json

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from sklearn.metrics import ConfusionMatrixDisplay

LEGIBLE = 60  # classes up to which the confusion matrix is drawn with all names and figures


def plot_history(path, history):
    """Curves of loss, accuracy, learning rate and images/s over the epochs, as a PNG."""
    epochs = [row["epoch"] for row in history]
    panels = {"loss": [], "accuracy": [], "learning rate": [], "images/s": []}
    for name in history[-1]:
        panel = next((p for p in panels if p in name), None)
        if panel:
            panels[panel].append(name)
    figure, axes = plt.subplots(1, len(panels), figsize=(14, 3.2), layout="constrained")
    for axis, (panel, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            axis.plot(epochs, [row[name] for row in history], marker=".", label=name)
        axis.set(title=panel, xlabel="epoch")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def table(rows, columns):
    """Text table: rows is {name: {column: number}}; figures with three decimals, nan as -."""
    width = max(len(name) for name in rows) + 2
    lines = [" " * width + "  ".join(columns)]
    for name, row in rows.items():
        cells = (("-" if np.isnan(row[c]) else f"{row[c]:.3f}").rjust(len(c)) for c in columns)
        lines.append(name.ljust(width) + "  ".join(cells))
    return "\n".join(lines)


def forget_scores(out_dir):
    """Remove what save_scores wrote for an earlier prediction."""
    for name in ("steps.csv", "metrics.json", "confusion.csv", "confusion.png"):
        (out_dir / name).unlink(missing_ok=True)


def save_scores(out_dir, steps, predicted, labels, ood, classes):
    """steps.csv (the scores after each step), metrics.json (the final ones), confusion.csv, .png."""
    columns = list(next(iter(steps.values())))
    with open(out_dir / "steps.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *columns])
        writer.writerows([name, *row.values()] for name, row in steps.items())
    final = {k: None if np.isnan(v) else v for k, v in list(steps.values())[-1].items()}
    (out_dir / "metrics.json").write_text(json.dumps(final, indent=2) + "\n")
    matrix = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(matrix, (labels[~ood], predicted[~ood]), 1)
    with open(out_dir / "confusion.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *classes])
        writer.writerows([name, *row] for name, row in zip(classes, matrix.tolist(), strict=True))
    few = len(classes) <= LEGIBLE
    side = 3 + 0.45 * min(len(classes), LEGIBLE)
    figure, axis = plt.subplots(figsize=(side + 1, side), layout="constrained")
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    if few:
        # A name that is no text, or would be set as a formula, is still drawn.
        names = [name.encode(errors="replace").decode().replace("$", r"\$") for name in classes]
        shown = ConfusionMatrixDisplay(shares, display_labels=names)
        shown.plot(ax=axis, cmap="cividis", xticks_rotation="vertical", values_format=".2f", colorbar=False)
    else:
        axis.imshow(shares, cmap="cividis")
    axis.set_title("share of each true class")
    figure.savefig(out_dir / "confusion.png", dpi=90)
    plt.close(figure)
