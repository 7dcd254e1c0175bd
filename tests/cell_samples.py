"""Records of cells that never ran: what the tables, claims and the sweep read."""

import json
import pathlib

import numpy as np

from dilbert_jax.config import REVISION
from dilbert_jax.models import SYSTEMS
from dilbert_jax.reproduce import cells, grid


def evaluation(value, chance=0.2, seed=0):
    """As eval.json, every figure at `value` (its own per network) or `chance`."""

    def interval(x):
        return {"value": x, "low": None, "high": None}

    def heads(x):
        macro = {m: interval(x) for m in ("sensitivity", "precision", "f1")}
        return {
            "condition": {"accuracy": interval(x), "macro": macro},
            "findings": {"macro": macro},
            "entities": {"macro": macro},
        }

    ranked = {"recall_at_1": value, "recall_at_10": value, "frequent_at_1": chance, "frequent_at_10": chance}
    pretraining = {t: ranked for t in ("mlm", "mlm_guided", "mdc", "moc")} | {
        "cmm": {"accuracy": value, "chance": chance}
    }
    network = {"annotation": heads(value), "pretraining": pretraining}
    return {
        "networks": {"student": network, "teacher": network},
        "baseline": {"majority": heads(chance)},
        "synthetic_data": True,
        "synthetic_reports": 3,
        "dataset": "phantom/large",
        "device": "cpu",
        "versions": {"jax": "0"},
        "data_fingerprint": "f" * 40,
        "seed": seed,
        "fold": None,
        "num_train_clips": 100,
        "num_clips": 40,
        "num_groups": 20,
    }


def answers(value, seed):
    """Forty clips of twenty patients, of which a share of `value` is answered right."""
    targets = np.arange(40) % 2
    right = np.random.default_rng(seed).random(40) < value
    condition = {
        "class_ids": ["cyst", "stone"],
        "groups": (np.arange(40) // 2).tolist(),
        "targets": targets[:, None].tolist(),
        "predictions": np.where(right, targets, 1 - targets)[:, None].tolist(),
    }
    return {"condition": condition}


def record(cell, value, minutes=1.0):
    rate = {"steps": 100, "ms_per_clip": minutes * 60000 / 1600}
    return {
        "schema": cells.SCHEMA,
        "cell": cell.name,
        "budget": "cpu",
        "command": f"rerun {cell.name}",
        "revision": REVISION,
        "commit": "abc",
        "seconds_of_last_call": 1.0,
        "config": {"train": {"batch_size": 16}},
        "evaluation": evaluation(value, seed=cell.seed),
        "decisions": {network: answers(value, cell.seed) for network in ("student", "teacher")},
        "parameters": 10**6,
        "flops_per_clip": {"annotate": 1e6, "student": 3e6},
        "training": {"student": rate},
    }


def planned(seeds=3):
    return grid.plan(grid.TABLES, (), ["phantom"], range(seeds), list(SYSTEMS))


def finish(output: pathlib.Path) -> None:
    """Writes the records of a grid in which DILBERT is clearly best and BERT is no better than chance."""
    rng = np.random.default_rng(0)
    levels = {"dilbert": 0.8, "bert": 0.2}
    for cell in planned():
        value = levels.get(cell.system, 0.5) + 0.005 * rng.standard_normal() + 0.02 * cell.seed
        minutes = {"videobert": 9.0, "dilbert": 5.0, "actbert": 4.9}.get(cell.system, 1.0) * rng.uniform(
            0.99, 1.01
        )
        folder = cells.workdir_of(cell, output)
        folder.mkdir(parents=True)
        (folder / "cell.json").write_text(json.dumps(record(cell, float(value), minutes)))
