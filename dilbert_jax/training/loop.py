"""The stages in order: teacher, student, mutual learning, fine-tuning; each resumes where it stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import pathlib
import time
from collections.abc import Iterator, Mapping
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
from dilbert_jax.input_pipeline import evaluation_batches, training_batches
from dilbert_jax.models import find_system
from dilbert_jax.sharding import local_part, make_mesh, on_one_cpu, put, put_batch, replicated, shardings
from dilbert_jax.training import objectives
from dilbert_jax.training import step as steps
from dilbert_jax.training.accumulation import Accumulation, Part
from dilbert_jax.training.checkpoints import StageCheckpoints
from dilbert_jax.training.interrupt import DeferredInterrupt
from dilbert_jax.training.log import MetricsLog
from dilbert_jax.training.objectives import NETWORKS
from dilbert_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from dilbert_jax.training.weights import weight_quantiles

STAGES = ("teacher", "student", "mutual", "finetune")
_log = logging.getLogger(__name__)


class NonFiniteLossError(RuntimeError):
    """A loss term became NaN or infinite; the message names stage, step, term and the batch's studies."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage, ready to run.

    Attributes:
      name: one of `STAGES`.
      objective: (params, frozen, batch, rng) -> (loss, metrics).
      params: where the trainable networks start.
      frozen: parameters that the objective reads and never changes.
      optimizer: its settings; num_steps: updates to make.
      batches: start_step -> endless batches, of which this process has its part.
      accumulation: how the step goes through micro-batches, or None.
    """

    name: str
    objective: steps.Objective
    params: dict[str, Any]
    frozen: Any
    optimizer: OptimizerConfig
    num_steps: int
    steps_per_epoch: float
    batches: Any
    accumulation: Accumulation | None = None


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
            stage = _make_stage(name, experiment, params, mesh)
            params |= _run_stage(stage, experiment, workdir, metrics_log, mesh)


def network_names(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The networks that a run trains: teacher and student, or the student alone."""
    return ("student",) if config.train.single_network else NETWORKS


