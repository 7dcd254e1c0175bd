"""Metrics of a few steps: averaged, checked, written to the log."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np

from dilbert_jax.experiment import Experiment
from dilbert_jax.training.log import MetricsLog
from dilbert_jax.training.stages import Stage


class NonFiniteLossError(RuntimeError):
    """A loss term became NaN or infinite; the message names stage, step, term and the batch's studies."""


class MetricsWindow:
    """Averages metrics over `log_every` steps, checks them one step late, writes them to the log."""

    def __init__(
        self,
        stage: Stage,
        experiment: Experiment,
        metrics_log: MetricsLog,
        schedule: Any,
        batch_size: int,
        log_every: int,
    ):
        self.stage, self.experiment, self.metrics_log = stage, experiment, metrics_log
        self.schedule, self.batch_size, self.log_every = schedule, batch_size, log_every
        self.pending: tuple[int, Any, np.ndarray] | None = None
        self.rows: list[dict[str, float]] = []
        self.started = time.monotonic()
        self.summary = ""

    def add(self, step: int, metrics: Any, studies: np.ndarray) -> None:
        self._settle()
        self.pending = (step, metrics, studies)

    def flush(self) -> None:
        """Reads what is pending and writes the open window."""
        self._settle()
        if self.rows:
            self._write(self.last_step)

    def _settle(self) -> None:
        if self.pending is None:
            return
        step, metrics, studies = self.pending
        self.pending = None
        row = {name: float(value) for name, value in jax.device_get(metrics).items()}
        bad = [name for name, value in row.items() if not np.isfinite(value)]
        if bad:
            ids = [self.experiment.store.studies[i].study_id for i in np.asarray(studies)]
            raise NonFiniteLossError(
                f"stage {self.stage.name}, step {step}: {', '.join(bad)} not finite; the batch's studies are "
                f"{', '.join(ids)}. The last checkpoint is good: lower optimizer.learning_rate in another "
                "workdir, or look at these studies"
            )
        self.rows.append(row)
        self.last_step = step + 1
        # The very first step stands alone, so that the log shows where every loss started.
        if step == 0 or (step + 1) % self.log_every == 0:
            self._write(step + 1)

    def _write(self, step: int) -> None:
        now = time.monotonic()
        means = {name: float(np.mean([row[name] for row in self.rows])) for name in self.rows[0]}
        rate = len(self.rows) * self.batch_size / max(now - self.started, 1e-9)
        self.metrics_log.write(
            {
                "stage": self.stage.name,
                "step": step,
                "epoch": round(step / self.stage.steps_per_epoch, 3),
                "split": "train",
                "learning_rate": float(self.schedule(step - 1)),
                "clips_per_second": round(rate, 2),
                **means,
            }
        )
        self.summary = f"loss {means['loss']:.3f}, {rate:.0f} clips/s"
        self.rows, self.started = [], now
