"""Preparing, listing, showing and loading the data sets.

python -m dilbert_jax.datasets prepare busi --manual_dir=DIR
python -m dilbert_jax.datasets list
python -m dilbert_jax.datasets show busi --output=busi.png
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dilbert_jax.data.builder import CARD_FILE, PREPARATION_FILE, UltrasoundBuilder
from dilbert_jax.data.record import EncodedFrames, Record, from_example
from dilbert_jax.media import MediaError

NAMES = ("phantom", "busi", "usss", "clust", "pocus", "kmve", "ahjuui")
SPLITS = ("train", "validation", "test")
SHOWN_SKIPS = 10  # of those that preparation.json lists


def default_data_dir() -> Path:
    """Where prepared sets lie: $DILBERT_PREPARED_DIR or ~/.cache/dilbert_jax/datasets."""
    stated = os.environ.get("DILBERT_PREPARED_DIR")
    return Path(stated) if stated else Path.home() / ".cache" / "dilbert_jax" / "datasets"


def make_builder(
    name: str,
    manual_dir: str | os.PathLike[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    strict: bool = False,
    progress: bool = True,
    graph_file: str | os.PathLike[str] | None = None,
) -> UltrasoundBuilder:
    """Makes the builder of a data set without preparing anything.

    Args:
      name: one of NAMES, or one with a size of it where it has several, such as "phantom/large".
      manual_dir: folder with the source's files; default $DILBERT_DATA_DIR/<name> if that variable is set.
      data_dir: folder of prepared sets; see ``default_data_dir``.
      strict: stop at the first bad study instead of skipping it.
      progress: show a progress bar.
      graph_file: your own terms (docs/knowledge.md), for sets whose labels are read from reports or checked.

    Returns:
      The builder.

    Raises:
      ValueError: an unknown name.
    """
    name, _, size = name.partition("/")
    if name not in NAMES:
        raise ValueError(f"data set {name!r} is unknown; known are {', '.join(NAMES)}")
    module = importlib.import_module(f"dilbert_jax.data.{name}.{name}_dataset_builder")
    if size and size not in module.Builder.builder_configs:
        known = ", ".join(f"{name}/{known}" for known in module.Builder.builder_configs) or name
        raise ValueError(f"data set {name!r} has no size {size!r}; choose from {known}")
    if manual_dir is None and os.environ.get("DILBERT_DATA_DIR") and module.Builder.LAYOUT:
        manual_dir = Path(os.environ["DILBERT_DATA_DIR"]) / name
    return module.Builder(
        manual_dir=manual_dir,
        config=size or None,
        data_dir=data_dir or default_data_dir(),
        strict=strict,
        progress=progress,
        graph_file=graph_file,
    )


def prepare(
    name: str,
    manual_dir: str | os.PathLike[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    strict: bool = False,
    progress: bool = True,
    graph_file: str | os.PathLike[str] | None = None,
) -> UltrasoundBuilder:
    """Prepares a data set unless it is prepared already from the same files.

    Prepared data are reused when the source's folder is unchanged (names, sizes, times), or when no folder is
    known any more, if they were prepared with the same ``graph_file``. Otherwise the folder is read again and
    replaces them, once all of it is read: a preparation that fails leaves them as they were.

    Args:
      name, manual_dir, data_dir, strict, progress, graph_file: as ``make_builder``.

    Returns:
      The prepared builder.

    Raises:
      ValueError: an unknown name, a folder that does not hold the set, or in strict mode the first bad study.
    """
    builder = make_builder(name, manual_dir, data_dir, strict, progress, graph_file)
    done = builder.preparation()
    if done is not None and _is_current(builder, done):
        return builder
    if done is not None and builder.manual_dir is None:
        raise ValueError(
            f"{name}: prepared with another graph_file; name that one, or the source's folder to prepare it anew"
        )
    builder.check_manual_dir()
    root = Path(builder.data_dir_root)
    root.mkdir(parents=True, exist_ok=True)
    # TFDS would delete the earlier data before it reads anything.
    with tempfile.TemporaryDirectory(prefix=f"incomplete.{builder.name}.", dir=root) as place:
        fresh = make_builder(name, manual_dir, place, strict, progress, graph_file)
        with _quiet_logs():
            fresh.download_and_prepare()
        _replace_folder(Path(builder.data_dir), Path(fresh.data_dir), Path(place) / "earlier")
    return make_builder(name, manual_dir, data_dir, strict, progress, graph_file)


def load_records(
    name: str,
    split: str | None = None,
    manual_dir: str | os.PathLike[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    graph_file: str | os.PathLike[str] | None = None,
) -> Iterator[Record]:
    """Yields the records of a set, prepared first where needed, one at a time.

    Args:
      name, manual_dir, data_dir, progress, graph_file: as ``prepare``.
      split: "train", "validation" or "test"; None for all three in that order.

    Yields:
      Records with all their frames.
    """
    builder = prepare(name, manual_dir, data_dir, progress=progress, graph_file=graph_file)
    for part in SPLITS if split is None else (split,):
        source = open_split(builder, part)
        for i in range(len(source)):
            yield from_example(source[i])


def open_split(builder: UltrasoundBuilder, split: str) -> Sequence[Any]:
    """Random access to the examples of a split, frames as PNG bytes (see ``from_example``).

    Raises:
      ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; known are {', '.join(SPLITS)}")
    return builder.as_data_source(split, decoders={"frames": EncodedFrames()})


