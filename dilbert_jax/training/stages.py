"""The stages of a run: what each trains, from where, against which frozen networks, on which batches."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from dilbert_jax.experiment import Experiment, ModelContext
from dilbert_jax.input_pipeline import evaluation_batches, training_batches
from dilbert_jax.models import find_system
from dilbert_jax.sharding import local_part, on_one_cpu, put, replicated, shardings
from dilbert_jax.training import objectives
from dilbert_jax.training import step as steps
from dilbert_jax.training.accumulation import Accumulation, Part
from dilbert_jax.training.checkpoints import StageCheckpoints
from dilbert_jax.training.objectives import NETWORKS
from dilbert_jax.training.optimizer import OptimizerConfig

_log = logging.getLogger(__name__)
STAGES = ("teacher", "student", "mutual", "finetune")


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


def network_names(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The networks that a run trains: teacher and student, or the student alone."""
    return ("student",) if config.train.single_network else NETWORKS


def stage_names(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The stages of a run in order, without a missing teacher's; mutual learning only where a system has it."""
    left_out = {name for name in NETWORKS if name not in network_names(config)}
    if not find_system(config.model.name).distilled:
        left_out.add("mutual")
    return tuple(stage for stage in STAGES if stage not in left_out)


def network_params(context: ModelContext, workdir: pathlib.Path, stage: str, network: str) -> tuple[Any, int]:
    """Restores one network's parameters at the end of a stage, and the step of the checkpoint."""
    checkpoints = StageCheckpoints(workdir, stage)
    shapes = jax.eval_shape(context.init_params, jax.random.key(0))
    config = context.config
    networks = (stage,) if stage in NETWORKS else network_names(config)
    if network not in networks:
        raise ValueError(f"stage {stage} of {workdir} holds no {network}, only {', '.join(networks)}")
    restored = checkpoints.restore_part({"params": {network: shapes}})
    checkpoint_step = checkpoints.latest_step()
    checkpoints.close()
    return restored["params"][network], int(checkpoint_step or 0)


def make_stage(name: str, experiment: Experiment, params: Mapping[str, Any], mesh: Mesh) -> Stage:
    """What a stage trains, from where, against which frozen networks, on which batches."""
    context = experiment.context
    config, model, loss = context.config, context.model, context.loss
    train_config = config.train
    num_studies = len(experiment.indices["train"])
    if not num_studies:
        raise ValueError(f"data set {config.data.name!r} has no training study; see its preparation.json")
    per_epoch = num_studies / train_config.batch_size
    num_steps = max(1, round(train_config[f"{name}_epochs"] * per_epoch))
    if num_steps == 1:
        _log.warning(
            "stage %s is a single step, and the rate of the first is 0: it trains nothing; raise train.%s_epochs (%g) "
            "or lower train.batch_size (%d)",
            name,
            name,
            train_config[f"{name}_epochs"],
            train_config.batch_size,
        )
    # Every stage draws its own order and masks; networks start from their own seeds.
    seed = config.seed * 10 + STAGES.index(name)
    build = experiment.builder.annotation if name == "finetune" else experiment.builder.pretraining
    part, parts = local_part(mesh, train_config.batch_size, train_config.num_micro_batches)
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
    if name == "finetune":
        optimizer = dataclasses.replace(optimizer, video_rate_scale=train_config.finetune_video_rate_scale)

    start: dict[str, Any]
    frozen: Any
    parts_of_step = train_config.num_micro_batches
    accumulation: Accumulation | None = None
    if parts_of_step > 1:
        masks = functools.partial(objectives.task_masks, config=loss)
        accumulation = Accumulation(parts_of_step, masks)
    if name in NETWORKS:
        start = {name: initial_params(experiment, seed, mesh)}
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


def initial_params(experiment: Experiment, seed: int, mesh: Mesh) -> Any:
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


def is_complete(workdir: pathlib.Path) -> bool:
    """Whether a run of this workdir finished all its stages."""
    return (workdir / "complete.json").exists()


def mark_complete(workdir: pathlib.Path, seconds: float) -> None:
    (workdir / "complete.json").write_text(
        json.dumps({"seconds_of_last_call": round(seconds, 1)}), encoding="utf-8"
    )
