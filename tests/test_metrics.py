"""Point values against scikit-learn, conventions for empty classes, baselines."""

import json

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

from dilbert_jax.evaluation import metrics

CLASSES = ["normal", "cyst", "benign_lesion", "malignant_lesion", "stone"]


def labels(rng, num=200, classes=5, right=0.6):
    targets = rng.choice(classes, num, p=np.array([8, 4, 3, 2, 1])[:classes] / sum([8, 4, 3, 2, 1][:classes]))
    predictions = np.where(rng.random(num) < right, targets, rng.integers(0, classes, num))
    return targets, predictions, rng.integers(0, 40, num).astype(str)


def expected(targets, predictions, average, classes=range(5)):
    values = precision_recall_fscore_support(
        targets, predictions, labels=list(classes), average=average, zero_division=0
    )
    return {"precision": values[0], "sensitivity": values[1], "f1": values[2]}


def test_point_values_are_those_of_scikit_learn(rng):
    targets, predictions, groups = labels(rng)
    report = metrics.classification_report(targets, predictions, CLASSES, groups, num_resamples=50)
    assert report["accuracy"]["value"] == pytest.approx(accuracy_score(targets, predictions), abs=1e-6)
    for average in ("macro", "micro"):
        for name, value in expected(targets, predictions, average).items():
            assert report[average][name]["value"] == pytest.approx(value, abs=1e-6)
    by_class = expected(targets, predictions, None)
    for c, row in enumerate(report["per_class"]):
        assert row["id"] == CLASSES[c] and row["support"] == (targets == c).sum()
        assert row["predicted"] == (predictions == c).sum()
        for name, values in by_class.items():
            assert row[name]["value"] == pytest.approx(values[c], abs=1e-6)
    assert report["confusion"] == confusion_matrix(targets, predictions, labels=range(5)).tolist()
    assert (report["num"], report["num_groups"]) == (200, len(set(groups)))


def test_intervals_hold_their_value_and_repeat(rng):
    targets, predictions, groups = labels(rng)
    report = metrics.classification_report(targets, predictions, CLASSES, groups, seed=3)
    assert report == metrics.classification_report(targets, predictions, CLASSES, groups, seed=3)
    for interval in [report["accuracy"], *report["macro"].values(), *report["micro"].values()]:
        assert 0 <= interval["low"] < interval["value"] < interval["high"] <= 1


def test_macro_leaves_out_classes_that_the_evaluated_set_does_not_hold(rng):
    targets, predictions, groups = labels(rng, classes=3)
    predictions[:5] = 4  # a class without support is predicted all the same
    report = metrics.classification_report(targets, predictions, CLASSES, groups, num_resamples=20)
    held = expected(targets, predictions, "macro", classes=range(3))
    for name, value in held.items():
        assert report["macro"][name]["value"] == pytest.approx(value, abs=1e-6)
    absent = report["per_class"][3]
    assert absent["support"] == absent["predicted"] == 0
    assert {absent[m][k] for m in metrics.MEASURES for k in ("value", "low", "high")} == {None}
    assert (
        report["per_class"][4]["precision"]["value"] == 0
        and report["per_class"][4]["sensitivity"]["value"] is None
    )


def test_a_class_that_is_never_predicted_counts_as_zero(rng):
    targets = np.array([0, 0, 1, 1])
    report = metrics.classification_report(
        targets, np.zeros(4, int), CLASSES[:2], list("abcd"), num_resamples=20
    )
    assert report["per_class"][1]["precision"]["value"] == 0 and report["per_class"][1]["f1"]["value"] == 0
    assert report["macro"]["f1"]["value"] == pytest.approx((2 / 3 + 0) / 2, abs=1e-6)


def test_examples_without_a_label_are_left_out(rng):
    targets, predictions, groups = labels(rng)
    kept = rng.random(200) < 0.5
    masked = metrics.classification_report(
        np.where(kept, targets, -1), predictions, CLASSES, groups, num_resamples=20
    )
    alone = metrics.classification_report(
        targets[kept], predictions[kept], CLASSES, groups[kept], num_resamples=20
    )
    assert masked == alone


def test_multilabel_point_values_are_those_of_scikit_learn(rng):
    targets = rng.random((150, 5)) < [0.5, 0.3, 0.2, 0.1, 0.05]
    predictions = np.where(rng.random((150, 5)) < 0.8, targets, ~targets)
    report = metrics.multilabel_report(
        targets, predictions, CLASSES, rng.integers(0, 30, 150), num_resamples=50
    )
    assert "accuracy" not in report
    for average in ("macro", "micro"):
        for name, value in expected(targets.astype(int), predictions.astype(int), average).items():
            assert report[average][name]["value"] == pytest.approx(value, abs=1e-6)


def test_majority_baseline_answers_the_training_majority():
    train = np.array([2, 2, 2, 1, -1, -1, -1, -1])
    report = metrics.majority_baseline(train, np.array([2, 1, 1, 0]), CLASSES, list("abcd"), num_resamples=20)
    assert [row["predicted"] for row in report["per_class"]] == [0, 0, 4, 0, 0]
    assert report["accuracy"]["value"] == 0.25


def test_majority_of_findings_and_the_constant_yardstick(rng):
    targets = rng.random((400, 2)) < [0.8, 0.2]
    groups = np.arange(400)
    majority = metrics.majority_baseline(targets, targets, ["nodule", "mass"], groups, num_resamples=20)
    assert [row["predicted"] for row in majority["per_class"]] == [400, 0]
    assert majority["per_class"][1]["f1"]["value"] == 0
    constant = metrics.constant_report(targets, ["nodule", "mass"], groups, num_resamples=20)
    p = targets[:, 1].mean()
    assert constant["per_class"][1]["f1"]["value"] == pytest.approx(2 * p / (1 + p), abs=1e-6)


def test_report_is_json_without_nan():
    report = metrics.classification_report(np.array([0, 1]), np.array([0, 0]), CLASSES, ["a", "a"])
    text = json.dumps(report, allow_nan=False)
    assert json.loads(text)["accuracy"] == {"value": 0.5, "low": None, "high": None}
    assert report["num_groups"] == 1


@pytest.mark.parametrize(
    ("targets", "predictions", "message"),
    [
        ([0, 1], [0], r"must all be \[N\]"),
        ([0, 7], [0, 1], "targets range from 0 to 7"),
        ([0, 1], [0, -1], "predictions range from -1"),
        ([-1, -1], [0, 1], "no example is labelled"),
    ],
)
def test_bad_input_is_named(targets, predictions, message):
    with pytest.raises(ValueError, match=message):
        metrics.classification_report(np.array(targets), np.array(predictions), CLASSES, ["a", "b"])


def test_probabilities_are_no_predictions():
    with pytest.raises(ValueError, match="apply the threshold first"):
        metrics.multilabel_report(np.ones((2, 1), bool), np.ones((2, 1)), ["mass"], ["a", "b"])
