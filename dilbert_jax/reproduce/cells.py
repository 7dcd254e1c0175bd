"""Runs cells and keeps what the tables need of each as `cell.json`; a finished cell is never run again."""

from __future__ import annotations

import json
import logging
import pathlib
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dilbert_jax import run
from dilbert_jax.ablation import copy_stages
from dilbert_jax.config import REVISION
from dilbert_jax.evaluate import evaluate
from dilbert_jax.experiment import Experiment, open_experiment
from dilbert_jax.flops import count_flops
from dilbert_jax.models import find_system
from dilbert_jax.reproduce.grid import Cell, cell_config, parse_cell
from dilbert_jax.training import objectives
from dilbert_jax.training.log import read_metrics
from dilbert_jax.training.stages import is_complete
from dilbert_jax.training.step import device_entries

SCHEMA = "dilbert-jax/cell/1"
COMPARED_HEADS = ("organ", "condition", "findings")
_log = logging.getLogger(__name__)


def workdir_of(cell: Cell, output: pathlib.Path) -> pathlib.Path:
    return output / "runs" / cell.name


def run_cells(cells: Sequence[Cell], budget: str, output: pathlib.Path, command: str) -> None:
    """Runs every cell that is not finished. A cell whose loss diverges says so and the others go on."""
    todo = [cell for cell in cells if read_cell(cell, output, budget) is None]
    code = commit()  # now: the checkout may move on while cells train
    for number, cell in enumerate(todo):
        folder = workdir_of(cell, output)
        _log.info("cell %d of %d: %s", number + 1, len(todo), cell.name)
        config = cell_config(cell, budget)
        take_pretraining(cell, output, budget)
        again = f"{command} --cells={cell.name}"
        started = time.monotonic()
        trained_by = _note_commit(folder, code)
        try:
            run.train_and_report(config, folder, command=again)
            if cell.rates is not None:  # the sweep must not look at test clips
                evaluate(config, folder, split="validation", command=again, progress=False)
            record = _measure(cell, budget, folder)
        except run.NonFiniteLossError as error:
            _log.info("%s", error)
            record = {"diverged": str(error)}
        except ValueError as error:
            raise ValueError(f"cell {cell.name}: {error}") from None
        record = {
            "schema": SCHEMA,
            "cell": cell.name,
            "budget": budget,
            "command": again,
            "revision": REVISION,
            "commit": trained_by,
            "evaluated_by": code,
            "seconds_of_last_call": round(time.monotonic() - started, 1),
            "config": json.loads(config.to_json_best_effort()),
            **record,
        }
        _write_record(record, folder)
        jax.clear_caches()  # the next cell compiles other programs


def take_pretraining(cell: Cell, output: pathlib.Path, budget: str) -> None:
    """Starts a cell of the sweep with what another pre-trained at the same rate, if one is complete and this is new."""
    if cell.rates is None or workdir_of(cell, output).exists():
        return
    for folder in sorted(workdir_of(cell, output).parents[1].glob(f"{cell.size}@*/{cell.seed}")):
        source = parse_cell(folder.relative_to(output / "runs").as_posix())
        if source.rates is None or source.rates[0] != cell.rates[0]:
            continue
        if is_complete(folder) and read_cell(source, output, budget) is not None:
            copy_stages(folder, workdir_of(cell, output), cell_config(cell, budget))
            return


def _note_commit(folder: pathlib.Path, code: str) -> str:
    """Notes in the run's folder which commits trained it, in order, and returns them; evaluating again adds none."""
    path = folder / "commits.txt"
    known = path.read_text(encoding="utf-8").split() if path.exists() else []
    if code and code not in known[-1:] and not is_complete(folder):
        known.append(code)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(known) + "\n", encoding="utf-8")
    return ", ".join(known)


def read_cell(cell: Cell, output: pathlib.Path, budget: str) -> dict[str, Any] | None:
    """What a finished cell left, or None.

    Raises:
      ValueError: the folder holds a cell of another budget, or of another version's configuration.
    """
    path = workdir_of(cell, output) / "cell.json"
    if not path.exists():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); delete it to run the cell again") from None
    if record["budget"] != budget:
        raise ValueError(
            f"{path}: field 'budget' is {record['budget']!r}, not {budget!r}; name another --output"
        )
    _check_config(record, cell, budget, str(path))
    return record


def holds_the_run(cell: Cell, output: pathlib.Path, budget: str) -> bool:
    """Whether the cell's run is here, and is the one that its record tells of: some are taken from elsewhere."""
    folder, record = workdir_of(cell, output), read_cell(cell, output, budget)
    if record is None or not is_complete(folder) or not (folder / "eval.json").exists():
        return False
    return _summary(json.loads((folder / "eval.json").read_text(encoding="utf-8"))) == record.get(
        "evaluation"
    )


def _check_config(record: Mapping[str, Any], cell: Cell, budget: str, source: str) -> None:
    """Raises `ValueError` where a record was made with other settings than this version's. New fields do not count."""
    revision = record.get("revision", 1)
    if revision != REVISION:
        raise ValueError(
            f"{source}: {cell.name} was made by revision {revision} of the method, and this version is revision "
            f"{REVISION}: their figures do not belong in one table; name another --output"
        )
    today = json.loads(cell_config(cell, budget).to_json_best_effort())
    for section, saved in record["config"].items():
        fields = saved.items() if isinstance(saved, dict) else [(None, saved)]
        for field, value in fields:
            now = today.get(section) if field is None else today.get(section, {}).get(field, value)
            if now != value:
                name = section if field is None else f"{section}.{field}"
                raise ValueError(
                    f"{source}: {cell.name} was made with {name} = {value!r}, where budget {budget!r} now has {now!r}; "
                    "name another --output"
                )


