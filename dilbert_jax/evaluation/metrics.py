"""Sensitivity, precision and F1 of annotations, eqs. (14)-(16), with bootstrap intervals over groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dilbert_jax.evaluation.statistics import Interval, group_bootstrap, sum_by_group

MEASURES = ("sensitivity", "precision", "f1")


def classification_report(
    targets: np.ndarray,
    predictions: np.ndarray,
    class_ids: Sequence[str],
    groups: Sequence[str] | np.ndarray,
    *,
    num_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluates one label an example (organ, condition).

    Macro figures average the classes that the evaluated set holds (support > 0); a class of the set that is
    never predicted counts with precision 0 and F1 0. Micro figures pool all classes; with one label an
    example the three of them equal accuracy.

    Args:
      targets: int [N], index into `class_ids`; -1 = not labelled, left out.
      predictions: int [N], index into `class_ids`.
      class_ids: concept id of each class, C of them.
      groups: [N] patient, subject or near-duplicate group of each example.
      num_resamples: bootstrap resamples.
      seed: of the bootstrap.

    Returns:
      REPORT of docs/evaluation.md: `accuracy`, `macro`, `micro`, `per_class`, `confusion` (counts [C][C], a
      row a true class), `num`, `num_groups`.

    Raises:
      ValueError: shapes or indices do not fit, or no example is labelled.
    """
    targets, predictions, labels = np.asarray(targets), np.asarray(predictions), np.asarray(groups)
    if targets.ndim != 1 or targets.shape != predictions.shape or targets.shape != labels.shape:
        raise ValueError(
            f"targets {targets.shape}, predictions {predictions.shape} and groups {labels.shape} "
            "must all be [N]"
        )
    labelled = targets >= 0
    targets, predictions, labels = targets[labelled], predictions[labelled], labels[labelled]
    if not len(targets):
        raise ValueError("no example is labelled; leave this task out of the evaluation")
    num_classes = len(class_ids)
    for name, values in (("targets", targets), ("predictions", predictions)):
        if values.min() < 0 or values.max() >= num_classes:
            raise ValueError(
                f"{name} range from {values.min()} to {values.max()}; "
                f"expected indices of {num_classes} classes"
            )
    true = np.eye(num_classes, dtype=bool)[targets]
    predicted = np.eye(num_classes, dtype=bool)[predictions]
    report = _report(true, predicted, class_ids, labels, True, num_resamples, seed)
    confusion = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(confusion, (targets, predictions), 1)
    report["confusion"] = confusion.tolist()
    return report


