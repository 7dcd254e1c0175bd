"""Trains the variants of an experiment over several seeds and compares each with the first, pair by pair.

python -m dilbert_jax.ablation --config=configs/ablation.py --workdir=runs/ablation

The experiment file holds `VARIANTS`, a dict of name -> overrides, and `get_config(variant)`. A stage that two variants
share (mutual learning differs, say, but not what went before) is trained once a seed and copied. Run the same command
again to resume; runs that are complete are only read. Two commands with different --seeds may share a workdir.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections

from dilbert_jax import run
from dilbert_jax.config import load_config, save_config
from dilbert_jax.console import log_to_console
from dilbert_jax.evaluation.statistics import holm, mean_interval, paired_difference, paired_p
from dilbert_jax.training.log import read_metrics
from dilbert_jax.training.objectives import NETWORKS
from dilbert_jax.training.stages import STAGES, is_complete, stage_names

# The stage that reads a field first; the teacher's pre-training reads all others.
FIRST_STAGE = {
    **dict.fromkeys(
        (
            "loss.temperature",
            "loss.scale_by_square",
            "train.student_epochs",
            "train.independent_student",
            "train.single_network",
        ),
        "student",
    ),
    **dict.fromkeys(
        (
            "loss.alpha",
            "loss.beta",
            "loss.gamma",
            "loss.beta1",
            "loss.beta2",
            "loss.reduction",
            "loss.relational_layer",
            "train.mutual_epochs",
            "train.mutual_rate_scale",
        ),
        "mutual",
    ),
    **dict.fromkeys(
        (
            "loss.organ",
            "loss.condition",
            "loss.findings",
            "loss.match",
            "loss.grounding",
            "train.finetune_epochs",
            "train.finetune_rate_scale",
            "train.finetune_video_rate_scale",
        ),
        "finetune",
    ),
}
# Head and figure of eval.json, as the table shows them; the first is the one that is tested.
FIGURES = {
    "condition macro F1": ("annotation", "condition", "macro", "f1", "value"),
    "findings macro F1": ("annotation", "findings", "macro", "f1", "value"),
    "MLM R@10": ("pretraining", "mlm", "recall_at_10"),
    "MDC R@1": ("pretraining", "mdc", "recall_at_1"),
    "MOC R@1": ("pretraining", "moc", "recall_at_1"),
    "CMM accuracy": ("pretraining", "cmm", "accuracy"),
}
_log = logging.getLogger(__name__)


def shared_stages(first: ml_collections.ConfigDict, second: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The leading stages that two configurations train alike, to the bit."""
    differing = {name for name, value in _flatten(first).items() if _flatten(second)[name] != value}
    differing = {name for name in differing if not name.startswith("evaluate.")}
    stop = min((STAGES.index(FIRST_STAGE.get(name, STAGES[0])) for name in differing), default=len(STAGES))
    kept = [s for s in STAGES[:stop] if s in stage_names(first) and s in stage_names(second)]
    return tuple(kept)


