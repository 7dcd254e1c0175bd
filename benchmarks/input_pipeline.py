"""The input pipeline: clips a second that it delivers, and what a step that it feeds waits for.

    python -m benchmarks.input_pipeline

Batches alone are those of the quickstart's phantom clips, drawn without training: built by a thread of this process
(what training does unless mesh.num_workers says otherwise), or by one or two worker processes. Fed steps take them from
the pipeline, beside steps on one batch that lies on the device; blocks of both alternate.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import runpy
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks import common

# What needs JAX is imported where it is used: a worker process imports this file, as it does train.py.

QUICKSTART = pathlib.Path(__file__).parents[1] / "configs" / "quickstart.py"
STAGES = ("pre-training", "mutual")
BUFFERED = 10  # more than any source holds ready


def measure_alone(experiment: Any, batch_size: int, rounds: int, batches: int) -> dict[str, list[float]]:
    """Clips a second of each way to build pre-training batches, one figure a round."""
    from dilbert_jax.input_pipeline import training_batches

    found: dict[str, list[float]] = {"thread": [], "1 worker": [], "2 workers": []}
    for i in range(rounds):
        for num_workers, rates in enumerate(found.values()):
            stream = training_batches(
                experiment.builder.pretraining,
                experiment.indices["train"],
                batch_size,
                seed=i,
                length_of=experiment.builder.padded_length,
                num_workers=num_workers,
            )
            for _ in range(BUFFERED):
                next(stream)
            start = time.perf_counter()
            for _ in range(batches):
                next(stream)
            rates.append(batches * batch_size / (time.perf_counter() - start))
            stream.close()
    return found


def measure_step(experiment: Any, stage: str, rounds: int, block: int) -> dict[str, list[float]]:
    """Seconds of a stage's step on a batch that lies on the device and on fed ones, a mean a block."""
    import jax
    import jax.numpy as jnp

    from dilbert_jax.input_pipeline import training_batches
    from dilbert_jax.training import objectives
    from dilbert_jax.training import step as steps
    from dilbert_jax.training.optimizer import OptimizerConfig, make_optimizer

    context = experiment.context
    config, model, loss = context.config, context.model, context.loss
    start = {name: context.init_params(jax.random.key(i)) for i, name in enumerate(objectives.NETWORKS)}
    if stage == "mutual":
        frozen, objective = start, functools.partial(objectives.mutual_objective, model, loss)
    else:
        start, frozen = {"teacher": start["teacher"]}, {}

        def objective(params: Any, frozen: Any, batch: Any, rng: Any) -> Any:
            return objectives.pretraining_objective(model, loss, params, None, batch, rng)

    optimizer = make_optimizer(OptimizerConfig(**config.optimizer), 1000)
    update = steps.make_step(objective, optimizer)
    state = steps.TrainState.create(jax.tree.map(jnp.copy, start), optimizer)
    rng = jax.random.key(0)
    stream = training_batches(
        experiment.builder.pretraining,
        experiment.indices["train"],
        config.train.batch_size,
        seed=0,
        low_priority=jax.default_backend() == "cpu",
    )
    cached = jax.device_put(steps.device_entries(next(stream)))
    seconds: dict[str, list[float]] = {"cached batch": [], "fed": []}
    for i in range(rounds + 1):
        for source, values in seconds.items():
            jax.block_until_ready(state)
            begin = time.perf_counter()
            previous = None
            for _ in range(block):
                batch = (
                    cached if source == "cached batch" else jax.device_put(steps.device_entries(next(stream)))
                )
                state, metrics = update(state, frozen, batch, rng)
                jax.block_until_ready(previous)  # as the training loop, which reads one step late
                previous = metrics
            jax.block_until_ready(state)
            if i:  # the first round compiles
                values.append((time.perf_counter() - begin) / block)
    stream.close()
    return seconds


def measure(arguments: argparse.Namespace) -> Iterator[common.Row]:
    from dilbert_jax.experiment import open_experiment

    config = runpy.run_path(str(QUICKSTART))["get_config"]()
    config.data.data_dir = arguments.data_dir
    with tempfile.TemporaryDirectory() as workdir:
        experiment = open_experiment(config, pathlib.Path(workdir))
        alone = measure_alone(experiment, config.train.batch_size, arguments.rounds, arguments.batches)
        for name, rates in alone.items():
            yield common.Row(f"batches alone, by {name}", "clips/s", common.quartiles(rates))
        for stage in STAGES:
            seconds = measure_step(experiment, stage, arguments.rounds, arguments.block)
            needed = config.train.batch_size / np.asarray(seconds["cached batch"])
            yield common.Row(
                f"batches alone, by thread, against the {stage} step",
                "clips/s",
                common.quartiles(alone["thread"]),
                "needed",
                common.quartiles(needed),
                common.exactly(float(np.median(alone["thread"]) / np.median(needed))),
                ">= 3",
            )
            yield common.compare(f"{stage} step, fed", seconds, "fed", "cached batch", "<= 1.05")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batches", type=int, default=60, help="timed batches a round of the pipeline alone")
    parser.add_argument("--block", type=int, default=20, help="timed steps a block")
    parser.add_argument("--data-dir", default="", help="where prepared data go; default: the user's cache")


if __name__ == "__main__":
    common.main(__doc__, measure, add_arguments, rounds=5)
