"""Pools the answers of several finished runs (the folds of a cross-validation) into one table with intervals.

python -m dilbert_jax.pool --workdirs runs/busi/0 runs/busi/1 runs/busi/2 runs/busi/3 runs/busi/4 --output=busi
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from dilbert_jax.evaluate import Decisions, report_decisions
from dilbert_jax.evaluation.statistics import mean_interval

TASKS = {"mlm": "recall_at_10", "mdc": "recall_at_1", "moc": "recall_at_1", "cmm": "accuracy"}


def pool(workdirs: Sequence[pathlib.Path], num_resamples: int = 2000) -> dict[str, Any]:
    """Joins decisions.json of runs that tested different studies, and averages their pre-training figures.

    Every study is answered once, by the run that did not train on it; intervals resample groups over all of them.

    Raises:
      ValueError: two runs answered the same study or used different data, or a workdir holds no evaluated run.
    """
    joined: dict[str, Decisions] = {}
    evaluations = []
    for workdir in workdirs:
        decisions, evaluation = (_read(workdir / name) for name in ("decisions.json", "eval.json"))
        evaluations.append(evaluation)
        for field in ("dataset", "split"):
            if evaluation[field] != evaluations[0][field]:
                raise ValueError(
                    f"{workdir / 'eval.json'}: field '{field}' is '{evaluation[field]}', but "
                    f"'{evaluations[0][field]}' in {workdirs[0]}; pool runs on the same data"
                )
        for system, heads in decisions.items():
            for head, d in heads.items():
                known = joined.setdefault(system, {}).setdefault(head, {"class_ids": d["class_ids"]})
                if known["class_ids"] != d["class_ids"]:
                    # Candidate entities follow from the training reports; they differ between folds.
                    known["differs"] = True
                for field in ("targets", "predictions", "groups", "study_ids"):
                    known.setdefault(field, []).extend(d[field])
    for system, heads in joined.items():
        for head in [h for h, d in heads.items() if d.get("differs")]:
            del heads[head]
        for head, d in heads.items():
            repeated = {s for s in d["study_ids"] if d["study_ids"].count(s) > 1}
            if repeated:
                raise ValueError(
                    f"{system} {head}: studies {sorted(repeated)[:3]} were tested by several runs"
                )
    pretraining: dict[str, dict[str, Any]] = {}
    for network in evaluations[0]["networks"]:
        pretraining[network] = {
            task: mean_interval(
                np.asarray([e["networks"][network]["pretraining"][task][field] for e in evaluations], float)
            ).to_json()
            for task, field in TASKS.items()
            if all(e["networks"][network]["pretraining"][task].get(field) is not None for e in evaluations)
        }
    return {
        "dataset": evaluations[0]["dataset"],
        "runs": len(workdirs),
        "device": evaluations[0]["device"],
        "annotation": {s: report_decisions(heads, num_resamples) for s, heads in joined.items()},
        "pretraining": pretraining,
    }


def _read(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{path} is missing; run eval.py on this workdir first")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); run eval.py on this workdir again") from error
    return content


def to_markdown(pooled: dict[str, Any]) -> str:
    """One table of annotation figures (pooled, bootstrap over groups) and one of pre-training figures (over runs)."""
    lines = ["| system | head | n | groups | accuracy | macro sensitivity | macro precision | macro F1 |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for system, heads in pooled["annotation"].items():
        for head, r in heads.items():
            cells = [_interval(r["accuracy"]) if "accuracy" in r else "–"]
            cells += [_interval(r["macro"][m]) for m in ("sensitivity", "precision", "f1")]
            lines.append(
                f"| {system} | {head} | {r['num']} | {r['num_groups']} | " + " | ".join(cells) + " |"
            )
    lines += ["", f"| network | {' | '.join(f'{t} {f}' for t, f in TASKS.items())} |", "|---" * 5 + "|"]
    for network, tasks in pooled["pretraining"].items():
        cells = [_interval(tasks[t]) if t in tasks else "–" for t in TASKS]
        lines.append(f"| {network} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _interval(interval: dict[str, float | None]) -> str:
    value, low, high = interval["value"], interval["low"], interval["high"]
    if value is None:
        return "–"
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dilbert_jax.pool", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--workdirs", nargs="+", required=True, type=pathlib.Path, help="evaluated runs")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="writes OUTPUT.json and OUTPUT.md")
    args = parser.parse_args(argv)
    try:
        pooled = pool(args.workdirs)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.output.parent.mkdir(parents=True, exist_ok=True)
    # Not with_suffix: it would cut "busi.v1" to "busi".
    pathlib.Path(f"{args.output}.json").write_text(json.dumps(pooled, indent=1), encoding="utf-8")
    table = to_markdown(pooled)
    pathlib.Path(f"{args.output}.md").write_text(table, encoding="utf-8")
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
