"""The exported artifact: equal outputs without this package's code, its description, what is refused."""

import copy
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from jax import export as jax_export
from small_export import make_clip, shared_experiment

from dilbert_jax import export
from dilbert_jax.annotation import NOTICE, build_visual, predict
from dilbert_jax.clips import find_sector
from dilbert_jax.config import save_config
from dilbert_jax.experiment import load_context, make_context
from dilbert_jax.thresholds import Thresholds
from dilbert_jax.training.checkpoints import StageCheckpoints
from dilbert_jax.training.stages import mark_complete
from dilbert_jax.training.step import TrainState

pytestmark = pytest.mark.numerics
PAGE = Path(__file__).resolve().parents[1] / "docs" / "export.md"
RUN_LINES, PREPARE_LINES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir as a finished run leaves it, with random weights; its context and the student's weights."""
    context = shared_experiment(tmp_path_factory).context
    workdir = tmp_path_factory.mktemp("finished") / "run"
    workdir.mkdir()
    save_config(context.config, workdir / "config.json")
    context.tokenizer.save(workdir / "vocab.txt")
    context.labels.save(workdir / "labels.json")
    Thresholds({context.labels.findings[0]: 0.25}, {}).save(workdir / "thresholds.json")
    student = context.init_params(jax.random.key(0))
    params = {"teacher": jax.tree.map(np.zeros_like, student), "student": student}
    checkpoints = StageCheckpoints(workdir, "finetune")
    checkpoints.save(7, TrainState.create(params, optax.sgd(0.1)))
    checkpoints.close()
    mark_complete(workdir, 1.0)
    return workdir, context, student


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The folder that the command writes for the run."""
    output = tmp_path_factory.mktemp("deployed") / "exported"
    assert export.main([f"--workdir={run[0]}", f"--output={output}"]) == 0
    return output


@pytest.fixture(scope="module")
def clips(run):
    """A batch of three clips of different lengths, as the network takes them."""
    examples = [
        build_visual(run[1], make_clip(organ, condition, num_frames, seed)[0])[0]
        for seed, (organ, condition, num_frames) in enumerate(
            [("liver", "cyst", 9), ("kidney", "stone", 1), ("liver", "normal", 3)]
        )
    ]
    return {name: np.stack([e[name] for e in examples]) for name in examples[0]}


def in_bare_python(lines, folder, *arguments):
    """Runs lines in a new process in which nothing but JAX, NumPy and what they need can be imported."""
    guard = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("dilbert_jax", "flax", "optax", "orbax", "grain", "ml_collections"):
            raise ImportError(f"{name} is not part of a bare installation")
sys.meta_path.insert(0, Refuse())
"""
    return subprocess.run(
        [sys.executable, "-c", guard + lines, *arguments],
        cwd=folder,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )


def test_the_documented_lines_give_equal_outputs_without_this_package(run, exported, clips, tmp_path):
    _, context, params = run
    shutil.copytree(exported, tmp_path / "exported")
    np.savez(tmp_path / "clips.npz", **{name: clips[name] for name in export.INPUTS})
    # The lines as they stand, on three clips; then the same function on the first alone.
    more = """
np.savez("three.npz", **outputs)
np.savez("one.npz", **jax.device_get(annotate(weights, {k: v[:1] for k, v in inputs.items()})))
"""
    finished = in_bare_python(RUN_LINES + more, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert NOTICE in finished.stdout and len(finished.stdout.splitlines()) == 4
    expected = predict(context, params, clips)
    for name, count in (("three", 3), ("one", 1)):
        outputs = np.load(tmp_path / f"{name}.npz")
        assert set(outputs) == set(expected) == set(export.OUTPUTS)
        for output, values in expected.items():
            np.testing.assert_allclose(outputs[output], values[:count], **TOLERANCE, err_msg=output)


def test_the_guard_of_the_bare_process_works(tmp_path):
    assert "not part of a bare installation" in in_bare_python("import dilbert_jax", tmp_path).stderr


def test_one_artifact_serves_every_length_on_every_platform(run, exported, clips):
    _, context, params = run
    network = jax_export.deserialize(bytearray((exported / export.NETWORK).read_bytes()))
    assert network.platforms == export.PLATFORMS
    short, _ = build_visual(context, make_clip("liver", "cyst", 2, 5)[0])
    patch = context.spec.frames_per_step
    batch = {name: value[None] for name, value in short.items()}
    expected = predict(context, params, batch)
    weights = dict(np.load(exported / export.WEIGHTS))
    inputs = {name: batch[name] for name in export.INPUTS}
    inputs |= {name: inputs[name][:, :patch] for name in ("frames", "frame_mask")}
    outputs = network.call(weights, inputs)
    for name, values in expected.items():
        if name == "frame_scores":
            values = values[..., :1]
        np.testing.assert_allclose(outputs[name], values, **TOLERANCE, err_msg=name)
    long = {name: np.concatenate([clips[name]] * 2, axis=1) for name in ("frames", "frame_mask")}
    with pytest.raises(ValueError, match="shapes"):
        network.call(weights, {name: clips[name] for name in export.INPUTS} | long)


def test_the_other_3d_cnn_has_free_lengths_too(run):
    context = run[1]
    config = copy.deepcopy(context.config)
    config.model.video, config.data.num_frames = "r3d_18", 16
    context = make_context(config, context.graph, context.tokenizer, context.labels)
    network = export.lower_network(context, ("cuda",))
    _, inputs = jax.tree.unflatten(network.in_tree, network.in_avals)[0]
    assert network.platforms == ("cuda",) and str(inputs["frames"].shape) == "(b, 8*a, 32, 32)"


def test_the_weights_are_beside_the_network_not_in_it(run, exported):
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(run[2]))
    assert sum(value.nbytes for value in np.load(exported / export.WEIGHTS).values()) == weights
    network = (exported / export.NETWORK).read_bytes()
    assert len(network) < weights / 4
    assert b"dilbert.py" in network and b"/dilbert.py" not in network  # no path of this machine


