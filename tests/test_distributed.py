"""Several processes on one machine train as one does, and a run goes on with another number of them."""

import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from dilbert_jax.config import save_config
from dilbert_jax.training.log import read_metrics
from dilbert_jax.training.stages import network_params

SCRIPT = pathlib.Path(__file__).with_name("distributed_training.py")
STOP_AFTER = 4

pytestmark = pytest.mark.numerics


def launch(config, workdir, processes, stop_after=0, *options):
    """Trains with so many processes; fails with the output of the one that failed."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "OMP_NUM_THREADS": "1"}
    environment["XDG_CACHE_HOME"] = str(config.parent)
    command = [sys.executable, SCRIPT, config, workdir, str(stop_after), *options]
    if processes > 1:
        command.append("--distributed")
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        environment |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(processes)}
    running = [
        subprocess.Popen(
            command, env={**environment, "JAX_PROCESS_ID": str(i)}, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for i in range(processes)
    ]  # fmt: skip
    for process in running:
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 0, output[-4000:]
        assert ("stopped" in output) == bool(stop_after), output[-2000:]


def losses(workdir):
    rows = [r for r in read_metrics(workdir / "metrics.jsonl") if r["split"] == "train"]
    assert [r["step"] for r in rows] == list(range(1, len(rows) + 1))
    return {name: np.asarray([r[name] for r in rows]) for name in rows[0] if "/" in name}


def assert_same_run(workdir, other, context):
    ours, theirs = losses(workdir), losses(other)
    assert ours.keys() == theirs.keys() and len(ours["student/loss"]) > STOP_AFTER + 2
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-5, atol=1e-6, err_msg=name)
    for network in ("teacher", "student"):
        (a, step), (b, other_step) = (network_params(context, w, "mutual", network) for w in (workdir, other))
        assert step == other_step
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(x, y, atol=2e-4)


@pytest.fixture(scope="module")
def config(experiment, tmp_path_factory):
    """The file that tells every process what to train."""
    changed = experiment.context.config.copy_and_resolve_references()
    changed.train.update(log_every_steps=1, checkpoint_every_seconds=1e6, mutual_epochs=6.0)
    path = tmp_path_factory.mktemp("distributed") / "config.json"
    save_config(changed, path)
    return path


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """One process, not interrupted."""
    workdir = tmp_path_factory.mktemp("alone")
    launch(config, workdir, 1)
    return workdir


@pytest.fixture(scope="module")
def stopped(config, tmp_path_factory):
    """Two processes, stopped in the middle by a signal to one of them."""
    workdir = tmp_path_factory.mktemp("stopped")
    launch(config, workdir, 2, STOP_AFTER)
    assert len(losses(workdir)["student/loss"]) == STOP_AFTER
    return workdir


def test_two_processes_train_a_linear_network_as_one_and_one_continues(config, tmp_path):
    """Who reads what, who stops when, and who writes: all of it but the compiler's work on a real network."""
    launch(config, tmp_path / "alone", 1, 0, "--linear")
    launch(config, tmp_path / "run", 2, STOP_AFTER, "--linear")
    assert len(losses(tmp_path / "run")["student/loss"]) == STOP_AFTER
    launch(config, tmp_path / "run", 1, 0, "--linear")
    ours, theirs = losses(tmp_path / "run"), losses(tmp_path / "alone")
    for network in ("teacher", "student"):
        values = theirs[f"{network}/loss"]
        assert len(values) > STOP_AFTER + 2 and values[-1] < values[0]
        np.testing.assert_allclose(ours[f"{network}/loss"], values, rtol=1e-5)


@pytest.mark.slow
def test_two_processes_train_as_one_and_one_continues(experiment, config, alone, stopped, tmp_path):
    workdir = shutil.copytree(stopped, tmp_path / "run")
    launch(config, workdir, 1)
    assert_same_run(workdir, alone, experiment.context)


@pytest.mark.slow
def test_four_processes_continue_what_two_began(experiment, config, alone, stopped, tmp_path):
    workdir = shutil.copytree(stopped, tmp_path / "run")
    launch(config, workdir, 4)
    assert_same_run(workdir, alone, experiment.context)


@pytest.mark.slow
def test_four_processes_train_as_one(experiment, config, alone, tmp_path):
    launch(config, tmp_path / "run", 4)
    assert_same_run(tmp_path / "run", alone, experiment.context)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({}, "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'"),
    ],
)
def test_processes_that_know_nothing_of_each_other_are_told_what_to_set(variables, named, tmp_path):
    root = pathlib.Path(__file__).parents[1]
    command = [sys.executable, "train.py", "--config=configs/quickstart.py", "--distributed"]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path}"],
        cwd=root,
        env={**os.environ, **variables},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 1 and done.stderr.startswith("error: ") and named in done.stderr
    assert len(done.stderr.splitlines()) == 1
