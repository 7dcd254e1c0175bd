"""What the benchmarks share: pairing, figures, pages. That they measure anything is seen by running them."""

import json
import subprocess
import sys

import pytest

from benchmarks import common
from benchmarks.__main__ import BENCHMARKS, write_page


def test_ratios_are_of_neighbouring_rounds():
    # The machine was twice as slow in the second round: for both.
    row = common.compare("setting", {"a": [1.0, 2.0, 1.0], "b": [2.0, 4.0, 2.0]}, "a", "b", per=2)
    assert row.ratio == {"median": 0.5, "low": 0.5, "high": 0.5}
    assert row.ours["median"] == 500.0  # ms of one of two
    assert row.theirs["median"] == 1000.0


def test_the_first_run_counts_apart_and_contenders_alternate():
    calls = []
    seconds, first = common.time_in_turn({name: lambda n=name: calls.append(n) for name in "ab"}, rounds=2)
    assert calls == list("ababab")
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}
    assert set(first) == {"a", "b"}


def test_figures_have_three_digits_and_their_quartiles():
    row = common.Row("s", "ms", {"median": 1234.4, "low": 0.01234, "high": 56.78}, wanted="<= 1")
    assert common.render(row) == "| s | ms | 1,234 [0.0123, 56.8] |  |  |  | <= 1 |"
    alone = common.compare_exactly("s", "MiB", 10.0, "other", 40.0)
    assert common.render(alone) == "| s | MiB | 10.0 | other | 40.0 | 0.25 |  |"


def test_the_peak_forgets_what_was_freed():
    common.reset_peak("jax")
    before = common.peak_mib("jax")
    block = bytearray(200 * 2**20)
    block[:: 2**12] = b"x" * len(block[:: 2**12])
    assert common.peak_mib("jax") - before > 150
    del block
    common.reset_peak("jax")
    assert common.peak_mib("jax") - before < 100


def test_a_page_tells_all_results_and_where_they_are_from(tmp_path):
    record = {
        "title": "One",
        "about": {
            "device": "cpu", "processor": "Some CPU", "cores": 2, "load_before": 0.1,
            "versions": {"jax": "1.2.3"}, "XLA_FLAGS": "", "arguments": {"rounds": 3},
        },
        "rows": [vars(common.Row("setting", "ms", common.exactly(5.0)))],
    }  # fmt: skip
    (tmp_path / "one.json").write_text(json.dumps(record))
    page = write_page(tmp_path)
    assert "| one | setting | ms | 5.00 |" in page
    assert "jax 1.2.3" in page and "Some CPU" in page and "rounds=3" in page
    assert "## Notes" not in page
    (tmp_path / "notes.md").write_text("On battery.\n")
    assert write_page(tmp_path) == f"{page}\n## Notes\n\nOn battery.\n"


def test_an_interrupted_benchmark_leaves_what_it_measured(tmp_path, monkeypatch):
    def measure(arguments):
        yield common.Row("first", "ms", common.exactly(5.0))
        raise KeyboardInterrupt

    found = tmp_path / "found.json"
    monkeypatch.setattr(common, "request_huge_pages", lambda: None)
    monkeypatch.setattr(sys, "argv", ["benchmark", f"--json={found}"])
    with pytest.raises(KeyboardInterrupt):
        common.main("What it is.", measure)
    assert [row["setting"] for row in json.loads(found.read_text())["rows"]] == ["first"]


def test_an_unknown_benchmark_is_named():
    found = subprocess.run([sys.executable, "-m", "benchmarks", "nothing"], capture_output=True, text=True)
    assert found.returncode == 2
    assert "no benchmark nothing" in found.stderr
    assert "training_step" in found.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BENCHMARKS.keys() - {"start", "input_pipeline"}))
def test_a_benchmark_runs_at_its_smallest(name, tmp_path):
    smallest = {
        "training_step": ["--presets", "tiny", "--turns", "1", "--no-compile"],
        "transformer": ["--preset", "tiny", "--side", "256"],
        "annotate": ["--presets", "tiny", "--batch-size", "2"],
        "relational": ["--samples", "32"],
        "conv3d": [],
        "joint_step": ["--size", "tiny"],
    }
    command = [sys.executable, "-m", f"benchmarks.{name}", "--rounds", "1", *smallest[name]]
    subprocess.run([*command, "--json", tmp_path / "found.json"], check=True)
    record = json.loads((tmp_path / "found.json").read_text())
    assert record["rows"] and record["about"]["versions"]["jax"]
