"""What the sweep over learning rates found, as sweep.md and sweep.json."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dilbert_jax.models import find_system
from dilbert_jax.reproduce.cells import read_cell
from dilbert_jax.reproduce.grid import Cell, budget_rate, learning_rates
from dilbert_jax.reproduce.tables import TITLES

HEADS = ("condition", "findings")
# The tasks that every system pre-trains for, as the tables measure them.
TASKS = {"mlm": "recall_at_10", "mdc": "recall_at_1", "moc": "recall_at_1", "cmm": "accuracy"}


def write_sweep(cells: Sequence[Cell], budget: str, output: pathlib.Path, command: str) -> pathlib.Path:
    """Writes sweep.md and sweep.json: what each system learned on validation clips, by learning rate.

    Pre-training is judged half by its tasks, half by annotation after it, fine-tuned at the budget's rate; fine-tuning
    by annotation, from what was pre-trained at the rate of `learning_rates`. A phase whose cells are not all finished
    keeps no rate yet. sweep.json holds every finished cell, for `--reuse`.
    """
    found = {cell: record for cell in cells if (record := read_cell(cell, output, budget)) is not None}
    systems = list(dict.fromkeys(cell.system for cell in cells))
    swept = [(cell, cell.rates) for cell in cells if cell.rates is not None]
    before = {cell: rates[0] for cell, rates in swept if rates[1] == budget_rate(budget)}
    after = {cell: rates[1] for cell, rates in swept if rates[0] == learning_rates(cell.system, budget)[0]}
    lines = [
        f"# Learning rates by system (budget `{budget}`)",
        "",
        f"`{command}`: every system once at each rate of pre-training, then, from what the better of them learned, at "
        "each of fine-tuning; the same budget, on one seed, which no table uses. The rate with the best mean on "
        "validation clips is kept, of DILBERT that of its student.",
    ]
    scores, kept = {}, {}
    annotation = "macro F1 of condition and findings after fine-tuning"
    tasks = (
        "half the mean of MLM R@10, MDC R@1, MOC R@1 and accuracy of matching, half that of the " + annotation
    )
    for phase, part, asked, rates, score in (
        (0, "pre-training", tasks, before, _pretraining_score),
        (1, "fine-tuning", "the mean " + annotation, after, _annotation_score),
    ):
        tried = {s: sorted(rate for cell, rate in rates.items() if cell.system == s) for s in systems}
        columns = sorted(set(rates.values()))
        scores[part] = {system: _scores(system, rates, found, score) for system in systems}
        kept[part] = {
            system: max(by_rate, key=lambda rate: (by_rate[rate].get("student", 0.0), -rate))
            for system, by_rate in scores[part].items()
            if len(by_rate) == len(tried[system])
        }
        at = "pre-trained at" if phase else "fine-tuned at"
        lines += [
            "",
            f"## {part.capitalize()}",
            "",
            f"Judged by {asked}.",
            "",
            f"| system | {at} | {' | '.join(f'{rate:g}' for rate in columns)} | kept |",
            "|---" * (len(columns) + 3) + "|",
        ]
        for system in systems:
            title = TITLES.get(system, system)
            start = f"{learning_rates(system, budget)[0] if phase else budget_rate(budget):g}"
            for network in ("student", "teacher")[: 1 + find_system(system).distilled]:
                by_rate = scores[part][system]
                texts = [_text(by_rate.get(r), network) if r in tried[system] else "" for r in columns]
                best = f"{kept[part][system]:g}" if network == "student" and system in kept[part] else ""
                row = f"{title}'s teacher" if network == "teacher" else title
                lines.append(f"| {row} | {start} | {' | '.join(texts)} | {best} |")
    lines += ["", f"{len(found)} of {len(cells)} cells; {_sweep_data(found.values())}."]
    path = output / "sweep.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    # Validation answers clip by clip decide nothing here.
    records = [{k: v for k, v in record.items() if k != "decisions"} for record in found.values()]
    content = {"command": command, "budget": budget, "scores": scores, "kept": kept, "cells": records}
    (output / "sweep.json").write_text(
        json.dumps(content, allow_nan=False, separators=(",", ":")), encoding="utf-8"
    )
    return path


def _scores(
    system: str,
    rates: Mapping[Cell, float],
    found: Mapping[Cell, Mapping[str, Any]],
    score: Callable[[Mapping[str, Any]], float],
) -> dict[float, dict[str, float]]:
    """Of each finished cell of a system: rate -> network -> score; no networks where the loss diverged."""
    return {
        rate: {
            name: score(network)
            for name, network in found[cell].get("evaluation", {"networks": {}})["networks"].items()
        }
        for cell, rate in rates.items()
        if cell.system == system and cell in found
    }


def _text(networks: Mapping[str, float] | None, network: str) -> str:
    if networks is None:
        return "–"
    return f"{networks[network]:.3f}" if network in networks else "diverged"


def _pretraining_score(network: Mapping[str, Any]) -> float:
    tasks = [network["pretraining"][task][figure] for task, figure in TASKS.items()]
    return float(np.mean(tasks) + _annotation_score(network)) / 2


def _annotation_score(network: Mapping[str, Any]) -> float:
    return float(np.mean([network["annotation"][head]["macro"]["f1"]["value"] for head in HEADS]))


def _sweep_data(records: Iterable[Mapping[str, Any]]) -> str:
    """On what the cells of a sweep were trained and validated, by which code and where."""
    evaluated = [record for record in records if "evaluation" in record]
    commits = sorted({commit for record in evaluated for commit in record["commit"].split(", ")})
    kinds = {
        (
            f"{e['num_train_clips']} training and {e['num_clips']} validation clips of {e['dataset']}, "
            f"device {e['device']}"
        )
        for e in (record["evaluation"] for record in evaluated)
    }
    return "; ".join([*sorted(kinds), f"trained by {', '.join(commits)}"])
