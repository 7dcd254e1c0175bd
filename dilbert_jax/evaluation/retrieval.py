"""Recall at rank k of the pre-training tasks, beside what chance and the training frequencies reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dilbert_jax.evaluation.statistics import as_json

KS = (1, 10)
_CHUNK_ELEMENTS = 4_000_000


def recall_at_k(
    logits: np.ndarray,
    targets: np.ndarray,
    ks: Sequence[int] = KS,
    *,
    training_counts: np.ndarray | None = None,
) -> dict[str, Any]:
    """Share of the right classes among the k highest scores.

    With one right class an example this is the usual R@k. With several (masked description classification,
    where a clip has an organ, a condition and findings) an example scores |top k and right| / min(k,
    |right|), so that a perfect ranking reaches 1 at every k. Ties count in expectation over a random order
    among equals: a constant score earns exactly chance.

    Args:
      logits: float [N, C].
      targets: int [N] (-1 = nothing to predict, left out), or bool [N, C] (rows without a right class are
        left out).
      ks: ranks.
      training_counts: [C], how often training shows each class; adds `frequent_at_k`, what ordering the
        classes by frequency alone reaches.

    Returns:
      `recall_at_k`, `chance_at_k` (classes in random order) and, with `training_counts`, `frequent_at_k`,
      each in [0, 1] or None when no example counts; `num`, the examples counted; `num_classes`, C (with k >=
      C every recall is 1).

    Raises:
      ValueError: shapes do not fit, a target is no class, a score is NaN.
    """
    logits, targets = np.asarray(logits), np.asarray(targets)
    if logits.ndim != 2 or targets.shape not in (logits.shape, logits.shape[:1]):
        raise ValueError(
            f"logits {logits.shape} and targets {targets.shape}; expected [N, C] and [N] or [N, C]"
        )
    if any(k < 1 for k in ks):
        raise ValueError(f"ks are {tuple(ks)}; ranks start at 1")
    num_classes = logits.shape[1]
    if targets.ndim == 1:
        kept = targets >= 0
        if kept.any() and targets.max() >= num_classes:
            raise ValueError(f"targets reach {targets.max()}, but there are {num_classes} classes")
        right_index = targets[kept][:, None]
    else:
        if targets.dtype != bool:
            raise ValueError(f"targets [N, C] are {targets.dtype}; expected bool")
        kept = np.asarray(targets.any(1))
        right_index = targets[kept]
    scores = logits[kept]
    if np.isnan(scores).any():
        raise ValueError("logits hold NaN; a ranking needs numbers")

    result: dict[str, Any] = {}
    systems: list[tuple[str, np.ndarray]] = [("recall", scores), ("chance", np.zeros((1, num_classes)))]
    if training_counts is not None:
        counts = np.asarray(training_counts, np.float64)
        if counts.shape != (num_classes,):
            raise ValueError(f"training_counts have shape {counts.shape}; expected [{num_classes}]")
        systems.append(("frequent", counts[None]))
    for name, system in systems:
        for k in ks:
            values = _recalls(np.broadcast_to(system, scores.shape), right_index, k)
            result[f"{name}_at_{k}"] = as_json(values.mean()) if len(values) else None
    return {**result, "num": len(scores), "num_classes": num_classes}


def matching_accuracy(
    logits: np.ndarray, targets: np.ndarray, mask: np.ndarray | None = None
) -> dict[str, Any]:
    """Accuracy of cross-modal matching: does this report belong to this clip?

    Args:
      logits: float [N, 2], (no, yes).
      targets: bool [N], True = the report is the clip's own.
      mask: bool [N], True = counted.

    Returns:
      `accuracy`, `chance` (always giving the more frequent answer), each in [0, 1] or None when nothing
      counts, and `num`. A tie between yes and no earns one half.

    Raises:
      ValueError: shapes do not fit.
    """
    logits, targets = np.asarray(logits), np.asarray(targets).astype(bool)
    if logits.shape != (len(targets), 2):
        raise ValueError(f"logits {logits.shape} and targets {targets.shape}; expected [N, 2] and [N]")
    if mask is not None:
        logits, targets = logits[np.asarray(mask, bool)], targets[np.asarray(mask, bool)]
    if not len(targets):
        return {"accuracy": None, "chance": None, "num": 0}
    margin = logits[:, 1] - logits[:, 0]
    if np.isnan(margin).any():
        raise ValueError("logits hold NaN; a decision needs numbers")
    right = np.where(margin == 0, 0.5, (margin > 0) == targets)
    share = targets.mean()
    return {"accuracy": as_json(right.mean()), "chance": as_json(max(share, 1 - share)), "num": len(targets)}


def _recalls(scores: np.ndarray, right: np.ndarray, k: int) -> np.ndarray:
    """Expected recall at k of each row; `right` is the class index [N, 1] or bool [N, C]."""
    rows = max(1, _CHUNK_ELEMENTS // max(1, scores.shape[1]))
    parts = [_recall_rows(scores[i : i + rows], right[i : i + rows], k) for i in range(0, len(scores), rows)]
    return np.concatenate(parts) if parts else np.zeros(0)


def _recall_rows(scores: np.ndarray, right: np.ndarray, k: int) -> np.ndarray:
    if right.dtype != bool:
        own = np.take_along_axis(scores, right, 1)
        greater, equal = (scores > own).sum(1), (scores == own).sum(1)
        return np.clip((k - greater) / equal, 0.0, 1.0)
    ordered = -np.sort(-scores, axis=1)
    bound = ordered[:, min(k, scores.shape[1]) - 1][:, None]
    # Whatever beats the k-th score is in; the places left over are shared among its equals.
    above, tied = scores > bound, scores == bound
    places = (min(k, scores.shape[1]) - above.sum(1)) / tied.sum(1)
    found = (above & right).sum(1) + places * (tied & right).sum(1)
    return found / np.minimum(k, right.sum(1))
