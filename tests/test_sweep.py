"""The sweep over learning rates: what it may see, what it keeps, and how it goes on elsewhere."""

import json

import pytest
from cell_samples import record

from dilbert_jax.reproduce import __main__ as command
from dilbert_jax.reproduce import cells, grid

pytestmark = pytest.mark.xdist_group("reproduce")


def test_the_sweep_never_sees_test_clips_and_keeps_the_best_rate(tmp_path, capsys):
    plan = grid.plan_sweep(["bert", "dilbert"])
    assert len(plan) == 2 * len(grid.SWEEP_RATES) and {c.seed for c in plan} == {grid.SWEEP_SEED}
    assert grid.parse_cell(plan[0].name) == plan[0]
    config = grid.cell_config(plan[0], "cpu")
    assert config.optimizer.learning_rate == grid.SWEEP_RATES[0] and not config.train.evaluate_after
    for cell in plan:
        folder = cells.workdir_of(cell, tmp_path)
        folder.mkdir(parents=True)
        value = 0.5 if cell.rate == (2e-3 if cell.system == "bert" else 1e-3) else 0.4
        (folder / "cell.json").write_text(json.dumps(record(cell, value)))
    options = ["--sweep", "--systems=bert,dilbert", "--budget=cpu", "--report"]
    assert command.main([*options, f"--output={tmp_path}"]) == 0
    content = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))
    assert content["kept"] == {"bert": 2e-3, "dilbert": 1e-3}
    text = (tmp_path / "sweep.md").read_text(encoding="utf-8")
    assert "| BERT | 0.400 | 0.400 | 0.500 | 0.002 |" in text
    assert "| DILBERT's teacher | 0.400 | 0.500 | 0.400 |  |" in text
    assert "6 of 6 cells" in text and "validation clips of phantom/large, commit abc, device cpu" in text


def test_a_sweep_goes_on_elsewhere_and_keeps_no_rate_before_its_end(tmp_path, capsys):
    plan = grid.plan_sweep(["bert", "hero"])
    first, second = tmp_path / "first", tmp_path / "second"
    for cell in plan[:-1]:
        folder = cells.workdir_of(cell, first)
        folder.mkdir(parents=True)
        (folder / "cell.json").write_text(json.dumps(record(cell, 0.4)))
    diverged = {k: v for k, v in record(plan[0], 0.4).items() if k != "evaluation"} | {"diverged": "loss"}
    (cells.workdir_of(plan[0], first) / "cell.json").write_text(json.dumps(diverged))
    options = ["--sweep", "--systems=bert,hero", "--budget=cpu", "--report"]
    assert command.main([*options, f"--output={first}"]) == 0
    assert command.main([*options, f"--output={second}", f"--reuse={first / 'sweep.json'}"]) == 0
    assert "5 cells taken" in capsys.readouterr().out
    for folder in (first, second):
        assert json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["kept"] == {"bert": 1e-3}
        text = (folder / "sweep.md").read_text(encoding="utf-8")
        assert "| BERT | diverged | 0.400 | 0.400 | 0.001 |" in text
        assert "| HERO | 0.400 | 0.400 | – |  |" in text and "5 of 6 cells" in text
