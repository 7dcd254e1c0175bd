"""Training end to end on a small export: all stages, exact resuming, refusal of another configuration."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_export import shared_config, shared_run
from tiny import tiny_run_config

from dilbert_jax import run
from dilbert_jax.config import check_config, default_config, load_config, save_config
from dilbert_jax.experiment import load_context, open_experiment
from dilbert_jax.models import SYSTEMS
from dilbert_jax.training import loop, objectives, stages
from dilbert_jax.training import step as steps
from dilbert_jax.training.checkpoints import StageCheckpoints
from dilbert_jax.training.log import MetricsLog, read_metrics
from dilbert_jax.training.window import NonFiniteLossError

TASKS = ("mlm", "mdc", "moc", "cmm", "summary")

# One worker runs both files: they share one trained run.
pytestmark = pytest.mark.xdist_group("trained")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return shared_run(tmp_path_factory)


def copy_until(workdir, folder, stage):
    """A copy of a finished run in which `stage` and what follows has not happened."""
    copy = folder / "copy"
    shutil.copytree(workdir, copy)
    (copy / "complete.json").unlink()
    gone = stages.STAGES[stages.STAGES.index(stage) :]
    for name in gone:
        shutil.rmtree(copy / "checkpoints" / name)
    kept = [r for r in read_metrics(copy / "metrics.jsonl") if r["stage"] not in gone]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
    return copy


def records(workdir, stage, split="train"):
    return [r for r in read_metrics(workdir / "metrics.jsonl") if (r["stage"], r["split"]) == (stage, split)]


def assert_same_params(a, b, experiment, stage):
    for network in objectives.NETWORKS:
        (first, step), (second, other) = (
            stages.network_params(experiment.context, workdir, stage, network) for workdir in (a, b)
        )
        assert step == other
        for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
            np.testing.assert_array_equal(x, y)


def test_a_workdir_in_use_is_refused(tmp_path):
    with (
        run._alone_in(tmp_path / "run"),
        pytest.raises(ValueError, match=r"run is in use by another process that trains there"),
        run._alone_in(tmp_path / "run"),
    ):
        pass
    with run._alone_in(tmp_path / "run"):
        pass


# --- configuration ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["tiny", "small", "medium", "base"])
def test_a_configuration_returns_from_its_file(tmp_path, preset):
    config = default_config(preset)
    config.data.grid_scales = (1, 2, 4)
    config.optimizer.learning_rate = 0.25
    check_config(config)
    save_config(config, tmp_path / "config.json")
    loaded = load_config(tmp_path / "config.json")
    assert loaded.to_dict() == config.to_dict()
    assert isinstance(loaded.data.grid_scales, tuple) and isinstance(loaded.model.channels, tuple)


@pytest.mark.parametrize(
    ("section", "field", "named"),
    [("data", "colour", r"data\.colour"), ("extra", None, "'extra'")],
)
def test_an_unknown_saved_field_is_refused(tmp_path, section, field, named):
    path = tmp_path / "config.json"
    save_config(default_config(), path)
    saved = json.loads(path.read_text(encoding="utf-8"))
    if field:
        saved[section][field] = 1
    else:
        saved[section] = {}
    path.write_text(json.dumps(saved), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"config\.json: unknown field.*{named}"):
        load_config(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data.num_frames", 5),
        ("data.size", 30),
        ("data.folds", 2),
        ("data.guided_masking", 1.5),
        ("model.num_heads", 5),
        ("train.batch_size", 1),
        ("train.mutual_epochs", 0.0),
        ("optimizer.name", "lamb"),
        ("loss.reduction", "median"),
        ("loss.temperature", 0.0),
    ],
)
def test_a_value_that_cannot_work_is_named(field, value):
    config = tiny_run_config()
    section, name = field.split(".")
    config[section][name] = value
    named = "hidden_size" if name == "num_heads" else name
    with pytest.raises(ValueError, match=rf"config\.{section}\.{named} is "):
        check_config(config)


def test_a_workdir_of_another_configuration_is_refused(experiment, tmp_path):
    config = load_config_of(experiment)
    save_config(config, tmp_path / "config.json")
    config.train.batch_size = 2
    config.seed = 5
    with pytest.raises(ValueError, match=r"seed: 0 -> 5; train\.batch_size: 4 -> 2.*--workdir"):
        open_experiment(config, tmp_path)


def test_a_run_is_not_tested_on_what_another_split_trained_it_on(experiment, tmp_path, caplog):
    config, path = load_config_of(experiment), tmp_path / "splits.json"
    opened = open_experiment(config, tmp_path)
    kept = json.loads(path.read_text("utf-8"))
    assert [kept[name]["studies"] for name in kept] == [len(part) for part in opened.indices.values()]
    assert not caplog.records
    path.write_text(json.dumps({**kept, "test": kept["validation"]}), "utf-8")
    with pytest.raises(ValueError, match=r"splits\.json: .* other studies for test, .*--workdir"):
        open_experiment(config, tmp_path)
    path.unlink()  # as of an earlier version
    open_experiment(config, tmp_path)
    assert "cannot be told" in caplog.text and not path.exists()


def load_config_of(experiment):
    return experiment.context.config.copy_and_resolve_references()


def test_a_corrected_data_folder_is_no_other_configuration(experiment, tmp_path):
    config = load_config_of(experiment)
    right = config.data.manual_dir
    config.data.update(manual_dir=str(tmp_path / "typo"), data_dir=str(tmp_path / "prepared"))
    with pytest.raises(ValueError, match=r"manifest\.jsonl|typo"):
        open_experiment(config, tmp_path / "run")
    config.data.manual_dir = right
    assert len(open_experiment(config, tmp_path / "run").store) == 28


def test_folds_keep_patients_together_and_test_every_study_once(experiment, tmp_path):
    tested = []
    for fold in range(3):
        config = load_config_of(experiment)
        config.data.update(folds=3, fold=fold)
        opened = open_experiment(config, tmp_path / str(fold))
        groups = [{opened.store.studies[i].group_id for i in ids} for ids in opened.indices.values()]
        assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
        tested += opened.indices["test"].tolist()
    assert sorted(tested) == list(range(28))


def test_an_empty_folder_holds_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing.*train\.py"):
        load_context(tmp_path)


# --- the log and checkpoints ------------------------------------------------------------------------------


def test_the_log_forgets_what_a_resumed_run_writes_again(tmp_path):
    log = MetricsLog(tmp_path)
    log.rewind("teacher", 0)  # nothing there yet
    for stage, step in (("teacher", 9), ("student", 1), ("student", 4), ("student", 6)):
        log.write({"stage": stage, "step": step})
    with log.path.open("a") as file:
        file.write('{"stage": "student", "st')  # a kill in the middle of a line
    log.rewind("student", 4)
    log.write({"stage": "student", "step": 5})
    steps_left = [(r["stage"], r["step"]) for r in read_metrics(log.path)]
    assert steps_left == [("teacher", 9), ("student", 1), ("student", 4), ("student", 5)]


def test_checkpoints_keep_the_newest_and_return_every_bit(tmp_path, rng):
    tree = {"a": jnp.asarray(rng.normal(size=3), jnp.float32), "n": jnp.int32(3), "b": [jnp.zeros((2, 1))]}
    checkpoints = StageCheckpoints(tmp_path, "teacher", keep=2)
    assert checkpoints.latest_step() is None
    with pytest.raises(FileNotFoundError, match=r"no checkpoint under .*teacher"):
        checkpoints.restore(tree)
    for step in (1, 2, 2, 5):
        checkpoints.save(step, tree | {"n": jnp.int32(step)})
    checkpoints.close()
    again = StageCheckpoints(tmp_path, "teacher")
    restored = again.restore(jax.eval_shape(lambda: tree))
    assert again.latest_step() == 5 and int(restored["n"]) == 5
    np.testing.assert_array_equal(restored["a"], tree["a"])
    assert sorted(p.name for p in again.folder.iterdir() if p.name.isdigit()) == ["2", "5"]
    again.close()


def test_weights_are_read_whatever_optimizer_was_saved_beside_them(tmp_path):
    saved = {
        "params": {"student": {"w": jnp.arange(3.0)}, "teacher": {"w": jnp.ones(3)}},
        "opt_state": [{"m": jnp.ones(3)}],
    }
    checkpoints = StageCheckpoints(tmp_path, "mutual")
    checkpoints.save(7, saved)
    restored = checkpoints.restore_part(
        {"params": {"student": {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}}}
    )
    checkpoints.close()
    assert jax.tree.map(jnp.shape, restored) == {"params": {"student": {"w": (3,)}}}
    np.testing.assert_array_equal(restored["params"]["student"]["w"], [0.0, 1.0, 2.0])


@pytest.mark.numerics
def test_initialisation_is_the_same_in_one_program(experiment):
    # As it is on one CPU device; in a program on meshes.
    init, key = experiment.context.init_params, jax.random.key(3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), init(key), jax.jit(init)(key)
    )


# --- whole runs -------------------------------------------------------------------------------------------


def test_every_stage_runs_to_its_end(trained):
    config, workdir = trained
    expected = {"teacher": 4, "student": 4, "mutual": 5, "finetune": 28}
    for stage, count in expected.items():
        assert count == round(config.train[f"{stage}_epochs"] * 14 / 4)
        checkpoints = StageCheckpoints(workdir, stage)
        assert checkpoints.latest_step() == count
        checkpoints.close()
        assert [r["step"] for r in records(workdir, stage)] == [
            s for s in range(1, count + 1) if s in (1, count) or s % 2 == 0
        ]
        (validation,) = records(workdir, stage, "validation")
        assert validation["step"] == count
    for record in read_metrics(workdir / "metrics.jsonl"):
        assert all(math.isfinite(v) for v in record.values() if isinstance(v, float))
    assert load_config(workdir / "config.json").to_dict() == config.to_dict()


def test_the_log_holds_every_term_of_equation_13(trained):
    config, workdir = trained
    weights = config.loss
    for record in records(workdir, "mutual"):
        for network in objectives.NETWORKS:
            terms = {k.split("/")[1]: v for k, v in record.items() if k.startswith(f"{network}/")}
            supervised = sum(weights[task] * terms[task] for task in TASKS)
            relational = terms["distance"] + weights.beta1 * terms["angle"]
            mutual = relational + weights.beta2 * terms["response"]
            expected = weights.alpha * supervised + weights.beta * mutual + weights.gamma * terms["self"]
            assert terms["loss"] == pytest.approx(expected, rel=1e-4)
        assert record["loss"] == pytest.approx(record["teacher/loss"] + record["student/loss"], rel=1e-5)
    # The first step starts at the snapshots, apart from dropout; then the networks leave them.
    assert all(r["student/response"] > 0 for r in records(workdir, "mutual"))
    teacher, student = records(workdir, "teacher")[0], records(workdir, "student")[0]
    assert "teacher/soft_labels" not in teacher and student["student/soft_labels"] > 0
    fine = records(workdir, "finetune")[-1]
    for network in objectives.NETWORKS:
        annotation = ("organ", "condition", "findings", "match", "grounding")
        terms = [weights[t] * fine[f"{network}/{t}"] for t in annotation]
        assert fine[f"{network}/loss"] == pytest.approx(sum(terms), rel=1e-4)


def test_fine_tuning_learns(trained):
    _, workdir = trained
    first, last = records(workdir, "finetune")[0], records(workdir, "finetune")[-1]
    for network in objectives.NETWORKS:
        assert last[f"{network}/loss"] < first[f"{network}/loss"]


def test_a_second_call_only_reports(trained, monkeypatch):
    config, workdir = trained

    def no_training(*args, **kwargs):
        raise AssertionError("the run was complete")

    monkeypatch.setattr(run, "open_experiment", no_training)
    monkeypatch.setattr(loop, "train", no_training)
    assert run.train_and_report(config, workdir) == workdir / "report.html"
    other = config.copy_and_resolve_references()
    other.loss.gamma = 0.5
    with pytest.raises(ValueError, match=r"loss\.gamma: 0\.6 -> 0\.5"):
        run.train_and_report(other, workdir)


@pytest.mark.slow
def test_an_interrupted_run_ends_like_an_uninterrupted_one(trained, tmp_path, monkeypatch):
    config, workdir = trained
    copy = copy_until(workdir, tmp_path, "mutual")
    experiment = open_experiment(config, copy)
    original = stages.training_batches

    def interrupted(build, indices, batch_size, seed, start_step=0, **options):
        batches = original(build, indices, batch_size, seed, start_step, **options)
        for i, batch in enumerate(batches, start_step):
            if seed == 2 and i == 3:  # the mutual stage
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(stages, "training_batches", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.train(experiment, copy)
    checkpoints = StageCheckpoints(copy, "mutual")
    assert checkpoints.latest_step() == 3
    checkpoints.close()
    assert not (copy / "checkpoints" / "finetune").exists()
    loop.train(open_experiment(config, copy), copy)
    assert_same_params(workdir, copy, experiment, "mutual")
    assert_same_params(workdir, copy, experiment, "finetune")
    # One more record where the run was cut, none twice; the others say the same.
    assert [r["step"] for r in records(copy, "mutual")] == [1, 2, 3, 4, 5]
    timing = {"clips_per_second"}
    for stage, last in (("mutual", 5), ("finetune", 28)):
        a, b = ({r["step"]: r for r in records(w, stage)} for w in (workdir, copy))
        for step in {1, 2, last} & a.keys():
            assert {k: v for k, v in a[step].items() if k not in timing} == {
                k: v for k, v in b[step].items() if k not in timing
            }


def fake_objective(model, loss, params, names, entity_of_region, batch, rng):
    """A loss that compiles in no time; NaN where the batch is marked."""
    total, metrics = jnp.float32(0), {}
    for name, network in params.items():
        value = jnp.sum(jax.tree.leaves(network)[0] ** 2) * 1e-3
        metrics[f"{name}/loss"] = value
        total += value
    metrics["student/match"] = batch["marker"].mean()
    return total + 0 * metrics["student/match"], metrics


def marked_batches(original, bad_step):
    def batches(build, indices, batch_size, seed, start_step=0, **options):
        for i, batch in enumerate(
            original(build, indices, batch_size, seed, start_step, **options), start_step
        ):
            yield batch | {"marker": np.full(batch_size, np.nan if i == bad_step else 1, np.float32)}

    return batches


def test_a_diverged_step_names_stage_step_term_and_studies(trained, tmp_path, monkeypatch):
    config, workdir = trained
    copy = copy_until(workdir, tmp_path, "finetune")
    experiment = open_experiment(config, copy)
    expected = stages.training_batches(
        experiment.builder.annotation, experiment.indices["train"], config.train.batch_size, 3
    )
    next(expected), next(expected)
    ids = [experiment.store.studies[i].study_id for i in next(expected)["study"]]
    with monkeypatch.context() as patch:
        patch.setattr(objectives, "annotation_objective", fake_objective)
        patch.setattr(stages, "training_batches", marked_batches(stages.training_batches, bad_step=2))
        with pytest.raises(NonFiniteLossError) as error:
            loop.train(experiment, copy)
    text = str(error.value)
    assert "stage finetune, step 2:" in text and "student/match" in text and "learning_rate" in text
    assert ", ".join(ids) in text
    checkpoints = StageCheckpoints(copy, "finetune")
    # Where compiling took longer than checkpoint_every_seconds, a good step has been saved.
    assert (checkpoints.latest_step() or 0) <= 2
    checkpoints.close()


def test_a_signal_inside_a_step_loses_no_checkpoint(trained, tmp_path, monkeypatch):
    """Python delivers a signal right after the compiled step returns, before its result has a name."""
    config, workdir = trained
    copy = copy_until(workdir, tmp_path, "finetune")
    experiment = open_experiment(config, copy)
    make_step = steps.make_step

    def make_interrupted(*arguments):
        update, calls = make_step(*arguments), []

        def interrupted(*args):
            result = update(*args)
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return result

        return interrupted

    monkeypatch.setattr(objectives, "annotation_objective", fake_objective)
    monkeypatch.setattr(stages, "training_batches", marked_batches(stages.training_batches, bad_step=None))
    monkeypatch.setattr(loop, "validate", lambda *_: {})
    monkeypatch.setattr(steps, "make_step", make_interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.train(experiment, copy)
    monkeypatch.setattr(steps, "make_step", make_step)
    loop.train(experiment, copy)
    checkpoints = StageCheckpoints(copy, "finetune")
    assert checkpoints.latest_step() == 28
    checkpoints.close()


# --- systems of one network ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "bert" else pytest.mark.slow) for n in SYSTEMS if n != "dilbert"],
)
def test_the_same_command_trains_and_evaluates_a_baseline(name, tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "use_compilation_cache", lambda: None)
    config = shared_config(tmp_path_factory)
    config.model.update(name=name, num_layers=2 if name == "actbert" else 1)  # compiling dominates
    with pytest.raises(ValueError, match="single_network"):
        check_config(config)
    config.train.update(single_network=True, student_epochs=1.0, finetune_epochs=1.0)
    assert stages.stage_names(config) == ("student", "finetune")
    report = run.train_and_report(config, tmp_path / "run")
    evaluation = json.loads((tmp_path / "run" / "eval.json").read_text(encoding="utf-8"))
    assert report.exists() and list(evaluation["networks"]) == ["student"]
    assert not (tmp_path / "run" / "checkpoints" / "mutual").exists()
