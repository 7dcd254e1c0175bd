"""Renders what the cells reached as reproduction.json, reproduction.md and reproduction.html."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dilbert_jax.report import figure_image, render_page
from dilbert_jax.reproduce import claims as judged
from dilbert_jax.reproduce.cells import commit, read_cell
from dilbert_jax.reproduce.figures import draw_figures
from dilbert_jax.reproduce.grid import Cell
from dilbert_jax.reproduce.tables import MAKERS, Results

SCHEMA = "dilbert-jax/reproduction/1"
SYNTHETIC = "Synthetic data: phantom clips and reports are generated; they say nothing about patients."
SYNTHETIC_REPORTS = "Synthetic reports: those of {} are composed from labels, not written by clinicians."
PAPER = "The paper's own figures are not in the text at hand; only the order that it claims can be compared."

FOLDS = (
    "Where a set has no splits of its own, each seed tests a fold. Folds share training data: their intervals are "
    "somewhat too narrow."
)
VALUE_NOTES = (
    "Values: mean over seeds [95 % interval of Student's t, which can leave 0 to 1 where few seeds differ] (chance). "
    "Bold: the best (DILBERT's teacher does not compete), with p < 0.05 in paired t-tests against every other system, "
    "Holm-adjusted. "
    "One seed has neither."
)


def write_report(
    cells: Sequence[Cell],
    budget: str,
    output: pathlib.Path,
    tables: Sequence[str],
    figures: Sequence[str],
    command: str,
) -> pathlib.Path:
    """Writes the report on the finished ones among `cells`, and returns the path of the page.

    Raises:
      ValueError: no cell is finished.
    """
    records = {cell.name: read_cell(cell, output, budget) for cell in cells}
    found = {name: record for name, record in records.items() if record is not None}
    if not found:
        raise ValueError(f"{output} holds no finished cell of this plan; run it without --report first")
    datasets = list(dict.fromkeys(cell.dataset for cell in cells if cell.name in found))
    systems = list(dict.fromkeys(cell.system for cell in cells))
    results = Results(found)
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "command": command,
        "budget": budget,
        "commit": commit(),
        "cells_planned": len(cells),
        "cells_finished": len(found),
        "diverged": results.diverged,
        "notices": _notices(found, cells, results, datasets),
        "tables": [MAKERS[t](results, datasets, systems) for t in tables],
        "claims": judged.judge_claims(results, datasets, systems),
        "above_chance": judged.beats_chance(results, datasets, systems),
        "clip_by_clip": judged.compare_clips(results, datasets, systems),
        "cells": [_publishable(record) for record in found.values()],
    }
    drawn: list[dict[str, Any]] = []
    if figures:
        seed = min(cell.seed for cell in cells)
        for dataset in datasets:
            drawn += draw_figures(figures, dataset, budget, output, seed)
    folder = output / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for figure in drawn:
        figure["file"] = f"figures/figure_{figure['figure']}_{_slug(figure['title'])}.png"
        (output / figure["file"]).write_bytes(figure["png"])
    content["figures"] = [{k: f[k] for k in ("figure", "title", "caption", "file")} for f in drawn]
    (output / "reproduction.json").write_text(
        json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")), encoding="utf-8"
    )
    (output / "reproduction.md").write_text(to_markdown(content), encoding="utf-8")
    path = output / "reproduction.html"
    _write_page(content, drawn, path)
    return path


def _publishable(record: dict[str, Any]) -> dict[str, Any]:
    """A record without the answers clip by clip, which hold patients' diagnoses, unless all patients are simulated."""
    simulated = record.get("evaluation", {}).get("synthetic_data", False)
    return record if simulated else {k: v for k, v in record.items() if k != "decisions"}


def _notices(
    found: Mapping[str, Mapping[str, Any]], cells: Sequence[Cell], results: Results, datasets: Sequence[str]
) -> list[str]:
    evaluated = [record["evaluation"] for record in found.values() if "evaluation" in record]
    notices = [PAPER]
    if any(e["synthetic_data"] for e in evaluated):
        notices.append(SYNTHETIC)
    composed = sorted({e["dataset"] for e in evaluated if e["synthetic_reports"] and not e["synthetic_data"]})
    if composed:
        notices.append(SYNTHETIC_REPORTS.format(", ".join(composed)))
    notices += [
        _sizes(dataset, [e for e in evaluated if e["dataset"].split("/")[0] == dataset])
        for dataset in datasets
    ]
    if any(e["fold"] is not None for e in evaluated):
        notices.append(FOLDS)
    notices += _mixtures(found)
    if len(found) < len(cells):
        notices.append(f"Incomplete: {len(found)} of {len(cells)} planned cells are finished.")
    if results.diverged:
        notices.append(f"Diverged, and left out of every mean: {', '.join(results.diverged)}.")
    if len({cell.seed for cell in cells}) < 2:
        notices.append("One seed: no intervals, no tests, every claim undecided.")
    return notices


