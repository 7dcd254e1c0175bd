"""From examples to batches: order, batches of one length, workers (Grain)."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing import resource_tracker

import grain
import numpy as np
from absl import flags

from dilbert_jax.examples import Example

SMALLEST_SHARED = 2048  # bytes
LOWEST_PRIORITY = 19  # nice value


def training_batches(
    build: Callable[[int, np.random.Generator], Example],
    indices: Sequence[int] | np.ndarray,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    *,
    length_of: Callable[[int], int] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    low_priority: bool = False,
) -> Generator[Example, None, None]:
    """Endless shuffled batches; the content of a batch follows from its step alone.

    It depends on neither the number of processes nor that of workers: the processes' parts of a step, in order,
    are the batch of a single process. Close the iterator after use: that ends threads and workers.

    Args:
      build: index into the store and a generator -> example. It is pickled for workers.
      indices: the training studies.
      batch_size: clips a batch, of all processes together; may exceed the number of studies (batches then cross
        epochs).
      seed: order and corruption.
      start_step: first step to deliver: a resumed run continues exactly.
      length_of: index -> frames of its example (`ExampleBuilder.padded_length`). A batch holds clips of one
        length; lengths take turns in proportion to their studies, the same in every process. None = all are equal.
      process_index: which part of each batch to deliver.
      process_count: how many parts there are.
      num_workers: processes that build batches; 0 = a thread of this process, enough unless clips are large.
      low_priority: that thread takes only what processor time others leave. For steps that compute on the CPU: they
        use as many threads as there are cores, and when one is stopped the others wait for it.

    Raises:
      ValueError: no study, or a batch that does not divide among the processes.
    """
    indices = np.asarray(indices)
    if not len(indices):
        raise ValueError("indices is empty; training needs at least one study")
    if batch_size % process_count or not 0 <= process_index < process_count:
        raise ValueError(
            f"batch_size {batch_size}, process_index {process_index}, process_count {process_count}: "
            "batch_size must be a multiple of process_count, and process_index lie in [0, process_count)"
        )
    if low_priority and not num_workers and sys.platform == "linux":  # no other system ranks single threads
        build = _with_low_priority(build)
    lengths = np.asarray([length_of(int(i)) if length_of else 0 for i in indices])
    groups, counts = np.unique(lengths, return_counts=True)
    parts, local = [], batch_size // process_count
    for length in groups:
        # Groups draw their own masks: with the same seed their n-th clips would share theirs.
        own = seed if len(groups) == 1 else int(np.random.SeedSequence((seed, length)).generate_state(1)[0])
        part = grain.MapDataset.source(indices[lengths == length]).seed(own).shuffle().repeat()
        part = part.random_map(lambda index, rng: build(int(index), rng)).batch(local, drop_remainder=True)
        parts.append(part[process_index::process_count])
    dataset = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, counts.tolist())
    dataset = dataset[start_step:]
    if not num_workers:
        return _deliver(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain asks for its own flags when it starts a worker
    resource_tracker.ensure_running()  # or the first worker starts it, which unblocks the signals of `_deliver`
    # No threads inside of a worker: its process is the one that builds ahead. Only small arrays pass through the
    # queue: a worker cannot end while more than a pipe holds (64 KiB) waits in it. The others are shared memory.
    stream = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    small = grain.experimental.DatasetOptions(min_shm_size=SMALLEST_SHARED)
    stream = grain.experimental.WithOptionsIterDataset(stream, small)
    options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
    stream = stream.mp_prefetch(options, worker_init_fn=_prepare_worker)
    # Copied, so that no segment outlives the next step, however long the batch is kept.
    return _deliver(stream.map(lambda batch: {name: np.array(value) for name, value in batch.items()}))


def _with_low_priority(build: Callable[[int, np.random.Generator], Example]) -> Callable[..., Example]:
    """`build` for another thread than this one, at the lowest priority."""
    ranked = {threading.get_native_id()}

    def built(index: int, rng: np.random.Generator) -> Example:
        thread = threading.get_native_id()
        if thread not in ranked:
            ranked.add(thread)
            os.setpriority(os.PRIO_PROCESS, thread, LOWEST_PRIORITY)
        return build(index, rng)

    return built


def _deliver(stream: grain.IterDataset[Example]) -> Generator[Example, None, None]:
    """Iterates over a stream and closes it at the end.

    Its threads and workers start at the first batch, and inherit that signals are blocked: Ctrl-C reaches a whole
    group of processes, and is for the training loop to handle, which may still take a batch after it. A worker that
    died before it has read its data set would leave its parent hanging.
    """
    iterator = iter(stream)
    try:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            first = next(iterator)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield first
        yield from iterator
    finally:
        iterator.close()


def _prepare_worker(worker: int, count: int) -> None:
    """Keeps a worker off the accelerator, and ends it with its parent, however that ends."""
    del worker, count
    import jax  # Grain has imported it; no batch needs it

    jax.config.update("jax_platforms", "cpu")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    time.sleep(1)  # by then the queue is full and all its shared memory known to who cleans it up
    os._exit(1)


def evaluation_batches(
    build: Callable[..., Example],
    indices: Sequence[int] | np.ndarray,
    batch_size: int,
    seed: int,
    repeats: int = 1,
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Every study once (`repeats` times, with other masks), in order; the last batch is padded by its last.

    Yields:
      A batch and a bool array [batch_size] that is False where the batch was padded.
    """
    work = [(int(i), r) for r in range(repeats) for i in indices]
    for first in range(0, len(work), batch_size):
        part = work[first : first + batch_size]
        examples = [build(i, np.random.default_rng((seed, r, i)), train=False) for i, r in part]
        real = np.arange(batch_size) < len(part)
        examples += [examples[-1]] * (batch_size - len(part))
        yield {name: np.stack([e[name] for e in examples]) for name in examples[0]}, real
