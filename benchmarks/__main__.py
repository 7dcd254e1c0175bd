"""Runs all benchmarks, each in a process of its own, and writes one Markdown table.

    python -m benchmarks [NAME ...] [--output DIR] [--dtype bfloat16] [--quick]

DIR gets a JSON file for each benchmark, and benchmarks.md with the table of all that lie there. On 2 CPU cores all of
them take hours, most of it torch.compile's in the training steps; leave the machine to them.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import time

from benchmarks import common

# Name -> (arguments, arguments with --quick: fewer sizes and rounds, for a few minutes on an accelerator).
BENCHMARKS: dict[str, tuple[list[str], list[str]]] = {
    "training_step": ([], ["--presets", "base", "--rounds", "5", "--turns", "1"]),
    "transformer": ([], ["--rounds", "5"]),
    "annotate": ([], ["--presets", "base", "--rounds", "5"]),
    "relational": ([], ["--samples", "128", "512", "2048", "--rounds", "3"]),
    "conv3d": ([], ["--rounds", "5"]),
    "joint_step": ([], ["--rounds", "5"]),
    "input_pipeline": ([], ["--rounds", "2"]),
    "start": ([], ["--rounds", "1"]),
}
WITH_DTYPE = ("training_step", "transformer")
OUTPUT = pathlib.Path(__file__).resolve().parents[1] / "docs" / "results" / "benchmarks"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"which: {', '.join(BENCHMARKS)}; default: all"
    )
    parser.add_argument(
        "--output", type=pathlib.Path, default=OUTPUT, help="default: docs/results/benchmarks"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    if not common.has_torch():
        print("PyTorch is not installed (the extra 'torch'): what would stand beside it is left out")
    failed = []
    for name in arguments.names or BENCHMARKS:
        suffix = "" if arguments.dtype == "float32" or name not in WITH_DTYPE else f"_{arguments.dtype}"
        command = [
            sys.executable,
            "-m",
            f"benchmarks.{name}",
            "--json",
            arguments.output / f"{name}{suffix}.json",
        ]
        command += BENCHMARKS[name][arguments.quick]
        command += ["--dtype", arguments.dtype] if name in WITH_DTYPE else []
        start = time.monotonic()
        print(f"\n## {name}", flush=True)
        if subprocess.run([str(part) for part in command]).returncode:
            failed.append(name)
        print(f"({time.monotonic() - start:.0f} s)", flush=True)
    page = arguments.output / "benchmarks.md"
    page.write_text(write_page(arguments.output), encoding="utf-8")
    print(f"\nwritten: {page}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


def write_page(folder: pathlib.Path) -> str:
    """One table of all results in a folder, on what they were measured, and what its notes.md says of them."""
    lines = [
        "# Benchmarks",
        "",
        "Medians with quartiles in brackets. Ratios are ours over theirs: of runs in turn, or, where each has a "
        "process of its own, of processes in turn; below 1 is faster, or less memory. Made by "
        "`python -m benchmarks`; the JSON files beside this page have all settings.",
        "",
        common.HEAD.replace("| setting", "| benchmark | setting", 1).replace("|---", "|---|---", 1),
    ]
    devices = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        about = record["about"]
        lines += [f"| {path.stem} {common.render(common.Row(**row))}" for row in record["rows"]]
        settings = " ".join(f"{k}={v}" for k, v in about["arguments"].items())
        versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
        devices.append(
            f"- {path.stem}: {about['device']} ({about['processor']}, {about['cores']} cores, load "
            f'{about["load_before"]} before); {versions}; XLA_FLAGS "{about["XLA_FLAGS"]}"; {settings}'
        )
    notes = folder / "notes.md"  # written by hand: what a reader must know of these runs
    remarks = ["", "## Notes", "", notes.read_text(encoding="utf-8").strip()] if notes.exists() else []
    return "\n".join([*lines, "", "## Where", "", *devices, *remarks]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
