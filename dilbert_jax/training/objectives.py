"""What each stage minimises, as pure functions of parameters, batch and random key.

Networks are entries of a dict of parameters ("teacher", "student"). A frozen network is an argument: it is never
closed over and never in the optimizer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dilbert_jax import losses
from dilbert_jax.models.network import Encoded, Network
from dilbert_jax.relational import Reduction, angle_loss, distance_loss
from dilbert_jax.training.accumulation import (
    Accumulation,
    Batch,
    Metrics,
    Params,
    Part,
)

Array = jax.Array
PAPER_TASKS = ("mlm", "mdc", "moc", "cmm")
FURTHER_TASKS = ("summary", "order")  # in use where they have a weight
OwnLosses = Callable[[Mapping[str, Array], Mapping[str, Array]], dict[str, Array]]
NETWORKS = ("teacher", "student")
VISUAL = (
    "frames",
    "frame_mask",
    "boxes",
    "box_frames",
    "region_mask",
    "token_ids",
    "token_types",
    "token_mask",
)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights and switches of the losses (PAPER section 5).

    Attributes:
      mlm, mdc, moc, cmm: weights of the pre-training tasks.
      summary: weight of classifying the pooled vectors (not in the paper): the description by the clip's classes, also
        where the report is another's, and the report by those of its own study. One head reads both, which gives
        matching two vectors in the same coordinates. 0 = as the paper.
      order: weight of telling shuffled description tokens from those in order (D9); 0 = no such task.
      own: weight of a comparison system's own tasks (`System.own_losses`), relative to MLM's; 0 = the common alone.
      mdc_target: what MDC classifies, "description" or "entity" (D9, see `NetworkConfig`).
      organ, condition, findings, match, grounding: weights of the terms of fine-tuning.
      alpha, beta, gamma: supervised, mutual and self-distillation weights of (13).
      beta1, beta2: angle within relational (9), response within mutual (10).
      temperature: T of (11) and of the teacher's soft labels; scale_by_square multiplies those by T squared.
      reduction: "mean", "mean_valid" or "sum" of the relational losses (D14).
      relational_layer: which vector the relational losses compare: "fused" or a stream's pooled vector (D16); "none"
        leaves (9) out.
      all_pairs: masked losses count mismatched pairs too (D12).
    """

    mlm: float = 1.0
    mdc: float = 1.0
    moc: float = 1.0
    cmm: float = 1.0
    summary: float = 0.0
    order: float = 0.0
    own: float = 1.0
    mdc_target: str = "description"
    organ: float = 1.0
    condition: float = 1.0
    findings: float = 1.0
    match: float = 1.0
    grounding: float = 1.0
    alpha: float = 0.2
    beta: float = 1.0
    gamma: float = 0.6
    beta1: float = 2.0
    beta2: float = 1.0
    temperature: float = 1.0
    scale_by_square: bool = False
    reduction: Reduction = "mean"
    relational_layer: str = "fused"
    all_pairs: bool = False

    @property
    def tasks(self) -> tuple[str, ...]:
        """The pre-training tasks in use: the paper's four, `summary` and `order` where they have a weight."""
        return (*PAPER_TASKS, *(task for task in FURTHER_TASKS if getattr(self, task)))

    @property
    def multi_label(self) -> tuple[str, ...]:
        """The tasks whose classes are independent sigmoids; the others are softmax."""
        return ("mdc", "summary") if self.mdc_target == "description" else ("summary",)


def pretraining_forward(
    model: Network, params: Any, batch: Batch, dropout: Array | None
) -> tuple[dict[str, Array], Encoded]:
    """Logits of the tasks on the corrupted batch; `dropout` is a key, or None for no dropout."""
    logits, encoded, _ = _pretraining_forward(model, params, batch, dropout, own_tasks=False)
    return logits, encoded


def _pretraining_forward(
    model: Network, params: Any, batch: Batch, dropout: Array | None, own_tasks: bool
) -> tuple[dict[str, Array], Encoded, dict[str, Array]]:
    """Logits, what they are read from, and what the system's own tasks need."""

    def run(module: Network) -> tuple[dict[str, Array], Encoded, dict[str, Array]]:
        encoded = module.encode(
            **{name: batch[name] for name in VISUAL},
            description_zeroed=batch["description_zeroed"],
            region_zeroed=batch["region_zeroed"],
            description_order=batch["description_order"] if module.config.order else None,
            deterministic=dropout is None,
        )
        own = module.own_tasks(encoded, batch, dropout is None) if own_tasks else {}
        return module.pretrain(encoded, batch["mlm_positions"]), encoded, own

    rngs = None if dropout is None else {"dropout": dropout}
    return nn.apply(run, model)({"params": params}, rngs=rngs)