def copy_stages(source: pathlib.Path, workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Starts a new workdir with the finished stages that another run trained as `config` would."""
    stages = shared_stages(load_config(source / "config.json"), config)
    if workdir.exists() or not stages:
        return
    temporary = workdir.with_name(workdir.name + ".copying")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for stage in stages:
        shutil.copytree(source / "checkpoints" / stage, temporary / "checkpoints" / stage)
    for name in ("vocab.txt", "labels.json", "splits.json", "commits.txt"):
        if (source / name).exists():
            shutil.copy(source / name, temporary / name)
    save_config(config, temporary / "config.json")
    rows = [r for r in read_metrics(source / "metrics.jsonl") if r["stage"] in stages]
    (temporary / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    temporary.replace(workdir)


def run_variants(
    configs: Mapping[str, ml_collections.ConfigDict],
    seeds: Sequence[int],
    workdir: pathlib.Path,
    command: str,
) -> None:
    """Trains and evaluates every variant with every seed under `workdir/<variant>/<seed>`.

    A run whose loss is no longer finite leaves `diverged.json` and the others go on.
    """
    for seed in seeds:
        done: list[pathlib.Path] = []
        for variant, base in configs.items():
            config = ml_collections.ConfigDict(base.to_dict())
            config.seed = seed
            folder = workdir / variant / str(seed)
            if not is_complete(folder) and not (folder / "diverged.json").exists():
                donor = max(
                    done,
                    key=lambda d: len(shared_stages(load_config(d / "config.json"), config)),
                    default=None,
                )
                if donor is not None:
                    copy_stages(donor, folder, config)
                _log.info("%s, seed %d", variant, seed)
                try:
                    run.train_and_report(config, folder, command=command)
                except run.NonFiniteLossError as error:
                    _log.info("%s", error)
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / "diverged.json").write_text(json.dumps({"error": str(error)}), encoding="utf-8")
                jax.clear_caches()  # the next variant compiles other programs
            if is_complete(folder):
                done.append(folder)


def collect(variants: Sequence[str], workdir: pathlib.Path, network: str = "student") -> dict[str, Any]:
    """Reads the evaluations of all finished runs.

    Returns:
      For every variant `seeds`, `diverged` (seed -> reason) and `figures`: name -> one value a seed, None where a run
      has no such figure. Runs that do not train this network are left out.
    """
    results: dict[str, Any] = {}
    for variant in variants:
        rows: dict[int, dict[str, float | None]] = {}
        diverged = {}
        for folder in (workdir / variant).glob("[0-9]*"):
            if (folder / "diverged.json").exists():
                diverged[int(folder.name)] = json.loads((folder / "diverged.json").read_text("utf-8"))[
                    "error"
                ]
            elif is_complete(folder):
                networks = json.loads((folder / "eval.json").read_text(encoding="utf-8"))["networks"]
                if network not in networks:  # the student alone
                    continue
                rows[int(folder.name)] = {
                    name: _look_up(networks[network], path) for name, path in FIGURES.items()
                }
        seeds = sorted(rows)
        results[variant] = {
            "seeds": seeds,
            "diverged": diverged,
            "figures": {name: [rows[s][name] for s in seeds] for name in FIGURES},
        }
    return results


def compare(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Paired differences of every variant from the first, over the seeds that both have.

    Returns:
      variant -> figure -> `value`, `low`, `high` (95 %, Student's t over seeds) and `p` of the paired t-test; the
      figure that is tested also has `p_holm`, adjusted for the number of variants. Figures that a run does not have are
      left out, and so are variants without the figure that is tested.
    """
    base, *others = results
    tested = next(iter(FIGURES))
    table: dict[str, dict[str, Any]] = {}
    for variant in others:
        seeds = [s for s in results[variant]["seeds"] if s in results[base]["seeds"]]
        if len(seeds) < 2:
            continue
        rows: dict[str, Any] = {}
        for name in FIGURES:
            pair = [
                [results[v]["figures"][name][results[v]["seeds"].index(s)] for s in seeds]
                for v in (variant, base)
            ]
            if None in pair[0] + pair[1]:
                continue
            rows[name] = {
                **paired_difference(*pair).to_json(),
                "p": paired_p(*pair),
                "n": len(seeds),
            }
        if tested in rows:
            table[variant] = rows
    adjusted = holm([row[tested]["p"] for row in table.values()])
    for row, p in zip(table.values(), adjusted, strict=True):
        row[tested]["p_holm"] = p
    return table


def to_markdown(results: Mapping[str, Any], differences: Mapping[str, Any]) -> str:
    """One table of means over seeds and one of paired differences from the first variant."""
    head = "| variant | seeds | " + " | ".join(FIGURES) + " |\n" + "|---" * (len(FIGURES) + 2) + "|"
    lines = [head]
    for variant, result in results.items():
        cells = [
            _cell(mean_interval(values).to_json()) if values and None not in values else "–"
            for values in result["figures"].values()
        ]
        count = str(len(result["seeds"]))
        if result["diverged"]:
            count += f" (+ {len(result['diverged'])} diverged)"
        lines.append(f"| {variant} | {count} | " + " | ".join(cells) + " |")
    base, tested = next(iter(results)), next(iter(FIGURES))
    lines += ["", f"Difference from {base}, paired by seed; p: paired t-test of {tested}, Holm-adjusted.", ""]
    lines += [head.replace("| seeds |", "| seeds | p |", 1).replace("|---", "|---|---", 1)]
    for variant, row in differences.items():
        cells = [_cell(row[name], sign=True) if name in row else "–" for name in FIGURES]
        lines.append(
            f"| {variant} | {row[tested]['n']} | {row[tested]['p_holm']:.3f} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines) + "\n"


def _cell(interval: Mapping[str, float | None], sign: bool = False) -> str:
    plus = "+" if sign else ""
    text = format(interval["value"], f"{plus}.3f")
    if interval["low"] is None or interval["high"] is None:
        return text
    return f"{text} [{interval['low']:{plus}.3f}, {interval['high']:{plus}.3f}]"


def _look_up(tree: Any, path: Sequence[str]) -> float | None:
    for key in path:
        if key not in tree:  # a head that the data set does not have
            return None
        tree = tree[key]
    return None if tree is None else float(tree)


def _flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, value in json.loads(json.dumps(config.to_dict())).items():
        if isinstance(value, dict):
            flat |= {f"{section}.{name}": item for name, item in value.items()}
        else:
            flat[section] = value
    return flat


def load_variants(path: pathlib.Path, wanted: Sequence[str] | None) -> dict[str, ml_collections.ConfigDict]:
    """The configurations of an experiment file's variants; the first always comes along, as the one to compare with.

    Raises:
      ValueError: the file has no variants, or not those that are wanted.
    """
    spec = importlib.util.spec_from_file_location("experiment_file", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"{path} is no Python file; name an experiment such as configs/ablation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = list(getattr(module, "VARIANTS", ()))
    if not names:
        raise ValueError(f"{path} holds no VARIANTS; train it with train.py")
    unknown = [name for name in wanted or () if name not in names]
    if unknown:
        raise ValueError(f"{path}: unknown variants {', '.join(unknown)}; choose from {', '.join(names)}")
    return {n: module.get_config(n) for n in names if not wanted or n in wanted or n == names[0]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dilbert_jax.ablation", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--config", required=True, type=pathlib.Path, help="experiment file with VARIANTS")
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="holds all runs and the tables")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--variants", nargs="+", help="these only (and the first); default all")
    parser.add_argument("--network", choices=NETWORKS, default="student", help="whose figures to compare")
    args = parser.parse_args(argv)
    log_to_console()
    command = "python -m dilbert_jax.ablation " + " ".join(argv if argv is not None else sys.argv[1:])
    try:
        configs = load_variants(args.config, args.variants)
        run_variants(configs, args.seeds, args.workdir, command)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command to continue", file=sys.stderr)
        return 1
    results = collect(list(configs), args.workdir, args.network)
    differences = compare(results)
    table = to_markdown(results, differences)
    content = {
        "command": command,
        "device": str(jax.devices()[0].device_kind),
        "network": args.network,
        "results": results,
        "differences": differences,
    }
    (args.workdir / "ablation.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    (args.workdir / "ablation.md").write_text(table, encoding="utf-8")
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
