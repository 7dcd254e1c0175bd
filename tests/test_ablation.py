"""Variants over seeds: which stages they share, what is copied, the paired tests, and runs that diverge."""

import json
import pathlib

import jax
import ml_collections
import numpy as np
import pytest
from scipy import stats
from small_export import shared_run

from dilbert_jax import ablation, run
from dilbert_jax.config import check_config, default_config, load_config, save_config
from dilbert_jax.experiment import load_context
from dilbert_jax.training import stages
from dilbert_jax.training.log import read_metrics

pytestmark = pytest.mark.xdist_group("trained")
CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "ablation.py"


def changed(**fields):
    config = default_config("tiny")
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


@pytest.mark.parametrize(
    ("fields", "shared"),
    [
        ({}, ("teacher", "student", "mutual", "finetune")),
        ({"evaluate__mask_repeats": 9}, ("teacher", "student", "mutual", "finetune")),
        ({"loss__condition": 9.0}, ("teacher", "student", "mutual")),
        ({"loss__beta1": 0.0}, ("teacher", "student")),
        ({"loss__temperature": 5.0}, ("teacher",)),
        ({"loss__temperature": 5.0, "loss__beta1": 0.0}, ("teacher",)),
        ({"loss__mlm": 9.0}, ()),
        ({"seed": 1}, ()),
        ({"train__single_network": True}, ()),
    ],
)
def test_stages_before_the_first_difference_are_shared(fields, shared):
    assert ablation.shared_stages(changed(), changed(**fields)) == shared


def test_fields_that_a_later_stage_reads_first_exist_and_are_read_there():
    flat = ablation._flatten(default_config())
    assert set(ablation.FIRST_STAGE) <= set(flat)
    stages = [name for name in flat if name.startswith("train.") and name.endswith("_epochs")]
    for name in stages:
        own = name.removeprefix("train.").removesuffix("_epochs")
        assert ablation.FIRST_STAGE.get(name, "teacher") == own


@pytest.mark.numerics
def test_a_copied_stage_is_the_donors_to_the_bit(tmp_path_factory, tmp_path):
    config, donor = shared_run(tmp_path_factory)
    other = ml_collections.ConfigDict(config.to_dict())
    other.loss.beta1 = 0.0
    copy = tmp_path / "without_angle" / "0"
    ablation.copy_stages(donor, copy, other)
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["student", "teacher"]
    assert load_config(copy / "config.json").loss.beta1 == 0.0
    rows = read_metrics(copy / "metrics.jsonl")
    assert {r["stage"] for r in rows} == {"teacher", "student"}
    params = [stages.network_params(load_context(w), w, "student", "student")[0] for w in (donor, copy)]
    for a, b in zip(*map(jax.tree.leaves, params), strict=True):
        np.testing.assert_array_equal(a, b)
    (copy / "mark").touch()
    ablation.copy_stages(donor, copy, other)  # what is there stays
    assert (copy / "mark").exists()


@pytest.mark.slow
def test_a_run_from_copied_stages_ends_like_one_from_scratch(tmp_path_factory, tmp_path):
    config, donor = shared_run(tmp_path_factory)
    other = ml_collections.ConfigDict(config.to_dict())
    other.loss.beta2 = 0.0
    ablation.copy_stages(donor, tmp_path / "copied", other)
    for name in ("copied", "scratch"):
        run.train_and_report(other, tmp_path / name)
    params = [
        stages.network_params(load_context(tmp_path / n), tmp_path / n, "finetune", "student")[0]
        for n in ("copied", "scratch")
    ]
    for a, b in zip(*map(jax.tree.leaves, params), strict=True):
        np.testing.assert_array_equal(a, b)


