"""A run killed at any moment continues where its last complete checkpoint stands, and ends as if never killed."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_export import shared_config, shared_experiment

from dilbert_jax.config import save_config
from dilbert_jax.experiment import load_context, open_experiment
from dilbert_jax.training import loop, objectives, stages
from dilbert_jax.training.checkpoints import StageCheckpoints
from dilbert_jax.training.log import read_metrics

ROOT = Path(__file__).resolve().parents[1]
NUM_STEPS = 7  # of every stage
# One kill after another in the same workdir: the stage, and whether a checkpoint is half-written then.
KILLS = (
    ("teacher", False),
    ("student", False),
    ("student", True),
    ("mutual", False),
    ("finetune", False),
    ("finetune", True),
)

# One worker runs the file: its tests share two runs.
pytestmark = pytest.mark.xdist_group("killed")


# --- runs as processes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the experiment file and the compilation cache of all processes."""
    return tmp_path_factory.mktemp("kill")


@pytest.fixture(scope="module")
def start(folder, tmp_path_factory):
    """Starts `train.py` on a workdir in a process group of its own, with its output in a file."""
    config = shared_config(tmp_path_factory)
    epochs = NUM_STEPS * config.train.batch_size / 14  # 14 training studies
    config.train.update({f"{stage}_epochs": epochs for stage in stages.STAGES})
    config.train.checkpoint_every_seconds = 1e-6  # after every step
    config.model.update(hidden_size=32, num_heads=2, ffn_size=32, channels=(8,), blocks=(1,))
    config.evaluate.mask_repeats = 1
    save_config(config, folder / "config.json")
    (folder / "small.py").write_text(
        "import pathlib\n\nfrom dilbert_jax.config import load_config\n\n\n"
        f"def get_config():\n    return load_config(pathlib.Path({str(folder / 'config.json')!r}))\n",
        encoding="utf-8",
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "JAX_COMPILATION_CACHE_DIR": ""}

    def start(workdir, log):
        with log.open("wb") as file:
            return subprocess.Popen(
                [sys.executable, "train.py", f"--config={folder / 'small.py'}", f"--workdir={workdir}"],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    return start


@contextlib.contextmanager
def ended(process):
    """Leaves no process of the group behind, whatever happens inside."""
    try:
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def finish(process, log):
    """Waits for a run to end well; returns what it said."""
    with ended(process):
        assert process.wait(timeout=600) == 0, log.read_text("utf-8")
    return log.read_text("utf-8")


def kill_when(ready, process, log):
    """Kills the process group at a moment when `ready()` holds: it is stopped first, and let go when too late."""
    give_up = time.monotonic() + 600
    with ended(process):
        while time.monotonic() < give_up:
            assert process.poll() is None, f"the run ended before the kill:\n{log.read_text('utf-8')}"
            if ready():
                os.killpg(process.pid, signal.SIGSTOP)
                os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
                if ready():
                    os.killpg(process.pid, signal.SIGKILL)
                    assert process.wait() == -signal.SIGKILL
                    return log.read_text("utf-8")
                os.killpg(process.pid, signal.SIGCONT)
            time.sleep(0.002)
    raise AssertionError(f"the moment of the kill never came:\n{log.read_text('utf-8')}")


def saved_steps(workdir, stage):
    """Complete and half-written checkpoints of a stage, as the names of their folders tell."""
    folder = workdir / "checkpoints" / stage
    names = os.listdir(folder) if folder.exists() else []
    return sorted(int(n) for n in names if n.isdigit()), [n for n in names if "orbax-checkpoint-tmp" in n]


def started_stages(output):
    """(stage, first step, last step) of each stage that a run went through."""
    return [(s, int(a), int(b)) for s, a, b in re.findall(r"stage (\w+): steps (\d+) to (\d+)", output)]


@pytest.fixture(scope="module")
def uninterrupted(start, folder):
    workdir, log = folder / "uninterrupted", folder / "uninterrupted.log"
    output = finish(start(workdir, log), log)
    assert started_stages(output) == [(stage, 0, NUM_STEPS) for stage in stages.STAGES]
    return workdir


@pytest.fixture(scope="module")
def killed(start, folder):
    """The workdir of a run that was killed again and again; where each kill hit; what each process said."""
    workdir, places, outputs = folder / "killed", [], []
    for number, (stage, during_save) in enumerate(KILLS):
        # Two steps in, so that old checkpoints are being deleted; in the stage of the last kill, further on.
        least = max(2, 1 + max(saved_steps(workdir, stage)[0], default=0))

        def ready(stage=stage, during_save=during_save, least=least):
            complete, half_written = saved_steps(workdir, stage)
            return bool(complete) and least <= complete[-1] < NUM_STEPS and during_save <= bool(half_written)

        log = folder / f"killed{number}.log"
        outputs.append(kill_when(ready, start(workdir, log), log))
        places.append(saved_steps(workdir, stage)[0][-1])
    log = folder / "killed.log"
    outputs.append(finish(start(workdir, log), log))
    return workdir, places, outputs


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(KILLS)), ids=lambda n: "-".join(map(str, KILLS[n])))
def test_the_next_run_continues_in_the_stage_of_the_kill(killed, number):
    _, places, outputs = killed
    stage, step = KILLS[number][0], places[number]
    assert 0 < step < NUM_STEPS
    (here, *later) = started_stages(outputs[number + 1])
    assert here == (stage, step, NUM_STEPS)
    # What follows starts from its beginning, up to the next kill; what came before is not repeated.
    last = KILLS[number + 1][0] if number + 1 < len(KILLS) else stages.STAGES[-1]
    following = stages.STAGES[stages.STAGES.index(stage) + 1 : stages.STAGES.index(last) + 1]
    assert later == [(name, 0, NUM_STEPS) for name in following]


