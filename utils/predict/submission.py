"""The submission: results.csv and readme.txt in a zip, in the challenge's format."""

import csv
import zipfile
from pathlib import Path

from utils.run.files import atomic_file


def write_submission(out_dir, image_ids, class_ids, confidences, seconds_per_image, on_gpu, description):
    """Write results.csv, readme.txt and submission.zip into `out_dir`.

    Args:
        image_ids: [N] numbers (or stems) of the chips' file names.
        class_ids: [N] the challenge's index of the predicted class.
        confidences: [N], higher = more in distribution.
        seconds_per_image: run time, s.
        on_gpu: whether a GPU was used.
        description: one line.

    Returns:
        Path of the zip.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    results, readme = out_dir / "results.csv", out_dir / "readme.txt"
    # Linux allows file names that are not valid UTF-8; they are written byte for byte.
    with atomic_file(results, newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image_id", "class_id", "score"])
        for image_id, class_id, score in zip(image_ids, class_ids, confidences, strict=True):
            # As many digits as tell the values of float32 apart; further ones would depend on the order of the chips.
            writer.writerow([image_id, int(class_id), f"{score:.9g}"])
    with atomic_file(readme, encoding="utf-8") as file:
        file.write(
            f"runtime per image [s] : {seconds_per_image:.6f}\n"
            f"CPU[1] / GPU[0] : {0 if on_gpu else 1}\n"
            "Extra Data [1] / No Extra Data [0] : 0\n"
            f"Other description : {description}\n"
        )
    with atomic_file(out_dir / "submission.zip", "wb") as archive:
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            for path in (results, readme):
                file.write(path, path.name)
    return out_dir / "submission.zip"
