"""Networks and batches of a configuration's shapes without any data: to measure, to compare, to compile."""

from __future__ import annotations

from typing import Any

import jax
import ml_collections
import numpy as np

from dilbert_jax.examples import MASK_RATE
from dilbert_jax.models import init_params, make_network
from dilbert_jax.models.network import NetworkConfig, frames_per_step

NAME_PIECES = 8
# Label spaces as large as a middling data set's.
SPACES: dict[str, Any] = {
    "num_organs": 4, "num_conditions": 5, "num_findings": 6, "num_classes": 12, "num_region_classes": 5,
    "num_entities": 9,
}  # fmt: skip


def random_model(config: ml_collections.ConfigDict) -> NetworkConfig:
    """The architecture that a configuration describes, with the label spaces `SPACES`."""
    fields: dict[str, Any] = {
        name: tuple(v) if isinstance(v, (list, tuple)) else v for name, v in config.model.items()
    }
    num_steps = config.data.num_frames // frames_per_step(config.model.video, config.model.stem_patch)
    return NetworkConfig(
        vocab_size=config.data.vocab_size,
        mdc_target=config.loss.mdc_target,
        order=config.loss.order > 0,
        max_tokens=config.data.max_tokens,
        max_steps=num_steps,
        **SPACES,
        **fields,
    )


def random_batch(
    config: ml_collections.ConfigDict,
    rng: np.random.Generator,
    batch_size: int | None = None,
    report: bool = True,
) -> dict[str, np.ndarray]:
    """A batch with clips, reports and region sets of every length up to the configuration's.

    Args:
      config: the experiment.
      rng: for all content.
      batch_size: None = the configuration's.
      report: as in pre-training; False: without a report and without annotated regions, as in annotation.

    Returns:
      Arrays by the names of the input pipeline, without what only the host reads.
    """
    model, data = random_model(config), config.data
    n, frames, size = batch_size or config.train.batch_size, data.num_frames, data.size
    tokens, steps = model.max_tokens, model.max_steps
    masked, entities = max(1, round(MASK_RATE * tokens)), model.num_entities
    regions = data.grid_steps * sum(s * s for s in data.grid_scales)
    if report:
        regions += data.max_annotated_regions
    low = rng.uniform(0.0, 0.6, (n, regions, 2))
    frame_count = rng.integers(1, frames + 1, (n, 1))
    region_count = rng.integers(1, regions + 1, (n, 1))
    batch = {
        "frames": rng.integers(0, 256, (n, frames, size, size), np.uint8),
        "frame_mask": np.arange(frames) < frame_count,
        "boxes": np.concatenate([low, low + rng.uniform(0.1, 0.4, low.shape)], -1).astype(np.float32),
        "box_frames": rng.integers(0, frame_count, (n, regions)).astype(np.int32),
        "region_mask": np.arange(regions) < region_count,
        "region_labels": rng.integers(-1, model.num_region_classes, (n, regions)).astype(np.int32),
        "region_target": rng.random((n, regions)) < 0.3,
        "region_zeroed": rng.random((n, regions)) < 0.3,
        "token_ids": rng.integers(5, model.vocab_size, (n, tokens)).astype(np.int32),
        "token_types": rng.integers(0, 6, (n, tokens)).astype(np.int32),
        "token_mask": np.arange(tokens) < rng.integers(2, tokens + 1, (n, 1)),
        "mlm_positions": rng.integers(0, tokens, (n, masked)).astype(np.int32),
        "mlm_targets": rng.integers(5, model.vocab_size, (n, masked)).astype(np.int32),
        "mlm_mask": rng.random((n, masked)) < 0.7,
        "mlm_entities": rng.integers(-1, entities, (n, masked)).astype(np.int32),
        "matched": rng.random(n) < 0.5,
        "cmm_mask": rng.random(n) < 0.8,
        "report": rng.integers(-1, n, n).astype(np.int32),
        "own_report": rng.integers(-1, n, n).astype(np.int32),
        "description_target": rng.random((n, steps)) < 0.3,
        "description_zeroed": rng.random((n, steps)) < 0.3,
        "description_order": np.tile(np.arange(steps, dtype=np.int32), (n, 1)),
        "classes": rng.random((n, model.num_classes)) < 0.4,
        "classes_mask": rng.random(n) < 0.8,
        "report_classes": rng.random((n, model.num_classes)) < 0.4,
        "report_classes_mask": rng.random(n) < 0.8,
        "organ": rng.integers(-1, model.num_organs, n).astype(np.int32),
        "condition": rng.integers(-1, model.num_conditions, n).astype(np.int32),
        "findings": rng.random((n, model.num_findings)) < 0.4,
        "findings_mask": rng.random(n) < 0.8,
        "entities": rng.random((n, entities)) < 0.4,
        "entities_mask": rng.random((n, entities)) < 0.8,
    }
    if not report:
        batch |= {name: batch[name][:, :2] for name in ("token_ids", "token_types", "token_mask")}
    return batch


def random_names(
    config: ml_collections.ConfigDict, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Word pieces of the candidate entities' names, and their mask."""
    entities = SPACES["num_entities"]
    names = rng.integers(5, config.data.vocab_size, (entities, NAME_PIECES)).astype(np.int32)
    return names, np.arange(NAME_PIECES) < rng.integers(1, NAME_PIECES + 1, (entities, 1))


def init_network(config: ml_collections.ConfigDict, key: jax.Array) -> Any:
    """Freshly initialised parameters of one network of `random_model` (`models.init_params`)."""
    return init_params(make_network(random_model(config)), key)