def task_masks(batch: Batch, config: LossConfig) -> dict[str, Array]:
    """Which positions the loss of each task in use counts: masked ones of matched pairs (D12), labelled ones only."""
    matched = batch["matched"] | config.all_pairs
    mlm = batch["mlm_mask"] & matched[:, None]
    masks = {
        "mlm": mlm,
        "mdc": batch["description_target"] & (matched & batch["classes_mask"])[:, None],
        "moc": batch["region_target"] & (batch["region_labels"] >= 0) & matched[:, None],
        "cmm": batch["cmm_mask"],
    }
    if config.mdc_target == "entity":
        masks["mdc"] = mlm & (batch["mlm_entities"] >= 0)
    if config.summary:
        masks["summary"] = jnp.stack([batch["classes_mask"], batch["report_classes_mask"]], axis=1)
    if config.order:
        masks["order"] = batch["frame_mask"].any(1)
    return masks


def task_targets(batch: Batch, config: LossConfig) -> dict[str, Array]:
    """Labels of each task in use: class indices, or, for independent sigmoids, bool [..., classes]."""
    targets = {
        "mlm": batch["mlm_targets"],
        "mdc": jnp.broadcast_to(
            batch["classes"][:, None], (*batch["description_target"].shape, batch["classes"].shape[-1])
        ),
        "moc": batch["region_labels"],
        "cmm": batch["matched"].astype(jnp.int32),
    }
    if config.mdc_target == "entity":
        targets["mdc"] = batch["mlm_entities"]
    if config.summary:
        targets["summary"] = jnp.stack([batch["classes"], batch["report_classes"]], axis=1)
    if config.order:
        in_order = batch["description_order"] == jnp.arange(batch["description_order"].shape[1])
        targets["order"] = (~in_order.all(1)).astype(jnp.int32)
    return targets