def stage_names(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The stages of a run in order, without a missing teacher's; mutual learning only where a system has it."""
    left_out = {name for name in NETWORKS if name not in network_names(config)}
    if not find_system(config.model.name).distilled:
        left_out.add("mutual")
    return tuple(stage for stage in STAGES if stage not in left_out)


def network_params(
    experiment_context: Any, workdir: pathlib.Path, stage: str, network: str
) -> tuple[Any, int]:
    """Restores one network's parameters at the end of a stage, and the step of the checkpoint."""
    checkpoints = StageCheckpoints(workdir, stage)
    shapes = jax.eval_shape(experiment_context.init_params, jax.random.key(0))
    config = experiment_context.config
    networks = (stage,) if stage in NETWORKS else network_names(config)
    if network not in networks:
        raise ValueError(f"stage {stage} of {workdir} holds no {network}, only {', '.join(networks)}")
    restored = checkpoints.restore_part({"params": {network: shapes}})
    checkpoint_step = checkpoints.latest_step()
    checkpoints.close()
    return restored["params"][network], int(checkpoint_step or 0)


def _make_stage(name: str, experiment: Experiment, params: Mapping[str, Any], mesh: Mesh) -> Stage:
    """What a stage trains, from where, against which frozen networks, on which batches."""
    context = experiment.context
    config, model, loss = context.config, context.model, context.loss
    train_config = config.train
    num_studies = len(experiment.indices["train"])
    if not num_studies:
        raise ValueError(f"data set {config.data.name!r} has no training study; see its preparation.json")
    per_epoch = num_studies / train_config.batch_size
    num_steps = max(1, round(train_config[f"{name}_epochs"] * per_epoch))
    # Every stage draws its own order and masks; networks start from their own seeds.
    seed = config.seed * 10 + STAGES.index(name)
    build = experiment.builder.annotation if name == "finetune" else experiment.builder.pretraining
    part, parts = local_part(mesh, train_config.batch_size)
    batches = functools.partial(
        training_batches,
        build,
        experiment.indices["train"],
        train_config.batch_size,
        seed,
        length_of=experiment.builder.padded_length,
        process_index=part,
        process_count=parts,
        num_workers=config.mesh.num_workers,
        low_priority=jax.default_backend() == "cpu",
    )

    rate = {"mutual": train_config.mutual_rate_scale, "finetune": train_config.finetune_rate_scale}.get(
        name, 1.0
    )
    optimizer = OptimizerConfig(**config.optimizer)
    optimizer = dataclasses.replace(optimizer, learning_rate=optimizer.learning_rate * rate)

    start: dict[str, Any]
    frozen: Any
    parts_of_step = train_config.num_micro_batches
    accumulation: Accumulation | None = None
    if parts_of_step > 1:
        masks = functools.partial(objectives.task_masks, config=loss)
        accumulation = Accumulation(parts_of_step, masks)
    if name in NETWORKS:
        start = {name: _initial_params(experiment, seed, mesh)}
        own_losses = find_system(config.model.name).own_losses if loss.own else None
        taught = name == "student" and "teacher" in params and not train_config.independent_student
        frozen = {"teacher": params["teacher"]} if taught else {}

        def objective(p: Any, f: Any, b: Any, r: Any, *part: Part) -> Any:
            return objectives.pretraining_objective(
                model, loss, p, f.get("teacher"), b, r, *part, own_losses=own_losses
            )

    elif name == "mutual":
        start, frozen = dict(params), dict(params)
        objective = functools.partial(objectives.mutual_objective, model, loss)
        if accumulation:
            accumulation = objectives.mutual_accumulation(
                model, loss, parts_of_step, train_config.relate_micro_batches
            )
    else:
        start, frozen = dict(params), {}
        pieces, mask = context.entity_names
        names = (jnp.asarray(pieces), jnp.asarray(mask))
        entity_of_region = jnp.asarray(context.entity_of_region)
        if accumulation:
            masks = functools.partial(objectives.annotation_masks, entity_of_region=entity_of_region)
            accumulation = Accumulation(parts_of_step, masks)

        def objective(p: Any, f: Any, b: Any, r: Any, *part: Part) -> Any:
            return objectives.annotation_objective(model, loss, p, names, entity_of_region, b, r, *part)

    return Stage(name, objective, start, frozen, optimizer, num_steps, per_epoch, batches, accumulation)


def _initial_params(experiment: Experiment, seed: int, mesh: Mesh) -> Any:
    """Random parameters, with the parts that come from outside or from the training clips."""
    context = experiment.context
    key, train_config = jax.random.key(seed), context.config.train
    placed = shardings(jax.eval_shape(context.init_params, key), mesh)
    # On one device as it is: in a program of its own every parameter would be compiled by itself.
    params = (
        context.init_params(key) if on_one_cpu() else jax.jit(context.init_params, out_shardings=placed)(key)
    )
    prepare = find_system(context.config.model.name).prepare
    if train_config.entity_weights or train_config.video_weights or prepare:
        params = jax.device_get(put(params, jax.tree.map(lambda _: replicated(mesh), params)))
        if prepare:
            clips = evaluation_batches(
                experiment.builder.annotation, experiment.indices["train"], train_config.batch_size, seed
            )
            params = prepare(context.model, params, (batch for batch, _ in clips), seed)
    if train_config.entity_weights or train_config.video_weights:
        from dilbert_jax.parity import outside  # needs an extra

        if train_config.entity_weights:
            folder = pathlib.Path(train_config.entity_weights)
            params = outside.with_bert(params, folder, context.config.model.num_heads)
        if train_config.video_weights:
            params = outside.with_r3d_18(params, pathlib.Path(train_config.video_weights))
    return put(params, placed)


def _run_stage(
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
    window = _Window(stage, experiment, metrics_log, schedule, batch_size, config.train.log_every_steps)
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
    validation = _validate(stage, experiment, state, rng, mesh)
    if validation:
        metrics_log.write({"stage": stage.name, "step": stage.num_steps, "split": "validation", **validation})
    checkpoints.save(stage.num_steps, state)
    checkpoints.close()
    if interrupt.requested:  # in the last step
        _log.info("stopped after stage %s; the same command continues", stage.name)
        raise KeyboardInterrupt
    return dict(state.params)


class _Window:
    """Averages metrics over `log_every` steps, checks them one step late, writes them to the log."""

    def __init__(
        self,
        stage: Stage,
        experiment: Experiment,
        metrics_log: MetricsLog,
        schedule: Any,
        batch_size: int,
        log_every: int,
    ):
        self.stage, self.experiment, self.metrics_log = stage, experiment, metrics_log
        self.schedule, self.batch_size, self.log_every = schedule, batch_size, log_every
        self.pending: tuple[int, Any, np.ndarray] | None = None
        self.rows: list[dict[str, float]] = []
        self.started = time.monotonic()
        self.summary = ""

    def add(self, step: int, metrics: Any, studies: np.ndarray) -> None:
        self._settle()
        self.pending = (step, metrics, studies)

    def flush(self) -> None:
        """Reads what is pending and writes the open window."""
        self._settle()
        if self.rows:
            self._write(self.last_step)

    def _settle(self) -> None:
        if self.pending is None:
            return
        step, metrics, studies = self.pending
        self.pending = None
        row = {name: float(value) for name, value in jax.device_get(metrics).items()}
        bad = [name for name, value in row.items() if not np.isfinite(value)]
        if bad:
            ids = [self.experiment.store.studies[i].study_id for i in np.asarray(studies)]
            raise NonFiniteLossError(
                f"stage {self.stage.name}, step {step}: {', '.join(bad)} not finite; the batch's studies are "
                f"{', '.join(ids)}. The last checkpoint is good: lower optimizer.learning_rate in another "
                "workdir, or look at these studies"
            )
        self.rows.append(row)
        self.last_step = step + 1
        # The very first step stands alone, so that the log shows where every loss started.
        if step == 0 or (step + 1) % self.log_every == 0:
            self._write(step + 1)

    def _write(self, step: int) -> None:
        now = time.monotonic()
        means = {name: float(np.mean([row[name] for row in self.rows])) for name in self.rows[0]}
        rate = len(self.rows) * self.batch_size / max(now - self.started, 1e-9)
        self.metrics_log.write(
            {
                "stage": self.stage.name,
                "step": step,
                "epoch": round(step / self.stage.steps_per_epoch, 3),
                "split": "train",
                "learning_rate": float(self.schedule(step - 1)),
                "clips_per_second": round(rate, 2),
                **means,
            }
        )
        self.summary = f"loss {means['loss']:.3f}, {rate:.0f} clips/s"
        self.rows, self.started = [], now


def _agree(due: bool, stop: bool) -> tuple[bool, bool]:
    """Whether to save, as the first process says, and whether to stop, as soon as any process is told to."""
    said = multihost_utils.process_allgather(np.asarray([due, stop]))
    return bool(said[0, 0]), bool(said[:, 1].any())


def _validate(
    stage: Stage, experiment: Experiment, state: steps.TrainState, rng: jax.Array, mesh: Mesh
) -> dict[str, float]:
    """Mean of the stage's loss terms over the validation studies (with this stage's dropout switched on).

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
    for batch, real in _full_batches(build, indices, size):
        del real
        inputs = steps.device_entries(batch)
        # Every process has all of the batch, whose size may not divide among several devices.
        everywhere = {name: replicated(mesh) for name in inputs}
        placed = put_batch(inputs, mesh) if mesh.size == 1 else put(inputs, everywhere)
        for name, value in jax.device_get(measure(placed)).items():
            totals.setdefault(name, []).append(float(value))
    return {name: float(np.mean(values)) for name, values in totals.items()}


def _full_batches(
    build: Any, indices: np.ndarray, size: int
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Evaluation batches without a padded last one (losses average over a batch)."""
    return evaluation_batches(build, indices[: len(indices) // size * size], size, seed=1)


def is_complete(workdir: pathlib.Path) -> bool:
    """Whether a run of this workdir finished all its stages."""
    return (workdir / "complete.json").exists()


def mark_complete(workdir: pathlib.Path, seconds: float) -> None:
    (workdir / "complete.json").write_text(
        json.dumps({"seconds_of_last_call": round(seconds, 1)}), encoding="utf-8"
    )


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
