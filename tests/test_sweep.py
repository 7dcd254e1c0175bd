"""The sweep over learning rates: what it may see, what it keeps, and how it goes on elsewhere."""

import json
import pathlib

import pytest
from cell_samples import evaluation, record

from dilbert_jax.config import REVISION, load_config, save_config
from dilbert_jax.models import SYSTEMS
from dilbert_jax.reproduce import __main__ as command
from dilbert_jax.reproduce import cells, grid

pytestmark = pytest.mark.xdist_group("reproduce")


def swept_record(cell, pretraining, annotation):
    """A record in which the mean of tasks and annotation is `pretraining`."""
    swept = record(cell, 2 * pretraining - annotation)
    for network in swept["evaluation"]["networks"].values():
        network["annotation"] = evaluation(annotation)["networks"]["student"]["annotation"]
    return swept


def test_the_sweep_never_sees_test_clips_and_keeps_the_best_rates(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(grid.LEARNING_RATES, "cpu", {"bert": (2e-3, 1e-3)})
    plan = grid.plan_sweep(["bert", "dilbert"], "cpu")
    assert len(plan) == 8 and {c.seed for c in plan} == {grid.SWEEP_SEED}
    assert [grid.parse_cell(cell.name) for cell in plan] == plan
    assert [cell.name.split("@")[1] for cell in plan[:4]] == [
        *("0.001/100", "0.002+0.001/100"),
        *("0.002/100", "0.002+0.004/100"),
    ]
    config = grid.cell_config(plan[1], "cpu")
    assert (config.optimizer.learning_rate, config.train.finetune_rate_scale) == (2e-3, 0.5)
    assert not config.train.evaluate_after
    table = grid.cell_config(grid.parse_cell("phantom/bert/matched/0"), "cpu")
    assert (table.optimizer.learning_rate, table.train.finetune_rate_scale) == (2e-3, 0.5)
    for cell in plan:
        folder = cells.workdir_of(cell, tmp_path)
        folder.mkdir(parents=True)
        pretraining = 0.5 if cell.rates[0] == (2e-3 if cell.system == "bert" else 1e-3) else 0.4
        annotation = 0.7 if cell.rates[1] == (1e-3 if cell.system == "bert" else 2e-3) else 0.3
        (folder / "cell.json").write_text(json.dumps(swept_record(cell, pretraining, annotation)))
    options = ["--sweep", "--systems=bert,dilbert", "--budget=cpu", "--report"]
    assert command.main([*options, f"--output={tmp_path}"]) == 0
    content = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))
    assert content["kept"] == {
        "pre-training": {"bert": 2e-3, "dilbert": 1e-3},
        "fine-tuning": {"bert": 1e-3, "dilbert": 2e-3},
    }
    text = (tmp_path / "sweep.md").read_text(encoding="utf-8")
    assert "| BERT | 0.001 | 0.400 | 0.500 | 0.002 |" in text
    assert "| DILBERT's teacher | 0.001 | 0.500 | 0.400 |  |" in text
    assert "| BERT | 0.002 | 0.700 | 0.300 | 0.300 | 0.001 |" in text
    assert "| DILBERT | 0.001 | 0.300 | 0.700 | 0.300 | 0.002 |" in text
    assert "8 of 8 cells" in text and "validation clips of phantom/large, device cpu; trained by abc" in text


def test_cells_that_only_fine_tune_otherwise_start_from_one_pre_training(tmp_path):
    system = "cbt"
    first, second = (
        grid.parse_cell(f"phantom/{system}/matched@{rates}/100") for rates in ("0.001", "0.001+0.002")
    )
    source, folder = cells.workdir_of(first, tmp_path), cells.workdir_of(second, tmp_path)
    (source / "checkpoints" / "student" / "9").mkdir(parents=True)
    (source / "checkpoints" / "finetune" / "9").mkdir(parents=True)
    save_config(grid.cell_config(first, "cpu"), source / "config.json")
    (source / "metrics.jsonl").write_text('{"stage": "student"}\n{"stage": "finetune"}\n')
    (source / "commits.txt").write_text("abc\n")
    (source / "cell.json").write_text(json.dumps(record(first, 0.4)))
    cells.take_pretraining(second, tmp_path, "cpu")
    assert not folder.exists()  # the other's training is not complete
    (source / "complete.json").write_text("{}")
    cells.take_pretraining(first, tmp_path, "cpu")
    cells.take_pretraining(second, tmp_path, "cpu")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["student"]
    assert load_config(folder / "config.json").to_dict() == grid.cell_config(second, "cpu").to_dict()
    assert (folder / "metrics.jsonl").read_text() == '{"stage": "student"}\n'
    assert (folder / "commits.txt").read_text() == "abc\n"
    other = grid.parse_cell(f"phantom/{system}/matched@0.002/100")
    cells.take_pretraining(other, tmp_path, "cpu")
    assert not cells.workdir_of(other, tmp_path).exists()  # none pre-trained at its rate


def test_a_sweep_goes_on_elsewhere_and_keeps_no_rate_before_its_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(grid.LEARNING_RATES, "cpu", {"hero": (2e-3, 2e-3)})
    plan = grid.plan_sweep(["bert", "hero"], "cpu")
    first, second = tmp_path / "first", tmp_path / "second"
    missing = grid.parse_cell(f"phantom/hero/matched@0.002/{grid.SWEEP_SEED}")
    for cell in plan:
        folder = cells.workdir_of(cell, first)
        folder.mkdir(parents=True)
        if cell != missing:
            (folder / "cell.json").write_text(json.dumps(record(cell, 0.4)))
    diverged = {k: v for k, v in record(plan[0], 0.4).items() if k != "evaluation"} | {"diverged": "loss"}
    (cells.workdir_of(plan[0], first) / "cell.json").write_text(json.dumps(diverged))
    options = ["--sweep", "--systems=bert,hero", "--budget=cpu", "--report"]
    assert command.main([*options, f"--output={first}"]) == 0
    assert command.main([*options, f"--output={second}", f"--reuse={first / 'sweep.json'}"]) == 0
    assert "7 cells taken" in capsys.readouterr().out
    for folder in (first, second):
        kept = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["kept"]
        assert kept == {"pre-training": {"bert": 2e-3, "hero": 1e-3}, "fine-tuning": {"bert": 2e-3}}
        text = (folder / "sweep.md").read_text(encoding="utf-8")
        assert "| BERT | 0.001 | diverged | 0.400 | 0.002 |" in text
        assert "| HERO | 0.002 | 0.400 | – | 0.400 |  |" in text and "7 of 8 cells" in text


def test_the_tables_use_the_rates_that_the_published_sweep_kept():
    """A phase that is not swept to the end, or was of another revision, has the budget's rate."""
    path = pathlib.Path(__file__).parents[1] / "docs" / "results" / "sweep.json"
    published = json.loads(path.read_text(encoding="utf-8"))
    of_today = {record["cell"] for record in published["cells"] if record.get("revision", 1) == REVISION}
    for system in SYSTEMS:
        swept = any(grid.parse_cell(name).system == system for name in of_today)
        kept = [published["kept"][phase].get(system) for phase in ("pre-training", "fine-tuning")]
        expected = tuple((rate if swept else None) or grid.budget_rate("cpu") for rate in kept)
        assert grid.learning_rates(system, "cpu") == expected