@pytest.mark.slow
def test_the_log_of_a_killed_run_holds_every_record_once(killed, uninterrupted):
    expected = []
    for stage in stages.STAGES:
        expected += [(stage, step, "train") for step in range(1, NUM_STEPS + 1)]
        expected.append((stage, NUM_STEPS, "validation"))
    a, b = (read_metrics(workdir / "metrics.jsonl") for workdir in (uninterrupted, killed[0]))
    for records in (a, b):
        assert [(r["stage"], r["step"], r["split"]) for r in records] == expected
        for record in records:
            record.pop("clips_per_second", None)
    assert a == b
    text = (killed[0] / "metrics.jsonl").read_text("utf-8")
    assert text.endswith("\n") and len(text.splitlines()) == len(expected)


@pytest.mark.slow
@pytest.mark.parametrize("stage", stages.STAGES)
def test_a_killed_run_ends_with_the_same_parameters(killed, uninterrupted, stage):
    context = load_context(uninterrupted)
    for network in objectives.NETWORKS if stage in ("mutual", "finetune") else (stage,):
        (first, step), (second, other) = (
            stages.network_params(context, workdir, stage, network) for workdir in (uninterrupted, killed[0])
        )
        assert step == other == NUM_STEPS
        for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_a_killed_run_is_evaluated_like_an_uninterrupted_one(killed, uninterrupted):
    a, b = (json.loads((w / "eval.json").read_text("utf-8")) for w in (uninterrupted, killed[0]))
    assert a.pop("command") != b.pop("command")  # another workdir
    assert a == b


@pytest.mark.slow
def test_no_half_written_checkpoint_stays(killed):
    for stage in stages.STAGES:
        assert saved_steps(killed[0], stage) == ([NUM_STEPS - 1, NUM_STEPS], [])


@pytest.mark.slow
def test_a_stage_is_compiled_once_however_often_it_is_continued(killed, uninterrupted, folder):
    """Neither twice in a process, nor again after a kill: the program of its gradients, and that of the update."""
    cache = folder / "cache" / "dilbert_jax" / "xla"
    for program, most in (("jit__gradients", len(stages.STAGES)), ("jit__update", 1)):
        cached = sorted(p.name for p in cache.glob(f"{program}-*-cache"))
        assert 1 <= len(cached) <= most, cached


@pytest.mark.slow
def test_a_finished_run_answers_and_writes_nothing(start, uninterrupted, tmp_path):
    def files():
        return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in uninterrupted.rglob("*")}

    before = files()
    output = finish(start(uninterrupted, tmp_path / "log"), tmp_path / "log")
    assert f"all stages of {uninterrupted} are complete" in output and "report.html" in output
    assert not started_stages(output) and files() == before


# --- what a kill leaves in a folder of checkpoints --------------------------------------------------------


