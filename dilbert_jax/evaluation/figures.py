"""Figures of the report: training curves, scores by class, confusion (matches: `match_figures`)."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

INK, MUTED, GRID = "#1f2933", "#66727f", "#e3e7eb"
# Okabe and Ito's palette: told apart under every common colour blindness, and in print by lightness.
SYSTEM_COLOURS = {
    "student": "#0072b2",
    "teacher": "#d55e00",
    "majority": "#9aa5b1",
    "always_present": "#56b4e9",
}
BLUES = LinearSegmentedColormap.from_list("counts", ["#ffffff", "#cfe3f1", "#6aaed6", "#0072b2", "#003f63"])
TERM_TITLES = {
    "loss": "sum of all terms",
    "mlm": "masked language (MLM)",
    "mdc": "masked description (MDC)",
    "moc": "masked organ (MOC)",
    "cmm": "cross-modal matching (CMM)",
    "soft_labels": "soft labels",
    "learning_rate": "learning rate",
}
_NO_TERM = ("stage", "step", "epoch", "split", "network", "clips_per_second", "gradient_norm", "time", "seed")
_STYLE = {
    "font.size": 8.5,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
}
_CJK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "PingFang SC",
    "Heiti SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "SimHei",
    "Arial Unicode MS",
)
Names = Mapping[str, Mapping[str, str]]


def display_name(concept: str, names: Mapping[str, str] | None = None, language: str = "en") -> str:
    """Name of a concept that the installed fonts can draw.

    Args:
      concept: id, the last resort ("portal_vein" reads "portal vein").
      names: by language ("en", "zh").
      language: preferred; English is taken where no font holds the characters.

    Returns:
      The text to draw.
    """
    english = (names or {}).get("en") or concept.replace("_", " ")
    wanted = (names or {}).get(language) or english
    return wanted if all(ord(c) in _drawable() for c in wanted) else english


def training_curves(history: Sequence[Mapping[str, Any]], stage: str) -> bytes:
    """Draws one panel a loss term of one stage, networks in one panel; the learning rate comes last.

    Args:
      history: records of metrics.jsonl: `stage`, `step`, `split` ("train" when absent), and numbers by term,
        with the network before a slash where there is one ("student/mlm").
      stage: stage to draw.

    Returns:
      PNG. Lines are running means over the raw values behind them; a circle is the validation set's value.
      Each panel states its first and last running mean.

    Raises:
      ValueError: no record of this stage holds a loss term.
    """
    series = collect_curves(history, stage)
    if not series:
        raise ValueError(f"the history holds no loss term of stage {stage!r}; is metrics.jsonl complete?")
    rows = math.ceil(len(series) / 5)
    columns = math.ceil(len(series) / rows)
    with mpl.rc_context(figure_style()):
        figure = Figure(figsize=(2.3 * columns + 0.2, 1.7 * rows + 0.35), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
        for axis, (term, lines) in zip(axes.flat, series.items(), strict=False):
            _draw_term(axis, term, lines)
        for axis in axes.flat[len(series) :]:
            axis.set_visible(False)
        for column in range(columns):
            lowest = max(r for r in range(rows) if r * columns + column < len(series))
            axes[lowest, column].tick_params(labelbottom=True)
            axes[lowest, column].set_xlabel("step", color=MUTED)
        networks = [n for n in ("teacher", "student") if any(n in lines for lines in series.values())]
        if networks:
            handles = [Line2D([], [], color=SYSTEM_COLOURS[n], lw=1.8, label=n) for n in networks]
            figure.legend(handles=handles, loc="outside upper left", ncols=len(networks))
        return encode_figure(figure)


def collect_curves(
    history: Sequence[Mapping[str, Any]], stage: str
) -> dict[str, dict[str, dict[str, list[tuple[float, float]]]]]:
    """Sorts the records of one stage into {term: {network or "": {split: [(step, value), ...]}}}."""
    series: dict[str, dict[str, dict[str, list[tuple[float, float]]]]] = {}
    for record in history:
        if record.get("stage") != stage:
            continue
        for key, value in record.items():
            network, _, term = key.rpartition("/")
            if term in _NO_TERM or isinstance(value, (str, bool)) or value is None:
                continue
            term = "learning_rate" if term == "lr" else term
            split = record.get("split", "train")
            line = series.setdefault(term, {}).setdefault(network or record.get("network", ""), {})
            line.setdefault(split, []).append((float(record["step"]), float(value)))
    order = list(TERM_TITLES)[1:-1]

    def rank(term: str) -> tuple[int, int]:
        if term in ("loss", "learning_rate"):
            return (1, term != "loss")
        return (0, order.index(term) if term in order else len(order))

    ranked = sorted(series, key=rank)
    return {term: series[term] for term in ranked} if set(ranked) - {"learning_rate"} else {}


def class_f1_bars(
    reports: Mapping[str, Mapping[str, Any]], names: Names | None = None, language: str = "en"
) -> bytes:
    """Draws F1 by class with 95 % intervals, one bar a system.

    Args:
      reports: REPORT by system ("teacher", "student", "majority"), with the same classes.
      names: concept id to names by language.
      language: of the labels.

    Returns:
      PNG; classes by falling support, those without support left out.

    Raises:
      ValueError: no system, or no class with support.
    """
    systems = list(reports)
    rows = [r for r in reports[systems[0]]["per_class"] if r["support"]] if systems else []
    if not rows:
        raise ValueError("no class with support to draw; the evaluated set is empty")
    rows.sort(key=lambda r: -r["support"])
    height = 0.8 / len(systems)
    with mpl.rc_context(figure_style()):
        figure = Figure(figsize=(6.4, 0.75 + len(rows) * (0.13 + 0.12 * len(systems))), layout="constrained")
        axis = figure.subplots()
        for s, system in enumerate(systems):
            by_id = {r["id"]: r["f1"] for r in reports[system]["per_class"]}
            values = [by_id[r["id"]] for r in rows]
            centre = np.asarray([v["value"] or 0.0 for v in values])
            low = [v["low"] if v["low"] is not None else c for v, c in zip(values, centre, strict=True)]
            high = [v["high"] if v["high"] is not None else c for v, c in zip(values, centre, strict=True)]
            # A percentile interval need not hold the value itself.
            error = np.maximum([centre - low, np.subtract(high, centre)], 0)
            position = np.arange(len(rows)) + (s - (len(systems) - 1) / 2) * height
            colour = SYSTEM_COLOURS.get(system, MUTED)
            axis.barh(
                position, centre, height * 0.86, color=colour, alpha=0.85, label=system.replace("_", " ")
            )
            axis.errorbar(centre, position, xerr=error, fmt="none", ecolor=INK, elinewidth=0.8, capsize=1.6)
        labels = [
            f"{display_name(r['id'], (names or {}).get(r['id']), language)}  ({r['support']})" for r in rows
        ]
        axis.set_yticks(range(len(rows)), labels, color=INK)
        axis.tick_params(axis="y", length=0)
        axis.grid(False, axis="y")
        axis.spines["left"].set_visible(False)
        axis.set(
            xlim=(0, 1), ylim=(len(rows) - 0.45, -0.55), xlabel="F1 with 95 % interval (examples in brackets)"
        )
        figure.legend(loc="outside upper left", ncols=len(systems))
        return encode_figure(figure)


def confusion_figure(
    confusion: Sequence[Sequence[int]] | np.ndarray,
    class_ids: Sequence[str],
    names: Names | None = None,
    language: str = "en",
) -> bytes:
    """Draws a confusion matrix: counts in the cells, shaded by the share of their row.

    Args:
      confusion: counts [C, C], a row a true class.
      class_ids: C concept ids.
      names: concept id to names by language.
      language: of the labels.

    Returns:
      PNG; classes neither present nor predicted are left out.

    Raises:
      ValueError: the matrix is not [C, C], or empty.
    """
    counts = np.asarray(confusion)
    if counts.shape != (len(class_ids),) * 2 or not counts.sum():
        raise ValueError(
            f"confusion has shape {counts.shape} for {len(class_ids)} classes, sum {counts.sum()}"
        )
    shown = np.flatnonzero(counts.sum(0) + counts.sum(1)).tolist()
    counts = counts[np.ix_(shown, shown)]
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    labels = [display_name(class_ids[i], (names or {}).get(class_ids[i]), language) for i in shown]
    size = 1.5 + 0.42 * len(shown)
    with mpl.rc_context(figure_style()):
        figure = Figure(figsize=(size + 0.3, size), layout="constrained")
        axis = figure.subplots()
        axis.imshow(share, cmap=BLUES, vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if share[row, column] > 0.55 else INK
                axis.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
        axis.set_xticks(range(len(shown)), labels, rotation=40, ha="right", rotation_mode="anchor", color=INK)
        axis.set_yticks(range(len(shown)), labels, color=INK)
        axis.set_xticks(np.arange(len(shown) + 1) - 0.5, minor=True)
        axis.set_yticks(np.arange(len(shown) + 1) - 0.5, minor=True)
        axis.grid(False)
        axis.grid(True, which="minor", color=GRID)
        axis.tick_params(which="both", length=0)
        axis.set(xlabel="predicted", ylabel="true")
        return encode_figure(figure)


def _draw_term(axis: Axes, term: str, lines: Mapping[str, Mapping[str, list[tuple[float, float]]]]) -> None:
    """One panel: raw values faint, running mean on top, validation as a circle, first and last mean."""
    axis.set_title(TERM_TITLES.get(term, term.replace("_", " ")), color=INK, pad=4)
    notes = []
    for network, splits in lines.items():
        colour = SYSTEM_COLOURS.get(network, INK)
        for split, points in splits.items():
            step, value = np.asarray(sorted(points)).T
            if split != "train":
                axis.plot(step, value, "o", ms=4, mfc="white", mec=colour, mew=1.3, zorder=4, clip_on=False)
                continue
            smooth = value if term == "learning_rate" else _running_mean(value)
            if smooth is not value:
                axis.plot(step, value, color=colour, lw=0.6, alpha=0.3)
            axis.plot(step, smooth, color=colour, lw=1.5, marker="o" if len(step) == 1 else "", ms=3)
            notes.append((f"{smooth[0]:.3g} → {smooth[-1]:.3g}", colour))
    for line, (text, colour) in enumerate(notes if term != "learning_rate" else []):
        axis.text(
            0.985,
            0.97 - 0.12 * line,
            text,
            transform=axis.transAxes,
            ha="right",
            va="top",
            fontsize=7,
            color=colour,
        )
    axis.margins(x=0.02)
    values = [
        v for splits in lines.values() for points in splits.values() for _, v in points if np.isfinite(v)
    ]
    top, bottom = max(values, default=1.0), min(values, default=0.0)
    axis.set_ylim(min(0, bottom * 1.05), top * 1.12 if top > 0 else 1)
    axis.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
    if term == "learning_rate":
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over a twentieth of the points, shorter at the ends; unchanged for short curves."""
    half = len(values) // 40
    if half < 1:
        return values
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    number = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    counted = number[high] - number[low]
    return np.where(counted > 0, (total[high] - total[low]) / np.maximum(counted, 1), np.nan)


@functools.cache
def _cjk_font() -> str | None:
    """Name of an installed font with Chinese characters."""
    installed = {entry.name for entry in font_manager.fontManager.ttflist}
    return next((name for name in _CJK_FONTS if name in installed), None)


def _font_families() -> list[str]:
    """Fonts to try for each character, in this order."""
    chinese = _cjk_font()
    return ["DejaVu Sans", chinese] if chinese else ["DejaVu Sans"]


@functools.cache
def _drawable() -> frozenset[int]:
    """Code points that the fonts in use can draw."""
    fonts = _font_families()
    return frozenset().union(*(FT2Font(font_manager.findfont(name)).get_charmap() for name in fonts))


def figure_style() -> Any:
    """Settings that every figure of the report shares, for `matplotlib.rc_context`."""
    return {**_STYLE, "font.family": _font_families()}


def encode_figure(figure: Figure) -> bytes:
    """Draws a figure to PNG without any display, the same bytes for the same figure."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