def task_losses(
    logits: Mapping[str, Array],
    batch: Batch,
    masks: Mapping[str, Array],
    config: LossConfig,
    counts: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """Supervised loss of each task in use (12), a mean over its valid positions; exactly 0 where there is none.

    `counts`, here and below, are those of the whole batch where this one is a part of it.
    """
    targets, values = task_targets(batch, config), {}
    counts = counts or {}
    for task in config.tasks:
        if task in config.multi_label:
            entropy = losses.binary_cross_entropy(logits[task], targets[task])
            # A mean over classes that is 0, not NaN, for a data set without any.
            value = entropy.sum(-1) / max(entropy.shape[-1], 1)
        else:
            value = losses.cross_entropy(logits[task], jnp.maximum(targets[task], 0))
        values[task] = losses.masked_mean(value, masks[task], counts.get(task))
    return values


def soften(
    logits: Mapping[str, Array],
    target: Mapping[str, Array],
    masks: Mapping[str, Array],
    config: LossConfig,
    temperature: float = 1.0,
    square: bool = False,
    counts: Mapping[str, Array] | None = None,
) -> Array:
    """Response terms (3) and (11): KL from `target`'s distribution, summed over the task heads (D18)."""
    total = jnp.float32(0.0)
    counts = counts or {}
    for task in config.tasks:
        compare = losses.binary_response_loss if task in config.multi_label else losses.response_loss
        pair = logits[task], target[task]
        total += compare(*pair, temperature=temperature, mask=masks[task], count=counts.get(task))
    return total * (temperature**2 if square else 1.0)


def relational_vector(encoded: Encoded, layer: str) -> Array:
    """The vector per sample that the relational losses compare (D16)."""
    if layer in ("fused", "none"):
        return encoded.fused
    if layer in encoded.pooled:
        return encoded.pooled[layer]
    raise ValueError(
        f"loss.relational_layer is {layer!r}; choose 'fused', 'none' or one of {sorted(encoded.pooled)}"
    )


def pretraining_objective(
    model: Network,
    config: LossConfig,
    params: Params,
    teacher: Any | None,
    batch: Batch,
    rng: Array,
    part: Part | None = None,
    *,
    own_losses: OwnLosses | None = None,
) -> tuple[Array, Metrics]:
    """Stages 1 and 2 (D19): the tasks for each network, plus a frozen teacher's soft labels if given.

    `own_losses`: `System.own_losses`, of the tasks that only this system has. They contrast within a micro-batch.
    """
    masks = task_masks(batch, config)
    counts = part.counts if part else None
    total: Array = jnp.float32(0.0)
    metrics: Metrics = {}
    for index, (name, network) in enumerate(params.items()):
        dropout = jax.random.fold_in(rng, index)
        logits, _, outputs = _pretraining_forward(
            model, network, batch, dropout, own_tasks=own_losses is not None
        )
        supervised = task_losses(logits, batch, masks, config, counts)
        loss = sum(getattr(config, task) * supervised[task] for task in config.tasks)
        metrics |= {f"{name}/{task}": supervised[task] for task in config.tasks}
        if own_losses is not None:
            share = part.share if part else 1.0
            own = {task: share * value for task, value in own_losses(outputs, batch).items()}
            metrics |= {f"{name}/{task}": value for task, value in own.items()}
            loss += config.own * config.mlm * sum(own.values())
        if teacher is not None:
            soft, _ = pretraining_forward(model, teacher, batch, None)
            soft = jax.lax.stop_gradient(soft)
            metrics[f"{name}/soft_labels"] = soften(
                logits, soft, masks, config, config.temperature, config.scale_by_square, counts
            )
            loss += metrics[f"{name}/soft_labels"]
        metrics[f"{name}/loss"] = loss
        total += loss
    return total, metrics


def relational_vectors(
    model: Network, config: LossConfig, params: Params, batch: Batch, rng: Array
) -> dict[str, Array]:
    """What `mutual_objective` compares between samples: a vector [B, D] per network."""
    return {
        name: relational_vector(
            pretraining_forward(model, params[name], batch, jax.random.fold_in(rng, index))[1],
            config.relational_layer,
        )
        for index, name in enumerate(NETWORKS)
        if name in params
    }


def relational_terms(config: LossConfig, vectors: Mapping[str, Array]) -> tuple[Array, Metrics]:
    """The part of `mutual_terms` that relates samples to each other: beta times (9), summed over the networks."""
    total: Array = jnp.float32(0.0)
    metrics: Metrics = {}
    for name in vectors:
        for peer in vectors.keys() - {name}:
            terms, relational = _relate(config, vectors[name], vectors[peer])
            metrics |= {f"{name}/{key}": value for key, value in terms.items()}
            metrics[f"{name}/loss"] = config.beta * relational
            total += metrics[f"{name}/loss"]
    return total, metrics


def _relate(config: LossConfig, own: Array, peer: Array) -> tuple[Metrics, Array]:
    """Distance and angle term, and (9)."""
    terms = {
        "distance": distance_loss(own, peer, reduction=config.reduction),
        "angle": angle_loss(own, peer, reduction=config.reduction),
    }
    return terms, terms["distance"] + config.beta1 * terms["angle"]


def mutual_objective(
    model: Network,
    config: LossConfig,
    params: Params,
    frozen: Params,
    batch: Batch,
    rng: Array,
    part: Part | None = None,
) -> tuple[Array, Metrics]:
    """Stage 4: equation (13) for both networks on the identical corrupted batch (D18).

    A network alone in `params` has no peer, and so no mutual term.
    """
    logits, vectors, anchors = {}, {}, {}
    for index, name in enumerate(NETWORKS):
        if name not in params:
            continue
        logits[name], encoded = pretraining_forward(
            model, params[name], batch, jax.random.fold_in(rng, index)
        )
        vectors[name] = relational_vector(encoded, config.relational_layer)
        anchors[name], _ = pretraining_forward(model, frozen[name], batch, None)
    return mutual_terms(config, logits, vectors, anchors, batch, part)


def mutual_terms(
    config: LossConfig,
    logits: Mapping[str, Mapping[str, Array]],
    vectors: Mapping[str, Array],
    anchors: Mapping[str, Mapping[str, Array]],
    batch: Batch,
    part: Part | None = None,
) -> tuple[Array, Metrics]:
    """Equation (13) of every network from what the networks say.

    Each learns from labels, from its peer (response and relations between samples) and from its own frozen snapshot.
    Peer and snapshot are targets: no gradient flows into them.

    Args:
      logits: network -> task -> logits.
      vectors: network -> [B, D], what the relational losses compare.
      anchors: network -> task -> logits of its frozen snapshot.
      batch: the batch that all of them saw.
      part: where it is a micro-batch, what it must know of the whole.

    Returns:
      The sum over the networks, and every term as `network/term`.
    """
    masks = task_masks(batch, config)
    counts = part.counts if part else None
    total: Array = jnp.float32(0.0)
    metrics: Metrics = {}
    for name in logits:
        supervised = task_losses(logits[name], batch, masks, config, counts)
        cross_entropy = sum(getattr(config, task) * value for task, value in supervised.items())
        anchor = jax.lax.stop_gradient(anchors[name])
        terms = {
            "self": soften(
                logits[name], anchor, masks, config, config.temperature, config.scale_by_square, counts
            )
        }
        mutual: Array = jnp.float32(0.0)
        for peer in logits.keys() - {name}:
            target = jax.lax.stop_gradient(logits[peer])
            terms["response"] = soften(logits[name], target, masks, config, counts=counts)
            relational: Array = jnp.float32(0.0)
            if config.relational_layer != "none" and (part is None or part.gradients is None):
                related, relational = _relate(config, vectors[name], vectors[peer])
                share = part.share if part else 1.0
                terms |= {key: share * value for key, value in related.items()}
                relational = share * relational
            mutual = losses.mutual_loss(relational, terms["response"], beta2=config.beta2)
        loss = losses.distillation_loss(
            cross_entropy, mutual, terms["self"], alpha=config.alpha, beta=config.beta, gamma=config.gamma
        )
        metrics |= {f"{name}/{key}": value for key, value in {**supervised, **terms, "loss": loss}.items()}
        total += loss
        if part is not None and part.gradients is not None:
            # Of the relational losses over the whole batch: their gradient; their value is known already.
            sent = (vectors[name].astype(jnp.float32) * part.gradients[name]).sum()
            total += sent - jax.lax.stop_gradient(sent)
    return total, metrics


def annotation_forward(
    model: Network, params: Any, batch: Batch, names: tuple[Array, Array], dropout: Array | None
) -> tuple[dict[str, Any], Encoded]:
    """Annotation logits; `names` are the candidate entities' word pieces and their mask."""

    def run(module: Network) -> tuple[dict[str, Any], Encoded]:
        encoded = module.encode(**{name: batch[name] for name in VISUAL}, deterministic=dropout is None)
        return module.annotate(encoded, *names), encoded

    rngs = None if dropout is None else {"dropout": dropout}
    return nn.apply(run, model)({"params": params}, rngs=rngs)


def annotation_masks(batch: Batch, entity_of_region: Array) -> dict[str, Array]:
    """Which positions each term of `annotation_objective` counts: labelled ones."""
    region_entity = entity_of_region[jnp.maximum(batch["region_labels"], 0)]
    return {
        "organ": batch["organ"] >= 0,
        "condition": batch["condition"] >= 0,
        "findings": jnp.broadcast_to(batch["findings_mask"][:, None], batch["findings"].shape),
        "match": batch["entities_mask"],
        "grounding": (batch["region_labels"] >= 0) & (region_entity >= 0),
    }


def annotation_objective(
    model: Network,
    config: LossConfig,
    params: Params,
    names: tuple[Array, Array],
    entity_of_region: Array,
    batch: Batch,
    rng: Array,
    part: Part | None = None,
) -> tuple[Array, Metrics]:
    """Stage 5: organ, condition, findings, and the match of entities with the clip and with labelled regions.

    Args:
      entity_of_region: int [num_region_classes]: the candidate entity of a region class, or -1.
    """
    total: Array = jnp.float32(0.0)
    metrics: Metrics = {}
    masks = annotation_masks(batch, entity_of_region)
    counts = part.counts if part else {}
    region_entity = entity_of_region[jnp.maximum(batch["region_labels"], 0)]  # [B, R]
    for index, (name, network) in enumerate(params.items()):
        logits, _ = annotation_forward(model, network, batch, names, jax.random.fold_in(rng, index))
        by_region = jnp.moveaxis(logits["match"]["region"], 1, 2)  # [B, R, E]
        values = {
            "organ": losses.cross_entropy(logits["organ"], jnp.maximum(batch["organ"], 0)),
            "condition": losses.cross_entropy(logits["condition"], jnp.maximum(batch["condition"], 0)),
            "findings": losses.binary_cross_entropy(logits["findings"], batch["findings"]),
            "match": losses.binary_cross_entropy(logits["match"]["clip"], batch["entities"]),
            # A labelled region belongs to its own entity rather than to any other; masked ones are asked too.
            "grounding": losses.cross_entropy(by_region, jnp.maximum(region_entity, 0)),
        }
        terms = {t: losses.masked_mean(v, masks[t], counts.get(t)) for t, v in values.items()}
        loss = sum((getattr(config, term) * value for term, value in terms.items()), start=jnp.float32(0.0))
        metrics |= {f"{name}/{key}": value for key, value in {**terms, "loss": loss}.items()}
        total += loss
    return total, metrics


def mutual_accumulation(
    model: Network, config: LossConfig, num_micro_batches: int, relate: bool
) -> Accumulation:
    """How `mutual_objective` goes through micro-batches; `relate`: relational losses over the whole batch."""
    vectors = relations = None
    if relate and config.relational_layer != "none":
        vectors = functools.partial(relational_vectors, model, config)
        relations = functools.partial(relational_terms, config)
    masks = functools.partial(task_masks, config=config)
    return Accumulation(num_micro_batches, masks, vectors, relations)
