"""The paper's ordinal claims, each with the test behind its verdict: holds, does not hold, or undecided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dilbert_jax.evaluation.metrics import MEASURES, class_counts, macro_measures
from dilbert_jax.evaluation.statistics import (
    Interval,
    holm,
    paired_group_bootstrap,
    paired_permutation_p,
    sum_by_group,
)
from dilbert_jax.models import find_system
from dilbert_jax.reproduce.grid import MAIN_SHAPE, SHAPES
from dilbert_jax.reproduce.tables import (
    LEVEL,
    TITLES,
    Results,
    Row,
    accuracy,
    chance_accuracy,
    compare,
    comparison_rows,
    macro,
    task_figure,
    training_minutes,
)

HOLDS, FAILS, UNDECIDED, UNTESTABLE = "holds", "does not hold", "undecided", "cannot be tested"
# Task, k and name of Table V's claims; R@10 says little where there are few classes: R@1 there.
RANKED = (
    ("mlm", 10, "MLM R@10, words masked at random"),
    ("mlm_guided", 10, "MLM R@10, words that the graph chose"),
    ("mdc", 1, "MDC R@1"),
    ("moc", 1, "MOC R@1"),
    ("cmm", 1, "CMM accuracy"),
)
DEEP, SHALLOW = "9L9H", "3L8H"
SHOWN = {
    "7": "language and image features in two dimensions, in training and validation",
    "8": "weights and biases over training and validation",
    "9": "which frames associate with a named entity",
}


def judge(comparisons: Sequence[Mapping[str, Any] | None]) -> str:
    """The verdict over one-sided statements "the difference is positive", all of which the claim makes.

    Holds: every difference is positive with p < 0.05, Holm-adjusted over the statements. Does not hold: one is negative
    with p < 0.05, adjusted. Undecided: anything else, a single seed included.
    """
    known = [c for c in comparisons if c is not None and c["p"] is not None]
    if not known or len(known) < len(comparisons):
        return UNDECIDED
    adjusted = holm([c["p"] for c in known])
    signs = [np.sign(c["value"]) for c in known]
    if any(s < 0 and p < LEVEL for s, p in zip(signs, adjusted, strict=True)):
        return FAILS
    return HOLDS if all(s > 0 and p < LEVEL for s, p in zip(signs, adjusted, strict=True)) else UNDECIDED


def _claim(number: str, text: str, pairs: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Any]:
    """A claim that every named difference is positive."""
    return {
        "id": number,
        "claim": text,
        "verdict": judge(list(pairs.values())),
        "test": "paired t-test over seeds, Holm-adjusted",
        "differences": {name: pair for name, pair in pairs.items()},
    }


def judge_claims(results: Results, datasets: Sequence[str], systems: Sequence[str]) -> list[dict[str, Any]]:
    """Every claim of the paper on every data set (PAPER section 8)."""
    claims: list[dict[str, Any]] = []
    student, teacher = Row("dilbert", MAIN_SHAPE), Row("dilbert", MAIN_SHAPE, "teacher")
    others = [row for row in comparison_rows(systems) if row.system != "dilbert"]

    def add(number: str, text: str, pairs: Mapping[str, Mapping[str, Any] | None]) -> None:
        if any(pair is not None for pair in pairs.values()):
            claims.append(_claim(number, text, pairs))

    def by_size(row: Row, size: str) -> dict[int, float]:
        return results.values(d, Row(row.system, size, row.network), accuracy)

    def by_construction(row: Row, task: str, k: int) -> bool:
        """Whether every answer is among the first k."""
        counts = results.values(d, row, task_figure(task, kind="classes"))
        return bool(counts) and max(counts.values()) <= k

    for d in datasets:
        bert = Row("bert", SHALLOW)
        add("IV", f"{d}: accuracy of the student exceeds the teacher's at 3, 6 and 9 layers",
            {size: compare(by_size(student, size), by_size(teacher, size)) for size in SHAPES})  # fmt: skip
        add("IV", f"{d}: accuracy of the teacher exceeds plain BERT's at 3, 6 and 9 layers",
            {size: compare(by_size(teacher, size), by_size(bert, size)) for size in SHAPES})  # fmt: skip
        add("IV", f"{d}: accuracy of the student exceeds plain BERT's at 3, 6 and 9 layers",
            {size: compare(by_size(student, size), by_size(bert, size)) for size in SHAPES})  # fmt: skip
        for row in (student, teacher):
            add("IV", f"{d}: the {row.network} gains with depth (9 over 3 layers)",
                {f"{DEEP} - {SHALLOW}": compare(by_size(row, DEEP), by_size(row, SHALLOW))})  # fmt: skip
        add("IV", f"{d}: BERT gains with depth (9 over 3 layers)",
            {f"{DEEP} - {SHALLOW}": compare(by_size(bert, DEEP), by_size(bert, SHALLOW))})  # fmt: skip

        for task, k, name in RANKED:
            figure = task_figure(task, k)
            own = results.values(d, student, figure)
            text = f"{d}: DILBERT's student is best on {name}"
            if task == "mdc":
                text += " (claimed everywhere but on BUSI)"
            if by_construction(student, task, k):
                claims.append(_untestable("V", text, "there is one class"))
                continue
            add("V", text, {r.title: compare(own, results.values(d, r, figure)) for r in others})
        recall = {t: results.values(d, student, task_figure(t, 10)) for t in ("mlm", "mdc", "moc")}
        recall["cmm"] = results.values(d, student, task_figure("cmm"))
        text = f"{d}: MLM is the task with the highest R@10 of the student"
        trivial = [t.upper() for t in ("mdc", "moc") if by_construction(student, t, 10)]
        if trivial:
            claims.append(
                _untestable("V", text, f"ten classes or fewer in {' and '.join(trivial)}: R@10 is 1")
            )
        else:
            add("V", text, {t.upper(): compare(recall["mlm"], recall[t]) for t in ("mdc", "moc", "cmm")})

        for measure in ("sensitivity", "precision", "f1"):
            own = results.values(d, student, macro(measure))
            add("VI", f"{d}: DILBERT's student is best on macro {'F1' if measure == 'f1' else measure}",
                {r.title: compare(own, results.values(d, r, macro(measure))) for r in others})  # fmt: skip

        cost = {row.system: results.values(d, row, training_minutes) for row in (student, *others)}
        slower = [s for s in ("cbt", "hero", "mmft_bert") if s in cost]
        if cost.get("dilbert") and slower:
            add("VII", f"{d}: DILBERT trains longer than CBT, HERO and MMFT-BERT",
                {TITLES[s]: compare(cost["dilbert"], cost[s]) for s in slower})  # fmt: skip
        if cost.get("dilbert") and cost.get("videobert"):
            add("VII", f"{d}: DILBERT trains less long than VideoBERT",
                {"VideoBERT": compare(cost["videobert"], cost["dilbert"])})  # fmt: skip
        if cost.get("dilbert") and cost.get("actbert"):
            claims.append(
                _about_equal(
                    f"{d}: DILBERT trains about as long as ActBERT", cost["dilbert"], cost["actbert"]
                )
            )

    if len(datasets) > 1:
        claims += _across(results, datasets, student)
    claims += _match_scores(results, datasets)
    claims += [
        _untestable(
            f"F{number}", f"Figure {number}: {shown}", "the paper states no order; look at the figure"
        )
        for number, shown in SHOWN.items()
    ]
    return claims


def _untestable(number: str, text: str, why: str) -> dict[str, Any]:
    """A claim that no figure of these runs can decide."""
    return {"id": number, "claim": text, "verdict": UNTESTABLE, "test": why, "differences": {}}


def _about_equal(text: str, first: Mapping[int, float], second: Mapping[int, float]) -> dict[str, Any]:
    """A claim of equality within 20 %, judged by the interval of the log ratio."""
    seeds = [s for s in first if s in second]
    ratios = compare(
        {s: float(np.log(first[s])) for s in seeds}, {s: float(np.log(second[s])) for s in seeds}
    )
    verdict = UNDECIDED
    if ratios is not None and ratios["low"] is not None:
        bound = np.log(1.2)
        if -bound < ratios["low"] and ratios["high"] < bound:
            verdict = HOLDS
        elif ratios["low"] > bound or ratios["high"] < -bound:
            verdict = FAILS
    return {"id": "VII", "claim": text, "verdict": verdict, "test": "95 % interval of the log ratio within 20 %",
            "differences": {"log ratio": ratios}}  # fmt: skip


def _across(results: Results, datasets: Sequence[str], student: Row) -> list[dict[str, Any]]:
    """Claims that compare data sets: by seed, which pairs no more than the order of initialisation."""
    claims = []
    figure = task_figure("mlm", 10)
    by_set = {d: results.values(d, student, figure) for d in datasets}
    if by_set.get("busi"):
        pairs = {d: compare(by_set[d], by_set["busi"]) for d in datasets if d != "busi"}
        claims.append(_claim("V", "R@10 of MLM is lowest on BUSI", pairs))
    longest = {d: results.values(d, student, training_minutes) for d in datasets}
    hospital = next((d for d in ("ahjuui", "kmve") if longest.get(d)), None)
    if hospital:
        pairs = {d: compare(longest[hospital], longest[d]) for d in datasets if d != hospital}
        claims.append(_claim("VII", f"the hospital's set (here {hospital}) takes longest", pairs))
    return claims


def _match_scores(results: Results, datasets: Sequence[str]) -> list[dict[str, Any]]:
    """Figure 10: the entity match at three shapes, judged by the macro F1 of matched entities."""
    claims = []
    for d in datasets:
        values = {s: results.values(d, Row("dilbert", s), macro("f1", "entities")) for s in SHAPES}
        pairs = {f"{DEEP} - {s}": compare(values[DEEP], values[s]) for s in SHAPES if s != DEEP}
        if any(pair is not None for pair in pairs.values()):
            claims.append(
                _claim("F10", f"{d}: entities match best at 9 layers and 9 heads (macro F1)", pairs)
            )
        pair = compare(values["3L8H"], values["6L6H"])
        if pair is not None:
            claims.append(
                _claim(
                    "F10",
                    f"{d}: more heads help more than more layers (3L8H over 6L6H)",
                    {"3L8H - 6L6H": pair},
                )
            )
    return claims


def beats_chance(results: Results, datasets: Sequence[str], systems: Sequence[str]) -> list[dict[str, Any]]:
    """For every system and task: what it reaches above training frequencies, with its interval.

    Words that the knowledge graph chose are a task of the systems that train it.
    """
    rows = []
    for d in datasets:
        for row in comparison_rows(systems):
            masked = {"MLM": "mlm"}
            if find_system(row.system).guided_masking:
                masked["guided MLM"] = "mlm_guided"
            tasks = {
                **{
                    f"{title} R@10": (task_figure(mlm, 10), task_figure(mlm, 10, "frequent"))
                    for title, mlm in masked.items()
                },
                "MDC R@1": (task_figure("mdc", 1), task_figure("mdc", 1, "frequent")),
                "MOC R@1": (task_figure("moc", 1), task_figure("moc", 1, "frequent")),
                "CMM accuracy": (task_figure("cmm"), task_figure("cmm", kind="frequent")),
                "annotation accuracy": (accuracy, chance_accuracy),
            }
            for task, (figure, chance) in tasks.items():
                difference = compare(results.values(d, row, figure), results.values(d, row, chance))
                if difference is None:
                    continue
                beats = None if difference["low"] is None else bool(difference["low"] > 0)
                rows.append(
                    {
                        "dataset": d,
                        "system": row.title,
                        "task": task,
                        "above_chance": difference,
                        "beats": beats,
                    }
                )
    return rows


CHANCE_NOTES = (
    "What each system gains over training frequencies alone (in annotation: over the commonest label). DILBERT "
    "is asked for words that the graph chose as well, as it trains on them. Each interval stands alone, "
    "unadjusted for how many there are. no: the interval does not lie above 0; below: it lies below 0."
)
CLIP_NOTES = (
    "Macro F1 of DILBERT's student minus that of the other, from the answers of all runs together: it sees what tests "
    "over few seeds cannot. Interval: bootstrap over patients (groups); p: answers swapped at random between the two "
    "within a patient; Holm-adjusted over the systems beside it. What another initialisation would give is not in it."
)
ClipCounts = tuple[list[str], np.ndarray, np.ndarray]


def compare_clips(results: Results, datasets: Sequence[str], systems: Sequence[str]) -> list[dict[str, Any]]:
    """DILBERT's student against every other network on the answers to the same test clips."""
    student = Row("dilbert", MAIN_SHAPE)
    rows: list[dict[str, Any]] = []
    for d in datasets:
        ours = results.records.get((d, student.system, student.size), {})
        for head in ("condition", "findings"):
            found = []
            for row in (*comparison_rows(systems), Row("bert", SHALLOW)):
                theirs = results.records.get((d, row.system, row.size), {})
                pairs = [_paired_counts(ours[s], theirs[s], row.network, head) for s in ours if s in theirs]
                known = [pair for pair in pairs if pair is not None]
                if row != student and known:
                    against = f"{row.title} {row.size}"
                    found.append({"dataset": d, "head": head, "system": against, **_clip_difference(known)})
            adjusted = holm([f["p"] for f in found])
            rows += [{**f, "p_holm": p} for f, p in zip(found, adjusted, strict=True)]
    return rows


