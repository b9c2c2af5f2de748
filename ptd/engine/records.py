"""What a run writes about itself while it goes: ``metrics.jsonl``, TensorBoard and the loss curve."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ptd.checkpoint.files import write_atomically, writing

METRICS = "metrics.jsonl"


class Records:
    """Writer of the records of a run, on rank 0. Training records carry ``loss``, evaluations ``eval_loss``.

    After a resume at ``after_step`` the records behind it are dropped: they will be written again; if the step's own
    ``evaluation_due``, that one too.
    """

    def __init__(self, folder: Path, after_step: int, *, evaluation_due: bool = False) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / METRICS
        kept = [record for record in read_records(folder) if record["step"] <= after_step]
        if evaluation_due:
            kept = [record for record in kept if record["step"] < after_step or "eval_loss" not in record]
        write_atomically(self.path, "".join(_line(record) for record in kept))
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=after_step + 1 if after_step else None)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record (a number that is not finite as null); its numbers go to TensorBoard under its ``step``.

        Raises `UserError` where that cannot be written.
        """
        with writing(self.path):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(record))
            for key, value in record.items():
                if key != "step" and isinstance(value, (int, float)):
                    self._board.add_scalar(key, value, record["step"])

    def close(self) -> None:
        with writing(self.path):
            self._board.close()


def _line(record: dict[str, Any]) -> str:
    # JSON has no NaN; most readers refuse the one that Python writes.
    finite = {key: value for key, value in record.items() if not isinstance(value, float) or math.isfinite(value)}
    valid = {key: finite.get(key) for key in record}
    return json.dumps(valid) + "\n"


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All whole records of a run's folder, oldest first (a line cut by a crash is left out)."""
    records = []
    path = folder / METRICS
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def plot_loss(folder: Path) -> Path | None:
    """Draw ``loss.png`` from the records; None when there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_records(folder)
    curves = {
        "training (each step)": ("loss", {"color": "#8da0cb", "linewidth": 1.2}),
        "held-out rows": ("eval_loss", {"color": "#d95f02", "linewidth": 1.8, "marker": "o", "markersize": 4}),
    }
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=150)
    for label, (key, style) in curves.items():
        points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    if not axes.lines:
        pyplot.close(figure)
        return None
    axes.set(xlabel="optimizer step", ylabel="loss (nats)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(folder / "loss.png")
    pyplot.close(figure)
    return folder / "loss.png"