def test_the_description_says_how_to_use_it(run, exported):
    workdir, context, _ = run
    description = json.loads((exported / export.DESCRIPTION).read_text(encoding="utf-8"))
    assert (description["schema"], description["notice"]) == (export.SCHEMA, NOTICE)
    assert description["run"]["dataset"] == "ahjuui" and description["run"]["step"] == 7
    assert description["platforms"] == ["cpu", "cuda", "tpu"]
    assert description["inputs"]["frames"]["shape"] == ["b", "2*a", 32, 32]
    assert description["inputs"]["frames"]["dtype"] == "uint8"
    assert description["outputs"]["frame_scores"]["shape"] == ["b", len(context.labels.entities), "a"]
    assert [e["id"] for e in description["labels"]["entities"]] == list(context.labels.entities)
    assert description["labels"]["organs"][0]["name"].keys() == {"en", "zh"}
    for region in description["labels"]["regions"]:
        if region["entity"] is not None:
            assert context.labels.entities[region["entity"]] == region["id"]
    pairs = description["labels"]["exclusive_findings"]
    assert [tuple(pair) for pair in pairs] == list(context.labels.exclusive)
    assert description["thresholds"]["findings"][context.labels.findings[0]] == 0.25
    assert description["thresholds"]["findings"][context.labels.findings[1]] == 0.5
    assert description["versions"].keys() >= {"dilbert-jax", "jax", "jaxlib", "numpy"}
    assert str(workdir) not in json.dumps(description)


@pytest.mark.parametrize("num_frames", [1, 3, 4, 70])
def test_the_documented_preparation_is_that_of_annotation(run, exported, num_frames):
    context = run[1]
    description = json.loads((exported / export.DESCRIPTION).read_text(encoding="utf-8"))
    assert inspect.signature(find_sector).parameters["threshold"].default == export.SECTOR_THRESHOLD
    namespace = {}
    exec(PREPARE_LINES, namespace)
    dark = np.zeros((num_frames, 50, 20), np.uint8)
    for frames in (make_clip("kidney", "cyst", num_frames, 3)[0], dark):
        inputs = namespace["prepare"](frames, description["preprocessing"])
        expected, _ = build_visual(context, frames)
        assert set(inputs) == set(description["inputs"])
        for name, value in inputs.items():
            assert value.dtype == description["inputs"][name]["dtype"], name
            np.testing.assert_allclose(value, expected[name], atol=1e-6, err_msg=name)


# --- what is refused --------------------------------------------------------------------------------------


def refused(capsys, workdir, output, *more):
    assert export.main([f"--workdir={workdir}", f"--output={output}", *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_exporting_again_replaces_the_same_network_only(run, exported, tmp_path, capsys):
    folder = tmp_path / "exported"
    shutil.copytree(exported, folder)
    (folder / export.DESCRIPTION).unlink()  # as a kill leaves it
    assert export.main([f"--workdir={run[0]}", f"--output={folder}", "--platforms=cpu"]) == 0
    assert json.loads((folder / export.DESCRIPTION).read_text("utf-8"))["platforms"] == ["cpu"]
    capsys.readouterr()
    assert "another run or network" in refused(capsys, run[0], folder, "--network=teacher")
    other = tmp_path / "other"
    shutil.copytree(run[0], other)
    config = load_context(other).config
    config.seed = 1
    save_config(config, other / "config.json")
    assert "another run or network" in refused(capsys, other, folder)
    assert json.loads((folder / export.DESCRIPTION).read_text("utf-8"))["run"]["network"] == "student"


def test_a_folder_in_use_is_left_alone(run, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert "notes.txt" in refused(capsys, run[0], tmp_path)
    assert "is a file" in refused(capsys, run[0], tmp_path / "notes.txt")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / export.DESCRIPTION).write_text("{", encoding="utf-8")
    assert export.DESCRIPTION in refused(capsys, run[0], tmp_path / "half")
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["half", "notes.txt"]


@pytest.mark.parametrize("absent", ["complete.json", "checkpoints/finetune", "config.json"])
def test_an_unfinished_run_is_refused(run, tmp_path, capsys, absent):
    workdir = tmp_path / "run"
    shutil.copytree(run[0], workdir)
    (workdir / "metrics.jsonl").write_text("", encoding="utf-8")
    shutil.rmtree(workdir / absent) if (workdir / absent).is_dir() else (workdir / absent).unlink()
    line = refused(capsys, workdir, tmp_path / "out")
    assert str(workdir) in line and "train.py" in line
    assert not (tmp_path / "out").exists() and not (workdir / absent).exists()


@pytest.mark.parametrize("platforms", ["cpu,abacus", ""])
def test_an_unknown_platform_is_refused(run, tmp_path, capsys, platforms):
    line = refused(capsys, run[0], tmp_path / "out", f"--platforms={platforms}")
    assert repr(platforms) in line and "cpu, cuda, tpu" in line
    assert not (tmp_path / "out").exists()