def draw_contact_sheet(records: Sequence[Record], path: str | os.PathLike[str], columns: int = 5) -> None:
    """Draws one frame of each record with its boxes to a PNG.

    The frame shown is that with most boxes, else the middle one.

    Args:
      records: what to draw; at least one.
      path: file to write.
      columns: pictures a row.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    from dilbert_jax.evaluation.figures import display_name, figure_style

    fonts = figure_style()["font.family"]
    rows = -(-len(records) // columns)
    figure = Figure(figsize=(2.9 * columns, 2.9 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    labels = sorted({r.label for record in records for r in record.regions})
    colours = {label: f"C{i % 10}" for i, label in enumerate(labels)}
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, record in zip(figure.axes, records, strict=False):
        frame = _frame_to_show(record)
        height, width = record.frames.shape[1:]
        axes.imshow(record.frames[frame], cmap="gray", vmin=0, vmax=255)
        for region in record.regions:
            if region.frame == frame:
                top, left, bottom, right = region.box
                corner, size = (left * width - 0.5, top * height - 0.5), (right - left, bottom - top)
                axes.add_patch(
                    Rectangle(
                        corner,
                        size[0] * width,
                        size[1] * height,
                        fill=False,
                        linewidth=1.5,
                        edgecolor=colours[region.label],
                    )
                )
                axes.text(
                    corner[0],
                    corner[1],
                    region.label,
                    color=colours[region.label],
                    fontsize=7,
                    va="bottom",
                    parse_math=False,
                )
        # Where no installed font has a character its number is shown: a box would name nothing.
        escaped = ascii(record.study_id)[1:-1]
        study_id = display_name(record.study_id, {"en": escaped, "zh": record.study_id}, "zh")
        title = f"{study_id}\n{record.organ} {record.condition}  frame {frame + 1}/{len(record.frames)}"
        axes.set_title(title, fontsize=7, fontfamily=fonts, parse_math=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _frame_to_show(record: Record) -> int:
    counts = np.bincount([r.frame for r in record.regions], minlength=len(record.frames))
    return int(counts.argmax()) if record.regions else len(record.frames) // 2


def format_labels(preparation: dict[str, Any]) -> str:
    """A text table of what was prepared: studies, groups and labels of every split."""
    splits = preparation["splits"]
    names = [n for n in SPLITS if n in splits]
    lines = [f"{'':34}" + "".join(f"{n:>12}" for n in names)]
    for key in ("studies", "groups", "frames", "synthetic_reports"):
        lines.append(f"{key.replace('_', ' '):34}" + "".join(f"{splits[n][key]:>12}" for n in names))
    for key in ("organs", "conditions", "findings", "regions", "languages", "decoders"):
        values = sorted({v for n in names for v in splits[n][key]})
        if values:
            lines.append(key)
        for value in values:
            counts = "".join(f"{splits[n][key].get(value, 0):>12}" for n in names)
            lines.append(f"  {(value or '(none stated)')[:31]:32}{counts}")
    return "\n".join(lines)


def format_counts(preparation: dict[str, Any]) -> str:
    """One line on what was kept and one for each reason to skip."""
    lines = [f"{preparation['name']}: kept {preparation['kept']} studies, skipped {preparation['skipped']}"]
    lines += [f"  skipped {n}: {reason}" for reason, n in preparation["skipped_by_reason"].items()]
    if whole := len(preparation.get("kept_whole", ())):  # older preparations did not count them
        lines.append(
            f"  {whole} of them not blanked, as no scan sector stood out: look for text burned in "
            f"(kept_whole in {PREPARATION_FILE})"
        )
    return "\n".join(lines)


def _is_current(builder: UltrasoundBuilder, done: dict[str, Any]) -> bool:
    if done["version"] != str(builder.version):
        return False
    if done.get("graph_fingerprint", "") != builder.graph_fingerprint():
        return False
    if not builder.LAYOUT or builder.manual_dir is None or not builder.manual_dir.is_dir():
        return True
    if builder.strict and set(done["skipped_by_reason"]):
        return False  # strict mode has to see the bad studies again
    if "kept_whole" not in done:
        return False  # prepared before what was not blanked was counted
    return done["source_fingerprint"] == builder.source_fingerprint()


def _replace_folder(folder: Path, fresh: Path, aside: Path) -> None:
    """Moves ``fresh`` to ``folder``, and what was there to ``aside``, or back when that fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        if folder.exists():
            folder.rename(aside)
        fresh.rename(folder)
    finally:
        if aside.exists() and not folder.exists():
            aside.rename(folder)


