"""The paper's tables and figures, reproduced: trains what is missing, compares, and writes one report.

    python -m dilbert_jax.reproduce --budget=smoke --output=runs/reproduction

Prints the plan first. Run the same command again to resume: finished cells are read, an interrupted one continues.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from dilbert_jax.console import log_to_console
from dilbert_jax.huge_pages import request_huge_pages
from dilbert_jax.models import SYSTEMS, find_system
from dilbert_jax.quick_compile import quick_compilation
from dilbert_jax.reproduce.cells import (
    read_cell,
    reuse_records,
    run_cells,
    take_pretraining,
    workdir_of,
)
from dilbert_jax.reproduce.grid import (
    BUDGETS,
    DATASETS,
    FIGURES,
    TABLES,
    Cell,
    budget_rate,
    expected_minutes,
    parse_cell,
    part_of,
    plan,
    plan_sweep,
)
from dilbert_jax.reproduce.report import write_report
from dilbert_jax.reproduce.sweep import write_sweep


def _choices(text: str, known: Sequence[str], what: str) -> list[str]:
    """A comma-separated list of known names, "none" for none."""
    names = [] if text == "none" else [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"unknown {what} {', '.join(unknown)}; choose from {', '.join(known)}")
    return [name for name in known if name in names]


def _shard(text: str) -> tuple[int, int]:
    """ "i/n", i from 1 to n."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise ValueError(f"--shard is {text!r}; expected i/n with i from 1 to n, e.g. 1/2")
    return int(number), int(count)


def print_plan(cells: Sequence[Cell], budget: str, output: pathlib.Path, jobs: int = 1) -> None:
    """What will be run, and about how long it takes with so many cells at a time."""
    todo = [cell for cell in cells if read_cell(cell, output, budget) is None]
    minutes = expected_minutes(todo, budget) / max(min(jobs, len(todo)), 1)
    print(
        f"{len(cells)} cells, {len(cells) - len(todo)} finished; about {minutes:.0f} minutes left (budget {budget}):"
    )
    for cell in cells:
        print(f"  {'   ' if cell in todo else 'ok '} {cell.name}")


def run_side_by_side(cells: Sequence[Cell], jobs: int, budget: str, output: pathlib.Path) -> None:
    """Runs up to `jobs` cells at a time: each in a process of its own, which has its share of this machine's cores and
    tells the `log.txt` beside its results. One seed comes after another, and of a seed the longest first.

    Raises:
      ValueError: some of them failed; the others are finished.
    """
    waiting = [cell for cell in cells if read_cell(cell, output, budget) is None]

    def only_fine_tunes(cell: Cell) -> bool:
        """Whether another cell of the sweep pre-trains for this one."""
        return cell.rates is not None and cell.rates[1] != budget_rate(budget)

    waiting.sort(key=lambda c: (c.seed, only_fine_tunes(c), -expected_minutes([c], budget)))
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    shares = [cores[job::jobs] for job in range(jobs)]
    running: dict[Cell, tuple[subprocess.Popen[bytes], list[int]]] = {}
    failed: list[Cell] = []
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        with tqdm(total=len(cells), initial=len(cells) - len(waiting), desc="cells", unit="cell") as bar:
            while waiting or running:
                while waiting and shares:
                    cell, share = waiting.pop(0), shares.pop(0)
                    running[cell] = _start(cell, share, budget, output), share
                time.sleep(0.5)
                for cell, (process, share) in list(running.items()):
                    if process.poll() is not None:
                        del running[cell]
                        shares.append(share)
                        failed += [cell] if process.returncode else []
                        bar.update()
    finally:
        signal.signal(signal.SIGTERM, previous)
        for process, _ in running.values():
            process.terminate()  # each saves where it is
        for process, _ in running.values():
            process.wait()
    if failed:
        logs = ", ".join(str(_log_of(cell, output)) for cell in failed)
        raise ValueError(f"{len(failed)} of {len(cells)} cells failed; see the end of {logs}")


