"""The grid of runs behind the tables: which systems, sizes, data sets and seeds, and each cell's configuration."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from dilbert_jax import flops
from dilbert_jax.config import default_config
from dilbert_jax.models import find_system
from dilbert_jax.models.network import NetworkConfig
from dilbert_jax.random_inputs import init_network, random_model

TABLES = ("IV", "V", "VI", "VII")
FIGURES = ("7", "8", "9", "10")
# Layers and heads of Table IV and Figure 10 (D7).
SHAPES = {"3L8H": (3, 8), "6L6H": (6, 6), "9L9H": (9, 9)}
MAIN_SHAPE = "3L8H"  # of Tables V to VII

# The sweep: every system at these learning rates of pre-training, then, from what the better of them learned, at these
# of fine-tuning; on this set and a seed of its own, judged on validation clips.
SWEPT_RATES = (1e-3, 2e-3), (1e-3, 2e-3, 4e-3)
SWEEP_DATASET, SWEEP_SEED = "phantom", 100

# What the sweep chose, of pre-training and of fine-tuning, by budget and system (docs/results/sweep.md). A system that
# is not here has the budget's rate for both.
LEARNING_RATES: dict[str, dict[str, tuple[float, float]]] = {
    "cpu": {
        "cbt": (1e-3, 2e-3),
        "hero": (2e-3, 1e-3),
        "mmft_bert": (2e-3, 1e-3),
        "actbert": (1e-3, 4e-3),
        "dilbert": (2e-3, 1e-3),
    }
}

# What each set needs: its own folder, folds where it has no split of its own (a seed tests one of them), lengths.
DATASETS: dict[str, dict[str, Any]] = {
    "phantom": {"num_frames": 12, "max_tokens": 96, "grid_scales": (1, 3), "grid_steps": 1},
    "busi": {
        "folds": 5,
        "size": 96,
        "num_frames": 1,
        "stored_frames": 1,
        "grid_scales": (1, 2, 4),
        "grid_steps": 1,
        "max_annotated_regions": 3,
    },
    "clust": {"folds": 5, "num_frames": 16},
    # In its own split only test subjects have masks, and with them organs: nothing to learn. Few have: three folds.
    "usss": {"folds": 3, "num_frames": 8, "stored_frames": 8},
    "pocus": {"folds": 5, "num_frames": 16, "stored_frames": 64, "min_entity_count": 4},
    "kmve": {"size": 96, "num_frames": 2, "stored_frames": 2, "max_tokens": 256, "grid_scales": (1, 3)},
    "ahjuui": {"num_frames": 16, "max_tokens": 256},
}
# Frames a description token covers, where it is not the default.
FRAMES_PER_STEP = {"phantom": 3, "busi": 1, "clust": 4, "pocus": 4, "kmve": 1, "ahjuui": 4}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much is spent on every cell, the same for all systems.

    Attributes:
      seeds: how many by default.
      fields: of the configuration, flattened.
      epochs: of the teacher, the student, mutual learning and fine-tuning.
      minutes: a guess at what a DILBERT cell and another system's cell take, for the plan.
      tiny_data: clips smaller than the data sets' settings say.
      large_phantom: four times as many phantom clips in a quarter of the epochs: as many updates, and more clips to
        test on.
      quick_compile: cells run for less time than XLA usually takes to compile them.
    """

    seeds: int
    fields: dict[str, Any]
    epochs: tuple[float, float, float, float]
    minutes: tuple[float, float]
    tiny_data: bool = False
    large_phantom: bool = False
    quick_compile: bool = False


