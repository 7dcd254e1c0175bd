"""Thresholds against brute force, and which findings they make present."""

import numpy as np
import pytest

from dilbert_jax.labels import LabelSpace
from dilbert_jax.thresholds import Thresholds, choose_threshold, decide_findings


def f1_at(probabilities, targets, threshold):
    answers = probabilities >= threshold
    hits = (answers & targets).sum()
    return 2 * hits / (answers.sum() + targets.sum())


@pytest.mark.parametrize("seed", range(20))
def test_the_chosen_threshold_has_the_best_f1(seed):
    rng = np.random.default_rng(seed)
    targets = rng.random(30) < 0.4
    probabilities = np.clip(0.3 + 0.2 * targets + rng.normal(0, 0.15, 30), 0.11, 0.89)
    if seed % 2:  # many ties
        probabilities = np.round(probabilities, 1)
    chosen = choose_threshold(probabilities, targets)
    candidates = np.linspace(0.05, 0.95, 1801)
    best = max(f1_at(probabilities, targets, c) for c in candidates)
    assert f1_at(probabilities, targets, chosen) == pytest.approx(best, abs=1e-12)
    # It lies between two answers, on neither of them.
    assert not np.isclose(probabilities, chosen).any()


def test_too_few_or_only_positives_choose_nothing():
    probabilities = np.linspace(0.1, 0.9, 12)
    assert choose_threshold(probabilities, np.arange(12) < 4) is None
    assert choose_threshold(probabilities, np.arange(12) < 5) is not None
    assert choose_threshold(probabilities, np.ones(12, bool)) is None
    assert choose_threshold(probabilities, np.arange(12) >= 9, min_positives=3) == pytest.approx(
        (probabilities[8] + probabilities[9]) / 2
    )


def test_thresholds_stay_in_sensible_bounds():
    targets = np.arange(12) < 6
    assert choose_threshold(np.where(targets, 1e-3, 1e-4), targets) == 0.05
    assert choose_threshold(np.where(targets, 0.9999, 0.999), targets) == 0.95


def test_thresholds_return_from_their_file_and_have_a_default(tmp_path):
    thresholds = Thresholds({"anechoic": 0.3}, {"cyst": 0.7})
    thresholds.save(tmp_path / "thresholds.json")
    loaded = Thresholds.load(tmp_path / "thresholds.json")
    assert loaded == thresholds
    assert (loaded.finding("anechoic"), loaded.finding("cyst")) == (0.3, 0.5)
    assert (loaded.entity("cyst"), loaded.entity("anechoic")) == (0.7, 0.5)


def test_of_findings_that_exclude_each_other_the_most_probable_is_present():
    ids = ("a", "b", "c", "d")
    labels = LabelSpace((), (), ids, (), (), exclusive=(("a", "b"), ("c", "b")))
    probabilities = np.asarray(
        [
            [0.6, 0.7, 0.8, 0.1],  # c leaves no b, so that a stays
            [0.6, 0.9, 0.8, 0.9],
            [0.2, 0.3, 0.1, 0.9],
            [0.6, 0.6, 0.1, 0.1],  # the first of equals
        ]
    )
    decided = decide_findings(labels, Thresholds({"b": 0.25}, {}), probabilities)
    wanted = ["ac", "bd", "bd", "a"]
    assert ["".join(c for c, p in zip(ids, row, strict=True) if p) for row in decided] == wanted
    free = decide_findings(LabelSpace((), (), ids, (), ()), Thresholds({}, {}), probabilities)
    np.testing.assert_array_equal(free, probabilities >= 0.5)
