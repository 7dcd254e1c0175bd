"""Confidence intervals: a bootstrap over groups for one evaluated set, Student's t over seeds or folds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95
_CHUNK_ELEMENTS = 4_000_000  # of the resampling weights held at once: 32 MB


@dataclasses.dataclass(frozen=True)
class Interval:
    """A value with its confidence limits; NaN where it is undefined (null in JSON)."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """The INTERVAL of eval.json: `{"value", "low", "high"}`, null for what is undefined."""
        return {name: as_json(number) for name, number in dataclasses.asdict(self).items()}


def as_json(number: float) -> float | None:
    """A float rounded to six places, or None for NaN and infinities, which JSON cannot hold."""
    return round(float(number), 6) if np.isfinite(number) else None


def sum_by_group(values: np.ndarray, groups: Sequence[str] | np.ndarray) -> np.ndarray:
    """Adds up the examples of each group.

    Args:
      values: [N, ...] counts of each example.
      groups: [N] group of each example.

    Returns:
      float64 [G, ...], groups in sorted order.

    Raises:
      ValueError: the lengths differ, or there is no example.
    """
    values = np.asarray(values)
    labels = np.asarray(groups)
    if labels.shape != values.shape[:1] or not len(labels):
        raise ValueError(
            f"values have shape {values.shape} and groups {labels.shape}; expected one group an example"
        )
    _, index = np.unique(labels, return_inverse=True)
    sums = np.zeros((int(index.max()) + 1, *values.shape[1:]), np.float64)
    np.add.at(sums, index, values)
    return sums


def group_bootstrap(
    counts: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    num_resamples: int = 2000,
    seed: int = 0,
    level: float = LEVEL,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Percentile bootstrap that draws whole groups with replacement.

    Frames and clips of one patient resemble each other, so examples are not independent; groups are. Every
    statistic used here depends on sums of counts only, so a resample is a weighted sum of the groups' count
    vectors.

    Args:
      counts: [G, ...] counts summed within each group (see `sum_by_group`).
      statistic: maps summed counts [R, ...] to values [R, S] or [R]; NaN where undefined (a class that a
        resample does not hold, for instance). Such resamples are left out of that value's interval.
      num_resamples: R.
      seed: of the resampling; the same seed gives the same interval.
      level: coverage in (0, 1).

    Returns:
      value, low, high: float64 [S] or scalars. With a single group nothing can be resampled: low and high
        are NaN.

    Raises:
      ValueError: no group, or a parameter out of range.
    """
    counts = np.asarray(counts, np.float64)
    if counts.ndim < 2 or not len(counts):
        raise ValueError(f"counts have shape {counts.shape}; expected [groups, ...] with at least one group")
    if num_resamples < 1 or not 0 < level < 1:
        raise ValueError(
            f"num_resamples is {num_resamples} and level {level}; expected >= 1 and within (0, 1)"
        )
    num_groups = len(counts)
    value = np.asarray(statistic(counts.sum(0, keepdims=True)), np.float64)[0]
    if num_groups == 1:
        return value, np.full_like(value, np.nan), np.full_like(value, np.nan)

    rng = np.random.default_rng(seed)
    flat = counts.reshape(num_groups, -1)
    rows = max(1, _CHUNK_ELEMENTS // num_groups)
    resampled = []
    for start in range(0, num_resamples, rows):
        size = min(rows, num_resamples - start)
        # How often each group is drawn in G draws with replacement.
        weights = rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=size)
        resampled.append(weights.astype(np.float64) @ flat)
    sums = np.concatenate(resampled).reshape(num_resamples, *counts.shape[1:])
    values = np.asarray(statistic(sums), np.float64)
    tail = (1 - level) / 2
    low, high = _quantiles(values, tail), _quantiles(values, 1 - tail)
    undefined = np.isnan(value)
    return value, np.where(undefined, np.nan, low), np.where(undefined, np.nan, high)


