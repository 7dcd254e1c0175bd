"""Intervals against closed forms, scipy and resampling written out."""

import math
import time

import numpy as np
import pytest
from scipy import stats

from dilbert_jax.evaluation import statistics


def share(sums):
    return sums[:, 0] / sums[:, 1]


def test_sum_by_group_adds_rows_of_the_same_group():
    values = np.arange(8).reshape(4, 2)
    sums = statistics.sum_by_group(values, ["b", "a", "b", "c"])
    np.testing.assert_array_equal(sums, [[2, 3], [4, 6], [6, 7]])


def test_sum_by_group_refuses_lengths_that_differ():
    with pytest.raises(ValueError, match="one group an example"):
        statistics.sum_by_group(np.ones((3, 2)), ["a", "b"])


def test_bootstrap_is_deterministic_and_seeded(rng):
    counts = np.stack([rng.binomial(9, 0.6, 30), np.full(30, 9)], -1)
    first = statistics.group_bootstrap(counts, share, num_resamples=200, seed=4)
    again = statistics.group_bootstrap(counts, share, num_resamples=200, seed=4)
    other = statistics.group_bootstrap(counts, share, num_resamples=200, seed=5)
    assert first == again and first != other


def test_bootstrap_agrees_with_resampling_groups_one_by_one(rng):
    sizes = rng.integers(1, 9, 40)
    counts = np.stack([rng.binomial(sizes, 0.7), sizes], -1)
    value, low, high = statistics.group_bootstrap(counts, share, num_resamples=4000)
    drawn = []
    for _ in range(4000):
        rows = counts[rng.integers(0, 40, 40)].sum(0)
        drawn.append(rows[0] / rows[1])
    assert value == pytest.approx(counts[:, 0].sum() / counts[:, 1].sum())
    np.testing.assert_allclose([low, high], np.percentile(drawn, [2.5, 97.5]), atol=0.012)


def test_bootstrap_is_wider_when_examples_of_a_group_agree(rng):
    outcome = np.repeat(rng.random(25) < 0.6, 8)
    counts = np.stack([outcome, np.ones(200)], -1)
    independent = statistics.group_bootstrap(counts, share)
    grouped = statistics.group_bootstrap(statistics.sum_by_group(counts, np.repeat(np.arange(25), 8)), share)
    assert grouped[0] == independent[0]
    assert grouped[2] - grouped[1] > 2 * (independent[2] - independent[1])


def test_bootstrap_covers_the_truth_about_as_often_as_it_says(rng):
    covered = 0
    for trial in range(300):
        counts = np.stack([rng.binomial(5, 0.7, 60), np.full(60, 5)], -1)
        _, low, high = statistics.group_bootstrap(counts, share, num_resamples=400, seed=trial)
        covered += low <= 0.7 <= high
    assert 0.90 <= covered / 300 <= 0.985


def test_one_group_has_no_interval():
    value, low, high = statistics.group_bootstrap(np.array([[3.0, 4.0]]), share)
    assert value == 0.75 and math.isnan(low) and math.isnan(high)
    assert statistics.Interval(float(value), float(low), float(high)).to_json() == {
        "value": 0.75,
        "low": None,
        "high": None,
    }


def test_bootstrap_leaves_out_resamples_in_which_a_value_is_undefined():
    counts = np.array([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])

    def guarded(sums):
        with np.errstate(invalid="ignore"):
            return sums[:, 0] / sums[:, 1]

    assert [float(v) for v in statistics.group_bootstrap(counts, guarded, num_resamples=50)] == [
        1.0,
        1.0,
        1.0,
    ]


def test_bootstrap_of_many_groups_is_chunked_and_quick(rng):
    counts = rng.integers(0, 3, (5000, 9, 3))
    start = time.perf_counter()
    _, low, high = statistics.group_bootstrap(counts, lambda s: s[:, :, 0] / s.sum(-1))
    assert time.perf_counter() - start < 10
    assert (low < 1 / 3).all() and (high > 1 / 3).all()


def test_bootstrap_names_what_is_wrong():
    with pytest.raises(ValueError, match="at least one group"):
        statistics.group_bootstrap(np.zeros((0, 2)), share)
    with pytest.raises(ValueError, match="level"):
        statistics.group_bootstrap(np.ones((2, 2)), share, level=1.0)


def test_paired_bootstrap_cancels_what_both_share(rng):
    sizes = np.full(40, 10)
    first = np.stack([rng.binomial(10, rng.choice([0.2, 0.95], 40)), sizes], -1)
    second = first - np.array([1, 0]) * (first[:, :1] > 0)
    value, low, high = statistics.paired_group_bootstrap(first, second, share)
    alone = statistics.group_bootstrap(first, share)
    assert 0 < low <= value <= high
    assert high - low < 0.5 * (alone[2] - alone[1])
    assert value == pytest.approx((first - second)[:, 0].sum() / 400)


def test_permutation_p_is_scipys(rng):
    sizes = np.full(12, 10)
    first, second = (np.stack([rng.binomial(10, p, 12), sizes], -1) for p in (0.7, 0.6))
    exact = stats.permutation_test(
        (first[:, 0], second[:, 0]),
        lambda a, b: a.sum() - b.sum(),
        permutation_type="samples",
        n_resamples=10**5,
    )
    p = statistics.paired_permutation_p(first, second, share, num_resamples=20000)
    assert p == pytest.approx(exact.pvalue, abs=0.015) and 0.02 < p < 0.98
    assert statistics.paired_permutation_p(first, first, share) == 1.0
    assert statistics.paired_permutation_p(first + np.array([9, 0]), first, share) < 0.01


def test_mean_interval_is_scipys():
    values = [0.71, 0.78, 0.69, 0.74, 0.80]
    interval = statistics.mean_interval(values)
    expected = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    np.testing.assert_allclose([interval.low, interval.high], expected)
    assert interval.value == pytest.approx(np.mean(values))
    assert math.isnan(statistics.mean_interval([0.5]).low)
    with pytest.raises(ValueError, match="finite"):
        statistics.mean_interval([0.5, float("nan")])


def test_paired_difference_agrees_with_the_paired_t_test():
    first, second = [0.8, 0.7, 0.9, 0.6], [0.7, 0.65, 0.85, 0.58]
    interval = statistics.paired_difference(first, second)
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    np.testing.assert_allclose([interval.low, interval.high], [expected.low, expected.high])
    with pytest.raises(ValueError, match="same seeds"):
        statistics.paired_difference([1.0], [1.0, 2.0])
