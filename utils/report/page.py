"""What a run shows: training curves, tables of scores, and the report on a prediction."""

import base64
import csv
import html
import io
import json
from dataclasses import dataclass
from functools import cached_property

from utils.report import pictures
from utils.report.metrics import intervals, scores
from utils.run.files import whole_file

import matplotlib.pyplot as plt
import numpy as np

SCORES = ("steps.csv", "metrics.json", "confusion.csv")
THEMES = {
    "light": {},
    "dark": {name: "#e6e6e6" for name in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")}
    | {"axes.edgecolor": "#8a8a8a", "axes.facecolor": "#1b1d21", "figure.facecolor": "#1b1d21"}
    | {"legend.facecolor": "#1b1d21", "savefig.facecolor": "#1b1d21"},
}
CAPTIONS = {
    "confusion": "Confusion matrix of the chips in distribution, after the vote.",
    "recall": "Recall of each class beside the number of chips it was trained on: the long tail.",
    "reliability": "How often the network is right when it says how sure it is, before the vote.",
    "energy": "Confidence of the chips; below the dashed line fall 5 % of those in distribution.",
    "roc": "Telling chips in distribution from others by their confidence.",
    "feature_map": "The features of the chips by t-SNE, coloured by predicted class.",
    "clusters": "The largest clusters and their votes.",
    "mistakes": "The chips that the network is most surely wrong about, with the two nearest class "
    "centres of the training chips in its features.",
}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Report</title><style>
:root {{ color-scheme: light dark; --ink: #1d1f23; --paper: #ffffff; --rule: #d4d7dc; --soft: #5d636e; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6e6e6; --paper: #1b1d21; --rule: #3b4048; --soft: #a3a9b3; }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem; }}
.tiles div {{ border: 1px solid var(--rule); border-radius: .4rem; padding: .6rem .8rem; }}
.tiles b {{ display: block; font-size: 1.5rem; }} small, figcaption {{ color: var(--soft); }}
.wide {{ overflow-x: auto; }} table {{ border-collapse: collapse; }}
td, th {{ border-bottom: 1px solid var(--rule); padding: .25rem .7rem .25rem 0; text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }}
figure {{ margin: 2rem 0; overflow-x: auto; }} img {{ max-width: max(100%, 44rem); height: auto; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
</style></head><body><h1>SAR chips, predicted</h1>
{body}
</body></html>
"""


@dataclass
class Found:
    """A prediction of N chips in C classes, and how it came about."""

    classes: list  # names, [C]
    settings: dict
    stages: dict  # {step: (labels [N], confidence [N])}; the last one is submitted
    probabilities: np.ndarray  # [N, C], over all views
    clusters: np.ndarray  # [N] ids
    features: np.ndarray  # [N, D]
    chips: object  # indices -> uint8 [B, S, S] array
    seconds: float  # a chip
    counts: list  # of training chips, [C]
    nearest: np.ndarray = None  # [N, C] classes by distance of their centre, or None
    truth: object = None  # data.layouts.Labelled, or None

    @property
    def labels(self):
        return list(self.stages.values())[-1][0]

    @property
    def before(self):
        """Labels before the vote."""
        return self.probabilities.argmax(1)

    @property
    def score(self):
        return list(self.stages.values())[-1][1]

    @cached_property
    def scores(self):
        """{step: scores of utils.report.metrics}, with truth."""
        return {
            name: scores(*stage, self.truth.labels, self.truth.ood) for name, stage in self.stages.items()
        }

    @cached_property
    def places(self):
        """Of `pictures.places`: computed once for both themes."""
        return pictures.places(self.features)

    @property
    def known(self):
        """Whether a chip is known to be in distribution, [N]."""
        return ~self.truth.ood

    @property
    def right(self):
        return self.labels == self.truth.labels


def plot_history(path, history):
    """Curves of loss, accuracy, learning rate and images/s over the epochs, as a PNG."""
    epochs = [row["epoch"] for row in history]
    panels = {"loss": [], "accuracy": [], "learning rate": [], "images/s": []}
    for name in history[-1]:
        panel = next((p for p in panels if p in name), None)
        if panel:
            panels[panel].append(name)
    figure, axes = plt.subplots(1, len(panels), figsize=(14, 3.4), layout="constrained")
    for axis, (panel, names) in zip(axes, panels.items(), strict=True):
        for name, colour in zip(names, pictures.COLOURS, strict=False):
            axis.plot(epochs, [row[name] for row in history], marker=".", label=name, color=colour)
        axis.set(title=panel, xlabel="epoch")
        axis.grid(alpha=0.3)
    handles, names = axes[1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize="small")
    with whole_file(path, "wb") as file:
        figure.savefig(file, format="png", dpi=100)
    plt.close(figure)


def event_writer(out_dir, epochs):
    """A writer of TensorBoard's event files for a run of which so many epochs are done.

    Epochs after them that an earlier writer told of come again, and TensorBoard forgets the first.
    """
    from torch.utils.tensorboard import SummaryWriter  # needs a package that few ask for

    return SummaryWriter(out_dir, purge_step=epochs + 1)


def write_events(events, row):
    """Write a row of the history, at once."""
    for name, value in row.items():
        if name != "epoch":
            events.add_scalar(name, value, row["epoch"])
    events.flush()


def table(rows, columns):
    """Text table: rows is {name: {column: number}}; figures with three decimals, nan as -."""
    width = max(len(name) for name in rows) + 2
    lines = [" " * width + "  ".join(columns)]
    for name, row in rows.items():
        cells = (_number(row[c]).rjust(len(c)) for c in columns)
        lines.append(name.ljust(width) + "  ".join(cells))
    return "\n".join(lines)


def forget_scores(out_dir):
    """Remove what was written for an earlier prediction, which does not belong to a new submission."""
    drawn = [f"{draw.__name__}.png" for draw in pictures.IN_ORDER]
    for name in ("report.html", *SCORES, *drawn):
        (out_dir / name).unlink(missing_ok=True)


def save_scores(out_dir, found):
    """steps.csv (the scores after each step), metrics.json (the final ones), confusion.csv."""
    steps = found.scores
    columns = list(next(iter(steps.values())))
    with whole_file(out_dir / "steps.csv", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *columns])
        writer.writerows([name, *row.values()] for name, row in steps.items())
    final = {k: None if np.isnan(v) else v for k, v in list(steps.values())[-1].items()}
    with whole_file(out_dir / "metrics.json") as file:
        file.write(json.dumps(final, indent=2) + "\n")
    path = out_dir / "confusion.csv"
    with whole_file(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *found.classes])
        matrix = pictures.confusion_matrix(found).tolist()
        writer.writerows([name, *row] for name, row in zip(found.classes, matrix, strict=True))


def write_report(out_dir, found):
    """report.html, one page that needs nothing else, and its pictures as PNGs beside it."""
    parts = [_summary(found)]
    judged = found.truth is not None and found.known.any()
    parts += [_changes(found)] if judged else []
    for draw in pictures.IN_ORDER:
        if draw in pictures.WITH_TRUTH and not judged or draw is pictures.roc and found.known.all():
            continue
        drawn = {}
        for theme, colours in THEMES.items():
            with plt.rc_context(colours):
                figure = draw(found)
                if figure is None:
                    break
                file = io.BytesIO()
                figure.savefig(file, format="png", dpi=100)
                plt.close(figure)
            drawn[theme] = file.getvalue()
        if drawn:
            with whole_file(out_dir / f"{draw.__name__}.png", "wb") as file:
                file.write(drawn["light"])
            parts.append(_figure(draw.__name__, drawn))
    settings = "\n".join(f"{name} = {value!r}" for name, value in found.settings.items())
    parts.append(f"<details><summary>Settings</summary><pre>{_text(settings)}</pre></details>")
    with whole_file(out_dir / "report.html", encoding="utf-8") as file:
        file.write(PAGE.format(body="\n".join(parts)))


def _summary(found):
    count, groups = len(found.labels), int(found.clusters.max()) + 1
    changed = int((found.labels != found.before).sum())
    tiles = {}
    if found.truth is not None:
        last = list(found.scores.values())[-1]
        spread = intervals(found.labels, found.score, found.truth.labels, found.truth.ood, found.clusters)
        tiles = {
            name: (_number(value), f"{_number(spread[name][0])} to {_number(spread[name][1])}")
            for name, value in last.items()
        }
    tiles |= {
        "chips": (f"{count:,}", f"in {groups:,} clusters"),
        "labels changed by the vote": (f"{changed:,}", f"{changed / count:.1%}"),
        "time a chip": (f"{found.seconds * 1000:.1f} ms", "views, clusters and vote"),
    }
    boxes = [f"<div>{name}<b>{value}</b><small>{more}</small></div>" for name, (value, more) in tiles.items()]
    note = ""
    if found.truth is not None:
        note = (
            "<p><small>Below each score its 95 % interval, by a bootstrap over clusters: the chips of a "
            "scene are right or wrong together.</small></p>"
        )
    return f'<div class="tiles">{"".join(boxes)}</div>{note}'


def _changes(found):
    """What each step changed, as a table."""
    head = ("step", "accuracy", "AUROC", "labels changed", "right to wrong", "wrong to right")
    rows, before = [], None
    for name, row in found.scores.items():
        labels, _ = found.stages[name]
        cells = [name, _number(row["accuracy"]), _number(row["AUROC"])]
        if before is None:
            cells += ["", "", ""]
        else:
            was, now = (found.known & (x == found.truth.labels) for x in (before, labels))
            cells += [(labels != before).sum(), (was & ~now).sum(), (~was & now).sum()]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        before = labels
    heads = "".join(f"<th>{cell}</th>" for cell in head)
    whole = f"<table><tr>{heads}</tr>{''.join(rows)}</table>"
    return f'<h2>What each step changed</h2><div class="wide">{whole}</div>'


def _figure(name, drawn):
    """The picture of the reader's theme, in the page itself."""
    light, dark = (f"data:image/png;base64,{base64.b64encode(drawn[theme]).decode()}" for theme in THEMES)
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{name.replace("_", " ")}"></picture>'
        f"<figcaption>{CAPTIONS[name]}</figcaption></figure>"
    )


def _number(value):
    return "-" if np.isnan(value) else f"{value:.3f}"


def _text(text):
    return html.escape(text.encode(errors="replace").decode())
