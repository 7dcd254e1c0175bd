"""The objectives of pre-training and mutual learning in PyTorch: equations (3)-(13) as public code writes them.

They mirror `pretraining_objective` and `mutual_objective` of `dilbert_jax.training.objectives`, and take the same
`LossConfig`. The relational terms build every difference and every angle at once: O(N^2 D) and O(N^3) memory.
"""

from __future__ import annotations

from collections.abc import Mapping

from dilbert_jax.parity import MISSING_EXTRA
from dilbert_jax.parity.torch_model import Encoded, TorchDilbert
from dilbert_jax.training.objectives import LossConfig

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
except ImportError as error:
    raise ImportError(MISSING_EXTRA) from error

Batch = Mapping[str, Tensor]
MULTI_LABEL = ("mdc", "summary")
REDUCTIONS = ("mean", "mean_valid", "sum")


def check_supported(config: LossConfig) -> None:
    """Refuses options that the PyTorch objectives do not have.

    Raises:
      ValueError: names every option and its value.
    """
    refused = []
    if config.mdc_target != "description":
        refused.append(f"mdc_target={config.mdc_target!r} (they have 'description')")
    if config.order:
        refused.append(f"order={config.order!r} (they have 0)")
    if config.reduction not in REDUCTIONS:
        refused.append(f"reduction={config.reduction!r} (they have {', '.join(REDUCTIONS)})")
    if refused:
        raise ValueError(f"the PyTorch objectives do not have {'; '.join(refused)}")


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the valid values; 0 where none is valid.

    Args:
      values, mask: [...]; bool, True = valid.

    Returns:
      Scalar.
    """
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def distance_loss(student: Tensor, teacher: Tensor, reduction: str = "mean") -> Tensor:
    """Distance-wise relational loss, equations (4)-(6), from all pairwise differences.

    Args:
      student: [N, Ds]; teacher: [N, Dt], no gradient reaches it.
      reduction: `mean` over all N^2 pairs, `mean_valid` over those of distinct samples, `sum` of these.

    Returns:
      Scalar.
    """
    number = len(student)
    difference = _normalized_distances(student) - _normalized_distances(teacher.detach())
    return _reduce(difference, number * (number - 1), reduction)


def angle_loss(student: Tensor, teacher: Tensor, reduction: str = "mean") -> Tensor:
    """Angle-wise relational loss, equations (6)-(8), from the products of all normalized edges.

    Args:
      student: [N, Ds]; teacher: [N, Dt], no gradient reaches it.
      reduction: `mean` over all N^3 triples, `mean_valid` over those of distinct samples, `sum` of these.

    Returns:
      Scalar.
    """
    number = len(student)
    difference = _cosines(student) - _cosines(teacher.detach())  # [N, N, N]
    if reduction != "mean":
        same = torch.eye(number, dtype=torch.bool, device=student.device)
        difference = difference.masked_fill(same, 0.0)
    return _reduce(difference, number * (number - 1) * (number - 2), reduction)


def _reduce(difference: Tensor, distinct: int, reduction: str) -> Tensor:
    """Huber loss of all differences, of which so many are of distinct samples."""
    total = F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="sum")
    return total / {"mean": difference.numel(), "mean_valid": max(distinct, 1), "sum": 1}[reduction]


def pretraining_forward(network: TorchDilbert, batch: Batch) -> tuple[dict[str, Tensor], Encoded]:
    """Logits of the tasks on the corrupted batch; dropout as the module's mode says."""
    encoded = network.encode_batch(batch, corrupted=True)
    return network.pretrain(encoded, batch["mlm_positions"]), encoded


def task_masks(batch: Batch, config: LossConfig) -> dict[str, Tensor]:
    """Which positions the loss of each task in use counts (D12)."""
    matched = batch["matched"] | config.all_pairs
    masks = {
        "mlm": batch["mlm_mask"] & matched[:, None],
        "mdc": batch["description_target"] & (matched & batch["classes_mask"])[:, None],
        "moc": batch["region_target"] & (batch["region_labels"] >= 0) & matched[:, None],
        "cmm": batch["cmm_mask"],
    }
    if config.summary:
        masks["summary"] = torch.stack([batch["classes_mask"], batch["report_classes_mask"]], dim=1)
    return masks


def task_losses(
    logits: Mapping[str, Tensor], batch: Batch, masks: Mapping[str, Tensor], config: LossConfig
) -> dict[str, Tensor]:
    """Supervised loss of each task in use, equation (12): a mean over its valid positions.

    Args:
      logits: as `TorchDilbert.pretrain` returns them.
      batch: a pre-training batch; masks: from `task_masks`.
      config: which tasks are in use.

    Returns:
      A scalar a task.
    """
    classes = batch["classes"][:, None].expand(-1, batch["description_target"].shape[1], -1)
    targets = {
        "mlm": batch["mlm_targets"],
        "mdc": classes,
        "moc": batch["region_labels"],
        "cmm": batch["matched"],
    }
    if config.summary:
        targets["summary"] = torch.stack([batch["classes"], batch["report_classes"]], dim=1)
    values = {}
    for task, target in targets.items():
        z = logits[task]
        if task in MULTI_LABEL:
            entropy = F.binary_cross_entropy_with_logits(z, target.to(z.dtype), reduction="none")
            value = entropy.sum(-1) / max(z.shape[-1], 1)
        else:
            value = F.cross_entropy(z.movedim(-1, 1), target.long().clamp(min=0), reduction="none")
        values[task] = masked_mean(value, masks[task])
    return values