def half_write(folder, step):
    """A step as a kill during its save leaves it: under a temporary name, without some of its files."""
    temporary = folder / f"{step + 1}.orbax-checkpoint-tmp"
    shutil.copytree(folder / str(step), temporary)
    for path in (temporary / "_CHECKPOINT_METADATA", temporary / "default" / "manifest.ocdbt"):
        path.unlink()
    return temporary


def half_delete(folder, step):
    """A step as a kill leaves it while it makes room for a newer one."""
    shutil.rmtree(folder / str(step) / "default" / "ocdbt.process_0")
    (folder / str(step) / "_CHECKPOINT_METADATA").unlink()


@pytest.mark.parametrize("next_step", [5, 6], ids=["the-same-step", "a-later-step"])
def test_half_written_and_half_deleted_checkpoints_are_ignored_and_removed(tmp_path, next_step):
    tree = {"weights": jnp.arange(12.0), "step": jnp.int32(0)}
    checkpoints = StageCheckpoints(tmp_path, "teacher")
    for step in (2, 4):
        checkpoints.save(step, tree | {"step": jnp.int32(step)})
    checkpoints.close()
    temporary = half_write(checkpoints.folder, 4)
    half_delete(checkpoints.folder, 2)

    again = StageCheckpoints(tmp_path, "teacher")
    assert again.latest_step() == 4
    restored = again.restore(tree)
    assert int(restored["step"]) == 4
    np.testing.assert_array_equal(restored["weights"], tree["weights"])
    assert temporary.exists()  # who only reads must not touch what another process may be writing
    again.save(next_step, tree | {"step": jnp.int32(next_step)})
    assert int(again.restore(tree)["step"]) == next_step
    again.close()
    assert sorted(os.listdir(again.folder)) == ["4", str(next_step)]


def test_a_first_checkpoint_that_is_half_written_is_none(tmp_path):
    checkpoints = StageCheckpoints(tmp_path, "teacher")
    checkpoints.save(1, {"a": jnp.zeros(3)})
    checkpoints.close()
    half_write(checkpoints.folder, 1)
    shutil.rmtree(checkpoints.folder / "1")
    again = StageCheckpoints(tmp_path, "teacher")
    assert again.latest_step() is None
    again.close()


# --- what a kill leaves of the other files ----------------------------------------------------------------


class Killed(BaseException):
    """Stands in for the end of the process."""


@pytest.mark.parametrize("name", ["config.json", "vocab.txt", "labels.json"])
def test_a_kill_while_a_file_is_written_breaks_no_later_run(tmp_path_factory, tmp_path, monkeypatch, name):
    config = shared_config(tmp_path_factory)
    open_experiment(config, tmp_path / "whole")
    write_text = Path.write_text

    def cut_off(path, data, *args, **kwargs):
        if not path.name.startswith(name):
            return write_text(path, data, *args, **kwargs)
        write_text(path, data[: len(data) // 2], *args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "write_text", cut_off)
        open_experiment(config, tmp_path / "cut")
    open_experiment(config, tmp_path / "cut")
    for file in ("config.json", "vocab.txt", "labels.json"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.slow
def test_a_request_to_stop_in_the_last_step_of_a_stage_is_kept(tmp_path_factory, tmp_path, monkeypatch):
    """The stage is finished, its validation included; the next one does not begin."""
    experiment = shared_experiment(tmp_path_factory)
    original = stages.training_batches

    def with_signal(build, indices, batch_size, seed, start_step=0, **options):
        batches = original(build, indices, batch_size, seed, start_step=start_step, **options)
        for i, batch in enumerate(batches, start_step):
            if i == 3:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    def objective(model, loss, params, teacher, batch, rng, own_losses=None):
        total = sum(jnp.sum(x * x) for x in jax.tree.leaves(params))
        return total, {"loss": total}

    monkeypatch.setattr(stages, "training_batches", with_signal)
    monkeypatch.setattr(objectives, "pretraining_objective", objective)
    with pytest.raises(KeyboardInterrupt):
        loop.train(experiment, tmp_path)
    assert saved_steps(tmp_path, "teacher")[0] == [4] and not (tmp_path / "checkpoints" / "student").exists()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["split"]) for r in records][-2:] == [(4, "train"), (4, "validation")]
