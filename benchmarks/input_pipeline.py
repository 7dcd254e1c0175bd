"""Clips a second that the input pipeline delivers, beside what the quickstart's steps consume.

    python benchmarks/input_pipeline.py --json input_pipeline.json

`alone` draws batches of the quickstart's phantom clips without training: built by a thread of this process (what
training does unless data.num_workers says otherwise), or by one or two worker processes. `step` times the pre-training
and the mutual step on one batch that lies on the device (`cached`) and on batches from the pipeline (`fed`): the ratio
of the two is what training waits for its data. Blocks of both are interleaved in one process, so that a slow moment of
the machine meets both.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import pathlib
import runpy
import tempfile
import time
from typing import Any

import numpy as np

# What needs JAX is imported where it is used: a worker process imports this file, as it does train.py.

QUICKSTART = pathlib.Path(__file__).parents[1] / "configs" / "quickstart.py"
STAGES = ("pre-training", "mutual")
BUFFERED = 10  # more than any source holds ready


def summarize(values: list[float]) -> dict[str, float]:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(middle), "low": float(low), "high": float(high)}


def measure_alone(experiment: Any, batch_size: int, rounds: int, batches: int) -> dict[str, Any]:
    """Clips a second of each way to build pre-training batches, its seconds to the first batch and to close."""
    from dilbert_jax.input_pipeline import training_batches

    found: dict[int, dict[str, list[float]]] = {n: {} for n in (0, 1, 2)}
    for i in range(rounds):
        for num_workers, rows in found.items():
            start = time.perf_counter()
            stream = training_batches(
                experiment.builder.pretraining,
                experiment.indices["train"],
                batch_size,
                seed=i,
                length_of=experiment.builder.padded_length,
                num_workers=num_workers,
            )
            next(stream)
            first = time.perf_counter() - start
            for _ in range(BUFFERED):
                next(stream)
            start = time.perf_counter()
            for _ in range(batches):
                next(stream)
            seconds = time.perf_counter() - start
            start = time.perf_counter()
            stream.close()
            row = {
                "clips_per_second": batches * batch_size / seconds,
                "first_batch_s": first,
                "close_s": time.perf_counter() - start,
            }
            for name, value in row.items():
                rows.setdefault(name, []).append(value)
    names = {0: "thread", 1: "1 worker", 2: "2 workers"}
    return {names[n]: {k: summarize(v) for k, v in rows.items()} for n, rows in found.items()}


def measure_step(experiment: Any, stage: str, rounds: int, block: int) -> dict[str, Any]:
    """Milliseconds of a stage's step on a cached batch and on fed ones, and the ratio of neighbouring blocks."""
    import jax
    import jax.numpy as jnp

    from dilbert_jax.input_pipeline import training_batches
    from dilbert_jax.training import step as steps
    from dilbert_jax.training.optimizer import OptimizerConfig, make_optimizer

    context = experiment.context
    config, model, loss = context.config, context.model, context.loss
    start = {name: context.init_params(jax.random.key(i)) for i, name in enumerate(steps.NETWORKS)}
    if stage == "mutual":
        frozen, objective = start, functools.partial(steps.mutual_objective, model, loss)
    else:
        start, frozen = {"teacher": start["teacher"]}, {}

        def objective(params: Any, frozen: Any, batch: Any, rng: Any) -> Any:
            return steps.pretraining_objective(model, loss, params, None, batch, rng)

    optimizer = make_optimizer(OptimizerConfig(**config.optimizer), 1000)
    update = steps.make_step(objective, optimizer)
    state = steps.TrainState.create(jax.tree.map(jnp.copy, start), optimizer)
    rng = jax.random.key(0)
    stream = training_batches(
        experiment.builder.pretraining, experiment.indices["train"], config.train.batch_size, seed=0
    )
    cached = jax.device_put(steps.device_entries(next(stream)))
    seconds: dict[str, list[float]] = {"cached": [], "fed": []}
    for i in range(rounds + 1):
        for source, values in seconds.items():
            jax.block_until_ready(state)
            begin = time.perf_counter()
            previous = None
            for _ in range(block):
                batch = cached if source == "cached" else jax.device_put(steps.device_entries(next(stream)))
                state, metrics = update(state, frozen, batch, rng)
                jax.block_until_ready(previous)  # as the training loop, which reads one step late
                previous = metrics
            jax.block_until_ready(state)
            if i:  # the first round compiles
                values.append((time.perf_counter() - begin) / block)
    stream.close()
    ratios = [fed / own for own, fed in zip(seconds["cached"], seconds["fed"], strict=True)]
    milliseconds = {source: summarize([1e3 * v for v in values]) for source, values in seconds.items()}
    return {
        "milliseconds": milliseconds,
        "fed_over_cached": summarize(ratios),
        "clips_per_second": 1e3 * config.train.batch_size / milliseconds["cached"]["median"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="interleaved repetitions of everything")
    parser.add_argument("--batches", type=int, default=60, help="timed batches a round of the pipeline alone")
    parser.add_argument("--block", type=int, default=20, help="timed steps a block")
    parser.add_argument("--data-dir", default="", help="where prepared data go; default: the user's cache")
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()

    import jax

    from dilbert_jax.experiment import open_experiment

    config = runpy.run_path(str(QUICKSTART))["get_config"]()
    config.data.data_dir = arguments.data_dir
    with tempfile.TemporaryDirectory() as workdir:
        experiment = open_experiment(config, pathlib.Path(workdir))
        batch_size = config.train.batch_size
        alone = measure_alone(experiment, batch_size, arguments.rounds, arguments.batches)
        print(f"{'alone':>12} {'clips/s':>24} {'first batch s':>14} {'close s':>8}")
        for name, row in alone.items():
            rate = row["clips_per_second"]
            print(
                f"{name:>12} {rate['median']:8.0f} [{rate['low']:5.0f}, {rate['high']:5.0f}]"
                f" {row['first_batch_s']['median']:14.2f} {row['close_s']['median']:8.2f}"
            )
        print(f"{'step':>12} {'cached ms':>10} {'clips/s':>8} {'thread / step':>14} {'fed / cached':>24}")
        step = {}
        for name in STAGES:
            row = measure_step(experiment, name, arguments.rounds, arguments.block)
            row["supply_over_demand"] = {
                source: r["clips_per_second"]["median"] / row["clips_per_second"]
                for source, r in alone.items()
            }
            step[name], ratio = row, row["fed_over_cached"]
            print(
                f"{name:>12} {row['milliseconds']['cached']['median']:10.0f} {row['clips_per_second']:8.1f}"
                f" {row['supply_over_demand']['thread']:13.1f}x"
                f" {ratio['median']:8.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]",
                flush=True,
            )
    if arguments.json:
        about = {
            "device": jax.devices()[0].device_kind,
            "cores": os.cpu_count(),
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "numpy", "grain")},
            "batch_size": batch_size,
            **vars(arguments),
        }
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"about": about, "alone": alone, "step": step}, file, indent=2)


if __name__ == "__main__":
    main()
