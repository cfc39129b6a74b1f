"""The history of a training run: a row for each epoch, as CSV, as curves, and as TensorBoard's event files."""

import csv

from utils.run.files import atomic_file
from utils.run.ranks import rank


class History:
    """Rows of an epoch each, written by rank 0.

    Args:
        out_dir: folder of history.csv and curves.png.
        rows: list of dicts, of the epochs that are done.
        tensorboard: True writes event files as well; needs the package tensorboard.
    """

    def __init__(self, out_dir, rows, tensorboard=False):
        self.out_dir, self.rows, self.tensorboard, self.events = out_dir, rows, tensorboard, None

    def write(self):
        """Write all rows to history.csv, and the last one to the event files."""
        if rank():
            return
        row = self.rows[-1]
        with atomic_file(self.out_dir / "history.csv", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            writer.writeheader()
            writer.writerows(self.rows)
        if self.tensorboard:
            self._write_event(row)

    def _write_event(self, row):
        if self.events is None:
            from torch.utils.tensorboard import SummaryWriter  # an optional package

            # Epochs that a killed process wrote and that are trained again replace the old ones.
            self.events = SummaryWriter(self.out_dir, purge_step=row["epoch"])
        for name, value in row.items():
            if name != "epoch":
                self.events.add_scalar(name, value, row["epoch"])
        self.events.flush()

    def plot(self):
        """Draw curves.png."""
        if not rank():
            from utils.report.curves import plot_history  # matplotlib is slow to load

            plot_history(self.out_dir / "curves.png", self.rows)