def _paired_counts(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], network: str, head: str
) -> ClipCounts | None:
    """Groups, and the counts [N, C, 3] of both over the clips of a seed; None where a record has no such answers."""
    first = ours.get("decisions", {}).get("student", {}).get(head)
    second = theirs.get("decisions", {}).get(network, {}).get(head)
    if first is None or second is None:
        return None
    if any(first[name] != second[name] for name in ("class_ids", "groups", "targets")):
        raise ValueError(f"{ours['cell']} and {theirs['cell']} tested other clips; run both on the same data")
    size = len(first["class_ids"])

    def hot(answers: Sequence[Sequence[int]]) -> np.ndarray:
        table = np.zeros((len(answers), size), bool)
        for row, classes in zip(table, answers, strict=True):
            row[list(classes)] = True
        return table

    # Folds test other patients, who are numbered alike.
    groups = [f"{ours['evaluation']['fold']}/{g}" for g in first["groups"]]
    counts = [class_counts(hot(d["targets"]), hot(d["predictions"])) for d in (first, second)]
    return groups, counts[0], counts[1]


def _clip_difference(pairs: Sequence[ClipCounts]) -> dict[str, Any]:
    groups = [g for names, _, _ in pairs for g in names]
    first, second = (sum_by_group(np.concatenate([pair[i] for pair in pairs]), groups) for i in (1, 2))

    def macro_f1(sums: np.ndarray) -> np.ndarray:
        return macro_measures(sums)[:, MEASURES.index("f1")]

    difference = Interval(*map(float, paired_group_bootstrap(first, second, macro_f1)))
    return {
        "runs": len(pairs),
        "groups": len(first),
        "difference": difference.to_json(),
        "p": paired_permutation_p(first, second, macro_f1),
    }
