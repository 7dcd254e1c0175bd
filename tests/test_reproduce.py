"""The reproduction command: what it refuses, what it runs, and that it resumes."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from cell_samples import planned

from dilbert_jax import run
from dilbert_jax.config import REVISION
from dilbert_jax.models import SYSTEMS
from dilbert_jax.reproduce import __main__ as command
from dilbert_jax.reproduce import cells, grid
from dilbert_jax.reproduce.grid import Cell

# One worker: sizing the matched systems traces each of them, once.
pytestmark = pytest.mark.xdist_group("reproduce")

REPOSITORY = pathlib.Path(__file__).parents[1]


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