def multilabel_report(
    targets: np.ndarray,
    predictions: np.ndarray,
    class_ids: Sequence[str],
    groups: Sequence[str] | np.ndarray,
    *,
    num_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluates any number of labels an example (findings); macro and micro as in `classification_report`.

    Args:
      targets: bool [N, C].
      predictions: bool [N, C].
      class_ids: concept id of each of the C findings.
      groups: [N] group of each example.
      num_resamples: bootstrap resamples.
      seed: of the bootstrap.

    Returns:
      REPORT of docs/evaluation.md without `accuracy` and `confusion`.

    Raises:
      ValueError: shapes or types do not fit, or there is no example.
    """
    targets, predictions, labels = np.asarray(targets), np.asarray(predictions), np.asarray(groups)
    if targets.dtype != bool or predictions.dtype != bool:
        raise ValueError(
            f"targets are {targets.dtype} and predictions {predictions.dtype}; "
            "expected bool: apply the threshold first"
        )
    expected = (len(labels), len(class_ids))
    if targets.shape != expected or predictions.shape != expected or not targets.size:
        raise ValueError(
            f"targets {targets.shape} and predictions {predictions.shape} must be "
            f"[N, C] = {expected}, not empty"
        )
    return _report(targets, predictions, class_ids, labels, False, num_resamples, seed)


def majority_predictions(train_targets: np.ndarray, num_examples: int) -> np.ndarray:
    """What the majority baseline answers: the most frequent training class, whatever the clip shows.

    Args:
      train_targets: int [M] (-1 = not labelled), or bool [M, C] for findings.
      num_examples: N, how many answers.

    Returns:
      int [N]; or bool [N, C]: findings present in more than half of the training examples (often none at
      all, which scores F1 0: see `constant_report` for the stricter yardstick).

    Raises:
      ValueError: no labelled training example.
    """
    train_targets = np.asarray(train_targets)
    if train_targets.ndim == 2:
        if not len(train_targets):
            raise ValueError("no training example to count findings in")
        return np.tile(train_targets.mean(0) > 0.5, (num_examples, 1))
    labelled = train_targets[train_targets >= 0]
    if not len(labelled):
        raise ValueError("no training example is labelled, so there is no majority class")
    return np.full(num_examples, np.bincount(labelled).argmax())


def majority_baseline(
    train_targets: np.ndarray,
    targets: np.ndarray,
    class_ids: Sequence[str],
    groups: Sequence[str] | np.ndarray,
    *,
    num_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """REPORT of `majority_predictions`, the line that a model has to beat.

    Args:
      train_targets: int [M] or bool [M, C], labels of the training examples.
      targets: int [N] or bool [N, C], labels of the evaluated examples.
      class_ids, groups, num_resamples, seed: as in `classification_report`.

    Returns:
      REPORT, of the kind that the targets' shape asks for.

    Raises:
      ValueError: as `majority_predictions` and the reports.
    """
    targets = np.asarray(targets)
    report = multilabel_report if targets.ndim == 2 else classification_report
    predictions = majority_predictions(train_targets, len(targets))
    return report(targets, predictions, class_ids, groups, num_resamples=num_resamples, seed=seed)


def constant_report(
    targets: np.ndarray,
    class_ids: Sequence[str],
    groups: Sequence[str] | np.ndarray,
    *,
    num_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """REPORT of answering that every finding is present in every clip.

    No constant answer has a higher F1: for a prevalence p it reaches 2 p / (1 + p), where the majority
    scores 0.

    Args:
      targets: bool [N, C].
      class_ids, groups, num_resamples, seed: as in `multilabel_report`.

    Returns:
      REPORT without `accuracy`.
    """
    everything = np.ones(np.shape(targets), bool)
    return multilabel_report(targets, everything, class_ids, groups, num_resamples=num_resamples, seed=seed)


def class_counts(targets: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """True positives, false positives and false negatives of each example and class.

    Args:
      targets: bool [N, C].
      predictions: bool [N, C].

    Returns:
      int [N, C, 3] in the order (TP, FP, FN).
    """
    return np.stack([targets & predictions, ~targets & predictions, targets & ~predictions], axis=-1).astype(
        np.int64
    )


def class_measures(counts: np.ndarray) -> np.ndarray:
    """Eqs. (14)-(16) for each class; a class that is present but never predicted has precision 0.

    Args:
      counts: [..., 3] in the order (TP, FP, FN).

    Returns:
      [..., 3] in the order of `MEASURES`; NaN where a measure has nothing to count.
    """
    hits, false_alarms, misses = counts[..., 0], counts[..., 1], counts[..., 2]
    support, predicted = hits + misses, hits + false_alarms
    sensitivity = _ratio(hits, support)
    precision = np.where((predicted == 0) & (support > 0), 0.0, _ratio(hits, predicted))
    f1 = _ratio(2 * hits, support + predicted)
    return np.stack([sensitivity, precision, f1], axis=-1)


def macro_measures(counts: np.ndarray) -> np.ndarray:
    """Mean of `class_measures` over the classes with support; [..., C, 3] to [..., 3]."""
    held = (counts[..., 0] + counts[..., 2] > 0)[..., None]
    return _ratio(np.where(held, class_measures(counts), 0.0).sum(-2), held.sum(-2))


def micro_measures(counts: np.ndarray) -> np.ndarray:
    """Measures of the counts pooled over classes; [..., C, 3] to [..., 3]."""
    return class_measures(counts.sum(-2))


def _report(
    true: np.ndarray,
    predicted: np.ndarray,
    class_ids: Sequence[str],
    groups: np.ndarray,
    single_label: bool,
    num_resamples: int,
    seed: int,
) -> dict[str, Any]:
    counts = sum_by_group(class_counts(true, predicted), groups)  # [G, C, 3]

    def statistic(sums: np.ndarray) -> np.ndarray:
        rows = [macro_measures(sums)[:, None], micro_measures(sums)[:, None], class_measures(sums)]
        return np.concatenate(rows, axis=1).reshape(len(sums), -1)

    value, low, high = group_bootstrap(counts, statistic, num_resamples=num_resamples, seed=seed)
    stacked = np.stack([value, low, high], -1).reshape(-1, len(MEASURES), 3)

    def measures(row: np.ndarray) -> dict[str, Any]:
        return {name: Interval(*row[i]).to_json() for i, name in enumerate(MEASURES)}

    report: dict[str, Any] = {"macro": measures(stacked[0]), "micro": measures(stacked[1])}
    if single_label:
        # Each example has one label and one answer: pooled sensitivity is the share of right answers.
        report = {"accuracy": report["micro"]["sensitivity"], **report}
    report["per_class"] = [
        {
            "id": concept,
            "support": int(true[:, c].sum()),
            "predicted": int(predicted[:, c].sum()),
            **measures(stacked[2 + c]),
        }
        for c, concept in enumerate(class_ids)
    ]
    return {**report, "num": len(true), "num_groups": len(counts)}


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient, NaN where the denominator is 0."""
    positive = np.asarray(denominator) > 0
    return np.where(positive, numerator / np.where(positive, denominator, 1), np.nan)
