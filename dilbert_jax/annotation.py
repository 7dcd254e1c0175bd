"""From clips to annotations: run the network on them, match entities with places, compose the dictionary."""

from __future__ import annotations

import collections
import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dilbert_jax
from dilbert_jax.clips import find_sector, place_on_canvas, select_evenly
from dilbert_jax.description import write_description
from dilbert_jax.examples import Example, lay_grid, pad_frames
from dilbert_jax.experiment import ModelContext
from dilbert_jax.media import Clip
from dilbert_jax.models import Network
from dilbert_jax.thresholds import Thresholds, decide_findings
from dilbert_jax.training.objectives import VISUAL, annotation_forward

SCHEMA = "dilbert-jax/annotation/1"
NOTICE = "Research use only. Not for clinical use."


def build_visual(context: ModelContext, frames: np.ndarray) -> tuple[Example, np.ndarray]:
    """Prepares decoded frames for the network as evaluation does, but padded to the clip's own bucket only.

    Args:
      context: of the run.
      frames: uint8 [T, H, W], T at least 1.

    Returns:
      The example (without labels), and its grid boxes mapped back to the frames' own coordinates [R, 4].

    Raises:
      ValueError: frames of another kind.
    """
    if frames.ndim != 3 or not frames.size or frames.dtype != np.uint8:
        raise ValueError(f"a clip's frames must be uint8 [T, H, W], grey; got {frames.dtype} {frames.shape}")
    spec, data = context.spec, context.config.data
    # In two steps like the clip store: the sector shows in all frames that a store would keep.
    stored = select_evenly(len(frames), data.stored_frames)
    canvas, placement = place_on_canvas(frames[stored], data.size)
    sampled = select_evenly(len(stored), spec.num_frames)
    boxes, box_frames = lay_grid(spec, find_sector(canvas), len(sampled))
    length = spec.padded_length(len(sampled))
    padded, mask = pad_frames(canvas[sampled], length)
    frame_index = stored[sampled]
    blank = context.tokenizer.encode("", "en", context.graph, spec.max_tokens)
    example = {
        "frames": padded,
        "frame_mask": mask,
        "boxes": boxes,
        "box_frames": box_frames,
        "region_mask": np.ones(len(boxes), bool),
        "token_ids": blank.token_ids[:2],
        "token_types": blank.token_types[:2],
        "token_mask": blank.token_mask[:2],
        "frame_index": np.pad(frame_index, (0, length - len(sampled)), mode="edge").astype(np.int32),
    }
    return example, placement.to_frame(boxes)


def annotation_probabilities(model: Network, params: Any, batch: Any, names: Any) -> dict[str, jax.Array]:
    """What the network says of a batch of clips; pure, so that it can be compiled and exported.

    Args:
      model: the architecture; params: its parameters.
      batch: the arrays of `VISUAL`, leading axis B.
      names: word pieces int [E, P] of the candidate entities' names, and their mask.

    Returns:
      As `predict`.
    """
    logits, _ = annotation_forward(model, params, batch, names, None)
    match = logits["match"]
    return {
        "organ": jax.nn.softmax(logits["organ"]),
        "condition": jax.nn.softmax(logits["condition"]),
        "findings": jax.nn.sigmoid(logits["findings"]),
        "entities": jax.nn.sigmoid(match["clip"]),
        "frame_scores": jax.nn.sigmoid(match["frame"]),
        "region_scores": jax.nn.sigmoid(match["region"]),
        "region_logits": match["region"],
    }


@functools.lru_cache(maxsize=4)
def compiled_probabilities(model: Network) -> Any:
    """`annotation_probabilities`, compiled once a batch shape; parameters and entity names are arguments."""
    return jax.jit(functools.partial(annotation_probabilities, model))


