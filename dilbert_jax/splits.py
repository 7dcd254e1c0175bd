"""Splits and folds by group only: no patient, subject or near-duplicate group is ever on two sides."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

SPLITS = ("train", "validation", "test")
DEFAULT_FRACTIONS = {"train": 0.7, "validation": 0.15, "test": 0.15}


def check_disjoint(split_groups: Mapping[str, Sequence[str]]) -> None:
    """Refuses splits that share a group.

    Args:
      split_groups: group id of every study of each split; order and repeats within a split are free.

    Raises:
      ValueError: naming the first group (in sorted order) found in more than one split, and the splits.
    """
    owners: dict[str, list[str]] = {}
    for split in sorted(split_groups):
        for group in set(split_groups[split]):
            owners.setdefault(group, []).append(split)
    cut = {group: splits for group, splits in owners.items() if len(splits) > 1}
    if cut:
        group = min(cut)
        raise ValueError(
            f"{len(cut)} group(s) lie in several splits, first {group!r} in {' and '.join(cut[group])}; "
            "a patient, subject or near-duplicate group must stay on one side"
        )


def split_by_group(
    group_ids: Sequence[str],
    strata: Sequence[str],
    fractions: Mapping[str, float] | None = None,
    seed: int = 0,
    *,
    official_splits: Sequence[str] | None = None,
    study_ids: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """Assigns whole groups to splits, balancing the strata; the same for any order of the input and on any CPU.

    Groups that the source itself assigns to "validation" or "test" stay there. Officially "train" groups are
    cut into train and validation when the source has no validation split. All other groups are free. Free
    groups are dealt, largest first, each to the split that lacks most of its strata.

    Args:
      group_ids: [N] group of each study.
      strata: [N] label to balance over, usually the condition.
      fractions: share of each split; positive, any sum. Default 0.70 / 0.15 / 0.15.
      seed: order among groups of equal size.
      official_splits: [N] the source's own split of each study, "" where it has none.
      study_ids: [N] names of the studies; checked to be unique when given.

    Returns:
      For each split of ``fractions`` the sorted indices of its studies, int64 [n]; none is empty.

    Raises:
      ValueError: fewer groups than splits, lengths that differ, duplicate study ids, an unknown official
        split, or official splits that cut through a group.
    """
    fractions = dict(fractions or DEFAULT_FRACTIONS)
    if not fractions or min(fractions.values()) <= 0:
        raise ValueError(f"split fractions are {fractions}; every split needs a positive share")
    group_ids, strata = _check_studies(group_ids, strata, study_ids)
    names, members = np.unique(group_ids, return_inverse=True)
    if len(names) < len(fractions):
        raise ValueError(
            f"{len(names)} group(s) cannot fill {len(fractions)} splits ({', '.join(fractions)}); "
            "splits are by group: add studies of further patients or ask for fewer splits"
        )
    stratum_names, stratum_index = np.unique(strata, return_inverse=True)
    counts = np.zeros((len(names), len(stratum_names)))
    np.add.at(counts, (members, stratum_index), 1)
    allowed = _allowed_splits(group_ids, members, len(names), tuple(fractions), official_splits)

    shares = allowed * np.asarray(list(fractions.values()))
    shares /= shares.sum(axis=1, keepdims=True)
    # Studies that each split still lacks, [splits, strata]. No matrix product: BLAS adds in an order of its own on
    # every kind of CPU, and where splits lack equally many, rounding decides.
    lacking = np.add.reduce(shares[:, :, None] * counts[:, None, :], axis=0)
    weight = 1.0 / counts.sum(axis=0)
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-counts[order].sum(axis=1), kind="stable")]
    assigned = np.empty(len(names), np.int64)
    for group in order:
        gain = (lacking * counts[group] * weight).sum(axis=1)
        gain[~allowed[group]] = -np.inf
        # Equal gains go to the split that lacks most studies overall, not to the first one named.
        tied = gain >= gain.max() - 1e-9
        assigned[group] = int(np.argmax(np.where(tied, lacking.sum(axis=1), -np.inf)))
        lacking[assigned[group]] -= counts[group]
    _fill_empty_splits(assigned, allowed, counts.sum(axis=1), tuple(fractions))

    splits = {name: np.flatnonzero(assigned[members] == k) for k, name in enumerate(fractions)}
    check_disjoint({name: [group_ids[i] for i in indices] for name, indices in splits.items()})
    return splits


def k_folds(
    group_ids: Sequence[str],
    strata: Sequence[str],
    folds: int,
    seed: int = 0,
    *,
    study_ids: Sequence[str] | None = None,
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Stratified cross-validation by group; the same folds for any order of the input.

    Fold i is tested on part i and validated on part (i + 1) mod ``folds``; the rest trains.

    Args:
      group_ids: [N] group of each study.
      strata: [N] label to balance over, usually the condition.
      folds: number of folds, at least 3.
      seed: of the assignment.
      study_ids: [N] names of the studies; checked to be unique when given.

    Returns:
      For each fold (train, validation, test): sorted int64 index arrays; none is empty.

    Raises:
      ValueError: fewer than 3 folds, fewer groups than folds, lengths that differ, duplicate study ids, or
        labels so rare or groups so large that a part would be empty.
    """
    if folds < 3:
        raise ValueError(f"{folds} folds asked for; train, validation and test parts need at least 3")
    group_ids, strata = _check_studies(group_ids, strata, study_ids)
    num_groups = len(set(group_ids))
    if num_groups < folds:
        raise ValueError(
            f"{num_groups} group(s) cannot fill {folds} folds; folds are by group: "
            "ask for fewer folds or add studies of further patients"
        )
    # Sorted by (group, stratum), equal input multisets give equal arrays whatever order they came in.
    order = np.lexsort((strata, group_ids))
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    labels = np.unique(np.asarray(strata)[order], return_inverse=True)[1]
    groups = np.unique(np.asarray(group_ids)[order], return_inverse=True)[1]
    part = np.empty(len(order), np.int64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")  # rare labels are expected
        try:
            for i, (_, test) in enumerate(splitter.split(np.zeros(len(order)), labels, groups)):
                part[order[test]] = i
        except ValueError as error:
            raise ValueError(
                f"no label has {folds} studies ({dict(Counter(strata))}); ask for fewer folds"
            ) from error
    sizes = np.bincount(part, minlength=folds)
    if sizes.min() == 0:
        raise ValueError(
            f"{folds} folds of {num_groups} groups leave an empty part (sizes {sizes.tolist()}); "
            "ask for fewer folds or another seed"
        )
    result = []
    for i in range(folds):
        validation = (i + 1) % folds
        train = np.flatnonzero((part != i) & (part != validation))
        result.append((train, np.flatnonzero(part == validation), np.flatnonzero(part == i)))
        check_disjoint(
            {name: [group_ids[j] for j in indices] for name, indices in zip(SPLITS, result[-1], strict=True)}
        )
    return result


def _check_studies(
    group_ids: Sequence[str], strata: Sequence[str], study_ids: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """Lengths agree, every study has a group, no study id occurs twice."""
    group_ids, strata = [str(g) for g in group_ids], [str(s) for s in strata]
    if len(group_ids) != len(strata) or (study_ids is not None and len(study_ids) != len(group_ids)):
        raise ValueError(
            f"{len(group_ids)} group ids, {len(strata)} strata"
            + (f", {len(study_ids)} study ids" if study_ids is not None else "")
            + "; one each per study is needed"
        )
    if "" in group_ids:
        raise ValueError(f"study number {group_ids.index('')} has no group; splits are by group only")
    if study_ids is not None:
        name, count = Counter(study_ids).most_common(1)[0] if len(study_ids) else ("", 1)
        if count > 1:
            raise ValueError(f"study id {name!r} occurs {count} times; study ids must be unique")
    return group_ids, strata


def _allowed_splits(
    group_ids: list[str],
    members: np.ndarray,
    num_groups: int,
    split_names: tuple[str, ...],
    official_splits: Sequence[str] | None,
) -> np.ndarray:
    """bool [groups, splits]: where each group may go."""
    allowed = np.ones((num_groups, len(split_names)), bool)
    if official_splits is None:
        return allowed
    if len(official_splits) != len(group_ids):
        raise ValueError(f"{len(official_splits)} official splits for {len(group_ids)} studies")
    fixed: dict[int, str] = {}
    for i, split in enumerate(official_splits):
        if not split:
            continue
        if split not in split_names:
            raise ValueError(f"official split {split!r} is unknown; expected '' or one of {split_names}")
        earlier = fixed.setdefault(int(members[i]), split)
        if earlier != split:
            raise ValueError(
                f"the official splits cut through group {group_ids[i]!r}: it has studies in {earlier!r} and "
                f"in {split!r}; drop one side or merge them"
            )
    open_train = ["train"] if "validation" in fixed.values() else ["train", "validation"]
    for group, split in fixed.items():
        targets = open_train if split == "train" else [split]
        allowed[group] = [name in targets for name in split_names]
    return allowed


def _fill_empty_splits(
    assigned: np.ndarray, allowed: np.ndarray, sizes: np.ndarray, split_names: tuple[str, ...]
) -> None:
    """Moves the smallest movable group into each split that got none."""
    for k, name in enumerate(split_names):
        if np.any(assigned == k):
            continue
        held = np.bincount(assigned, minlength=len(split_names))
        movable = [g for g in range(len(assigned)) if allowed[g, k] and held[assigned[g]] > 1]
        if not movable:
            raise ValueError(
                f"split {name!r} would be empty: the official splits leave no group for it; "
                "add studies of further patients"
            )
        assigned[min(movable, key=lambda g: (sizes[g], g))] = k