def soften(
    logits: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    temperature: float = 1.0,
    square: bool = False,
) -> Tensor:
    """Response terms (3) and (11): KL(target || logits), a mean over valid positions, summed over the heads (D18).

    Args:
      logits, target: per task [..., C]; no gradient reaches the target.
      masks: from `task_masks`; its tasks are summed.
      temperature: both logits are divided by it.
      square: multiply by the squared temperature.

    Returns:
      Scalar.
    """
    terms = []
    for task, mask in masks.items():
        ours, theirs = logits[task] / temperature, target[task].detach() / temperature
        if task in MULTI_LABEL:
            present = F.logsigmoid(theirs) - F.logsigmoid(ours)
            absent = F.logsigmoid(-theirs) - F.logsigmoid(-ours)
            divergence = (theirs.sigmoid() * present + (-theirs).sigmoid() * absent).mean(-1)
        else:
            divergence = F.kl_div(
                ours.log_softmax(-1), theirs.log_softmax(-1), reduction="none", log_target=True
            ).sum(-1)
        terms.append(masked_mean(divergence, mask))
    return torch.stack(terms).sum() * (temperature**2 if square else 1.0)


def pretraining_objective(
    networks: Mapping[str, TorchDilbert], teacher: TorchDilbert | None, batch: Batch, config: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Stages 1 and 2 (D19): the tasks for each network, plus a frozen teacher's soft labels if given.

    Args:
      networks: the trainable ones by name.
      teacher: frozen, or None.
      batch: a pre-training batch as tensors.
      config: weights and switches.

    Returns:
      The sum of the networks' losses, and every term as "network/term".

    Raises:
      ValueError: an option that the PyTorch objectives do not have.
    """
    check_supported(config)
    masks = task_masks(batch, config)
    losses: list[Tensor] = []
    metrics: dict[str, Tensor] = {}
    for name, network in networks.items():
        logits, _ = pretraining_forward(network, batch)
        terms = task_losses(logits, batch, masks, config)
        loss = _weighted(terms, config)
        if teacher is not None:
            soft = _frozen_logits(teacher, batch)
            terms["soft_labels"] = soften(logits, soft, masks, config.temperature, config.scale_by_square)
            loss = loss + terms["soft_labels"]
        metrics |= {f"{name}/{term}": value for term, value in {**terms, "loss": loss}.items()}
        losses.append(loss)
    return torch.stack(losses).sum(), metrics


def mutual_objective(
    networks: Mapping[str, TorchDilbert], frozen: Mapping[str, TorchDilbert], batch: Batch, config: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Stage 4: equation (13) for both networks on the identical corrupted batch (D18).

    Args:
      networks: "teacher" and "student", both trained; one alone has no mutual term.
      frozen: their snapshots.
      batch: a pre-training batch as tensors.
      config: weights and switches.

    Returns:
      The sum of the networks' losses, and every term as "network/term".

    Raises:
      ValueError: an option that the PyTorch objectives do not have.
    """
    check_supported(config)
    masks = task_masks(batch, config)
    logits, vectors, anchors = {}, {}, {}
    for name, network in networks.items():
        logits[name], encoded = pretraining_forward(network, batch)
        layers = {"fused": encoded.fused, **encoded.pooled}
        if config.relational_layer not in layers:
            raise ValueError(
                f"loss.relational_layer is {config.relational_layer!r}; choose one of {', '.join(layers)}"
            )
        vectors[name] = layers[config.relational_layer]
        anchors[name] = _frozen_logits(frozen[name], batch)
    losses: list[Tensor] = []
    metrics: dict[str, Tensor] = {}
    for name in networks:
        terms = task_losses(logits[name], batch, masks, config)
        cross_entropy = _weighted(terms, config)
        terms["self"] = soften(logits[name], anchors[name], masks, config.temperature, config.scale_by_square)
        loss = config.alpha * cross_entropy + config.gamma * terms["self"]
        for peer in networks.keys() - {name}:
            terms["response"] = soften(logits[name], logits[peer], masks)
            terms["distance"] = distance_loss(vectors[name], vectors[peer], config.reduction)
            terms["angle"] = angle_loss(vectors[name], vectors[peer], config.reduction)
            relational = terms["distance"] + config.beta1 * terms["angle"]  # (9)
            loss = loss + config.beta * (relational + config.beta2 * terms["response"])  # (10)
        metrics |= {f"{name}/{term}": value for term, value in {**terms, "loss": loss}.items()}
        losses.append(loss)
    return torch.stack(losses).sum(), metrics


def _weighted(terms: Mapping[str, Tensor], config: LossConfig) -> Tensor:
    return torch.stack([getattr(config, task) * value for task, value in terms.items()]).sum()


@torch.no_grad()
def _frozen_logits(network: TorchDilbert, batch: Batch) -> dict[str, Tensor]:
    """Logits of a network that does not learn, without dropout."""
    training = network.training
    logits, _ = pretraining_forward(network.eval(), batch)
    network.train(training)
    return logits


def _normalized_distances(x: Tensor) -> Tensor:
    """Distances [N, N] over their mean over pairs of distinct samples."""
    squared = (x[:, None] - x[None]).square().sum(-1)
    same = torch.eye(len(x), dtype=torch.bool, device=x.device)
    length = squared.clamp(min=1e-12).sqrt().masked_fill(same, 0.0)
    mean = length.sum() / max(len(x) * (len(x) - 1), 1)
    return length / torch.where(mean > 0, mean, 1.0)


def _cosines(x: Tensor) -> Tensor:
    """Cosine of every angle: [v, u, w] is that at vertex v between the edges to u and w."""
    edges = F.normalize(x[None] - x[:, None], dim=-1)
    return torch.bmm(edges, edges.transpose(1, 2))
