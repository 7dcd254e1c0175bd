"""Metrics on disk: one JSON object a line, and TensorBoard when tensorboardX is installed."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax


class MetricsLog:
    """Appends records to a file of the workdir, one JSON object a line; of several processes only the first does."""

    def __init__(self, workdir: pathlib.Path, name: str = "metrics.jsonl"):
        self.path = workdir / name
        self._writes = jax.process_index() == 0
        try:
            from tensorboardX import SummaryWriter  # the extra "tensorboard"
        except ImportError:
            self._tensorboard = None
        else:
            self._tensorboard = SummaryWriter(str(workdir / "tensorboard"))

    def rewind(self, stage: str, step: int) -> None:
        """Drops records of `stage` after `step`: a resumed run writes them again."""
        if not self._writes or not self.path.exists():
            return
        kept = [r for r in read_metrics(self.path) if r["stage"] != stage or r["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        temporary.replace(self.path)

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record; it holds at least `stage` and `step`."""
        if not self._writes:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._tensorboard is not None:
            for name, value in record.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._tensorboard.add_scalar(f"{record['stage']}/{name}", value, record["step"])
            self._tensorboard.flush()


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads what `MetricsLog` wrote; a last line cut off by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
