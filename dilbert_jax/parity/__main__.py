"""Moves weights between a run and PyTorch, and compares both implementations.

python -m dilbert_jax.parity export --workdir=RUN --stage=finetune --network=student --output=x.safetensors
python -m dilbert_jax.parity import --input=x.safetensors --like=RUN --workdir=NEW --stage=finetune --network=student
python -m dilbert_jax.parity compare --config=configs/quickstart.py --steps=50
"""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from dilbert_jax.parity import MISSING_EXTRA

STAGES = ("teacher", "student", "mutual", "finetune")
NETWORKS = ("teacher", "student")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: arguments; None = those of the process.

    Returns:
      Exit status: 0; 1 where a comparison misses its tolerance; 2 for an error.
    """
    args = _parser().parse_args(argv)
    try:
        if any(importlib.util.find_spec(name) is None for name in ("torch", "safetensors")):
            raise ImportError(MISSING_EXTRA)
        return {"export": _export, "import": _import, "compare": _compare}[args.command](args)
    except (ImportError, ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)  # Orbax writes several lines
        return 2


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m dilbert_jax.parity", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="checkpoint of a run -> safetensors file")
    export.add_argument("--workdir", required=True, type=pathlib.Path, help="the run")
    export.add_argument("--output", required=True, type=pathlib.Path, help="file to write, .safetensors")
    bring = commands.add_parser("import", help="safetensors file -> new run")
    bring.add_argument("--input", required=True, type=pathlib.Path, help="file to read, .safetensors")
    bring.add_argument(
        "--like", required=True, type=pathlib.Path, help="the run that gives all but this network; unchanged"
    )
    bring.add_argument("--workdir", required=True, type=pathlib.Path, help="the new run")
    for command in (export, bring):
        command.add_argument("--stage", default="finetune", choices=STAGES)
        command.add_argument("--network", default="student", choices=NETWORKS)
    compare = commands.add_parser("compare", help="outputs, gradients and losses of both implementations")
    compare.add_argument("--config", required=True, type=pathlib.Path, help="experiment file")
    compare.add_argument("--steps", type=_positive(int), default=50, help="updates of the mutual stage")
    compare.add_argument("--dtype", default="both", choices=("float64", "float32", "both"))
    compare.add_argument(
        "--batches", default="dataset", choices=("dataset", "random"), help="the config's data set, or noise"
    )
    compare.add_argument(
        "--learning-rate",
        type=_positive(float),
        default=0.024,
        help="peak rate of SGD, which replaces the config's",
    )
    compare.add_argument("--seed", type=int, default=0, help="of the initial weights")
    compare.add_argument("--output", type=_result_file, help="also write the tables, .md or .json")
    return parser


def _positive(kind: Any) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return value

    parse.__name__ = kind.__name__  # argparse names the type in its message
    return parse


def _result_file(text: str) -> pathlib.Path:
    path = pathlib.Path(text)
    if path.suffix not in (".md", ".json"):
        raise argparse.ArgumentTypeError(f"{text}: the file's name must end in .md or .json")
    return path


def _export(args: argparse.Namespace) -> int:
    from dilbert_jax.parity.convert import export_network

    count = export_network(args.workdir, args.stage, args.network, args.output)
    print(f"{args.output}: {count} tensors of {args.network} after stage {args.stage}")
    return 0


def _import(args: argparse.Namespace) -> int:
    from dilbert_jax.parity.convert import import_network

    count = import_network(args.input, args.like, args.workdir, args.stage, args.network)
    print(
        f"{args.workdir}: {args.network} after stage {args.stage} from {count} tensors, all else as {args.like}"
    )
    return 0


def _compare(args: argparse.Namespace) -> int:
    config = _load_config(args.config)
    from dilbert_jax.parity.agreement import DTYPES, render, to_json
    from dilbert_jax.parity.compare import measure
    from dilbert_jax.parity.setting import dataset_setting, random_setting
    from dilbert_jax.run import use_compilation_cache

    use_compilation_cache()
    prepare = dataset_setting if args.batches == "dataset" else random_setting
    setting = prepare(config, args.steps, args.learning_rate)
    agreements = []
    for dtype in DTYPES if args.dtype == "both" else (args.dtype,):
        started = time.monotonic()
        agreements.append(measure(setting, dtype, args.seed))
        print(f"{dtype}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    text = render(setting, agreements)
    print(text, end="")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        content = to_json(setting, agreements) if args.output.suffix == ".json" else text
        args.output.write_text(content, encoding="utf-8")
    missed = [f"{a.dtype} {part}" for a in agreements for part in a.missed()]
    if missed:
        print(f"no agreement: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


def _load_config(path: pathlib.Path) -> Any:
    """Runs an experiment file's `get_config()`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; name an experiment file such as configs/quickstart.py")
    spec = importlib.util.spec_from_file_location("experiment_config", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file; name an experiment file such as configs/quickstart.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.get_config()
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
