"""Batches: order, resuming, parts of processes, lengths, workers."""

import dataclasses
import gc
import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading

import grain
import numpy as np
import pytest
from small_builder import GRAPH, SIZE, assert_same, make_builder, make_study

from dilbert_jax.examples import ExampleBuilder
from dilbert_jax.input_pipeline import evaluation_batches, training_batches


@pytest.fixture(scope="module")
def builder():
    return make_builder()


def test_a_resumed_stream_equals_the_tail_of_the_uninterrupted_one(builder):
    indices = [0, 2, 3, 5, 7, 8, 11]
    whole = list(itertools.islice(training_batches(builder.pretraining, indices, 4, seed=3), 7))
    for start in (1, 4):
        tail = itertools.islice(
            training_batches(builder.pretraining, indices, 4, seed=3, start_step=start), 7 - start
        )
        for batch, expected in zip(tail, whole[start:], strict=True):
            assert_same(batch, expected)
    # Every epoch shows every study once, and no other.
    seen = np.concatenate([batch["study"] for batch in whole])
    for epoch in range(4):
        assert sorted(seen[7 * epoch : 7 * epoch + 7]) == indices
    assert seen[:7].tolist() != seen[7:14].tolist()
    # A study looks different the next time.
    first, second = (np.flatnonzero(seen == 5)[k] for k in (0, 1))
    frames = np.concatenate([batch["frames"] for batch in whole])
    assert (frames[first] != frames[second]).any()
    other = next(training_batches(builder.pretraining, indices, 4, seed=4))
    assert other["study"].tolist() != whole[0]["study"].tolist()


def test_a_batch_may_exceed_the_number_of_studies(builder):
    batch = next(training_batches(builder.annotation, [4, 6], 5, seed=0))
    assert len(batch["frames"]) == 5 and set(batch["study"]) == {4, 6}


def test_one_group_is_the_plain_shuffled_stream(builder):
    """What runs of earlier versions saw: a resumed run must not change its order."""
    indices = np.asarray([0, 2, 3, 5, 7, 8, 11])
    plain = grain.MapDataset.source(indices).seed(3).shuffle().repeat()
    plain = plain.random_map(lambda index, rng: builder.pretraining(int(index), rng)).batch(4)
    for length_of in (None, lambda index: 9):
        batches = training_batches(builder.pretraining, indices, 4, seed=3, length_of=length_of)
        for i in range(5):
            assert_same(next(batches), plain[i])


BUCKETS = {"num_frames": 6, "frame_buckets": (2, 4)}


@pytest.fixture(scope="module")
def bucket_builder():
    """Clips of 1 to 9 frames, six in each of three lengths."""
    counts = [1, 2, 3, 4, 5, 9] * 3
    return make_builder([make_study(i, frame_index=tuple(range(n))) for i, n in enumerate(counts)], **BUCKETS)