def paired_group_bootstrap(
    first: np.ndarray,
    second: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    num_resamples: int = 2000,
    seed: int = 0,
    level: float = LEVEL,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bootstrap interval of `statistic(first) - statistic(second)` for two systems on the same groups.

    Both are resampled with the same groups, so what makes a group easy for both cancels out.

    Args:
      first, second: [G, ...] counts of the two systems, groups in the same order.
      statistic, num_resamples, seed, level: as in `group_bootstrap`.

    Returns:
      value, low, high of the difference.

    Raises:
      ValueError: the shapes differ.
    """
    first, second = np.asarray(first), np.asarray(second)
    if first.shape != second.shape:
        raise ValueError(
            f"the systems' counts have shapes {first.shape} and {second.shape}; expected the same groups"
        )

    def difference(sums: np.ndarray) -> np.ndarray:
        return np.asarray(statistic(sums[:, 0])) - np.asarray(statistic(sums[:, 1]))

    stacked = np.stack([first, second], axis=1)
    return group_bootstrap(stacked, difference, num_resamples=num_resamples, seed=seed, level=level)


def paired_permutation_p(
    first: np.ndarray,
    second: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    num_resamples: int = 2000,
    seed: int = 0,
) -> float:
    """Two-sided p of `statistic(first) - statistic(second)` when systems swap their answers in random groups.

    Args:
      first, second: [G, ...] counts of the two systems, groups in the same order.
      statistic: maps summed counts [R, ...] to one value each, [R].
      num_resamples: R random swaps.
      seed: of the swaps.

    Returns:
      (1 + swaps with a difference at least as large) / (1 + R).
    """
    stacked = np.stack([first, second], axis=1).astype(np.float64)  # [G, 2, ...]
    flat = stacked.reshape(len(stacked), 2, -1)
    swapped = np.random.default_rng(seed).random((num_resamples, len(stacked))) < 0.5
    change = swapped.astype(np.float64) @ (flat[:, 1] - flat[:, 0])  # what `first` gains by the swaps
    totals = flat.sum(0)

    def difference(gain: np.ndarray) -> np.ndarray:
        pair = totals[0] + gain, totals[1] - gain
        left, right = (np.asarray(statistic(x.reshape(-1, *stacked.shape[2:]))) for x in pair)
        return np.nan_to_num(left - right)

    observed = abs(difference(np.zeros((1, flat.shape[-1])))[0])
    return float((1 + (np.abs(difference(change)) >= observed - 1e-12).sum()) / (1 + num_resamples))


def mean_interval(values: Sequence[float] | np.ndarray, *, level: float = LEVEL) -> Interval:
    """Mean over seeds or folds with Student's t interval, mean +- t(n - 1) s / sqrt(n).

    Folds share training data, so this interval is somewhat too narrow for them; say so beside the figure.

    Args:
      values: one figure a seed or fold.
      level: coverage in (0, 1).

    Returns:
      The interval; NaN limits for a single value.

    Raises:
      ValueError: no value, or one that is not finite.
    """
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError(f"values are {numbers}; expected at least one finite number a seed or fold")
    mean, count = float(numbers.mean()), len(numbers)
    if count == 1:
        return Interval(mean, float("nan"), float("nan"))
    margin = float(stats.t.ppf((1 + level) / 2, count - 1) * numbers.std(ddof=1) / np.sqrt(count))
    return Interval(mean, mean - margin, mean + margin)


def paired_difference(
    first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray, *, level: float = LEVEL
) -> Interval:
    """Student's t interval of the mean of `first - second`, paired by seed or fold.

    Args:
      first, second: figures of two systems, in the same order of seeds or folds.
      level: coverage in (0, 1).

    Returns:
      The interval of the difference; NaN limits for a single pair.

    Raises:
      ValueError: the lengths differ, or as `mean_interval`.
    """
    left, right = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if left.shape != right.shape:
        raise ValueError(
            f"{left.shape} values against {right.shape}; a paired difference needs the same seeds or folds"
        )
    return mean_interval(left - right, level=level)


def paired_p(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> float | None:
    """Two-sided p of the paired t-test.

    Returns:
      None with fewer than two pairs, and where all differences are equal but not 0, to rounding: figures of few clips
      tie, and a test that takes their spread for 0 would call that certain. 1 where all are 0.
    """
    if len(first) < 2:
        return None
    difference = np.subtract(first, second)
    if np.ptp(difference) <= 1e-9:
        return 1.0 if np.abs(difference).max() <= 1e-9 else None
    return float(stats.ttest_rel(first, second).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment for as many tests as there are values, in the order given."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = largest
    return adjusted


def _quantiles(values: np.ndarray, q: float) -> np.ndarray:
    """Quantile over the resamples in which a value is defined; NaN when there is none."""
    ordered = np.sort(values, axis=0)  # NaN last
    defined = (~np.isnan(values)).sum(0)
    position = q * np.maximum(defined - 1, 0)
    below = np.floor(position).astype(int)
    above = np.minimum(below + 1, np.maximum(defined - 1, 0))
    left = np.take_along_axis(ordered, below[None], 0)[0]
    right = np.take_along_axis(ordered, above[None], 0)[0]
    return left + (position - below) * (right - left)