def _log_of(cell: Cell, output: pathlib.Path) -> pathlib.Path:
    return workdir_of(cell, output) / "log.txt"


def _start(cell: Cell, share: Sequence[int], budget: str, output: pathlib.Path) -> subprocess.Popen[bytes]:
    """A process that runs one cell on some cores (none = on any)."""
    path = _log_of(cell, output)
    take_pretraining(cell, output, budget)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, "-m", "dilbert_jax.reproduce", f"--budget={budget}", f"--output={output}"]
    with path.open("a", encoding="utf-8") as log:
        # In a session of its own: Ctrl-C reaches it once, through this process, and does not cut its step short.
        process = subprocess.Popen(
            [*line, f"--cells={cell.name}"], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    if share:
        os.sched_setaffinity(process.pid, share)
    return process


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dilbert_jax.reproduce", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--tables", default=",".join(TABLES), help="comma-separated, or none; default all")
    parser.add_argument("--figures", default=",".join(FIGURES), help="comma-separated, or none; default all")
    parser.add_argument("--datasets", default="phantom", help=f"comma-separated, of {', '.join(DATASETS)}")
    parser.add_argument(
        "--systems", default=",".join(SYSTEMS), help="comma-separated; default all; or modules"
    )
    parser.add_argument("--seeds", type=int, help="how many; default the budget's")
    parser.add_argument("--budget", choices=BUDGETS, default="smoke", help="what every cell may cost")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="holds all runs and the report")
    parser.add_argument(
        "--shard", default="1/1", help="i/n: the i-th of n parts of the grid; no report unless 1/1"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes that share this machine's cores")
    parser.add_argument(
        "--cells", help="run these cells alone, comma-separated, e.g. phantom/dilbert/3L8H/0; no report"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="instead: every system at several learning rates"
    )
    parser.add_argument(
        "--reuse",
        type=pathlib.Path,
        help="a reproduction.json (or sweep.json) whose cells count as finished, e.g. a published one",
    )
    parser.add_argument("--plan", action="store_true", help="print the plan and stop")
    parser.add_argument(
        "--report", action="store_true", help="run nothing: report on the cells that are finished"
    )
    args = parser.parse_args(argv)
    log_to_console()
    if BUDGETS[args.budget].quick_compile:
        os.environ["XLA_FLAGS"] = quick_compilation(os.environ.get("XLA_FLAGS", ""))
    command = f"python -m dilbert_jax.reproduce --budget={args.budget} --output={args.output}"
    try:
        tables = _choices(args.tables, TABLES, "tables")
        figures = _choices(args.figures, FIGURES, "figures")
        datasets = _choices(args.datasets, tuple(DATASETS), "data sets")
        systems = [name.strip() for name in args.systems.split(",")]
        for name in systems:
            find_system(name)
        seeds = range(BUDGETS[args.budget].seeds if args.seeds is None else args.seeds)
        number, count = _shard(args.shard)
        cells = (
            plan_sweep(systems, args.budget)
            if args.sweep
            else plan(tables, figures, datasets, seeds, systems)
        )
        wanted = [parse_cell(name) for name in args.cells.split(",")] if args.cells else cells
        wanted = part_of(wanted, number - 1, count, args.budget)
        if args.reuse:
            print(f"{reuse_records(args.reuse, args.output, args.budget)} cells taken from {args.reuse}")
        print_plan(wanted, args.budget, args.output, args.jobs)
        if args.plan:
            return 0
        if args.jobs > 1 and not args.report:
            run_side_by_side(wanted, args.jobs, args.budget, args.output)
        elif not args.report:
            run_cells(wanted, args.budget, args.output, command)
        if args.report or (not args.cells and count == 1):
            typed = "python -m dilbert_jax.reproduce " + " ".join(sys.argv[1:] if argv is None else argv)
            if args.sweep:
                path = write_sweep(cells, args.budget, args.output, typed)
            else:
                path = write_report(cells, args.budget, args.output, tables, figures, typed)
            print(f"report: {path}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command to continue", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    request_huge_pages()
    sys.exit(main())
