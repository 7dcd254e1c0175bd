"""Loss terms on the validation studies."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dilbert_jax.experiment import Experiment
from dilbert_jax.input_pipeline import evaluation_batches
from dilbert_jax.sharding import on_one_cpu, put, put_batch, replicated
from dilbert_jax.training import step as steps
from dilbert_jax.training.stages import Stage


def validate(
    stage: Stage, experiment: Experiment, state: steps.TrainState, rng: jax.Array, mesh: Mesh
) -> dict[str, float]:
    """Mean of the stage's loss terms over the validation studies (with this stage's dropout switched on).

    Studies that do not fill a last batch are left out, as losses average over a batch.

    On one CPU device the program of the gradients is there already, for batches of this shape: to run it takes less
    time than to compile one for the terms alone.
    """
    indices = experiment.indices["validation"]
    if not len(indices):
        return {}
    build: Any = experiment.builder.pretraining
    if stage.name == "finetune":
        build = functools.partial(experiment.builder.annotation, annotated=True)
    batch_size = experiment.context.config.train.batch_size
    size = min(batch_size, len(indices))
    if on_one_cpu() and size == batch_size and not stage.accumulation:
        gradients = steps.compiled_gradients(stage.objective, None)

        def measure(batch: Any) -> dict[str, jax.Array]:
            return gradients(state.params, state.step, stage.frozen, batch, rng)[1]
    else:
        forward = jax.jit(lambda p, s, f, b, r: stage.objective(p, f, b, jax.random.fold_in(r, s)))

        def measure(batch: Any) -> dict[str, jax.Array]:
            loss, metrics = forward(state.params, state.step, stage.frozen, batch, rng)
            return metrics | {"loss": loss}

    totals: dict[str, list[float]] = {}
    for batch, _ in evaluation_batches(build, indices[: len(indices) // size * size], size, seed=1):
        inputs = steps.device_entries(batch)
        # Every process has all of the batch, whose size may not divide among several devices.
        everywhere = {name: replicated(mesh) for name in inputs}
        placed = put_batch(inputs, mesh) if mesh.size == 1 else put(inputs, everywhere)
        for name, value in jax.device_get(measure(placed)).items():
            totals.setdefault(name, []).append(float(value))
    return {name: float(np.mean(values)) for name, values in totals.items()}