def predict(context: ModelContext, params: Any, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Probabilities for a batch (leading axis B).

    Returns:
      `organ` [B, O], `condition` [B, C], `findings` [B, F], `entities` [B, E], `frame_scores` [B, E, A],
      `region_scores` and `region_logits` [B, E, R].
    """
    names = tuple(map(jnp.asarray, context.entity_names))
    inputs = {name: jnp.asarray(batch[name]) for name in VISUAL}
    return jax.device_get(compiled_probabilities(context.model)(params, inputs, names))


@dataclasses.dataclass
class _Waiting:
    """A clip on its way: what the network sees of it, and its annotation, empty until its batch has run."""

    example: Example
    boxes: np.ndarray
    source: dict[str, Any]
    annotation: dict[str, Any] = dataclasses.field(default_factory=dict)


def annotate_clips(
    context: ModelContext,
    params: Any,
    clips: Iterable[tuple[Clip, str]],
    thresholds: Thresholds,
    *,
    model: Mapping[str, Any],
    batch_size: int = 8,
) -> Iterator[dict[str, Any]]:
    """Annotates a stream of clips in batches of one bucket each, in the order in which they come.

    A batch runs when it is full, when the stream ends, or when its first clip holds up too many others: of the clips
    read at most batch_size times the number of buckets are not yielded yet, and of those only what the network sees
    is kept. Short batches are padded to batch_size, so that every bucket compiles once.

    Args:
      context: of the run; params: of the network.
      clips: clips and the SHA-256 of their files ("" = unknown); read one by one, no more than needed.
      thresholds: from validation.
      model: provenance, copied into every annotation.
      batch_size: clips a batch.

    Yields:
      One annotation dictionary a clip (docs/annotation_schema.md).

    Raises:
      ValueError: a batch size below 1, or a clip without grey frames.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")

    def run(batch: list[_Waiting]) -> None:
        examples = [clip.example for clip in batch]
        examples += examples[-1:] * (batch_size - len(batch))
        prediction = predict(
            context, params, {name: np.stack([e[name] for e in examples]) for name in VISUAL}
        )
        for row, clip in enumerate(batch):
            clip.annotation = compose(
                context,
                {name: values[row] for name, values in prediction.items()},
                clip.example,
                clip.boxes,
                thresholds,
                source=clip.source,
                model=model,
            )
        batch.clear()

    limit = batch_size * len({*context.spec.frame_buckets, context.spec.num_frames})
    buckets: dict[int, list[_Waiting]] = collections.defaultdict(list)
    queue: collections.deque[_Waiting] = collections.deque()
    for clip, sha256 in clips:
        queue.append(_Waiting(*build_visual(context, clip.frames), describe_source(clip, sha256)))
        batch = buckets[len(queue[-1].example["frames"])]
        batch.append(queue[-1])
        if len(batch) == batch_size:
            run(batch)
        if len(queue) == limit and not queue[0].annotation:
            run(buckets[len(queue[0].example["frames"])])
        while queue and queue[0].annotation:
            yield queue.popleft().annotation
    for batch in buckets.values():
        if batch:
            run(batch)
    for waiting in queue:
        yield waiting.annotation


def compose(
    context: ModelContext,
    prediction: Mapping[str, np.ndarray],
    example: Mapping[str, np.ndarray],
    boxes: np.ndarray,
    thresholds: Thresholds,
    *,
    source: Mapping[str, Any],
    model: Mapping[str, Any],
) -> dict[str, Any]:
    """Turns one clip's probabilities into the annotation dictionary (docs/annotation_schema.md).

    Args:
      prediction: one row of `predict` (no batch axis).
      example: the example the row came from.
      boxes: [R, 4] in the source frame's coordinates.
      thresholds: from validation.
      source, model: provenance, copied as it is.
    """
    graph, labels = context.graph, context.labels

    def names(concept: str) -> dict[str, str]:
        return {language: graph.name(concept, language) for language in ("en", "zh")}

    organ = _ranked(labels.organs, prediction["organ"], names)
    condition = _ranked(labels.conditions, prediction["condition"], names)
    (decided,) = decide_findings(labels, thresholds, prediction["findings"][None])
    findings: list[dict[str, Any]] = [
        {
            "id": concept,
            "name": names(concept),
            "probability": round(float(probability), 4),
            "threshold": round(thresholds.finding(concept), 4),
            "present": bool(present),
        }
        for concept, probability, present in zip(
            labels.findings, prediction["findings"], decided, strict=True
        )
    ]
    findings.sort(key=lambda f: -f["probability"])

    patch = context.spec.frames_per_step
    valid = example["frame_mask"].reshape(-1, patch).any(1)
    frame_index = example["frame_index"].reshape(-1, patch)[:, 0][valid]
    entities = []
    for index in np.argsort(-prediction["entities"], kind="stable"):
        concept = labels.entities[index]
        entities.append(
            {
                "id": concept,
                "type": graph.concepts[concept].type,
                "name": names(concept),
                "score": round(float(prediction["entities"][index]), 4),
                "supported": bool(prediction["entities"][index] >= thresholds.entity(concept)),
                "frame_scores": _rounded(prediction["frame_scores"][index][valid]),
                "region_scores": _rounded(prediction["region_scores"][index]),
            }
        )

    frames = example["frame_index"][example["box_frames"]]
    regions = []
    for box, frame, label in zip(boxes, frames, _region_labels(context, prediction), strict=True):
        regions.append({"frame": int(frame), "box": _rounded(box), **label})
        if label["label"]:
            regions[-1]["name"] = names(label["label"])

    annotation = {
        "schema": SCHEMA,
        "notice": NOTICE,
        "source": dict(source),
        "model": {**model, "version": dilbert_jax.__version__},
        "organ": organ,
        "condition": condition,
        "findings": findings,
        "entities": entities,
        "frame_index": [int(i) for i in frame_index],
        "regions": regions,
    }
    annotation["description"] = write_description(annotation, graph)
    return annotation


def describe_source(clip: Clip, sha256: str) -> dict[str, Any]:
    """Provenance of the pixels; the file's name only, never its header."""
    return {
        "file": pathlib.Path(clip.source).name,
        "sha256": sha256,
        # Long clips are thinned evenly, the last frame included.
        "num_frames": clip.frame_index[-1] + 1 if clip.frame_index else len(clip.frames),
        "height": int(clip.frames.shape[1]),
        "width": int(clip.frames.shape[2]),
        "fps": clip.fps,
        "pixel_spacing_mm": list(clip.pixel_spacing_mm) if clip.pixel_spacing_mm else None,
        "decoder": clip.decoder,
    }


def _region_labels(context: ModelContext, prediction: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Most likely region class of every region, among the classes that annotated boxes had in training."""
    classes = [
        (r, e) for r, e in zip(context.labels.regions, context.entity_of_region, strict=False) if e >= 0
    ]
    logits = prediction["region_logits"]  # [E, R]
    if len(classes) < 2:
        return [{"label": "", "probability": None}] * logits.shape[1]
    chosen = logits[[e for _, e in classes]]
    weights = np.exp(chosen - chosen.max(0))
    weights /= weights.sum(0)
    best = weights.argmax(0)
    return [
        {"label": classes[b][0], "probability": round(float(weights[b, r]), 4)} for r, b in enumerate(best)
    ]


def _ranked(ids: Sequence[str], probabilities: np.ndarray, names: Any) -> dict[str, Any] | None:
    """The most likely class with its alternatives; None for a data set that does not name any."""
    if not ids:
        return None
    order = np.argsort(-probabilities, kind="stable")
    entries = [
        {"id": ids[i], "name": names(ids[i]), "probability": round(float(probabilities[i]), 4)} for i in order
    ]
    return {**entries[0], "alternatives": entries[1:]}


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(v), 4) for v in values]
