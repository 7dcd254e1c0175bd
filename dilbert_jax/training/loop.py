"""Training: the stages in order, each from where it stopped."""

from __future__ import annotations

import contextlib
import functools
import logging
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from dilbert_jax.experiment import Experiment
from dilbert_jax.flops import count_parameters
from dilbert_jax.sharding import make_mesh, put_batch, shardings
from dilbert_jax.training import step as steps
from dilbert_jax.training.checkpoints import StageCheckpoints
from dilbert_jax.training.interrupt import DeferredInterrupt
from dilbert_jax.training.log import MetricsLog
from dilbert_jax.training.optimizer import make_optimizer, make_schedule
from dilbert_jax.training.stages import STAGES, Stage, make_stage, stage_names
from dilbert_jax.training.validation import validate
from dilbert_jax.training.weights import weight_quantiles
from dilbert_jax.training.window import MetricsWindow

_log = logging.getLogger(__name__)


def train(experiment: Experiment, workdir: pathlib.Path) -> None:
    """Runs every stage that is not complete yet.

    Order of operations in a step, which makes resuming exact: take the batch of step i (its content follows
    from i alone), update, log, and only then perhaps save as step i + 1.
    """
    metrics_log = MetricsLog(workdir)
    config = experiment.context.config
    params: dict[str, Any] = {}
    mesh = make_mesh(config.mesh.fsdp, config.mesh.tensor)
    with jax.set_mesh(mesh):
        for name in stage_names(config):
            stage = make_stage(name, experiment, params, mesh)
            params |= run_stage(stage, experiment, workdir, metrics_log, mesh)


def run_stage(
    stage: Stage, experiment: Experiment, workdir: pathlib.Path, metrics_log: MetricsLog, mesh: Mesh
) -> dict[str, Any]:
    """Trains one stage to its end from its newest checkpoint; returns the trained parameters."""
    config = experiment.context.config
    optimizer = make_optimizer(stage.optimizer, stage.num_steps)
    schedule = make_schedule(stage.optimizer, stage.num_steps)
    create = functools.partial(steps.TrainState.create, optimizer=optimizer)
    placed = shardings(jax.eval_shape(create, stage.params), mesh)
    # A copy: the step donates its state, and the frozen snapshot may be the same arrays.
    state = jax.jit(lambda p: create(jax.tree.map(jnp.copy, p)), out_shardings=placed)(stage.params)
    checkpoints = StageCheckpoints(workdir, stage.name)
    done = checkpoints.latest_step()
    if done is not None:
        state = checkpoints.restore(state)
    else:
        done = 0
    if done >= stage.num_steps:
        checkpoints.close()
        return dict(state.params)
    metrics_log.rewind(stage.name, done)
    _log.info("stage %s: steps %d to %d", stage.name, done, stage.num_steps)

    weights_log = MetricsLog(workdir, "weights.jsonl")
    weights_log.rewind(stage.name, done - 1)
    weight_steps = set(
        np.linspace(0, stage.num_steps - 1, config.train.weight_points).round().astype(int).tolist()
    )
    update = steps.make_step(stage.objective, optimizer, stage.accumulation, placed)
    batch_size = config.train.batch_size
    rng = jax.random.key(config.seed * 10 + STAGES.index(stage.name))
    batches = stage.batches(done)
    window = MetricsWindow(stage, experiment, metrics_log, schedule, batch_size, config.train.log_every_steps)
    saved_at = time.monotonic()
    several = jax.process_count() > 1
    bar = tqdm(
        total=stage.num_steps,
        initial=done,
        desc=stage.name,
        unit="step",
        smoothing=0.05,
        disable=jax.process_index() > 0,
    )
    with contextlib.closing(batches), bar, logging_redirect_tqdm(), DeferredInterrupt() as interrupt:
        try:
            for i in range(done, stage.num_steps):
                due = time.monotonic() - saved_at >= config.train.checkpoint_every_seconds
                stop = interrupt.requested
                if several:  # all stop and save at the same step; asking at every step would cost time
                    due, stop = _agree(due, stop) if i % config.train.log_every_steps == 0 else (False, False)
                if due and i > done:
                    window.flush()
                    checkpoints.save(i, state)
                    saved_at = time.monotonic()
                if stop:
                    raise KeyboardInterrupt
                if i in weight_steps:
                    for name, network in state.params.items():
                        spread = {k: v.tolist() for k, v in jax.device_get(weight_quantiles(network)).items()}
                        weights_log.write({"stage": stage.name, "step": i, "network": name, **spread})
                batch = next(batches)
                state, metrics = update(
                    state, stage.frozen, put_batch(steps.device_entries(batch), mesh), rng
                )
                # Looking at the step before keeps the device busy while the host reads.
                window.add(i, metrics, batch["study"])
                bar.update()
                bar.set_postfix_str(window.summary, refresh=False)
            window.flush()
        except KeyboardInterrupt:
            # Interrupted inside a step, the state is donated and gone: the last checkpoint stands.
            if not any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
                window.flush()
                checkpoints.save(int(state.step), state)
            _log.info(
                "stopped in stage %s at step %d; the same command continues here",
                stage.name,
                checkpoints.latest_step() or 0,
            )
            checkpoints.close()
            raise
    validation = validate(stage, experiment, state, rng, mesh)
    if validation:
        metrics_log.write({"stage": stage.name, "step": stage.num_steps, "split": "validation", **validation})
    checkpoints.save(stage.num_steps, state)
    checkpoints.close()
    if interrupt.requested:  # in the last step
        _log.info("stopped after stage %s; the same command continues", stage.name)
        raise KeyboardInterrupt
    return dict(state.params)


def _agree(due: bool, stop: bool) -> tuple[bool, bool]:
    """Whether to save, as the first process says, and whether to stop, as soon as any process is told to."""
    said = multihost_utils.process_allgather(np.asarray([due, stop]))
    return bool(said[0, 0]), bool(said[:, 1].any())


def describe_run(config: ml_collections.ConfigDict, experiment: Experiment) -> str:
    """One paragraph for the console: data, sizes, device."""
    sizes = {name: len(ids) for name, ids in experiment.indices.items()}
    shapes = jax.eval_shape(experiment.context.init_params, jax.random.key(0))
    labels = experiment.context.labels
    return (
        f"data {config.data.name}: {sizes['train']} training, {sizes['validation']} validation, "
        f"{sizes['test']} test studies; {len(labels.organs)} organs, {len(labels.conditions)} conditions, "
        f"{len(labels.findings)} findings, {len(labels.entities)} entities; "
        f"{config.model.name}, {count_parameters(shapes) / 1e6:.2f} M parameters a network; "
        f"{len(jax.devices())} device(s), {jax.devices()[0].device_kind}"
    )