@pytest.mark.parametrize("buckets", [False, True])
@pytest.mark.parametrize("start", [0, 3])
def test_parts_of_the_processes_make_up_the_batch_of_one(bucket_builder, buckets, start):
    builder = bucket_builder if buckets else make_builder()
    length_of = builder.padded_length if buckets else None

    def take(**part):
        return itertools.islice(
            training_batches(
                builder.pretraining, range(11), 8, 5, start_step=start, length_of=length_of, **part
            ),
            5,
        )

    expected = list(take())
    for count in (1, 2, 4, 8):
        parts = [take(process_index=i, process_count=count) for i in range(count)]
        for whole, *pieces in zip(expected, *parts, strict=True):
            assert all(len(piece["study"]) == 8 // count for piece in pieces)
            assert_same({name: np.concatenate([p[name] for p in pieces]) for name in whole}, whole)


@pytest.mark.parametrize("part", [(0, 3), (2, 2), (-1, 2)])
def test_a_batch_must_divide_among_the_processes(builder, part):
    index, count = part
    with pytest.raises(ValueError, match=f"process_index {index}, process_count {count}"):
        training_batches(builder.pretraining, [0, 1], 8, 0, process_index=index, process_count=count)
    with pytest.raises(ValueError, match="indices is empty"):
        training_batches(builder.pretraining, [], 8, 0)


def test_examples_are_padded_to_their_own_bucket_in_training_alone(bucket_builder):
    builder, spec = bucket_builder, bucket_builder.spec
    for index, study in enumerate(builder.store.studies):
        count = min(len(study.frame_index), 6)
        length = builder.padded_length(index)
        assert length == {1: 2, 2: 2, 3: 4, 4: 4, 5: 6, 6: 6}[count]
        example = builder.pretraining(index, np.random.default_rng(index))
        assert example["frames"].shape == (length, SIZE, SIZE)
        assert example["frame_mask"].tolist() == [True] * count + [False] * (length - count)
        assert len(example["frame_index"]) == length and not example["frames"][count:].any()
        steps = length // spec.frames_per_step
        for name in ("description_target", "description_zeroed"):
            assert example[name].shape == (steps,)
        assert example["box_frames"].max() < count
        assert builder.annotation(index, np.random.default_rng(0))["frames"].shape[0] == length
        for kind in (builder.pretraining, builder.annotation):
            assert len(kind(index, np.random.default_rng(0), train=False)["frames"]) == spec.num_frames
    shuffled = dataclasses.replace(spec, shuffle=True)
    other = ExampleBuilder(builder.store, builder.labels, shuffled, builder.tokenizer, GRAPH)
    assert len(other.pretraining(0, np.random.default_rng(0))["description_order"]) == 1


def test_lengths_take_turns_in_proportion_to_their_studies(bucket_builder):
    builder = bucket_builder
    indices = [i for i in range(18) if builder.padded_length(i) != 4 or i < 4]  # 6, 2 and 6 studies
    stream = training_batches(builder.pretraining, indices, 4, seed=1, length_of=builder.padded_length)
    whole = list(itertools.islice(stream, 42))
    lengths = [batch["frames"].shape[1] for batch in whole]
    assert [lengths.count(n) for n in (2, 4, 6)] == [18, 6, 18]
    assert {n: lengths[:7].count(n) for n in (2, 4, 6)} == {2: 3, 4: 1, 6: 3}
    for batch in whole:
        assert {builder.padded_length(i) for i in batch["study"]} == {batch["frames"].shape[1]}
    # All studies are seen equally often (42 batches of 4 clips of 14 studies), the small group across epochs.
    seen = np.concatenate([batch["study"] for batch in whole])
    assert {int(i): n for i, n in zip(*np.unique(seen, return_counts=True), strict=True)} == dict.fromkeys(
        indices, 12
    )
    for start in (1, 9):
        tail = training_batches(
            builder.pretraining, indices, 4, 1, start_step=start, length_of=builder.padded_length
        )
        for batch, expected in zip(itertools.islice(tail, 6), whole[start:], strict=False):
            assert_same(batch, expected)


def test_evaluation_covers_every_study_once(builder):
    indices = [1, 2, 5, 6, 9]
    seen = []
    for batch, real in evaluation_batches(builder.annotation, indices, 3, seed=0):
        assert len(real) == 3 and all(len(value) == 3 for value in batch.values())
        seen += batch["study"][real].tolist()
    assert seen == indices
    repeated = [
        (batch["study"][real], batch["mlm_positions"][real])
        for batch, real in evaluation_batches(builder.pretraining, indices, 3, seed=0, repeats=2)
    ]
    studies = np.concatenate([s for s, _ in repeated])
    assert studies.tolist() == indices * 2
    masks = np.concatenate([m for _, m in repeated])
    assert (masks[:5] != masks[5:]).any()


# --- worker processes -----------------------------------------------------------------------------------


def on_disk(builder, folder):
    """The same builder with its pixels in a file, as `open_clip_store` maps them."""
    np.save(folder / "pixels.npy", builder.store.pixels)
    pixels = np.load(folder / "pixels.npy", mmap_mode="r")
    store = dataclasses.replace(builder.store, pixels=pixels)
    return ExampleBuilder(store, builder.labels, builder.spec, builder.tokenizer, GRAPH)


def test_a_store_travels_without_its_pixels(tmp_path, builder, monkeypatch):
    many = dataclasses.replace(builder.store, pixels=np.repeat(builder.store.pixels, 20, axis=0))
    monkeypatch.chdir(tmp_path)
    np.save("pixels.npy", many.pixels)
    mapped = dataclasses.replace(many, pixels=np.load("pixels.npy", mmap_mode="r"))
    sent = pickle.dumps(mapped)
    assert len(sent) < 20_000 < mapped.pixels.nbytes
    monkeypatch.chdir("/")  # the path does not depend on where the worker starts
    again = pickle.loads(sent)
    assert isinstance(again.pixels, np.memmap) and again.studies == mapped.studies
    np.testing.assert_array_equal(again.frames(3), mapped.frames(3))
    with pytest.raises(ValueError, match="read-only"):
        again.pixels[0] = 0
    plain = pickle.loads(pickle.dumps(builder.store))
    np.testing.assert_array_equal(plain.pixels, builder.store.pixels)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_build_the_same_batches_in_the_same_order(tmp_path, bucket_builder, num_workers):
    builder = on_disk(bucket_builder, tmp_path)
    arguments = (builder.pretraining, range(18), 6, 2)
    options = {"start_step": 1, "length_of": builder.padded_length, "process_index": 1, "process_count": 2}
    batches = training_batches(*arguments, **options, num_workers=num_workers)
    for batch, expected in zip(
        itertools.islice(batches, 7), training_batches(*arguments, **options), strict=False
    ):
        assert_same(batch, expected)
        assert all(type(a) is np.ndarray and a.dtype == expected[n].dtype for n, a in batch.items())
    assert len(multiprocessing.active_children()) == num_workers
    if num_workers == 1:
        batches.close()
    else:  # dropped without a word
        del batches
        gc.collect()
    assert not multiprocessing.active_children()


def describe_worker(index, rng):
    import jax
    from jax._src import xla_bridge

    return {
        "process": np.asarray(os.getpid()),
        "backend": np.asarray(xla_bridge.backends_are_initialized()),
        "platform": np.asarray(jax.config.jax_platforms == "cpu"),
        "blocks": np.asarray(
            len({signal.SIGINT, signal.SIGTERM} & signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        ),
    }


def test_a_worker_leaves_the_accelerator_alone():
    batches = training_batches(describe_worker, range(3), 3, 0, num_workers=1)
    batch = next(batches)
    batches.close()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert set(batch["process"]) != {os.getpid()}
    assert not batch["backend"].any() and batch["platform"].all() and (batch["blocks"] == 2).all()


@pytest.mark.skipif(sys.platform != "linux", reason="ranks single threads on Linux only")
def test_the_thread_that_builds_can_leave_the_processor_to_the_step():
    def priority(index, rng):
        return {"nice": np.asarray(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))}

    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    for low, expected in ((False, own), (True, 19)):
        batches = training_batches(priority, range(3), 3, 0, low_priority=low)
        assert next(batches)["nice"].tolist() == [expected] * 3
        batches.close()
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own


def fail(index, rng):
    raise OSError(f"study {index} is broken")


def test_a_worker_passes_its_error_on():
    batches = training_batches(fail, [4], 2, 0, num_workers=1)
    with pytest.raises(OSError, match="study 4 is broken"):
        next(batches)
    batches.close()
    assert not multiprocessing.active_children()


USER_OF_WORKERS = """
import contextlib

from dilbert_jax.input_pipeline import training_batches
from dilbert_jax.training.interrupt import DeferredInterrupt
from small_builder import make_builder

if __name__ == "__main__":
    # Python's own handler raises in whatever runs, and loses the error where that is a finalizer.
    with DeferredInterrupt() as interrupt, contextlib.ExitStack() as stack:
        stream = training_batches(make_builder().pretraining, range(12), 8, 0, num_workers=2)
        for batch in stack.enter_context(contextlib.closing(stream)):
            print("ready", flush=True)
            if interrupt.requested:
                break
"""


@pytest.mark.parametrize("end", ["interrupt", "terminate", "kill"])
def test_no_worker_outlives_its_parent(tmp_path, end):
    """A signal reaches the whole group and must end it in order; a parent that dies cannot tell its workers."""
    (tmp_path / "user.py").write_text(USER_OF_WORKERS, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, tmp_path / "user.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    if end == "kill":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT if end == "interrupt" else signal.SIGTERM)
    # The workers hold the pipe too: it ends with the last of them.
    _, errors = process.communicate(timeout=90)
    if end == "kill":
        assert process.returncode == -signal.SIGKILL
    else:
        assert (process.returncode, errors) == (0, b"")
