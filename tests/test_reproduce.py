"""The reproduction command: its plan, fair sizes, statistics, report, and that it resumes."""

import json
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from cell_samples import record
from scipy import stats

from dilbert_jax import run
from dilbert_jax.config import REVISION, check_config
from dilbert_jax.evaluation import statistics
from dilbert_jax.models import SYSTEMS
from dilbert_jax.reproduce import __main__ as command
from dilbert_jax.reproduce import cells, claims, grid, report, tables
from dilbert_jax.reproduce.grid import Cell

# One worker: sizing the matched systems traces each of them, once.
pytestmark = pytest.mark.xdist_group("reproduce")

REPOSITORY = pathlib.Path(__file__).parents[1]


def planned(seeds=3):
    return grid.plan(grid.TABLES, (), ["phantom"], range(seeds), list(SYSTEMS))


@pytest.fixture
def finished(tmp_path):
    """A grid in which DILBERT is clearly best and BERT is no better than chance."""
    rng = np.random.default_rng(0)
    levels = {"dilbert": 0.8, "bert": 0.2}
    for cell in planned():
        value = levels.get(cell.system, 0.5) + 0.005 * rng.standard_normal() + 0.02 * cell.seed
        minutes = {"videobert": 9.0, "dilbert": 5.0, "actbert": 4.9}.get(cell.system, 1.0) * rng.uniform(
            0.99, 1.01
        )
        folder = cells.workdir_of(cell, tmp_path)
        folder.mkdir(parents=True)
        (folder / "cell.json").write_text(json.dumps(record(cell, float(value), minutes)))
    return tmp_path


# -- plan ------------------------------------------------------------------------------------------------------


def test_the_plan_holds_every_cell_once_and_shards_part_it():
    plan = planned()
    assert len(plan) == len(set(plan)) == 3 * (len(SYSTEMS) + 5)
    assert {c.size for c in plan if c.system == "hero"} == {"matched"}
    assert {c.size for c in plan if c.system == "bert"} == {"matched", *grid.SHAPES}
    shards = [grid.part_of(plan, i, 3, "cpu") for i in range(3)]
    minutes = [grid.expected_minutes(part, "cpu") for part in shards]
    assert max(minutes) < 1.1 * min(minutes)
    assert sorted(c.name for part in shards for c in part) == sorted(c.name for c in plan)
    assert [c.seed for c in plan] == sorted(c.seed for c in plan)
    assert grid.plan((), ("9",), ["phantom"], [0], ["dilbert"]) == [Cell("phantom", "dilbert", "3L8H", 0)]


