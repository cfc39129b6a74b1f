"""The submission: results.csv and readme.txt in a zip, as the challenge asks for."""

import csv
import zipfile
from pathlib import Path

from utils.run.files import whole_file


def write_submission(out_dir, image_ids, class_ids, confidences, seconds_per_image, on_gpu, description):
    """Write results.csv, readme.txt and submission.zip into `out_dir`.

    Args:
        image_ids: [N] bare numbers (or stems) of the chips.
        class_ids: [N] index of the predicted class in the challenge.
        confidences: [N], higher = more in distribution.
        seconds_per_image: run time.
        on_gpu: True where a GPU was used.
        description: one line.

    Returns:
        Path of the zip.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    results, readme = out_dir / "results.csv", out_dir / "readme.txt"
    # Names that are no text, as Linux allows, stand there byte for byte.
    with whole_file(results, newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image_id", "class_id", "score"])
        for image_id, class_id, score in zip(image_ids, class_ids, confidences, strict=True):
            writer.writerow([image_id, int(class_id), f"{score:.6f}"])
    with whole_file(readme, encoding="utf-8") as file:
        file.write(
            f"runtime per image [s] : {seconds_per_image:.6f}\n"
            f"CPU[1] / GPU[0] : {0 if on_gpu else 1}\n"
            "Extra Data [1] / No Extra Data [0] : 0\n"
            f"Other description : {description}\n"
        )
    with whole_file(out_dir / "submission.zip", "wb") as whole:
        with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as file:
            for path in (results, readme):
                file.write(path, path.name)
    return out_dir / "submission.zip"
