"""Figures 7 to 10, drawn from finished DILBERT cells."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from dilbert_jax.evaluate import BATCH_SIZE, example_annotations, predict_all
from dilbert_jax.evaluation.figures import MUTED, display_name, encode_figure, figure_style
from dilbert_jax.evaluation.match_figures import entity_frame_graph, entity_region_figure
from dilbert_jax.experiment import Experiment, open_experiment
from dilbert_jax.input_pipeline import evaluation_batches
from dilbert_jax.reproduce.cells import holds_the_run, workdir_of
from dilbert_jax.reproduce.grid import MAIN_SHAPE, SHAPES, Cell, cell_config
from dilbert_jax.thresholds import Thresholds
from dilbert_jax.training.log import read_metrics
from dilbert_jax.training.objectives import pretraining_forward
from dilbert_jax.training.stages import STAGES, network_params
from dilbert_jax.training.step import device_entries
from dilbert_jax.training.weights import QUANTILES

MAX_POINTS = 300  # a panel
CLASS_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_log = logging.getLogger(__name__)


def draw_figures(
    numbers: Sequence[str], dataset: str, budget: str, output: pathlib.Path, seed: int = 0
) -> list[dict[str, Any]]:
    """Draws the wanted figures of one data set from the cells of one seed.

    Returns:
      For each `figure` (its number), `title`, `caption` and `png`; those whose run is not here, or is another than the
      record tells of, are left out.
    """
    drawn: list[dict[str, Any]] = []

    def add(number: str, title: str, caption: str, png: bytes) -> None:
        drawn.append({"figure": number, "title": title, "caption": caption, "png": png})

    main = Cell(dataset, "dilbert", MAIN_SHAPE, seed)
    if holds_the_run(main, output, budget):
        experiment = open_experiment(cell_config(main, budget), workdir_of(main, output))
        if "7" in numbers:
            add("7", f"{dataset}: language and image features",
                "Pooled vectors of report and clip of the student after mutual learning, each clip with its report, "
                "by principal components and by t-SNE. Colours: condition (organ where a set names none).",
                projections(experiment, workdir_of(main, output)))  # fmt: skip
        if "8" in numbers:
            rows = read_metrics(workdir_of(main, output) / "weights.jsonl")
            add("8", f"{dataset}: weights and biases over the steps",
                "Of all weights and all biases, at steps of every stage: median, and the middle 50, 90 and 98 percent, "
                "dark to light.",
                weight_figure(rows))  # fmt: skip
    for size in SHAPES if "10" in numbers else (MAIN_SHAPE,):
        cell = Cell(dataset, "dilbert", size, seed)
        if not {"9", "10"} & set(numbers) or not holds_the_run(cell, output, budget):
            continue
        annotation, frames, name = _annotated(cell, budget, output)
        if not annotation["entities"]:
            _log.info("%s: no entity to draw", cell.name)
            continue
        if "9" in numbers and size == MAIN_SHAPE and annotation["frame_index"]:
            add("9", f"{dataset}: entities and the frames they associate with",
                f"Test clip {name}; line width by score.", entity_frame_graph(annotation, frames))  # fmt: skip
        if "10" in numbers:
            add("10", f"{dataset}: entities and regions, {size}",
                f"Test clip {name}; line width by match score.", entity_region_figure(annotation, frames))  # fmt: skip
    return drawn


def _annotated(cell: Cell, budget: str, output: pathlib.Path) -> tuple[dict[str, Any], np.ndarray, str]:
    """The same test clip for every size: the first that holds a finding, annotated by the student."""
    config = cell_config(cell, budget)
    experiment = open_experiment(config, workdir_of(cell, output))
    indices = experiment.indices["test"]
    studies = experiment.store.studies
    chosen = next((i for i in indices if studies[i].findings and studies[i].condition), indices[0])
    params, step = network_params(experiment.context, workdir_of(cell, output), "finetune", "student")
    one = np.asarray([chosen])
    thresholds = Thresholds.load(workdir_of(cell, output) / "thresholds.json")
    predictions = predict_all(experiment, params, one)
    ((annotation, frames),) = example_annotations(experiment, predictions, one, thresholds, step, 1)
    return annotation, frames, studies[chosen].study_id


def pooled_vectors(
    experiment: Experiment, workdir: pathlib.Path, indices: np.ndarray
) -> dict[str, np.ndarray]:
    """The student's pooled report and clip of matched pairs after pre-training, nothing masked."""
    context = experiment.context
    params, _ = network_params(context, workdir, "mutual", "student")
    forward = jax.jit(lambda p, b: pretraining_forward(context.model, p, b, None)[1].pooled)

    def build(index: int, rng: np.random.Generator, *, train: bool) -> dict[str, np.ndarray]:
        example = experiment.builder.pretraining(index, rng, train=train)
        report = experiment.builder.reports[index]
        return example | {
            "token_ids": report.token_ids,
            "token_types": report.token_types,
            "token_mask": report.token_mask,
            "description_zeroed": np.zeros_like(example["description_zeroed"]),
            "region_zeroed": np.zeros_like(example["region_zeroed"]),
        }

    rows: dict[str, list[np.ndarray]] = {"language": [], "image": []}
    for batch, real in evaluation_batches(build, indices, BATCH_SIZE, seed=7):
        pooled = jax.device_get(
            forward(params, {k: jnp.asarray(v) for k, v in device_entries(batch).items()})
        )
        rows["language"].append(pooled["entity"][real])
        rows["image"].append(pooled["description"][real])
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def projections(experiment: Experiment, workdir: pathlib.Path) -> bytes:
    """Figure 7: language and image features of training and validation clips in two dimensions."""
    studies, graph = experiment.store.studies, experiment.context.graph
    splits = {}
    for split in ("train", "validation"):
        indices = experiment.indices[split]
        splits[split] = indices[:: max(1, -(-len(indices) // MAX_POINTS))]
    splits = {name: indices for name, indices in splits.items() if len(indices) > 2}
    joined = np.concatenate(list(splits.values()))
    vectors = pooled_vectors(experiment, workdir, joined)
    named = "condition" if any(study.condition for study in studies) else "organ"
    names = [getattr(studies[i], named) for i in joined]
    commonest = sorted(set(names) - {""}, key=lambda c: (-names.count(c), c))[: len(CLASS_COLOURS)]
    names = [c if c in commonest else "" for c in names]
    colours = {**dict(zip(commonest, CLASS_COLOURS, strict=False)), "": MUTED}
    classes = [c for c in colours if c in names]
    of_split = np.repeat(list(splits), [len(i) for i in splits.values()])
    methods = {
        "PCA": PCA(2, random_state=0),
        "t-SNE": TSNE(2, perplexity=min(30, len(joined) // 4), random_state=0),
    }
    with rc_context(figure_style()):
        figure = Figure(figsize=(2.5 * len(splits) * 2, 5.6))
        axes = figure.subplots(2, 2 * len(splits), squeeze=False)
        for row, stream in enumerate(("language", "image")):
            for column, (method, reducer) in enumerate(methods.items()):
                placed = reducer.fit_transform(vectors[stream])
                for offset, split in enumerate(splits):
                    axis = axes[row, column * len(splits) + offset]
                    for concept in classes:
                        keep = (of_split == split) & (np.asarray(names) == concept)
                        axis.plot(*placed[keep].T, "o", ms=3, alpha=0.75, mew=0, color=colours[concept])
                    axis.set_title(
                        f"{stream}, {method}, {split} (n = {(of_split == split).sum()})", fontsize=7.5
                    )
                    axis.set(xticks=[], yticks=[])
        handles = [
            axes[0, 0].plot([], [], "o", ms=5, mew=0, color=colours[c], label=_title(c, graph))[0]
            for c in classes
        ]
        figure.legend(
            handles=handles, loc="lower center", ncols=min(4, len(handles)), fontsize=7.5, frameon=False
        )
        rows = -(-len(handles) // 4)
        figure.tight_layout(rect=(0, 0.02 + 0.035 * rows, 1, 1))
        return encode_figure(figure)


def _title(concept: str, graph: Any) -> str:
    return display_name(concept, {"en": graph.name(concept, "en")}) if concept else "none or another"


def weight_figure(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Figure 8 from the records of weights.jsonl."""
    networks = list(dict.fromkeys(r["network"] for r in rows))
    ends: dict[str, float] = {}
    start = 0.0
    spans = []
    for stage in STAGES:
        steps = [r["step"] for r in rows if r["stage"] == stage]
        if steps:
            ends[stage] = start
            spans.append((stage, start, start + max(steps) + 1))
            start += max(steps) + 1
    with rc_context(figure_style()):
        figure = Figure(figsize=(4.2 * len(networks), 4.8))
        axes = figure.subplots(2, len(networks), squeeze=False, sharex=True, sharey="row")
        for column, network in enumerate(networks):
            for row, kind in enumerate(("weights", "biases")):
                axis = axes[row, column]
                for stage, _, _ in spans:
                    points = [r for r in rows if r["stage"] == stage and r["network"] == network]
                    if not points:
                        continue
                    x = np.asarray([ends[stage] + r["step"] for r in points])
                    levels = np.asarray([r[kind] for r in points]).T
                    colour = "#0072b2" if row == 0 else "#d55e00"
                    for band, alpha in ((1, 0.12), (2, 0.2), (3, 0.35)):
                        axis.fill_between(x, levels[band], levels[-1 - band], color=colour, alpha=alpha, lw=0)
                    axis.plot(x, levels[QUANTILES.index(0.5)], color=colour, lw=1.3)
                for index, (stage, low, high) in enumerate(spans):
                    axis.axvline(high, color="#999999", lw=0.5)
                    if row == 0:  # at two heights: mutual learning is short
                        place = (low + high) / 2, 1.02 + 0.06 * (index % 2)
                        axis.text(
                            *place, stage, transform=axis.get_xaxis_transform(), ha="center", fontsize=7
                        )
                if row == 0:
                    axis.set_title(network, pad=22)
                else:
                    axis.set_xlabel("updates, over all stages")
                if column == 0:
                    axis.set_ylabel(kind)
        figure.tight_layout()
        return encode_figure(figure)