@pytest.mark.parametrize("arguments, message", [
    (["--tables=IX"], "unknown tables IX"),
    (["--figures=7,11"], "unknown figures 11"),
    (["--datasets=imagenet"], "unknown data sets imagenet"),
    (["--systems=gpt"], "'gpt'; choose one of"),
    (["--systems=no.such_module"], "cannot be imported"),
    (["--shard=3/2"], "--shard is '3/2'"),
    (["--cells=phantom/bert"], "need DATASET/SYSTEM/SIZE/SEED"),
    (["--report"], "no finished cell"),
])  # fmt: skip
def test_a_wrong_option_is_one_line(arguments, message, tmp_path, capsys):
    assert command.main([*arguments, f"--output={tmp_path}"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.numerics
def test_the_plan_is_printed_with_its_time_before_anything_runs(finished, capsys):
    missing = cells.workdir_of(planned()[0], finished) / "cell.json"
    missing.unlink()
    assert command.main(["--budget=cpu", "--plan", f"--output={finished}"]) == 0
    text = capsys.readouterr().out
    assert f"{len(planned())} cells, {len(planned()) - 1} finished" in text and "about 7 minutes left" in text
    assert "phantom/bert/matched/0" in text


def test_the_plan_says_less_time_where_cells_run_side_by_side(tmp_path, capsys):
    arguments = ["--budget=cpu", "--tables=none", "--figures=7", "--seeds=4", "--plan"]
    for jobs, minutes in ((1, 44), (2, 22), (8, 11)):
        assert command.main([*arguments, f"--output={tmp_path}", f"--jobs={jobs}"]) == 0
        assert f"about {minutes} minutes left" in capsys.readouterr().out


@pytest.mark.parametrize("budget", grid.BUDGETS)
@pytest.mark.parametrize("dataset", grid.DATASETS)
def test_every_cell_has_a_configuration_that_works(dataset, budget):
    for system, size in (("dilbert", "9L9H"), ("bert", "3L8H")):
        config = grid.cell_config(Cell(dataset, system, size, 7), budget)
        check_config(config)
        assert config.data.guided_masking == (0.5 if system == "dilbert" else 0)
        assert (config.model.num_layers, config.model.num_heads) == grid.SHAPES[size]
        assert not config.data.folds or config.data.fold == 7 % config.data.folds


@pytest.mark.numerics
@pytest.mark.parametrize("system", [name for name in SYSTEMS if name != "dilbert"])
def test_matched_systems_have_as_many_parameters_as_dilbert(system):
    dilbert = grid.cell_config(Cell("phantom", "dilbert", grid.MAIN_SHAPE, 0), "cpu")
    other = grid.cell_config(Cell("phantom", system, "matched", 0), "cpu")
    assert grid.count_parameters(other) == pytest.approx(grid.count_parameters(dilbert), rel=0.01)
    assert other.train.student_epochs == dilbert.train.student_epochs + dilbert.train.mutual_epochs
    check_config(other)


def test_the_experiment_file_names_a_system():
    get_config = runpy.run_path(str(REPOSITORY / "configs" / "systems.py"))["get_config"]
    assert get_config().model.name == "dilbert"
    config = get_config("bert")
    check_config(config)
    assert config == grid.cell_config(Cell("phantom", "bert", "matched", 0), "cpu")
    with pytest.raises(ValueError, match="'gpt'; choose one of"):
        get_config("gpt")


# -- statistics ------------------------------------------------------------------------------------------------


def test_holm_multiplies_the_smallest_first_and_never_falls_back():
    np.testing.assert_allclose(statistics.holm([0.04, 0.01, 0.03]), [0.06, 0.03, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_paired_comparison_is_the_t_test_over_common_seeds():
    first, second = {0: 0.5, 1: 0.7, 2: 0.65, 5: 0.1}, {0: 0.4, 1: 0.5, 2: 0.5, 3: 0.9}
    found = tables.compare(first, second)
    assert found["n"] == 3 and found["value"] == pytest.approx(0.15)
    expected = stats.ttest_rel([0.5, 0.7, 0.65], [0.4, 0.5, 0.5]).pvalue
    assert found["p"] == pytest.approx(expected)
    assert tables.compare({0: 1.0}, {0: 0.5})["p"] is None
    assert tables.compare({0: 1.0}, {1: 0.5}) is None
    # Few clips tie: that all folds differ by the same says nothing of the spread, rounding even less.
    tied = tables.compare({0: 0.56, 1: 0.6, 2: 0.64}, {0: 0.6, 1: 0.64, 2: 0.68})
    assert tied["value"] == pytest.approx(-0.04) and (tied["low"], tied["p"]) == (None, None)
    assert tables.compare({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6})["p"] == 1.0


def test_the_best_is_bold_only_when_every_paired_test_says_so(finished):
    results = tables.Results({c.name: cells.read_cell(c, finished, "cpu") for c in planned()})
    table = tables.table_vi(results, ["phantom"], list(SYSTEMS))
    by_name = {row["system"]: row["cells"][0] for row in table["rows"]}
    assert by_name["DILBERT student"]["best"] and sum(c["best"] for c in by_name.values()) == 1
    assert by_name["BERT"]["chance"] == pytest.approx(0.2) and by_name["BERT"]["n"] == 3
    close = {**results.records}
    key = ("phantom", "hero", "matched")
    close[key] = {s: record(Cell(*key, s), 0.8 + 0.02 * ((s * 2) % 3)) for s in range(3)}
    results.records = close
    table = tables.table_vi(results, ["phantom"], list(SYSTEMS))
    assert not any(row["cells"][0]["best"] for row in table["rows"])


def test_claims_hold_fail_or_stay_undecided(finished):
    results = tables.Results({c.name: cells.read_cell(c, finished, "cpu") for c in planned()})
    found = {c["claim"]: c["verdict"] for c in claims.judge_claims(results, ["phantom"], list(SYSTEMS))}
    assert found["phantom: DILBERT's student is best on macro F1"] == claims.HOLDS
    assert found["phantom: accuracy of the student exceeds plain BERT's at 3, 6 and 9 layers"] == claims.HOLDS
    assert (
        found["phantom: accuracy of the student exceeds the teacher's at 3, 6 and 9 layers"]
        == claims.UNDECIDED
    )
    assert found["phantom: DILBERT trains less long than VideoBERT"] == claims.HOLDS
    assert found["phantom: DILBERT trains about as long as ActBERT"] == claims.HOLDS
    assert found["Figure 8: weights and biases over training and validation"] == claims.UNTESTABLE
    worse = [{"value": -0.1, "p": 0.001, "n": 3}, {"value": 0.1, "p": 0.2, "n": 3}]
    assert claims.judge(worse) == claims.FAILS
    assert claims.judge([{"value": 0.1, "p": None, "n": 1}]) == claims.UNDECIDED
    assert claims.judge([{"value": 0.1, "p": 0.001, "n": 3}, None]) == claims.UNDECIDED
    above = claims.beats_chance(results, ["phantom"], list(SYSTEMS))
    beats = {(row["system"], row["task"]): row["beats"] for row in above}
    assert beats["DILBERT student", "CMM accuracy"] and not beats["BERT", "MLM R@10"]


def test_what_holds_by_construction_cannot_be_tested(finished):
    records = {c.name: cells.read_cell(c, finished, "cpu") for c in planned()}
    for kept in records.values():
        for network in kept["evaluation"]["networks"].values():
            network["pretraining"]["mdc"]["num_classes"] = 9
            network["pretraining"]["moc"]["num_classes"] = 1
    judged = claims.judge_claims(tables.Results(records), ["phantom"], list(SYSTEMS))
    found = {c["claim"]: (c["verdict"], c["test"]) for c in judged}
    verdict, why = found["phantom: MLM is the task with the highest R@10 of the student"]
    assert verdict == claims.UNTESTABLE and why == "ten classes or fewer in MDC and MOC: R@10 is 1"
    assert found["phantom: DILBERT's student is best on MOC R@1"] == (claims.UNTESTABLE, "there is one class")
    assert (
        found["phantom: DILBERT's student is best on MDC R@1 (claimed everywhere but on BUSI)"][0]
        == claims.HOLDS
    )


# -- report ----------------------------------------------------------------------------------------------------


def test_the_report_is_written_as_page_markdown_and_json(finished):
    assert command.main(["--budget=cpu", "--figures=none", "--report", f"--output={finished}"]) == 0
    content = json.loads((finished / "reproduction.json").read_text(encoding="utf-8"))
    assert [t["table"] for t in content["tables"]] == list(grid.TABLES)
    assert len(content["cells"]) == len(planned()) and content["cells"][0]["command"].startswith("rerun")
    markdown = (finished / "reproduction.md").read_text(encoding="utf-8")
    page = (finished / "reproduction.html").read_text(encoding="utf-8")
    for text in (markdown, page):
        assert "phantom: 100 clips to train on, 40 of 20 patients (groups) to test on." in text
        assert "Synthetic data" in text and "Table VII" in text and "rerun phantom/hero/matched/2" in text
        assert "paper's own figures are not in the text" in text.replace("&#39;", "'")
    assert re.search(r"DILBERT student \| 3L8H \| 3 \| \*\*0\.8", markdown)
    assert "p < 0.001" in markdown and "p &lt; 0.001" in page and "p = 0.000" not in markdown


def test_a_reader_is_told_of_folds_and_of_cells_made_otherwise(finished):
    plan = planned()

    def notices():
        report.write_report(plan, "cpu", finished, (), (), "command")
        return " ".join(json.loads((finished / "reproduction.json").read_text("utf-8"))["notices"])

    assert not any(text in notices() for text in ("Folds", "same data", "commits"))
    path = cells.workdir_of(plan[0], finished) / "cell.json"
    kept = json.loads(path.read_text("utf-8"))
    elsewhere = {**kept["evaluation"], "data_fingerprint": "e" * 40}
    path.write_text(json.dumps({**kept, "commit": "def", "evaluation": elsewhere}))
    assert "phantom/large: not all cells saw the same data" in notices()
    assert "Trained by 2 commits of one revision of the method: abc; def" in notices()
    path.write_text(json.dumps({**kept, "evaluation": {**kept["evaluation"], "fold": 1}}))
    assert "Folds share training data" in notices()


def test_figures_are_not_drawn_from_another_run_than_the_record_tells_of(finished):
    cell = planned()[0]
    folder = cells.workdir_of(cell, finished)
    assert not cells.holds_the_run(cell, finished, "cpu")
    saved = json.loads((folder / "cell.json").read_text("utf-8"))["evaluation"]
    (folder / "complete.json").write_text("{}")
    (folder / "eval.json").write_text(json.dumps(saved))
    assert cells.holds_the_run(cell, finished, "cpu")
    (folder / "eval.json").write_text(json.dumps({**saved, "created": "later"}))
    assert not cells.holds_the_run(cell, finished, "cpu")


def test_clips_are_compared_patient_by_patient(finished):
    results = tables.Results({c.name: cells.read_cell(c, finished, "cpu") for c in planned()})
    rows = {r["system"]: r for r in claims.compare_clips(results, ["phantom"], list(SYSTEMS))}
    bert, teacher = rows["BERT matched"], rows["DILBERT teacher 3L8H"]
    assert rows["BERT 3L8H"]["runs"] == 3
    assert bert["runs"] == 3 and bert["groups"] == 20
    assert bert["difference"]["low"] > 0.3 and bert["p_holm"] < 0.01
    assert teacher["difference"]["value"] == 0.0 and teacher["p_holm"] == 1.0


def test_answers_are_kept_as_the_classes_that_hold():
    heads = {
        "condition": {
            "class_ids": ["a", "b"],
            "groups": ["p2", "p1"],
            "targets": [1, 0],
            "predictions": [0, 0],
        },
        "findings": {
            "class_ids": ["x", "y", "z"],
            "groups": ["p2", "p1"],
            "targets": [[True, False, True], [False] * 3],
            "predictions": [[False, True, False], [True] * 3],
        },
        "entities": {"class_ids": [], "groups": [], "targets": [], "predictions": []},
    }
    kept = cells._answers(heads)
    assert kept["condition"] == {
        "class_ids": ["a", "b"], "groups": [1, 0], "targets": [[1], [0]], "predictions": [[0], [0]]
    }  # fmt: skip
    assert kept["findings"]["targets"] == [[0, 2], []] and kept["findings"]["predictions"] == [[1], [0, 1, 2]]
    assert set(kept) == {"condition", "findings"}


def test_a_published_report_stands_in_for_its_cells(finished, tmp_path, capsys):
    assert command.main(["--budget=cpu", "--figures=none", "--report", f"--output={finished}"]) == 0
    other = tmp_path / "other"
    options = ["--budget=cpu", "--figures=none", f"--output={other}", f"--reuse={finished}/reproduction.json"]
    assert command.main([*options, "--plan"]) == 0
    assert f"{len(planned())} cells taken" in (text := capsys.readouterr().out) and "0 minutes left" in text
    assert command.main([*options, "--report"]) == 0
    first, second = (
        json.loads((folder / "reproduction.json").read_text("utf-8")) for folder in (finished, other)
    )
    assert first["tables"] == second["tables"] and first["claims"] == second["claims"]
    options[0] = "--budget=smoke"
    assert command.main([*options, "--plan"]) == 2
    assert "field 'budget' is 'cpu', not 'smoke'" in capsys.readouterr().err


def test_what_was_said_of_each_patient_stays_out_of_the_report(finished, tmp_path):
    for path in finished.rglob("cell.json"):
        kept = json.loads(path.read_text("utf-8"))
        kept["evaluation"]["synthetic_data"] = False
        path.write_text(json.dumps(kept), "utf-8")
    assert command.main(["--budget=cpu", "--figures=none", "--report", f"--output={finished}"]) == 0
    content = json.loads((finished / "reproduction.json").read_text("utf-8"))
    assert content["clip_by_clip"] and not any("decisions" in cell for cell in content["cells"])
    other = [f"--output={tmp_path / 'other'}", f"--reuse={finished}/reproduction.json"]
    assert command.main(["--budget=cpu", "--figures=none", "--report", *other]) == 0
    again = json.loads((tmp_path / "other" / "reproduction.json").read_text("utf-8"))
    assert again["tables"] == content["tables"] and again["clip_by_clip"] == []


def test_an_unfinished_grid_and_a_diverged_cell_are_named(finished):
    plan = planned()
    (cells.workdir_of(plan[0], finished) / "cell.json").unlink()
    path = cells.workdir_of(plan[1], finished) / "cell.json"
    bad = {k: v for k, v in record(plan[1], 0.5).items() if k not in ("evaluation", "training")}
    path.write_text(json.dumps({**bad, "diverged": "student/loss not finite"}))
    report.write_report(plan, "cpu", finished, grid.TABLES, (), "command")
    text = (finished / "reproduction.md").read_text(encoding="utf-8")
    assert f"{len(plan) - 1} of {len(plan)} planned cells" in text
    assert f"Diverged, and left out of every mean: {plan[1].name}" in text


def test_a_folder_of_another_budget_is_refused(finished, capsys):
    assert command.main(["--budget=smoke", "--plan", f"--output={finished}"]) == 2
    assert "field 'budget' is 'cpu', not 'smoke'" in capsys.readouterr().err


def test_finished_cells_are_not_run_again(finished, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a finished cell ran again")

    monkeypatch.setattr(run, "train_and_report", refuse)
    cells.run_cells(planned(), "cpu", finished, "command")


def test_a_cell_names_the_commit_that_it_started_from(tmp_path, monkeypatch):
    now = "started"

    def train(*arguments, **options):
        nonlocal now
        now = "moved on"
        raise run.NonFiniteLossError("diverged")

    monkeypatch.setattr(run, "train_and_report", train)
    monkeypatch.setattr(cells, "commit", lambda: now)
    cell = planned()[0]
    cells.run_cells([cell], "cpu", tmp_path, "command")
    assert cells.read_cell(cell, tmp_path, "cpu")["commit"] == "started"


def test_a_cell_that_is_evaluated_again_keeps_the_commit_that_trained_it(tmp_path, monkeypatch):
    now = "trains"

    def train(config, folder, **options):
        (folder / "complete.json").write_text("{}")
        raise run.NonFiniteLossError("stands for an evaluation")

    monkeypatch.setattr(run, "train_and_report", train)
    monkeypatch.setattr(cells, "commit", lambda: now)
    cell = planned()[0]
    for now in ("trains", "evaluates"):
        cells.run_cells([cell], "cpu", tmp_path, "command")
        record = cells.read_cell(cell, tmp_path, "cpu")
        assert (record["commit"], record["evaluated_by"]) == ("trains", now)
        (cells.workdir_of(cell, tmp_path) / "cell.json").unlink()


def test_cells_of_another_revision_of_the_method_are_refused(finished, tmp_path):
    cell = planned()[0]
    path = cells.workdir_of(cell, finished) / "cell.json"
    old = json.loads(path.read_text()) | {"revision": REVISION - 1}
    path.write_text(json.dumps(old))
    with pytest.raises(ValueError, match=rf"{cell.name} was made by revision {REVISION - 1} of the method"):
        cells.read_cell(cell, finished, "cpu")


# -- cells -----------------------------------------------------------------------------------------------------


def test_a_cell_of_another_version_is_refused(finished):
    cell = planned()[0]
    made = cells.read_cell(cell, finished, "cpu")
    assert made is not None
    path = cells.workdir_of(cell, finished) / "cell.json"
    for section, field, value in (("optimizer", "learning_rate", 0.7), ("model", "channels", [1, 2])):
        changed = {**made, "config": {**made["config"], section: {field: value}}}
        path.write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(
            ValueError, match=rf"cell\.json: phantom/\S+ was made with {section}\.{field} = .*--output"
        ):
            cells.read_cell(cell, finished, "cpu")
    # A field that this version no longer has, or did not have yet, says nothing against it.
    path.write_text(json.dumps({**made, "config": {"model": {"gone": 1}, "seed": 0}}), encoding="utf-8")
    assert cells.read_cell(cell, finished, "cpu") is not None
    shared = finished / "published.json"
    other = {**made, "config": {"seed": 3}}
    shared.write_text(json.dumps({"budget": "cpu", "cells": [other]}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"published\.json: .* made with seed = 3"):
        cells.reuse_records(shared, finished, "cpu")


def test_only_cells_that_compile_longer_than_they_run_compile_quickly(tmp_path, monkeypatch):
    own = "--xla_cpu_parallel_codegen_split_count=16"
    monkeypatch.setenv("XLA_FLAGS", own)
    for budget in ("cpu", "smoke", "smoke"):  # a process that it starts sets the flags again
        assert command.main([f"--budget={budget}", "--plan", f"--output={tmp_path / budget}"]) == 0
        flags = os.environ["XLA_FLAGS"].split()
        assert flags[-1] == own and len(flags) == len(set(flags))
        assert ("--xla_backend_optimization_level=1" in flags) == (budget == "smoke")


WORKER = """
import pathlib, sys, time
folder, status = pathlib.Path(sys.argv[1]), int(sys.argv[2])
(folder / "at").write_text(str(time.monotonic()))
time.sleep(0.3)
(folder / "until").write_text(str(time.monotonic()))
sys.exit(status)
"""


def test_cells_run_side_by_side_and_one_that_fails_stops_no_other(tmp_path, monkeypatch):
    todo = [Cell("phantom", "bert", "3L8H", seed) for seed in range(5)]

    def start(cell, share, budget, output):
        folder = cells.workdir_of(cell, output)
        folder.mkdir(parents=True)
        return subprocess.Popen([sys.executable, "-c", WORKER, folder, "1" if cell.seed == 1 else "0"])

    monkeypatch.setattr(command, "_start", start)
    with pytest.raises(ValueError, match=r"1 of 5 cells failed.*bert/3L8H/1/log\.txt"):
        command.run_side_by_side(todo, 2, "smoke", tmp_path)
    spans = []
    for cell in todo:
        folder = cells.workdir_of(cell, tmp_path)
        spans.append([float((folder / name).read_text()) for name in ("at", "until")])
    at_once = [sum(a <= moment < b for a, b in spans) for moment, _ in spans]
    assert max(at_once) == 2


def test_the_longest_cell_of_a_seed_starts_first(tmp_path, monkeypatch):
    started = []

    def start(cell, share, budget, output):
        started.append(cell)
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(command, "_start", start)
    small, deep, wide = ("bert", "3L8H"), ("dilbert", "9L9H"), ("dilbert", "3L8H")
    todo = [Cell("phantom", *which, seed) for seed in (0, 1) for which in (small, wide, deep)]
    command.run_side_by_side(todo, 1, "smoke", tmp_path)
    assert started == [Cell("phantom", *which, seed) for seed in (0, 1) for which in (deep, wide, small)]


STOPPABLE = r"""
import pathlib, signal, sys, time
from dilbert_jax.reproduce import __main__ as command
from dilbert_jax.reproduce.grid import Cell
import subprocess

def start(cell, share, budget, output):
    code = ("import pathlib, signal, sys, time\n"
            "def stop(*_):\n"
            "    pathlib.Path(sys.argv[1]).write_text('saved'); sys.exit(1)\n"
            "signal.signal(signal.SIGTERM, stop)\n"
            "pathlib.Path(sys.argv[1]).write_text('trains'); time.sleep(60)")
    return subprocess.Popen([sys.executable, "-c", code, str(output / str(cell.seed))], start_new_session=True)

command._start = start
todo = ",".join(Cell("phantom", "bert", "3L8H", seed).name for seed in range(3))
sys.exit(command.main([f"--cells={todo}", "--jobs=2", f"--output={sys.argv[1]}"]))
"""


def test_a_stopped_grid_leaves_no_cell_running(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", STOPPABLE, tmp_path], stderr=subprocess.PIPE, text=True)
    told = [tmp_path / str(seed) for seed in range(2)]
    deadline = time.monotonic() + 60
    while not all(p.exists() and p.read_text() for p in told) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    assert "run the same command to continue" in process.communicate()[1] and process.returncode == 1
    assert [p.read_text() for p in told] == ["saved", "saved"] and not (tmp_path / "2").exists()


# -- the real thing --------------------------------------------------------------------------------------------


def reproduce(*arguments, **options):
    return subprocess.Popen([sys.executable, "-m", "dilbert_jax.reproduce", *arguments], **options)


@pytest.mark.slow
def test_a_killed_grid_resumes_and_a_cell_gives_the_same_numbers_again(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    names = ["phantom/bert/3L8H/0", "phantom/bert/3L8H/1"]
    first, second = (cells.workdir_of(grid.parse_cell(n), tmp_path / "a") / "cell.json" for n in names)
    options = [f"--cells={','.join(names)}", "--budget=smoke"]
    process = reproduce(*options, f"--output={tmp_path / 'a'}", env=environment, start_new_session=True)
    deadline = time.monotonic() + 900
    while not (second.parent / "checkpoints").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert first.exists() and not second.exists()
    written = first.stat().st_mtime_ns
    assert reproduce(*options, f"--output={tmp_path / 'a'}", env=environment).wait() == 0
    assert first.stat().st_mtime_ns == written and second.exists()

    assert reproduce(*options, f"--output={tmp_path / 'b'}", env=environment).wait() == 0
    for name in names:
        again = cells.workdir_of(grid.parse_cell(name), tmp_path / "b") / "cell.json"
        once = cells.workdir_of(grid.parse_cell(name), tmp_path / "a") / "cell.json"
        results = [
            json.loads(path.read_text(encoding="utf-8"))["evaluation"]["networks"] for path in (once, again)
        ]
        assert results[0] == results[1]


@pytest.mark.slow
def test_the_smoke_budget_gives_every_table_and_figure(tmp_path):
    assert reproduce("--budget=smoke", "--jobs=2", f"--output={tmp_path}").wait() == 0
    content = json.loads((tmp_path / "reproduction.json").read_text(encoding="utf-8"))
    assert content["cells_finished"] == content["cells_planned"] == len(SYSTEMS) + 5
    assert [t["table"] for t in content["tables"]] == list(grid.TABLES)
    assert all(cell is not None for t in content["tables"][:3] for row in t["rows"] for cell in row["cells"])
    assert {f["figure"] for f in content["figures"]} == set(grid.FIGURES)
    assert sum(f["figure"] == "10" for f in content["figures"]) == 3
    assert all((tmp_path / f["file"]).stat().st_size > 5000 for f in content["figures"])
