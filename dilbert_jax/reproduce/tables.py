"""Tables IV to VII from finished cells: means over seeds with intervals, chance, and what paired tests support."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dilbert_jax.evaluation.statistics import holm, mean_interval, paired_difference, paired_p
from dilbert_jax.models import find_system
from dilbert_jax.reproduce.grid import MAIN_SHAPE, SHAPES

LEVEL = 0.05
TASKS = ("mlm", "mdc", "moc", "cmm")
TITLES = {
    "bert": "BERT",
    "videobert": "VideoBERT",
    "cbt": "CBT",
    "hero": "HERO",
    "mmft_bert": "MMFT-BERT",
    "actbert": "ActBERT",
    "dilbert": "DILBERT",
    "dilbert/student": "DILBERT student",
    "dilbert/teacher": "DILBERT teacher",
}
# (record of a cell, network) -> figure, or None where there is none.
Figure = Callable[[Mapping[str, Any], str], float | None]


@dataclasses.dataclass(frozen=True)
class Row:
    """Who is in a line of a table.

    Attributes:
      system: a system; size: of its cells; network: whose figures.
    """

    system: str
    size: str
    network: str = "student"

    @property
    def title(self) -> str:
        if find_system(self.system).distilled:
            return TITLES.get(f"{self.system}/{self.network}", f"{self.system} {self.network}")
        return TITLES.get(self.system, self.system)


def comparison_rows(systems: Sequence[str]) -> list[Row]:
    """The rows of Tables V to VII: every system at DILBERT's number of parameters."""
    rows = [Row(s, MAIN_SHAPE if find_system(s).distilled else "matched") for s in systems]
    return rows + [Row(r.system, r.size, "teacher") for r in rows if find_system(r.system).distilled]


class Results:
    """Records of finished cells by data set, system, size and seed."""

    def __init__(self, records: Mapping[str, Mapping[str, Any]]):
        self.records: dict[tuple[str, str, str], dict[int, Mapping[str, Any]]] = {}
        self.diverged: list[str] = []
        for name, record in records.items():
            dataset, system, size, seed = name.split("/")
            if "diverged" in record:
                self.diverged.append(name)
            else:
                self.records.setdefault((dataset, system, size), {})[int(seed)] = record

    def values(self, dataset: str, row: Row, figure: Figure) -> dict[int, float]:
        """A figure by seed; seeds without it are left out."""
        found = {}
        for seed, record in self.records.get((dataset, row.system, row.size), {}).items():
            value = figure(record, row.network)
            if value is not None:
                found[seed] = float(value)
        return dict(sorted(found.items()))


def head_of(record: Mapping[str, Any], network: str) -> str | None:
    """The head that Table IV and VI are about: the condition, or the organ of a set that names no condition."""
    heads = record["evaluation"]["networks"][network]["annotation"]
    return next((head for head in ("condition", "organ") if head in heads), None)


def accuracy(record: Mapping[str, Any], network: str) -> float | None:
    head = head_of(record, network)
    return (
        record["evaluation"]["networks"][network]["annotation"][head]["accuracy"]["value"] if head else None
    )


def chance_accuracy(record: Mapping[str, Any], network: str) -> float | None:
    head = head_of(record, network)
    baseline = record["evaluation"]["baseline"].get("majority", {})
    return baseline[head]["accuracy"]["value"] if head in baseline else None


def macro(measure: str, head: str | None = None) -> Figure:
    """Macro sensitivity, precision or F1 of a head; None = that of `head_of`."""

    def look_up(record: Mapping[str, Any], network: str) -> float | None:
        which = head or head_of(record, network)
        heads = record["evaluation"]["networks"][network]["annotation"]
        return heads[which]["macro"][measure]["value"] if which in heads else None

    return look_up


def chance_macro(measure: str, head: str | None = None) -> Figure:
    """What the commonest training label reaches."""

    def look_up(record: Mapping[str, Any], network: str) -> float | None:
        which = head or head_of(record, network)
        heads = record["evaluation"]["baseline"].get("majority", {})
        return heads[which]["macro"][measure]["value"] if which in heads else None

    return look_up


