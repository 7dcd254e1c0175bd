"""Tables, claims and the report: their statistics, and what a reader is told."""

import json
import re

import numpy as np
import pytest
from cell_samples import planned, record
from scipy import stats

from dilbert_jax.evaluation import statistics
from dilbert_jax.models import SYSTEMS
from dilbert_jax.reproduce import __main__ as command
from dilbert_jax.reproduce import cells, claims, grid, report, tables
from dilbert_jax.reproduce.grid import Cell

# One worker: sizing the matched systems traces each of them, once.
pytestmark = pytest.mark.xdist_group("reproduce")


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