BUDGETS = {
    "smoke": Budget(
        1,
        {"model.hidden_size": 72, "model.ffn_size": 144, "model.channels": (16, 32), "model.blocks": (1, 1),
         "model.unroll": 1, "train.batch_size": 16, "evaluate.mask_repeats": 1, "evaluate.num_resamples": 200},
        (1.0, 1.0, 0.5, 1.0), (2.4, 1.4), tiny_data=True, quick_compile=True,
    ),
    "cpu": Budget(
        3,
        {"model.hidden_size": 72, "model.ffn_size": 144, "model.channels": (32, 64), "model.blocks": (1, 1),
         "model.unroll": 1, "train.batch_size": 16, "optimizer.warmup_fraction": 0.1, "evaluate.mask_repeats": 2,
         "optimizer.video_rate_scale": 0.5, "train.finetune_video_rate_scale": 4.0},
        (34.0, 34.0, 5.0, 48.0), (11.0, 7.0), large_phantom=True,
    ),
    "gpu": Budget(
        5,
        {"model.hidden_size": 360, "model.ffn_size": 1440, "model.channels": (64, 128, 256), "model.blocks": (1, 1, 1),
         "train.batch_size": 32, "optimizer.warmup_fraction": 0.1, "optimizer.learning_rate": 5e-4},
        (60.0, 60.0, 4.0, 60.0), (20.0, 8.0), large_phantom=True,
    ),
    # The paper's settings (PAPER section 7), with AdamW: what rate 0.24 does is in docs/results/ablation.md.
    "paper": Budget(
        5,
        {"model.hidden_size": 720, "model.ffn_size": 2880, "model.channels": (64, 128, 256), "model.blocks": (1, 2, 2),
         "train.batch_size": 32, "optimizer.learning_rate": 1e-4, "data.size": 128, "data.report_dropout": 0.0,
         "loss.mlm": 1.0, "loss.mdc": 1.0, "loss.moc": 1.0, "loss.cmm": 1.0, "loss.summary": 0.0},
        (800.0, 800.0, 4.0, 100.0), (3000.0, 1200.0),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
      dataset, system: a key of `DATASETS`, and a name that `find_system` knows.
      size: a key of `SHAPES`, or "matched": as many parameters as DILBERT has at `MAIN_SHAPE`.
      seed: of initialisation, order and masks; where the set has folds, it also says which is tested.
      rates: learning rates of pre-training and of fine-tuning of a cell of the sweep; None = the system's own.
    """

    dataset: str
    system: str
    size: str
    seed: int
    rates: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        swept = ""
        if self.rates is not None:
            swept = "@" + "+".join(f"{rate:g}" for rate in dict.fromkeys(self.rates))
        return f"{self.dataset}/{self.system}/{self.size}{swept}/{self.seed}"


def parse_cell(name: str) -> Cell:
    """The cell of a name such as "phantom/dilbert/3L8H/0".

    Raises:
      ValueError: no such cell.
    """
    parts = name.split("/")
    size, _, swept = parts[2].partition("@") if len(parts) == 4 else ("", "", "")
    sizes = (*SHAPES, "matched")
    if len(parts) != 4 or parts[0] not in DATASETS or size not in sizes or not parts[3].isdigit():
        raise ValueError(
            f"no cell {name!r}: need DATASET/SYSTEM/SIZE/SEED with a data set of {', '.join(DATASETS)} and a size of "
            f"{', '.join(sizes)}"
        )
    find_system(parts[1])
    pretraining, _, finetuning = swept.partition("+")
    rates = (float(pretraining), float(finetuning or pretraining)) if swept else None
    return Cell(parts[0], parts[1], size, int(parts[3]), rates)


def plan(
    tables: Sequence[str],
    figures: Sequence[str],
    datasets: Sequence[str],
    seeds: Sequence[int],
    systems: Sequence[str],
) -> list[Cell]:
    """The cells that tables and figures need, each once; those of one seed come together."""
    sizes: list[tuple[str, str]] = []
    if tables:
        sizes += [(s, MAIN_SHAPE if find_system(s).distilled else "matched") for s in systems]
    if "IV" in tables:
        sizes += [(s, shape) for shape in SHAPES for s in ("dilbert", "bert") if s in systems]
    if figures:
        shapes = SHAPES if "10" in figures else (MAIN_SHAPE,)
        sizes += [("dilbert", shape) for shape in shapes if "dilbert" in systems]
    cells = [Cell(d, s, size, seed) for seed in seeds for d in datasets for s, size in dict.fromkeys(sizes)]
    return list(dict.fromkeys(cells))


def plan_sweep(systems: Sequence[str], budget: str) -> list[Cell]:
    """Every system at each rate of pre-training, fine-tuned at the budget's rate; then, pre-trained at the rate that
    `learning_rates` has, at each of fine-tuning."""
    cells = []
    for system in systems:
        pairs = [(rate, budget_rate(budget)) for rate in SWEPT_RATES[0]]
        pairs += [(learning_rates(system, budget)[0], rate) for rate in SWEPT_RATES[1]]
        size = MAIN_SHAPE if find_system(system).distilled else "matched"
        cells += [Cell(SWEEP_DATASET, system, size, SWEEP_SEED, pair) for pair in dict.fromkeys(pairs)]
    return cells


def budget_rate(budget: str) -> float:
    """The peak learning rate of both phases where no sweep chose another."""
    rate: float = BUDGETS[budget].fields.get(
        "optimizer.learning_rate", default_config("tiny").optimizer.learning_rate
    )
    return rate


def learning_rates(system: str, budget: str) -> tuple[float, float]:
    """A system's peak learning rates of pre-training and of fine-tuning."""
    return LEARNING_RATES.get(budget, {}).get(system, (budget_rate(budget),) * 2)


def cell_config(cell: Cell, budget: str) -> ml_collections.ConfigDict:
    """The configuration of a cell.

    A comparison system is one network. It makes as many updates before fine-tuning as DILBERT's student does, mutual
    learning included, on the same batches; what the teacher costs on top is in Table VII.
    """
    settings = BUDGETS[budget]
    config = default_config("tiny")
    system = find_system(cell.system)
    fields: dict[str, Any] = {"data.name": cell.dataset, "data.size": 64}
    fields |= {f"data.{name}": value for name, value in DATASETS[cell.dataset].items()}
    fields["model.stem_patch"] = (FRAMES_PER_STEP.get(cell.dataset, 2), 4, 4)
    fields |= settings.fields
    if settings.tiny_data:
        frames = min(4, fields.get("data.num_frames", 4))
        patch = min(2, frames)
        fields |= {
            "data.size": 32,
            "data.num_frames": frames,
            "data.stored_frames": 8,
            "model.stem_patch": (patch, 4, 4),
        }
        fields |= {"data.grid_scales": (1, 2), "data.grid_steps": 1, "data.max_tokens": 64}
    layers, heads = SHAPES.get(cell.size, SHAPES[MAIN_SHAPE])
    large = settings.large_phantom and cell.dataset == "phantom"
    if large:
        fields["data.name"] = "phantom/large"
    teacher, student, mutual, finetune = (epochs * (0.25 if large else 1.0) for epochs in settings.epochs)
    fields |= {
        "seed": cell.seed,
        "model.name": cell.system,
        "model.num_layers": layers,
        "model.num_heads": heads,
        "data.guided_masking": system.guided_masking,
        "train.single_network": not system.distilled,
        "train.teacher_epochs": teacher,
        "train.student_epochs": student if system.distilled else student + mutual,
        "train.mutual_epochs": mutual,
        "train.finetune_epochs": finetune,
        "evaluate.num_examples": 2,
    }
    if system.distilled and cell.seed == 0:
        fields["train.weight_points"] = 12
    pretraining, finetuning = cell.rates or learning_rates(cell.system, budget)
    fields |= {"optimizer.learning_rate": pretraining, "train.finetune_rate_scale": finetuning / pretraining}
    if cell.rates is not None:
        fields["train.evaluate_after"] = False
    config.update_from_flattened_dict(fields)
    if config.data.folds:
        config.data.fold = cell.seed % config.data.folds
    if cell.size == "matched":
        hidden_size, ffn_size = matched_size(cell.system, _sizes(config))
        config.model.update(hidden_size=hidden_size, ffn_size=ffn_size)
    return config


def count_parameters(config: ml_collections.ConfigDict) -> int:
    """Parameters of one network, with label spaces of a middling size; the vocabulary is the configuration's."""
    return flops.count_parameters(_trace_parameters(config))


def _trace_parameters(config: ml_collections.ConfigDict) -> list[jax.ShapeDtypeStruct]:
    model = random_model(config)
    if model not in _traced:  # tracing an initialisation takes a second or two
        params = jax.eval_shape(functools.partial(init_network, config), jax.random.key(0))
        _traced[model] = jax.tree.leaves(params)
    return _traced[model]


_traced: dict[NetworkConfig, list[jax.ShapeDtypeStruct]] = {}


def _sizes(config: ml_collections.ConfigDict) -> str:
    """What the number of parameters depends on, as JSON."""
    sizes = ml_collections.ConfigDict(config.to_dict())
    sizes.seed = sizes.data.fold = 0
    return str(sizes.to_json_best_effort())


@functools.cache
def matched_size(system: str, config_json: str) -> tuple[int, int]:
    """Hidden size and feed-forward width that give a system DILBERT's number of parameters at its number of layers.

    The hidden size is the largest multiple of the heads that fits with DILBERT's ratio of feed-forward to hidden size;
    what is left widens the feed-forward layers.

    Args:
      system: to be sized.
      config_json: DILBERT's configuration in JSON, so that the answer can be kept.
    """
    config = ml_collections.ConfigDict(_tuples(json.loads(config_json)))
    ratio, heads = config.model.ffn_size / config.model.hidden_size, config.model.num_heads

    def trial(name: str, hidden_size: int, ffn_size: int) -> ml_collections.ConfigDict:
        other = ml_collections.ConfigDict(config.to_dict())
        other.model.update(name=name, hidden_size=hidden_size, ffn_size=ffn_size)
        return other

    def shapes(hidden_size: int, ffn_size: int) -> list[np.ndarray]:
        leaves = _trace_parameters(trial(system, hidden_size, ffn_size))
        return [np.asarray(leaf.shape) for leaf in leaves]

    # Each side of a parameter grows in proportion with either size: three networks tell the shapes of all.
    start = config.model.hidden_size, config.model.ffn_size
    origin = shapes(*start)
    with_heads, with_unit = shapes(start[0] + heads, start[1]), shapes(start[0], start[1] + 1)

    def count(hidden_size: int, ffn_size: int) -> int:
        steps, units = (hidden_size - start[0]) // heads, ffn_size - start[1]
        return sum(
            int(np.prod(a + steps * (b - a) + units * (c - a)))
            for a, b, c in zip(origin, with_heads, with_unit, strict=True)
        )

    def at_ratio(hidden_size: int) -> int:
        return count(hidden_size, round(ratio * hidden_size))

    target = count_parameters(trial("dilbert", *start))
    hidden_size = config.model.hidden_size
    while hidden_size > heads and at_ratio(hidden_size) > target:
        hidden_size -= heads
    while at_ratio(hidden_size + heads) <= target:
        hidden_size += heads
    width = round(ratio * hidden_size)
    at_width = count(hidden_size, width)
    step = (count(hidden_size, 2 * width) - at_width) / width  # parameters a unit of width
    return hidden_size, max(1, round(width + (target - at_width) / step))


def _tuples(value: Any) -> Any:
    """Lists of JSON as the tuples that they were."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(value) if isinstance(value, list) else value


def expected_minutes(cells: Sequence[Cell], budget: str) -> float:
    """How long the cells take one after the other, roughly; deep shapes in proportion to their layers."""
    distilled, single = BUDGETS[budget].minutes
    total = 0.0
    for cell in cells:
        depth = SHAPES.get(cell.size, SHAPES[MAIN_SHAPE])[0] / SHAPES[MAIN_SHAPE][0]
        total += (distilled if find_system(cell.system).distilled else single) * (0.5 + 0.5 * depth)
    return total


def part_of(cells: Sequence[Cell], index: int, count: int, budget: str) -> list[Cell]:
    """One of `count` parts of about equal time, in the order of the plan; the same wherever it is asked for."""
    loads, parts = [0.0] * count, {}
    for cell in sorted(cells, key=lambda c: (-expected_minutes([c], budget), c.name)):
        least = loads.index(min(loads))
        parts[cell], loads[least] = least, loads[least] + expected_minutes([cell], budget)
    return [cell for cell in cells if parts[cell] == index]
