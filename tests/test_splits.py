"""Splits and folds: by group only, deterministic, refusing anything else."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from dilbert_jax.splits import check_disjoint, k_folds, split_by_group


def make_studies(seed=0, groups=30):
    """Group ids and strata of studies, 1 to 6 a group."""
    rng = np.random.default_rng(seed)
    group_ids, strata = [], []
    for g in range(groups):
        for _ in range(rng.integers(1, 7)):
            group_ids.append(f"g{g:02d}")
            strata.append("abc"[g % 3] if rng.random() < 0.9 else "a")
    return group_ids, strata


def assignment(splits, group_ids):
    return {group_ids[i]: name for name, indices in splits.items() for i in indices}


def test_split_covers_all_studies_once_and_cuts_no_group():
    group_ids, strata = make_studies()
    splits = split_by_group(group_ids, strata)
    together = np.sort(np.concatenate(list(splits.values())))
    np.testing.assert_array_equal(together, np.arange(len(group_ids)))
    owners = {}
    for name, indices in splits.items():
        for i in indices:
            assert owners.setdefault(group_ids[i], name) == name


def test_split_follows_fractions_and_strata():
    group_ids, strata = make_studies(groups=200)
    splits = split_by_group(group_ids, strata, {"train": 0.6, "validation": 0.2, "test": 0.2})
    for name, share in (("train", 0.6), ("validation", 0.2), ("test", 0.2)):
        assert abs(len(splits[name]) / len(group_ids) - share) < 0.03
        for stratum in "abc":
            held = sum(strata[i] == stratum for i in splits[name])
            assert abs(held / strata.count(stratum) - share) < 0.05


def test_split_does_not_depend_on_input_order():
    group_ids, strata = make_studies()
    expected = assignment(split_by_group(group_ids, strata, seed=3), group_ids)
    order = np.random.default_rng(9).permutation(len(group_ids))
    shuffled = [group_ids[i] for i in order]
    found = split_by_group(shuffled, [strata[i] for i in order], seed=3)
    assert assignment(found, shuffled) == expected


def test_split_seed_matters_and_is_reproducible():
    group_ids, strata = make_studies()
    first = assignment(split_by_group(group_ids, strata, seed=0), group_ids)
    assert first == assignment(split_by_group(group_ids, strata, seed=0), group_ids)
    assert first != assignment(split_by_group(group_ids, strata, seed=1), group_ids)


SPLIT_MANY = """
import hashlib, json
import numpy as np
from test_splits import make_many
from dilbert_jax.splits import k_folds, split_by_group
group_ids, strata = make_many()
parts = [*split_by_group(group_ids, strata).values()] + [test for _, _, test in k_folds(group_ids, strata, 5)]
print(hashlib.sha256(json.dumps([part.tolist() for part in parts]).encode()).hexdigest())
"""


def make_many():
    """So many groups of one or two studies that splits often lack equally many but for rounding."""
    rng = np.random.default_rng(0)
    group_ids = [f"g{g:04d}" for g in range(1440) for _ in range(1 + (g % 3 == 0))]
    return group_ids, [str(s) for s in rng.choice(list("abcdef"), len(group_ids))]


def test_split_does_not_depend_on_the_kind_of_cpu():
    def split(**environment):
        run = subprocess.run(
            [sys.executable, "-c", SPLIT_MANY], capture_output=True, text=True, check=True,
            env={**os.environ, **environment}, cwd=pathlib.Path(__file__).parent,
        )  # fmt: skip
        return run.stdout

    # OpenBLAS adds in the order of the oldest x86-64 CPU that it knows, whatever it runs on.
    assert split() == split(OPENBLAS_CORETYPE="Prescott")


def test_official_splits_are_kept_and_train_is_cut_for_validation():
    group_ids = [f"g{i}" for i in range(12)]
    official = ["train"] * 8 + ["test"] * 4
    splits = split_by_group(group_ids, ["x"] * 12, official_splits=official)
    assert list(splits["test"]) == [8, 9, 10, 11]
    assert len(splits["validation"]) >= 1
    assert set(splits["train"]) | set(splits["validation"]) == set(range(8))


def test_official_validation_keeps_official_train_whole():
    official = ["train"] * 5 + ["validation"] * 2 + ["test"] * 2
    splits = split_by_group([f"g{i}" for i in range(9)], ["x"] * 9, official_splits=official)
    assert [len(splits[s]) for s in ("train", "validation", "test")] == [5, 2, 2]


def test_partly_official_group_goes_where_it_is_official():
    group_ids = ["a", "a", "b", "c", "d"]
    splits = split_by_group(group_ids, ["x"] * 5, official_splits=["test", "", "", "", ""])
    assert {0, 1} <= set(splits["test"])


def test_every_split_gets_a_group():
    splits = split_by_group(["a"] * 50 + ["b", "c"], ["x"] * 52)
    assert min(len(v) for v in splits.values()) >= 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"group_ids": ["a", "a", "b"], "strata": ["x"] * 3}, "2 group"),
        ({"group_ids": ["a", "b"], "strata": ["x"]}, "2 group ids, 1 strata"),
        ({"group_ids": ["a", "", "c"], "strata": ["x"] * 3}, "study number 1 has no group"),
        ({"group_ids": list("abc"), "strata": ["x"] * 3, "study_ids": ["s", "t", "s"]}, "'s' occurs 2 times"),
        (
            {"group_ids": list("abca"), "strata": ["x"] * 4, "official_splits": ["test", "", "", "train"]},
            "cut",
        ),
        ({"group_ids": list("abc"), "strata": ["x"] * 3, "official_splits": ["val", "", ""]}, "'val'"),
        ({"group_ids": list("abc"), "strata": ["x"] * 3, "official_splits": ["test"] * 3}, "would be empty"),
        ({"group_ids": list("abc"), "strata": ["x"] * 3, "fractions": {"train": 1, "test": 0}}, "positive"),
    ],
)
def test_split_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        split_by_group(**kwargs)


def test_check_disjoint_names_the_group():
    check_disjoint({"train": ["a", "a"], "test": ["b"]})
    with pytest.raises(ValueError, match="'b' in test and train"):
        check_disjoint({"train": ["a", "b"], "test": ["b", "c"]})


def test_folds_test_every_study_once_and_validate_on_the_next_part():
    group_ids, strata = make_studies()
    folds = k_folds(group_ids, strata, 5, seed=1)
    tested = np.concatenate([test for _, _, test in folds])
    np.testing.assert_array_equal(np.sort(tested), np.arange(len(group_ids)))
    for i, (train, validation, test) in enumerate(folds):
        np.testing.assert_array_equal(validation, folds[(i + 1) % 5][2])
        assert len(train) + len(validation) + len(test) == len(group_ids)
        groups = [{group_ids[j] for j in part} for part in (train, validation, test)]
        assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])


def test_folds_are_stratified():
    group_ids, strata = make_studies(groups=120)
    for _, _, test in k_folds(group_ids, strata, 5):
        for stratum in "abc":
            share = sum(strata[i] == stratum for i in test) / strata.count(stratum)
            assert 0.1 < share < 0.3


def test_folds_do_not_depend_on_input_order():
    group_ids, strata = make_studies()
    expected = [{group_ids[i] for i in test} for _, _, test in k_folds(group_ids, strata, 5, seed=2)]
    order = np.random.default_rng(4).permutation(len(group_ids))
    shuffled = [group_ids[i] for i in order]
    found = k_folds(shuffled, [strata[i] for i in order], 5, seed=2)
    assert [{shuffled[i] for i in test} for _, _, test in found] == expected


@pytest.mark.parametrize(
    ("group_ids", "strata", "folds", "message"),
    [
        (list("abcd"), ["x"] * 4, 5, "4 group"),
        (list("abcd"), ["x"] * 4, 2, "at least 3"),
        (list("abcd"), list("wxyz"), 3, "no label has 3 studies"),
    ],
)
def test_folds_refuse(group_ids, strata, folds, message):
    with pytest.raises(ValueError, match=message):
        k_folds(group_ids, strata, folds)
