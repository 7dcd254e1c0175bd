"""Pooled folds against scikit-learn and SciPy on the joined answers; what may not be pooled; the command line."""

import json

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from dilbert_jax import pool
from dilbert_jax.evaluate import _save_decisions

ORGANS = ["breast", "liver", "thyroid"]
FINDINGS = ["hypoechoic", "spiculated_margin"]


def make_answers(rng, studies, class_ids=ORGANS, multilabel=False):
    """One head's answers, right in about half of the studies; two studies a group."""
    shape = (len(studies), len(class_ids)) if multilabel else len(studies)
    targets, predictions = rng.integers(0, 2 if multilabel else len(class_ids), (2, *np.atleast_1d(shape)))
    kind = bool if multilabel else int
    return {
        "class_ids": list(class_ids),
        "targets": targets.astype(kind),
        "predictions": np.where(rng.random(targets.shape) < 0.4, targets, predictions).astype(kind),
        "groups": np.asarray([f"g{s // 2}" for s in studies]),
        "study_ids": np.asarray([f"s{s}" for s in studies]),
    }


def make_tasks(mlm, cmm=0.75, moc=0.5):
    """The pre-training figures of one network as eval.json holds them."""
    recalls = {"recall_at_1": 0.25, "recall_at_10": mlm, "num": 40}
    return {
        "mlm": recalls,
        "mdc": recalls,
        "moc": {**recalls, "recall_at_1": moc},
        "cmm": {"accuracy": cmm, "chance": 0.5, "num": 8},
    }


def write_run(workdir, decisions, tasks=None, **changes):
    """A workdir with what ``evaluate`` leaves there and pooling reads."""
    workdir.mkdir(parents=True)
    _save_decisions(decisions, workdir / "decisions.json")
    evaluation = {
        "dataset": "busi",
        "split": "test",
        "device": "cpu",
        "networks": {"student": {"pretraining": tasks or make_tasks(0.5)}},
        **changes,
    }
    (workdir / "eval.json").write_text(json.dumps(evaluation), encoding="utf-8")
    return workdir


@pytest.fixture
def folds(tmp_path, rng):
    """Three folds of 6, 10 and 8 studies, with a head of one label and one of many; (workdirs, decisions)."""
    workdirs, decisions = [], []
    for fold, (studies, mlm) in enumerate(((range(6), 0.2), (range(6, 16), 0.5), (range(16, 24), 0.6))):
        student = {
            "organ": make_answers(rng, studies),
            "findings": make_answers(rng, studies, FINDINGS, multilabel=True),
        }
        majority = {"organ": {**student["organ"], "predictions": np.zeros(len(studies), int)}}
        decisions.append({"student": student, "majority": majority})
        workdirs.append(write_run(tmp_path / str(fold), decisions[-1], make_tasks(mlm)))
    return workdirs, decisions


def join(decisions, system, head, field):
    return np.concatenate([d[system][head][field] for d in decisions])


@pytest.mark.parametrize("system", ["student", "majority"])
def test_one_label_heads_are_scored_on_the_joined_answers(folds, system):
    workdirs, decisions = folds
    pooled = pool.pool(workdirs, num_resamples=200)
    report = pooled["annotation"][system]["organ"]
    targets = join(decisions, system, "organ", "targets")
    predictions = join(decisions, system, "organ", "predictions")
    assert (pooled["dataset"], pooled["device"], pooled["runs"]) == ("busi", "cpu", 3)
    assert (report["num"], report["num_groups"]) == (24, 12)
    assert report["accuracy"]["value"] == pytest.approx(accuracy_score(targets, predictions), abs=1e-6)
    assert report["macro"]["f1"]["value"] == pytest.approx(
        f1_score(targets, predictions, average="macro", zero_division=0), abs=1e-6
    )
    assert [c["support"] for c in report["per_class"]] == np.bincount(targets, minlength=3).tolist()
    assert (
        np.sum(report["confusion"]) == 24 and np.trace(report["confusion"]) == (targets == predictions).sum()
    )
    assert report["accuracy"]["low"] < report["accuracy"]["value"] < report["accuracy"]["high"]


def test_many_label_heads_are_scored_on_the_joined_answers(folds):
    workdirs, decisions = folds
    report = pool.pool(workdirs, num_resamples=200)["annotation"]["student"]["findings"]
    targets = join(decisions, "student", "findings", "targets")
    predictions = join(decisions, "student", "findings", "predictions")
    assert (report["num"], report["num_groups"]) == (24, 12) and "accuracy" not in report
    for name, score in (("sensitivity", recall_score), ("precision", precision_score), ("f1", f1_score)):
        expected = score(targets, predictions, average="macro", zero_division=0)
        assert report["macro"][name]["value"] == pytest.approx(expected, abs=1e-6)


def test_a_group_may_lie_in_two_runs(tmp_path, rng):
    """Counted by hand: s0 s1 | s2 s3 s4 with s1 and s2 of one patient, 3 of 5 right."""
    first, second = make_answers(rng, range(2)), make_answers(rng, range(2, 5))
    first |= {"targets": np.array([0, 1]), "predictions": np.array([0, 0]), "groups": np.array(["a", "b"])}
    second |= {
        "targets": np.array([1, 2, 2]),
        "predictions": np.array([1, 2, 0]),
        "groups": np.array(["b", "c", "d"]),
    }
    runs = [
        write_run(tmp_path / name, {"student": {"organ": d}}) for name, d in (("0", first), ("1", second))
    ]
    report = pool.pool(runs, num_resamples=20)["annotation"]["student"]["organ"]
    assert (report["num"], report["num_groups"], report["accuracy"]["value"]) == (5, 4, 0.6)
    assert report["confusion"] == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]