@contextlib.contextmanager
def _quiet_logs() -> Iterator[None]:
    """TFDS logs each step through absl; errors still come through."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _run_prepare(args: argparse.Namespace) -> None:
    builder = prepare(args.name, args.manual_dir, args.data_dir, args.strict, not args.quiet, args.graph_file)
    done = builder.preparation()
    assert done is not None
    print(format_counts(done))
    for skipped in done["skipped_studies"][:SHOWN_SKIPS]:
        print(f"  {skipped['source']}: {skipped['reason']}")
    folder = Path(builder.data_dir)
    print(f"  data  {folder}\n  card  {folder / CARD_FILE}\n  list  {folder / PREPARATION_FILE}")


def _run_list(args: argparse.Namespace) -> None:
    for name in NAMES:
        builder = make_builder(name, data_dir=args.data_dir)
        done = builder.preparation()
        state = f"prepared, {done['kept']} studies" if done else "not prepared"
        print(f"{name:9}{state:26}{builder.TITLE}")
        if builder.LAYOUT:
            print(f"{'':9}{'':26}needs {builder.LAYOUT}")


def _run_show(args: argparse.Namespace) -> None:
    builder = make_builder(args.name, data_dir=args.data_dir)
    done = builder.preparation()
    if done is None:
        raise ValueError(
            f"{args.name} is not prepared in {args.data_dir or default_data_dir()} (no {PREPARATION_FILE}); "
            f"run: python -m dilbert_jax.datasets prepare {args.name}"
        )
    sources = [open_split(builder, split) for split in SPLITS]
    places = [(source, i) for source in sources for i in range(len(source))]
    chosen = np.random.default_rng(args.seed).permutation(len(places))[: args.count]
    records = [from_example(places[i][0][places[i][1]]) for i in sorted(chosen)]
    output = args.output or Path(f"{args.name}.png")
    draw_contact_sheet(records, output)
    print(format_counts(done))
    print(format_labels(done))
    print(f"contact sheet of {len(records)} studies: {output}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dilbert_jax.datasets", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    with_name: dict[str, argparse.ArgumentParser] = {}
    for command, help_text in (
        ("prepare", "read a source into array_record files"),
        ("list", "name the data sets and say which are prepared"),
        ("show", "draw a contact sheet and print the labels"),
    ):
        sub = with_name[command] = commands.add_parser(command, help=help_text)
        if command != "list":
            sub.add_argument("name", help=f"{', '.join(NAMES)}; also phantom/small, phantom/large")
        sub.add_argument(
            "--data_dir", type=Path, help="prepared sets (default: $DILBERT_PREPARED_DIR or cache)"
        )
    with_name["prepare"].add_argument(
        "--manual_dir", type=Path, help="the source's files (default: $DILBERT_DATA_DIR/<name>)"
    )
    with_name["prepare"].add_argument("--graph_file", type=Path, help="your own terms (docs/knowledge.md)")
    with_name["prepare"].add_argument("--strict", action="store_true", help="stop at the first bad study")
    with_name["prepare"].add_argument("--quiet", action="store_true", help="no progress bar")
    with_name["show"].add_argument("--output", type=Path, help="PNG to write (default: <name>.png)")
    with_name["show"].add_argument("--count", type=int, default=20, help="studies on the sheet")
    with_name["show"].add_argument("--seed", type=int, default=0, help="choice of studies")
    args = parser.parse_args(argv)
    if args.command == "show" and args.count < 1:
        parser.error(f"--count is {args.count}; it must be at least 1")
    run = {"prepare": _run_prepare, "list": _run_list, "show": _run_show}[args.command]
    try:
        run(args)
    except (ValueError, MediaError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
