"""The plan of the grid: every cell once, each with a configuration, and fair sizes."""

import pathlib
import runpy

import pytest
from cell_samples import planned

from dilbert_jax.config import check_config
from dilbert_jax.models import SYSTEMS
from dilbert_jax.reproduce import __main__ as command
from dilbert_jax.reproduce import cells, grid
from dilbert_jax.reproduce.grid import Cell

# One worker: sizing the matched systems traces each of them, once.
pytestmark = pytest.mark.xdist_group("reproduce")

REPOSITORY = pathlib.Path(__file__).parents[1]


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
