"""What all benchmarks share: contenders timed in turn, ratios with quartiles, one form of result."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dilbert_jax.huge_pages import request_huge_pages

# What needs JAX is imported where it is used: a worker process of the input pipeline imports this file.

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMALL_PAGES = ", small pages"  # ends the name of a contender that has no huge pages; all others ask for them
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "grain", "torch")


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
      setting: what was run, such as "base, mutual step".
      quantity: what the figures are, such as "ms".
      ours: quartiles as {"low", "median", "high"}; None = only the ratio is told.
      beside: whom ours is compared with; "" = nobody.
      theirs: their quartiles.
      ratio: quartiles of ours over theirs, round by round.
      wanted: what the median ratio (or, alone, the median) has to be, such as "<= 1.2".
      more: further figures for the JSON.
    """

    setting: str
    quantity: str
    ours: dict[str, float] | None = None
    beside: str = ""
    theirs: dict[str, float] | None = None
    ratio: dict[str, float] | None = None
    wanted: str = ""
    more: dict[str, Any] = dataclasses.field(default_factory=dict)


def quartiles(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """Median and quartiles of the values times `scale`."""
    low, median, high = np.quantile(np.asarray(values, np.float64) * scale, [0.25, 0.5, 0.75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def exactly(value: float) -> dict[str, float]:
    """A figure without quartiles."""
    return dict.fromkeys(("low", "median", "high"), float(value))


def compare(
    setting: str,
    seconds: Mapping[str, Sequence[float]],
    ours: str,
    beside: str,
    wanted: str = "",
    per: int = 1,
    quantity: str = "ms",
    **more: Any,
) -> Row:
    """A row of milliseconds, from what `time_in_turn` found.

    Args:
      setting: what was run.
      seconds: per contender, the seconds of every round.
      ours, beside: two of them.
      wanted: of the ratio.
      per: what one run handles; the figures are milliseconds for one.
      quantity: how they are called.
      more: further figures.
    """
    ratio = np.asarray(seconds[ours]) / np.asarray(seconds[beside])
    own, other = (quartiles(seconds[name], 1e3 / per) for name in (ours, beside))
    return Row(setting, quantity, own, beside, other, quartiles(ratio), wanted, more)


def compare_exactly(
    setting: str, quantity: str, ours: float, beside: str = "", theirs: float | None = None, **more: Any
) -> Row:
    """A row of two single figures; `theirs` = None: of ours alone."""
    if theirs is None:
        return Row(setting, quantity, exactly(ours), more=more)
    return Row(setting, quantity, exactly(ours), beside, exactly(theirs), exactly(ours / theirs), more=more)


def time_in_turn(
    runs: Mapping[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Times contenders in turn, so that a slow moment of the machine meets all of them.

    Args:
      runs: each returns when its work is done.
      rounds: timed runs of each.

    Returns:
      Per contender, the seconds of every round; and of its first run, which may compile and counts apart.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    first: dict[str, float] = {}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            taken = time.perf_counter() - start
            if name in first:
                seconds[name].append(taken)
            else:
                first[name] = taken
    return seconds, first


def measure_in_process(benchmark: str, contender: str, options: Sequence[str]) -> dict[str, Any]:
    """What `measure_alone` of a benchmark finds for one contender, in a fresh process."""
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", "--one", contender, *options]
    small = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"} if contender.endswith(SMALL_PAGES) else {}
    environment = {**os.environ, **small}
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    return json.loads(found.stdout.splitlines()[-1])


def has_torch() -> bool:
    """Whether PyTorch is installed: without it, what would stand beside it is left out."""
    return importlib.util.find_spec("torch") is not None


def torch_device() -> str:
    """PyTorch's device of the kind that JAX computes on."""
    import jax

    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def resident_mib(framework: str) -> float:
    """MiB that this process holds now: on its GPU where JAX computes on one, else in memory.

    Args:
      framework: "jax" or "torch", whose memory counts.
    """
    return _memory(framework, "VmRSS", "bytes_in_use", "memory_allocated")


def peak_mib(framework: str) -> float:
    """MiB that this process held at most since `reset_peak`, as in `resident_mib`."""
    return _memory(framework, "VmHWM", "peak_bytes_in_use", "max_memory_allocated")


def reset_peak(framework: str) -> None:
    """Starts a new peak. JAX cannot on a GPU: there, the peak is that of the process."""
    if torch_device() == "cpu":
        pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    elif framework == "torch":
        import torch

        torch.cuda.reset_peak_memory_stats()


def _memory(framework: str, status: str, jax_name: str, torch_name: str) -> float:
    if torch_device() == "cpu":
        lines = pathlib.Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(status)) / 2**10
    if framework == "torch":
        import torch

        return getattr(torch.cuda, torch_name)() / 2**20
    import jax

    return (jax.devices()[0].memory_stats() or {})[jax_name] / 2**20


def geometric_mean(rows: Sequence[Row]) -> float:
    """Of the median ratios."""
    return statistics.geometric_mean([row.ratio["median"] for row in rows if row.ratio])


HEAD = "| setting | | ours | beside | theirs | ours / theirs | wanted |\n|---|---|---|---|---|---|---|"


def render(row: Row) -> str:
    """A line of a Markdown table under `HEAD`."""
    figures = (_figure(row.ours), row.beside, _figure(row.theirs), _figure(row.ratio, 2))
    return "| " + " | ".join((row.setting, row.quantity, *figures, row.wanted)) + " |"


def _figure(values: Mapping[str, float] | None, places: int | None = None) -> str:
    """median [low, high] with three significant digits, or so many decimal places."""
    if values is None:
        return ""

    def digits(value: float) -> str:
        if places is not None:
            return f"{value:.{places}f}"
        magnitude = int(np.floor(np.log10(abs(value)))) if value else 0
        return f"{value:,.{max(0, 2 - magnitude)}f}"

    median, low, high = (digits(values[k]) for k in ("median", "low", "high"))
    return median if median == low == high else f"{median} [{low}, {high}]"


def main(
    doc: str,
    measure: Callable[[argparse.Namespace], Iterator[Row]],
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    rounds: int = 9,
    measure_alone: Callable[[argparse.Namespace], dict[str, Any]] | None = None,
) -> None:
    """The command of a benchmark: parses the arguments, measures, prints the table, writes the JSON.

    Args:
      doc: the module's docstring, whose first line is printed.
      measure: arguments -> rows.
      add_arguments: those of this benchmark alone.
      rounds: the default of --rounds.
      measure_alone: what `measure_in_process` asks of this command, for the contender `arguments.one`.
    """
    request_huge_pages()
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="timed runs of each contender")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    add_arguments(parser)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one and measure_alone:
        print(json.dumps(measure_alone(arguments)))
        return
    load = os.getloadavg()[0]
    print(f"{doc.splitlines()[0]}\n\n{HEAD}", flush=True)
    rows: list[Row] = []
    try:
        for row in measure(arguments):
            rows.append(row)
            print(render(row), flush=True)
    finally:  # what an interrupted run has measured stays; `describe` would take an accelerator's memory before the end
        if arguments.json and rows:
            _write(arguments, doc.splitlines()[0], load, rows)


def _write(arguments: argparse.Namespace, title: str, load: float, rows: Iterable[Row]) -> None:
    settings = {k: v for k, v in vars(arguments).items() if k not in ("json", "one")}
    record = {"title": title, "about": describe(load) | {"arguments": settings}}
    record["rows"] = [dataclasses.asdict(row) for row in rows]
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def describe(load: float) -> dict[str, Any]:
    """Device, versions and what else a figure depends on; `load` is the machine's before the first run."""
    import jax

    versions = {name: _version(name) for name in PACKAGES}
    about: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_before": round(load, 2),
        "python": platform.python_version(),
        "versions": {name: version for name, version in versions.items() if version},
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
    }
    if "torch" in sys.modules:
        about["torch_threads"] = sys.modules["torch"].get_num_threads()
    return about


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