def task_figure(task: str, k: int = 1, kind: str = "recall") -> Figure:
    """R@k of a task (`kind` "recall"), what training frequencies alone give ("frequent"), or its "classes".

    For matching, a choice of two where R@10 says nothing: its accuracy, and the larger class's share.
    """

    def look_up(record: Mapping[str, Any], network: str) -> float | None:
        figures = record["evaluation"]["networks"][network]["pretraining"][task]
        if kind == "classes":
            return figures.get("num_classes")
        if task == "cmm":
            return figures["accuracy" if kind == "recall" else "chance"]
        return figures[f"{kind}_at_{k}"]

    return look_up


def compare(first: Mapping[int, float], second: Mapping[int, float]) -> dict[str, Any] | None:
    """The paired difference over common seeds: value, low, high, p, n; None without any.

    Where every seed differs by the same, the spread is unknown, not 0: low, high and p are None.
    """
    seeds = [s for s in first if s in second]
    if not seeds:
        return None
    pair = [first[s] for s in seeds], [second[s] for s in seeds]
    found = {**paired_difference(*pair).to_json(), "p": paired_p(*pair), "n": len(seeds)}
    return found if found["p"] is not None else {**found, "low": None, "high": None}


def column(
    results: Results,
    dataset: str,
    rows: Sequence[Row],
    figure: Figure,
    chance: Figure | None = None,
    larger_is_better: bool = True,
) -> list[dict[str, Any] | None]:
    """One figure of all rows: interval, n, chance, and whether it is the best and a paired test says so.

    `best` needs p < 0.05 against every other row, Holm-adjusted over them. The teacher, which is trained together with
    the student, does not compete with it.
    """
    values = [results.values(dataset, row, figure) for row in rows]
    cells: list[dict[str, Any] | None] = []
    for row, found in zip(rows, values, strict=True):
        if not found:
            cells.append(None)
            continue
        level = results.values(dataset, row, chance) if chance else {}
        cells.append(
            {
                **mean_interval(list(found.values())).to_json(),
                "n": len(found),
                "chance": float(np.mean(list(level.values()))) if level else None,
                "best": False,
            }
        )
    rivals = [i for i, cell in enumerate(cells) if cell is not None and rows[i].network == "student"]
    if len(rivals) > 1:
        sign = 1 if larger_is_better else -1
        top = max(rivals, key=lambda i: sign * cells[i]["value"])  # type: ignore[index]
        against = [compare(values[top], values[i]) for i in rivals if i != top]
        if all(a is not None and a["p"] is not None and sign * a["value"] > 0 for a in against):
            adjusted = holm([a["p"] for a in against if a is not None])
            cells[top]["best"] = max(adjusted) < LEVEL  # type: ignore[index]
    return cells


def _table(
    number: str,
    title: str,
    notes: str,
    dataset_rows: Sequence[tuple[str, Row]],
    columns: Mapping[str, Any],
    unit: str = "",
) -> dict[str, Any]:
    return {
        "table": number,
        "title": title,
        "notes": notes,
        "columns": list(columns),
        "rows": [
            {
                "dataset": dataset,
                "system": row.title,
                "size": row.size,
                "cells": [columns[c][i] for c in columns],
            }
            for i, (dataset, row) in enumerate(dataset_rows)
        ],
    }


def _by_dataset(
    results: Results, datasets: Sequence[str], rows: Sequence[Row], figures: Mapping[str, tuple[Any, Any]]
) -> tuple[list[tuple[str, Row]], dict[str, list[Any]]]:
    """Columns over the rows of all data sets, one data set below the other."""
    columns: dict[str, list[Any]] = {name: [] for name in figures}
    for dataset in datasets:
        for name, (figure, chance) in figures.items():
            columns[name] += column(results, dataset, rows, figure, chance)
    return [(d, row) for d in datasets for row in rows], columns


def table_iv(results: Results, datasets: Sequence[str], systems: Sequence[str]) -> dict[str, Any]:
    rows = []
    for size in SHAPES:
        rows += [Row("bert", size)] if "bert" in systems else []
        rows += [Row("dilbert", size, n) for n in ("teacher", "student")] if "dilbert" in systems else []
    columns = {}
    for dataset in datasets:
        cells: list[Any] = []
        for size in SHAPES:
            of_size = [row for row in rows if row.size == size]
            cells += column(results, dataset, of_size, accuracy, chance_accuracy)
        columns[dataset] = cells
    notes = "Accuracy of the condition (of the organ where a set names none). Chance: the commonest training label."
    return _table("IV", "Accuracy by layers and heads", notes, [("", row) for row in rows], columns)