def commit() -> str:
    """The commit that the code is at, with "+" where files differ from it; "" outside of a checkout."""
    folder = pathlib.Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if changed else "")


def _measure(cell: Cell, budget: str, folder: pathlib.Path) -> dict[str, Any]:
    """Evaluation, size, time and FLOPs of a finished run."""
    evaluation = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    experiment = open_experiment(cell_config(cell, budget), folder)
    shapes = jax.eval_shape(experiment.context.init_params, jax.random.key(0))
    decisions = json.loads((folder / "decisions.json").read_text(encoding="utf-8"))
    return {
        "evaluation": _summary(evaluation),
        "decisions": {name: _answers(decisions[name]) for name in evaluation["networks"]},
        "parameters": evaluation["parameters"],
        "flops_per_clip": {"annotate": evaluation["flops_per_clip"], **_flops(experiment, shapes)},
        "training": training_time(read_metrics(folder / "metrics.jsonl")),
    }


def _summary(evaluation: dict[str, Any]) -> dict[str, Any]:
    """eval.json without its figures by class, which nothing here reads."""
    left_out = ("per_class", "confusion")

    def heads(reports: dict[str, Any]) -> dict[str, Any]:
        return {head: {k: v for k, v in r.items() if k not in left_out} for head, r in reports.items()}

    networks = {n: {**r, "annotation": heads(r["annotation"])} for n, r in evaluation["networks"].items()}
    baseline = {name: heads(reports) for name, reports in evaluation["baseline"].items()}
    return {**evaluation, "networks": networks, "baseline": baseline}


def _answers(heads: dict[str, Any]) -> dict[str, Any]:
    """The classes that every test clip has, and those that a network said; groups are numbers, clips have no name."""
    return {
        head: {
            "class_ids": d["class_ids"],
            "groups": np.unique(d["groups"], return_inverse=True)[1].tolist(),
            **{name: [_classes_of(answer) for answer in d[name]] for name in ("targets", "predictions")},
        }
        for head, d in heads.items()
        if head in COMPARED_HEADS
    }


def _classes_of(answer: int | Sequence[bool]) -> list[int]:
    """The index of a class, or of all that hold, as a list."""
    return [answer] if isinstance(answer, int) else np.flatnonzero(answer).tolist()


def reuse_records(path: pathlib.Path, output: pathlib.Path, budget: str) -> int:
    """Puts the finished cells of another reproduction.json or sweep.json below `output`, and returns how many were new.

    Raises:
      ValueError: no such file, or one of another budget or version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); name a reproduction.json or sweep.json"
        ) from None
    if content.get("budget") != budget:
        raise ValueError(f"{path}: field 'budget' is {content.get('budget')!r}, not {budget!r}")
    count = 0
    for record in content["cells"]:
        cell = parse_cell(record["cell"])
        _check_config(record, cell, budget, str(path))
        folder = workdir_of(cell, output)
        if not (folder / "cell.json").exists():
            _write_record(record, folder)
            count += 1
    return count


def _write_record(record: dict[str, Any], folder: pathlib.Path) -> None:
    """Writes cell.json whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "cell.json.tmp"
    temporary.write_text(json.dumps(record), encoding="utf-8")
    temporary.replace(folder / "cell.json")


def training_time(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of training by stage without compilation, and milliseconds a clip.

    The log gives clips per second of every window of steps; the first step, which compiles, is a window by itself and
    left out, and the median of the others stands for all steps.
    """
    stages: dict[str, dict[str, float]] = {}
    for stage in dict.fromkeys(row["stage"] for row in rows):
        train = [r for r in rows if r["stage"] == stage and r.get("split", "train") == "train"]
        rates = [r["clips_per_second"] for r in train if r["step"] > 1 and r["clips_per_second"] > 0]
        if rates:
            stages[stage] = {
                "steps": train[-1]["step"],
                "ms_per_clip": round(1000 / float(np.median(rates)), 4),
            }
    return stages


def _flops(experiment: Experiment, shapes: Any) -> dict[str, float]:
    """Model FLOPs a clip of one update that has it in its batch, by stage."""
    context, index = experiment.context, int(experiment.indices["train"][0])
    loss, model, system = context.loss, context.model, find_system(context.config.model.name)
    size = context.config.train.batch_size

    example = device_entries(experiment.builder.pretraining(index, np.random.default_rng(0)))
    batch = {k: jax.ShapeDtypeStruct((size, *np.shape(v)), np.asarray(v).dtype) for k, v in example.items()}
    key = jax.eval_shape(lambda: jax.random.key(0))

    def pretraining(params: Any, frozen: Any, batch: Any, key: Any) -> Any:
        return objectives.pretraining_objective(
            model, loss, params, frozen.get("teacher"), batch, key, own_losses=system.own_losses
        )[0]

    def mutual(params: Any, frozen: Any, batch: Any, key: Any) -> Any:
        return objectives.mutual_objective(model, loss, params, frozen, batch, key)[0]

    counts = {}
    one, both = {"student": shapes}, {"teacher": shapes, "student": shapes}
    if system.distilled:
        counts["teacher"] = count_flops(jax.grad(pretraining), {"teacher": shapes}, {}, batch, key)
        counts["mutual"] = count_flops(jax.grad(mutual), both, both, batch, key)
    taught = {"teacher": shapes} if system.distilled else {}
    counts["student"] = count_flops(jax.grad(pretraining), one, taught, batch, key)
    return {name: value / size for name, value in counts.items()}