def fake_training(monkeypatch, values):
    """Replaces training by an evaluation whose figures are `values(variant config)`; counts the calls."""
    calls = []

    def train_and_report(config, workdir, command=""):
        calls.append(workdir)
        if config.loss.alpha == 0.9:
            raise run.NonFiniteLossError("stage teacher, step 3: loss not finite")
        value = values(config)
        figures = {
            "annotation": {
                "condition": {"macro": {"f1": {"value": value}}},
                "findings": {"macro": {"f1": {"value": 0.5}}},
            },
            "pretraining": {
                "mlm": {"recall_at_10": 0.5},
                "mdc": {"recall_at_1": None},
                "moc": {"recall_at_1": 0.5},
                "cmm": {"accuracy": value},
            },
        }
        workdir.mkdir(parents=True)
        save_config(config, workdir / "config.json")
        (workdir / "eval.json").write_text(json.dumps({"networks": {"student": figures}}))
        stages.mark_complete(workdir, 1.0)

    monkeypatch.setattr(run, "train_and_report", train_and_report)
    monkeypatch.setattr(ablation, "copy_stages", lambda *_: None)
    return calls


NOISE = {0: 0.01, 1: -0.02, 2: 0.015}


def test_variants_are_compared_pair_by_pair(monkeypatch, tmp_path):
    def values(config):
        return 0.6 + 0.05 * config.seed - (0.1 + NOISE[config.seed]) * (config.loss.beta1 == 0.0)

    calls = fake_training(monkeypatch, values)
    variants = {"full": {}, "without": {"loss__beta1": 0.0}, "same": {}, "wild": {"loss__alpha": 0.9}}
    configs = {name: changed(**fields) for name, fields in variants.items()}
    ablation.run_variants(configs, [0, 1, 2], tmp_path, "")
    assert len(calls) == 12
    ablation.run_variants(configs, [0, 1, 2], tmp_path, "")
    assert len(calls) == 12  # nothing is trained twice, not even what diverged

    results = ablation.collect(list(configs), tmp_path)
    assert results["full"]["seeds"] == [0, 1, 2] and results["wild"]["seeds"] == []
    assert "step 3" in results["wild"]["diverged"][1]
    differences = ablation.compare(results)
    first, second = results["without"]["figures"], results["full"]["figures"]
    test = stats.ttest_rel(first["condition macro F1"], second["condition macro F1"])
    row = differences["without"]["condition macro F1"]
    np.testing.assert_allclose(row["p"], test.pvalue)
    np.testing.assert_allclose([row["low"], row["high"]], test.confidence_interval(0.95), atol=1e-6)
    np.testing.assert_allclose(row["p_holm"], 2 * row["p"])  # two variants were compared
    assert differences["same"]["condition macro F1"]["p_holm"] == 1.0
    assert ablation.collect(list(configs), tmp_path, "teacher")["full"]["seeds"] == []
    table = ablation.to_markdown(results, differences)
    assert "| wild | 0 (+ 3 diverged) | – |" in table
    assert f"{row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]" in table
    assert "nan" not in table


def test_a_figure_that_a_run_does_not_have_is_a_dash(monkeypatch, tmp_path):
    fake_training(monkeypatch, lambda config: 0.5)
    configs = {"full": changed(), "other": changed(loss__beta1=0.0)}
    ablation.run_variants(configs, [0, 1], tmp_path, "")
    results = ablation.collect(list(configs), tmp_path)
    table = ablation.to_markdown(results, ablation.compare(results))
    column = ablation.to_markdown(results, {}).splitlines()[0].split("|").index(" MDC R@1 ")
    assert table.splitlines()[2].split("|")[column].strip() == "–"


def test_the_experiment_file_has_variants_that_work():
    configs = ablation.load_variants(CONFIG, None)
    assert next(iter(configs)) == "full" and len(configs) > 15
    for config in configs.values():
        check_config(config)
    assert list(ablation.load_variants(CONFIG, ["temperature_5"])) == ["full", "temperature_5"]
    differing = {name: ablation.shared_stages(configs["full"], config) for name, config in configs.items()}
    assert differing["without_angle"] == ("teacher", "student") and differing["add_resized"] == ()


def test_what_is_no_ablation_is_refused(tmp_path, capsys):
    arguments = ["--workdir", str(tmp_path / "w"), "--config"]
    assert ablation.main([*arguments, str(tmp_path / "none.py")]) == 2
    assert "is no Python file" in capsys.readouterr().err
    assert ablation.main([*arguments, str(CONFIG.parent / "busi.py")]) == 2
    assert "holds no VARIANTS" in capsys.readouterr().err
    assert ablation.main([*arguments, str(CONFIG), "--variants", "without_love"]) == 2
    assert "unknown variants without_love; choose from full" in capsys.readouterr().err
