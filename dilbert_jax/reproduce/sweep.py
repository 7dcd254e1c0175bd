"""What the sweep over learning rates found, as sweep.md and sweep.json."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dilbert_jax.models import find_system
from dilbert_jax.reproduce.cells import read_cell
from dilbert_jax.reproduce.grid import Cell
from dilbert_jax.reproduce.tables import TITLES

HEADS = ("condition", "findings")


def write_sweep(cells: Sequence[Cell], budget: str, output: pathlib.Path, command: str) -> pathlib.Path:
    """Writes sweep.md and sweep.json: macro F1 on validation clips, by system and rate.

    A system whose cells are not all finished keeps no rate yet. sweep.json holds every finished cell, for `--reuse`.
    """
    found = {cell: record for cell in cells if (record := read_cell(cell, output, budget)) is not None}
    rates = sorted({cell.rate for cell in cells if cell.rate is not None})
    table: dict[str, dict[float, float | None]] = {}
    rows: dict[str, list[str]] = {}
    for cell in cells:
        record = found.get(cell)
        networks = record["evaluation"]["networks"] if record and "evaluation" in record else {}
        scores = {name: _sweep_score(network["annotation"]) for name, network in networks.items()}
        if record:
            assert cell.rate is not None
            table.setdefault(cell.system, {})[cell.rate] = scores.get("student")
        title = TITLES.get(cell.system, cell.system)
        for name, row in (("student", title), ("teacher", f"{title}'s teacher")):
            if name == "student" or find_system(cell.system).distilled:
                text = "–" if record is None else f"{scores[name]:.3f}" if scores else "diverged"
                rows.setdefault(row, []).append(text)
    chosen = {
        system: max(scores, key=lambda rate: (scores[rate] or 0.0, -rate))
        for system, scores in table.items()
        if len(scores) == len(rates)
    }
    kept = {TITLES.get(system, system): f"{rate:g}" for system, rate in chosen.items()}
    lines = [
        f"# Learning rates by system (budget `{budget}`)",
        "",
        f"`{command}`: every system once at each rate, the same budget.",
        "Mean of the macro F1 of condition and findings on validation clips (one seed, which no table uses); the best",
        "is kept, of DILBERT that of its student.",
        "",
        "| system | " + " | ".join(f"{rate:g}" for rate in rates) + " | kept |",
        "|---" * (len(rates) + 2) + "|",
        *(f"| {row} | {' | '.join(texts)} | {kept.get(row, '')} |" for row, texts in rows.items()),
        "",
        f"{len(found)} of {len(cells)} cells; {_sweep_data(found.values())}.",
    ]
    path = output / "sweep.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    # Validation answers clip by clip decide nothing here.
    records = [{k: v for k, v in record.items() if k != "decisions"} for record in found.values()]
    content = {"command": command, "budget": budget, "scores": table, "kept": chosen, "cells": records}
    (output / "sweep.json").write_text(
        json.dumps(content, allow_nan=False, separators=(",", ":")), encoding="utf-8"
    )
    return path


def _sweep_score(annotation: Mapping[str, Any]) -> float:
    figures = [annotation[head]["macro"]["f1"]["value"] for head in HEADS]
    return sum(figures) / len(figures)


def _sweep_data(records: Iterable[Mapping[str, Any]]) -> str:
    """On what the cells of a sweep were trained and validated, by which code and where."""
    kinds = {
        (
            f"{e['num_train_clips']} training and {e['num_clips']} validation clips of {e['dataset']}, "
            f"commit {record['commit']}, device {e['device']}"
        )
        for record in records
        if (e := record.get("evaluation"))
    }
    return "; ".join(sorted(kinds))