def test_pretraining_figures_are_averaged_over_runs(folds):
    tasks = pool.pool(folds[0], num_resamples=20)["pretraining"]["student"]
    low, high = stats.t.interval(0.95, 2, loc=1.3 / 3, scale=stats.sem([0.2, 0.5, 0.6]))
    assert tasks["mlm"] == pytest.approx({"value": 1.3 / 3, "low": low, "high": high}, abs=1e-6)
    assert tasks["mdc"] == {"value": 0.25, "low": 0.25, "high": 0.25}
    assert tasks["moc"]["value"] == 0.5 and tasks["cmm"]["value"] == 0.75


def test_a_task_that_one_run_could_not_measure_is_left_out(tmp_path, rng):
    runs = [
        write_run(tmp_path / "0", {"student": {"organ": make_answers(rng, range(4))}}),
        write_run(
            tmp_path / "1", {"student": {"organ": make_answers(rng, range(4, 8))}}, make_tasks(0.5, moc=None)
        ),
    ]
    pooled = pool.pool(runs, num_resamples=20)
    assert pooled["pretraining"]["student"].keys() == {"mlm", "mdc", "cmm"}
    assert pool.to_markdown(pooled).splitlines()[-1].count(" – ") == 1


def test_a_single_run_has_no_interval_over_runs(tmp_path, rng):
    run = write_run(tmp_path / "0", {"student": {"organ": make_answers(rng, range(4))}})
    pooled = pool.pool([run], num_resamples=20)
    assert pooled["pretraining"]["student"]["mlm"] == {"value": 0.5, "low": None, "high": None}
    assert pool.to_markdown(pooled).splitlines()[-1] == "| student | 0.500 | 0.250 | 0.500 | 0.750 |"


@pytest.mark.parametrize("other", [["cyst", "mass"], ["mass", "cyst", "node"]])
def test_heads_with_other_classes_in_a_run_are_left_out(tmp_path, rng, other):
    runs = []
    for fold, (studies, entities) in enumerate(((range(4), ["mass", "cyst"]), (range(4, 8), other))):
        heads = {
            "organ": make_answers(rng, studies),
            "entities": make_answers(rng, studies, entities, multilabel=True),
        }
        runs.append(write_run(tmp_path / str(fold), {"student": heads, "majority": heads}))
    annotation = pool.pool(runs, num_resamples=20)["annotation"]
    assert {system: list(heads) for system, heads in annotation.items()} == {
        "student": ["organ"],
        "majority": ["organ"],
    }
    assert annotation["student"]["organ"]["num"] == 8


def test_a_study_tested_twice_is_an_error_that_names_it(tmp_path, rng):
    runs = [
        write_run(tmp_path / str(i), {"student": {"organ": make_answers(rng, studies)}})
        for i, studies in enumerate((range(4), range(3, 8)))
    ]
    with pytest.raises(ValueError, match=r"student organ: studies \['s3'\] were tested by several runs"):
        pool.pool(runs)
    with pytest.raises(ValueError, match="'s0'"):
        pool.pool([runs[0], runs[0]])


@pytest.mark.parametrize("name", ["decisions.json", "eval.json"])
@pytest.mark.parametrize("content", [None, '{"student": {'])
def test_a_run_without_a_whole_file_is_an_error_that_names_it(folds, capsys, tmp_path, name, content):
    path = folds[0][1] / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError) as caught:
        pool.pool(folds[0])
    assert str(path) in str(caught.value) and "run eval.py" in str(caught.value)
    arguments = ["--workdirs", *map(str, folds[0]), f"--output={tmp_path / 'out'}"]
    assert pool.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and not printed.out
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(("field", "value"), [("dataset", "usss"), ("split", "validation")])
def test_runs_on_other_data_are_refused(folds, tmp_path, rng, field, value):
    other = write_run(
        tmp_path / "other", {"student": {"organ": make_answers(rng, range(90, 94))}}, **{field: value}
    )
    with pytest.raises(ValueError, match=f"{other}/eval.json: field '{field}' is '{value}'"):
        pool.pool([*folds[0], other])


def test_the_table_has_a_row_for_each_system_and_head(folds):
    pooled = pool.pool(folds[0], num_resamples=50)
    first, second = (part.splitlines() for part in pool.to_markdown(pooled).split("\n\n"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in first]
    assert [row[:4] for row in rows[2:]] == [
        ["student", "organ", "24", "12"],
        ["student", "findings", "24", "12"],
        ["majority", "organ", "24", "12"],
    ]
    assert {len(row) for row in rows} == {8}
    accuracy = pooled["annotation"]["student"]["organ"]["accuracy"]
    assert rows[2][4] == "{value:.3f} [{low:.3f}, {high:.3f}]".format(**accuracy)
    assert rows[3][4] == "–"
    assert len(second) == 3 and {line.count("|") for line in second} == {6}
    assert second[2].startswith("| student | 0.433 [")


@pytest.mark.parametrize("name", ["busi", "busi.v1"])
def test_command_writes_both_files(folds, capsys, tmp_path, name):
    output = tmp_path / "tables" / name
    assert pool.main(["--workdirs", *map(str, folds[0]), f"--output={output}"]) == 0
    assert sorted(p.name for p in output.parent.iterdir()) == [f"{name}.json", f"{name}.md"]
    table = (output.parent / f"{name}.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == table + "\n"
    written = json.loads((output.parent / f"{name}.json").read_text(encoding="utf-8"))
    assert written == pool.pool(folds[0]) and pool.to_markdown(written) == table
