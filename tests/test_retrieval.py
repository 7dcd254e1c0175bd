"""Recall at k against scikit-learn and against counting by hand; chance and ties."""

import itertools
import types

import numpy as np
import pytest
from sklearn.metrics import top_k_accuracy_score
from small_builder import make_builder, make_study

from dilbert_jax.evaluate import count_answers, rank_classes
from dilbert_jax.evaluation.retrieval import matching_accuracy, recall_at_k
from dilbert_jax.training.objectives import LossConfig


@pytest.mark.parametrize("k", [1, 3, 10])
def test_recall_is_top_k_accuracy(rng, k):
    logits, targets = rng.normal(size=(300, 25)), rng.integers(0, 25, 300)
    result = recall_at_k(logits, targets, (k,))
    expected = top_k_accuracy_score(targets, logits, k=k, labels=np.arange(25))
    assert result[f"recall_at_{k}"] == pytest.approx(expected, abs=1e-6)
    assert result[f"chance_at_{k}"] == pytest.approx(k / 25)
    assert result["num"] == 300 and result["num_classes"] == 25


def test_a_constant_score_earns_exactly_chance():
    result = recall_at_k(np.zeros((40, 20)), np.arange(40) % 20)
    assert result["recall_at_1"] == result["chance_at_1"] == 0.05
    assert result["recall_at_10"] == result["chance_at_10"] == 0.5


def test_ties_count_in_expectation_over_every_order(rng):
    scores = np.array([2.0, 1.0, 1.0, 1.0, 0.0])
    right = np.array([True, True, False, True, False])
    for k in range(1, 6):
        found = []
        for order in itertools.permutations(range(5)):
            ranking = sorted(range(5), key=lambda c: (-scores[c], order[c]))
            found.append(right[ranking[:k]].sum() / min(k, 3))
        result = recall_at_k(scores[None], right[None], (k,))
        assert result[f"recall_at_{k}"] == pytest.approx(np.mean(found), abs=1e-6)
    single = recall_at_k(scores[None], np.array([2]), (1, 2, 3, 4))
    np.testing.assert_allclose(
        [single[f"recall_at_{k}"] for k in (1, 2, 3, 4)], [0, 1 / 3, 2 / 3, 1], atol=1e-6
    )


def test_perfect_ranking_of_several_labels_reaches_one_at_every_k(rng):
    targets = rng.random((50, 12)) < 0.4
    targets[0] = False
    result = recall_at_k(np.where(targets, 3.0, -3.0), targets, (1, 2, 10))
    assert [result[f"recall_at_{k}"] for k in (1, 2, 10)] == [1, 1, 1]
    assert result["num"] == targets.any(1).sum()


def test_one_label_gives_the_same_as_class_indices(rng):
    logits, targets = rng.normal(size=(80, 15)).round(1), rng.integers(0, 15, 80)
    assert recall_at_k(logits, targets) == recall_at_k(logits, np.eye(15, dtype=bool)[targets])


def test_frequencies_of_training_are_a_yardstick(rng):
    targets = np.array([0] * 6 + [1] * 3 + [2])
    result = recall_at_k(rng.normal(size=(10, 3)), targets, (1, 2), training_counts=np.array([60, 30, 10]))
    assert result["frequent_at_1"] == pytest.approx(0.6) and result["frequent_at_2"] == pytest.approx(0.9)


def test_rank_beyond_the_classes_is_one_and_absent_targets_are_left_out(rng):
    result = recall_at_k(rng.normal(size=(5, 4)), np.array([0, 1, -1, 3, -1]))
    assert result["num"] == 3 and result["recall_at_10"] == result["chance_at_10"] == 1
    nothing = recall_at_k(rng.normal(size=(2, 4)), np.array([-1, -1]))
    assert nothing["recall_at_1"] is None and nothing["num"] == 0


def test_masked_rows_may_hold_nan_but_counted_rows_may_not():
    logits = np.array([[1.0, 0.0], [np.nan, np.nan]])
    assert recall_at_k(logits, np.array([0, -1]), (1,))["recall_at_1"] == 1
    with pytest.raises(ValueError, match="NaN"):
        recall_at_k(logits, np.array([0, 1]))


@pytest.mark.parametrize(
    ("shape", "targets", "ks", "message"),
    [
        ((2, 3), np.array([0, 3]), (1,), "targets reach 3"),
        ((2, 3), np.array([0, 1, 2]), (1,), r"expected \[N, C\]"),
        ((2, 3), np.ones((2, 3)), (1,), "expected bool"),
        ((2, 3), np.array([0, 1]), (0,), "start at 1"),
    ],
)
def test_bad_input_is_named(shape, targets, ks, message):
    with pytest.raises(ValueError, match=message):
        recall_at_k(np.zeros(shape), targets, ks)


def test_matching_accuracy_counts_masked_pairs_and_halves_ties():
    logits = np.array([[0, 2], [1, 0], [0, 1], [3, 3], [9, 0]])
    targets = np.array([True, False, False, True, True])
    result = matching_accuracy(logits, targets, np.array([True, True, True, True, False]))
    assert result == {"accuracy": 2.5 / 4, "chance": 0.5, "num": 4}
    assert matching_accuracy(np.zeros((0, 2)), np.zeros(0, bool)) == {
        "accuracy": None,
        "chance": None,
        "num": 0,
    }


def test_a_class_that_is_always_right_is_left_out_of_the_ranking():
    logits = np.asarray([[0.1, 0.9, 5.0], [0.9, 0.1, 5.0]])
    targets = np.asarray([[True, False, True], [True, False, True]])
    counts = np.asarray([3, 4, 9])
    assert rank_classes(logits, targets, counts)["recall_at_1"] == 1.0
    ranked = rank_classes(logits, targets, counts, kept=counts < 9)
    assert ranked["recall_at_1"] == 0.5 and ranked["num_classes"] == 2


def test_frequencies_are_those_of_the_answers_that_training_asks_for():
    builder = make_builder(
        [make_study(i, region_labels=(), region_boxes=(), region_frames=()) for i in range(12)]
    )
    tokenizer, labels = builder.tokenizer, builder.labels
    experiment = types.SimpleNamespace(
        builder=builder, indices={"train": np.arange(12)}, context=types.SimpleNamespace(loss=LossConfig())
    )
    num_classes = {
        "mlm": tokenizer.vocab_size, "mlm_guided": tokenizer.vocab_size,
        "mdc": len(labels.classes), "moc": len(labels.regions),
    }  # fmt: skip
    counts = count_answers(experiment, num_classes)
    for name in ("mlm", "mlm_guided"):
        assert counts[name].sum() > 100 and not counts[name][~tokenizer.is_ordinary].any()
    period = tokenizer.vocabulary.index(".")  # belongs to no entity, which come first
    assert counts["mlm"][period] > counts["mlm_guided"][period]
    assert counts["mdc"][labels.classes.index("liver")] == counts["mdc"].max()
    # Without annotated boxes each region is asked for the clip's organ.
    assert counts["moc"].sum() > 100 and counts["moc"].argmax() == labels.regions.index("liver")
