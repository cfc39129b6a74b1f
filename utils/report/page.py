"""The files of a report on a prediction: tables of scores, and one HTML page with all pictures."""

import base64
import csv
import html
import json
from pathlib import Path
from string import Template

from utils.report import pictures
from utils.report.figures import save_png
from utils.run.files import atomic_file

import numpy as np

PAGE = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))


def table(rows, columns):
    """Text table.

    Args:
        rows: {name: {column: number}}; numbers get three decimals, nan is shown as "-".
        columns: names of the columns, in their order.
    """
    width = max(len(name) for name in rows) + 2
    lines = [" " * width + "  ".join(columns)]
    for name, row in rows.items():
        cells = (_number(row[c]).rjust(len(c)) for c in columns)
        lines.append(name.ljust(width) + "  ".join(cells))
    return "\n".join(lines)


def describe_intervals(prediction):
    """The 95 % intervals of the last step's scores in a line of text; needs truth."""
    names = ("accuracy", "AUROC", "total")
    limits = (f"{name} {' to '.join(map(_number, prediction.intervals[name]))}" for name in names)
    return f"95 % intervals (bootstrap over groups of chips): {', '.join(limits)}"


def remove_old_scores(out_dir):
    """Delete the scores and the report of an earlier prediction, which do not describe the new one."""
    pngs = [f"{draw.__name__}.png" for draw in pictures.CAPTIONS]
    for name in ("report.html", "steps.csv", "metrics.json", "confusion.csv", *pngs):
        (out_dir / name).unlink(missing_ok=True)


def save_scores(out_dir, prediction):
    """Write steps.csv (scores after each step), metrics.json (final scores) and confusion.csv.

    Args:
        out_dir: Path of a folder.
        prediction: `utils.report.prediction.Prediction` with truth.
    """
    steps = prediction.scores
    final = list(steps.values())[-1]
    with atomic_file(out_dir / "steps.csv", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *final])
        writer.writerows([name, *row.values()] for name, row in steps.items())
    with atomic_file(out_dir / "metrics.json") as file:
        valid = {name: None if np.isnan(value) else value for name, value in final.items()}
        file.write(json.dumps(valid, indent=2) + "\n")
    path = out_dir / "confusion.csv"
    with atomic_file(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *prediction.classes])
        rows = zip(prediction.classes, prediction.confusion.tolist(), strict=True)
        writer.writerows([name, *row] for name, row in rows)


def write_report(out_dir, prediction):
    """Write report.html, one page that contains its pictures, and each picture as a PNG.

    Args:
        out_dir: Path of a folder.
        prediction: `utils.report.prediction.Prediction`; without truth, or without chips in distribution,
            the page leaves out what needs them.
    """
    parts = [_tiles(prediction)]
    parts += [_step_table(prediction)] if prediction.can_be_scored else []
    for draw, caption in pictures.CAPTIONS.items():
        if draw in pictures.NEEDS_TRUTH and not prediction.can_be_scored:
            continue
        figure = draw(prediction)
        if figure is not None:
            path = out_dir / f"{draw.__name__}.png"
            with atomic_file(path, "wb") as file:
                save_png(figure, file)
            parts.append(
                f'<figure><img src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" '
                f'alt="{path.stem.replace("_", " ")}"><figcaption>{caption}</figcaption></figure>'
            )
    settings = "\n".join(f"{name} = {value!r}" for name, value in prediction.settings.items())
    parts.append(f"<details><summary>Settings</summary><pre>{_text(settings)}</pre></details>")
    with atomic_file(out_dir / "report.html", encoding="utf-8") as file:
        file.write(PAGE.substitute(body="\n".join(parts)))


def _tiles(prediction):
    """The final scores with their intervals, and the numbers of chips, clusters and changed labels."""
    labels, truth = prediction.labels, prediction.truth
    changed = int((labels != prediction.labels_before_vote).sum())
    tiles, note = {}, f"<p>Vote: {_text(prediction.vote)}.</p>" if prediction.vote else ""
    if truth is not None:
        for name, value in list(prediction.scores.values())[-1].items():
            tiles[name] = _number(value), " to ".join(map(_number, prediction.intervals[name]))
        note += (
            "<p><small>Below each score: its 95 % interval, from a bootstrap over groups of frame numbers (without "
            "such: over clusters), because the chips of one vehicle are not independent.</small></p>"
        )
    tiles |= {
        "chips": (f"{len(labels):,}", f"in {int(prediction.clusters.max()) + 1:,} clusters"),
        "labels changed by the vote": (f"{changed:,}", f"{changed / len(labels):.1%}"),
        "time per chip": (f"{prediction.seconds * 1000:.1f} ms", "views, clusters and vote"),
    }
    boxes = [f"<div>{name}<b>{value}</b><small>{more}</small></div>" for name, (value, more) in tiles.items()]
    return f'<div class="tiles">{"".join(boxes)}</div>{note}'


def _step_table(prediction):
    """HTML table of what each step changed."""
    header = ("step", "accuracy", "AUROC", "labels changed", "right to wrong", "wrong to right")
    rows, previous = [], None
    for name, (labels, _) in prediction.steps.items():
        row = prediction.scores[name]
        cells = [name, _number(row["accuracy"]), _number(row["AUROC"])]
        if previous is None:
            cells += ["", "", ""]
        else:
            truth, known = prediction.truth.labels, prediction.in_distribution
            was_right, is_right = known & (previous == truth), known & (labels == truth)
            cells += [x.sum() for x in (labels != previous, was_right & ~is_right, ~was_right & is_right)]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        previous = labels
    heads = "".join(f"<th>{cell}</th>" for cell in header)
    return f'<h2>What each step changed</h2><div class="wide"><table><tr>{heads}</tr>{"".join(rows)}</table></div>'


def _number(value):
    return "-" if np.isnan(value) else f"{value:.3f}"


def _text(text):
    """Text as HTML; bytes that are not UTF-8 become "?"."""
    return html.escape(text.encode(errors="replace").decode())