def table_v(results: Results, datasets: Sequence[str], systems: Sequence[str]) -> dict[str, Any]:
    figures = {}
    for task, title in (("mlm", "MLM"), ("mlm_guided", "guided MLM"), ("mdc", "MDC"), ("moc", "MOC")):
        for k in (1, 10):
            figures[f"{title} R@{k}"] = task_figure(task, k), task_figure(task, k, "frequent")
    figures["CMM accuracy"] = task_figure("cmm"), task_figure("cmm", kind="frequent")
    rows, columns = _by_dataset(results, datasets, comparison_rows(systems), figures)
    notes = (
        "Recall among the first 1 and 10 answers. R@10 is 1 by construction with ten classes or fewer; "
        "matching has two answers, so that its accuracy stands in. MDC asks for all classes of a clip: R@k is their "
        "share among the first k, of k at most, so that R@10 can lie below R@1. "
        "Chance: the commonest answers of training."
    )
    return _table("V", "Pre-training tasks", notes, rows, columns)


def table_vi(results: Results, datasets: Sequence[str], systems: Sequence[str]) -> dict[str, Any]:
    titles = {"sensitivity": "sensitivity", "precision": "precision", "f1": "F1"}
    figures = {title: (macro(m), chance_macro(m)) for m, title in titles.items()}
    figures["findings F1"] = macro("f1", "findings"), chance_macro("f1", "findings")
    rows, columns = _by_dataset(results, datasets, comparison_rows(systems), figures)
    notes = (
        "Macro means over the conditions (organs where a set names none), equations (14) to (16), and macro F1 of the "
        "findings. Chance: always the commonest training label."
    )
    return _table("VI", "Annotation after fine-tuning", notes, rows, columns)


def training_minutes(record: Mapping[str, Any], network: str) -> float | None:
    """Minutes of training over all stages, compilation left out."""
    del network
    size = record["config"]["train"]["batch_size"]
    stages = record["training"].values()
    return sum(s["steps"] * size * s["ms_per_clip"] for s in stages) / 60000 if stages else None


def ms_per_clip(record: Mapping[str, Any], network: str) -> float | None:
    """Milliseconds a clip in the student's pre-training."""
    del network
    return record["training"].get("student", {}).get("ms_per_clip")


def mflop(kind: str) -> Figure:
    """Millions of floating-point operations a clip: annotating it, or one update that has it in its batch."""

    def look_up(record: Mapping[str, Any], network: str) -> float | None:
        del network
        flops = record["flops_per_clip"].get(kind)
        return None if flops is None else flops / 1e6

    return look_up


def table_vii(results: Results, datasets: Sequence[str], systems: Sequence[str]) -> dict[str, Any]:
    rows = [row for row in comparison_rows(systems) if row.network == "student"]
    figures = {
        "training, min": training_minutes,
        "pre-training, ms/clip": ms_per_clip,
        "update, MFLOP/clip": mflop("student"),
        "mutual update, MFLOP/clip": lambda r, n: (
            r["flops_per_clip"].get("mutual", np.nan) / 1e6 if "mutual" in r["flops_per_clip"] else None
        ),
        "annotate, MFLOP/clip": mflop("annotate"),
        "parameters, M": lambda r, n: r["parameters"] / 1e6,
    }
    columns: dict[str, list[Any]] = {name: [] for name in figures}
    for dataset in datasets:
        for name, figure in figures.items():
            columns[name] += column(results, dataset, rows, figure, larger_is_better=False)
    for cells in columns.values():
        for cell in cells:
            if cell:
                cell["best"] = False  # faster is no better by itself: nothing is set in bold here
    notes = (
        "Training: all stages, DILBERT's teacher included, without compilation. Parameters: of one network. "
        "Times depend on what else the machine did; FLOPs, counted from the program, do not."
    )
    return _table("VII", "Cost", notes, [(d, row) for d in datasets for row in rows], columns)


MAKERS = {"IV": table_iv, "V": table_v, "VI": table_vi, "VII": table_vii}