def _mixtures(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a reader must know of cells that were not all made alike."""
    notices = []
    prints: dict[tuple[str, Any], set[str]] = {}
    for record in found.values():
        if e := record.get("evaluation"):
            prints.setdefault((e["dataset"], e["fold"]), set()).add(e["data_fingerprint"])
    for dataset in sorted({d for (d, _), seen in prints.items() if len(seen) > 1}):
        notices.append(f"{dataset}: not all cells saw the same data; Provenance has the fingerprint of each.")
    commits = sorted({record["commit"] for record in found.values()})
    if len(commits) > 1:
        notices.append(
            f"Trained by {len(commits)} commits of one revision of the method: {'; '.join(commits)}."
        )
    return notices


def _sizes(dataset: str, evaluated: Sequence[Mapping[str, Any]]) -> str:
    """How many clips stand behind a set's figures, fold by fold."""
    counts = {(e["fold"], e["num_train_clips"], e["num_clips"], e["num_groups"]) for e in evaluated}
    texts = [
        ("" if fold is None else f"fold {fold}: ")
        + f"{train} clips to train on, {test} of {groups} patients (groups) to test on"
        for fold, train, test, groups in sorted(counts, key=str)
    ]
    return f"{dataset}: {'; '.join(texts)}."


def _provenance(record: Mapping[str, Any]) -> dict[str, Any]:
    evaluation = record.get("evaluation", {})
    return {
        "cell": record["cell"],
        "command": record["command"],
        "commit": record["commit"],
        "device": evaluation.get("device", ""),
        "fingerprint": evaluation.get("data_fingerprint", ""),
    }


def _slug(text: str) -> str:
    kept = "".join(c if c.isalnum() else "_" for c in text.lower())
    return "_".join(part for part in kept.split("_") if part)


def _digits(cell: Mapping[str, Any]) -> int:
    """Decimals that show a value and its interval: shares have three."""
    size = abs(cell["value"] or 0.0)
    return 3 if size < 10 else max(0, 3 - int(math.log10(size)))


def _spread(cell: Mapping[str, Any]) -> bool:
    """Whether there is an interval to show: none for one run, nor for what no run changes."""
    return cell["low"] is not None and cell["low"] < cell["high"]


def _text(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "–"
    digits = _digits(cell)
    text = f"{cell['value']:.{digits}f}"
    if cell["best"]:
        text = f"**{text}**"
    if _spread(cell):
        text += f" [{cell['low']:.{digits}f}, {cell['high']:.{digits}f}]"
    if cell["chance"] is not None:
        text += f" ({cell['chance']:.3f})"
    return text


def _difference(name: str, pair: Mapping[str, Any] | None) -> str:
    if pair is None:
        return f"{name}: –"
    text = f"{name}: {pair['value']:+.3f}"
    if pair["low"] is not None:
        text += f" [{pair['low']:+.3f}, {pair['high']:+.3f}]"
    if pair["p"] is not None:
        p = _probability(pair["p"])
        text += f", p {p}" if p.startswith("<") else f", p = {p}"
    return text + f", n = {pair['n']}"


def _probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _clip_text(row: Mapping[str, Any]) -> str:
    d = row["difference"]
    return f"{d['value']:+.3f}" + ("" if d["low"] is None else f" [{d['low']:+.3f}, {d['high']:+.3f}]")


def _differences(claim: Mapping[str, Any]) -> list[str]:
    if claim["verdict"] == judged.UNTESTABLE:
        return [claim["test"]]
    return [_difference(name, pair) for name, pair in claim["differences"].items()]


def _rows_above_chance(content: Mapping[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    tasks = list(dict.fromkeys(row["task"] for row in content["above_chance"]))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for row in content["above_chance"]:
        difference = row["above_chance"]
        text = f"{difference['value']:+.3f}"
        if difference["low"] is not None:
            verdict = "" if row["beats"] else " below" if difference["high"] < 0 else " no"
            text += f" [{difference['low']:+.3f}, {difference['high']:+.3f}]{verdict}"
        rows.setdefault((row["dataset"], row["system"]), {})[row["task"]] = text
    return tasks, [
        {"dataset": d, "system": s, "cells": [cells.get(t, "–") for t in tasks]}
        for (d, s), cells in rows.items()
    ]


def to_markdown(content: Mapping[str, Any]) -> str:
    """The report as Markdown; its figures are files beside it."""
    provenance = [_provenance(record) for record in content["cells"]]
    devices = sorted({c["device"] for c in provenance if c["device"]})
    lines = [
        f"# The paper's tables and figures, reproduced (budget `{content['budget']}`)",
        "",
        f"`{content['command']}`",
        "",
        f"{content['cells_finished']} of {content['cells_planned']} cells; commit {content['commit'] or 'unknown'}; "
        f"device {', '.join(devices)}.",
        "",
        *[f"> {notice}\n" for notice in content["notices"]],
        VALUE_NOTES,
        "",
    ]
    for table in content["tables"]:
        lines += [f"## Table {table['table']}: {table['title']}", "", table["notes"], ""]
        by_set = _by_set(table)
        heads = ["set"] * by_set + ["system", "size", "n", *table["columns"]]
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for row in table["rows"]:
            cells = [row["dataset"]] * by_set + [row["system"], row["size"], _count(row)]
            lines.append(f"| {' | '.join(cells + [_text(cell) for cell in row['cells']])} |")
        lines.append("")
    lines += ["## The paper's claims", "", "| of | claim | verdict | differences |", "|---|---|---|---|"]
    lines += [
        f"| {c['id']} | {c['claim']} | {c['verdict']} | {'; '.join(_differences(c))} |"
        for c in content["claims"]
    ]
    tasks, rows = _rows_above_chance(content)
    lines += [
        "",
        "## Above chance",
        "",
        judged.CHANCE_NOTES,
        "",
        "| set | system | " + " | ".join(tasks) + " |",
        "|---" * (2 + len(tasks)) + "|",
    ]
    lines += [f"| {r['dataset']} | {r['system']} | {' | '.join(r['cells'])} |" for r in rows]
    if content["clip_by_clip"]:
        lines += ["", "## Clip by clip", "", judged.CLIP_NOTES, ""]
        lines += ["| set | head | against | runs | patients | difference | p | p (Holm) |", "|---" * 8 + "|"]
        lines += [
            f"| {r['dataset']} | {r['head']} | {r['system']} | {r['runs']} | {r['groups']} | {_clip_text(r)} | "
            f"{_probability(r['p'])} | {_probability(r['p_holm'])} |"
            for r in content["clip_by_clip"]
        ]
    if content["figures"]:
        lines += ["", "## Figures", ""]
        for figure in content["figures"]:
            lines += [f"![{figure['title']}]({figure['file']})", ""]
            lines += [f"Figure {figure['figure']}. {figure['title']}. {figure['caption']}", ""]
    lines += ["", "## Provenance", "", "Each cell and the command that makes it again.", ""]
    lines += ["| cell | commit | data | command |", "|---|---|---|---|"]
    lines += [
        f"| {c['cell']} | {c['commit'] or '–'} | {c['fingerprint'][:12]} | `{c['command']}` |"
        for c in provenance
    ]
    return "\n".join(lines) + "\n"


def _by_set(table: Mapping[str, Any]) -> bool:
    """Whether rows differ by data set; Table IV has a column for each."""
    return any(row["dataset"] for row in table["rows"])


def _count(row: Mapping[str, Any]) -> str:
    counts = sorted({cell["n"] for cell in row["cells"] if cell is not None})
    return "–".join(str(n) for n in ([counts[0], counts[-1]] if len(counts) > 1 else counts)) or "0"


def _write_page(content: Mapping[str, Any], drawn: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    def prepared(cell: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if cell is None:
            return None
        digits = _digits(cell)
        texts = {name: f"{cell[name]:.{digits}f}" for name in ("low", "high") if cell[name] is not None}
        texts = {f"{k}_text": v for k, v in texts.items()}
        return {**cell, "spread": _spread(cell), "text": f"{cell['value']:.{digits}f}", **texts}

    tables = [
        {
            **t,
            "by_set": _by_set(t),
            "rows": [{**r, "n": _count(r), "cells": [prepared(c) for c in r["cells"]]} for r in t["rows"]],
        }
        for t in content["tables"]
    ]
    tasks, rows = _rows_above_chance(content)
    provenance = [_provenance(record) for record in content["cells"]]
    render_page(
        "reproduction.html",
        path,
        r=content,
        facts=[
            ("budget", content["budget"]),
            ("cells", f"{content['cells_finished']} of {content['cells_planned']}"),
            ("commit", content["commit"] or "unknown"),
            ("device", ", ".join(sorted({c["device"] for c in provenance if c["device"]}))),
        ],
        tables=tables,
        claims=[{**c, "texts": _differences(c)} for c in content["claims"]],
        chance_tasks=tasks,
        chance_rows=rows,
        figures=[{**f, **figure_image(f["png"])} for f in drawn],
        value_notes=VALUE_NOTES,
        chance_notes=judged.CHANCE_NOTES,
        clip_notes=judged.CLIP_NOTES,
        clip_rows=[
            {**row, "text": _clip_text(row), **{name: _probability(row[name]) for name in ("p", "p_holm")}}
            for row in content["clip_by_clip"]
        ],
        cells=provenance,
    )
