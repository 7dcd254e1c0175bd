"""From a stored clip to an example: frames, regions, labels, and the corruption for the four tasks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dilbert_jax.augmentation import augment
from dilbert_jax.boxes import box_iou
from dilbert_jax.clips import ClipStore, Study, select_evenly
from dilbert_jax.knowledge import (
    EncodedReport,
    KnowledgeGraph,
    ReportTokenizer,
    extract_entities,
    mask_report,
    related_entities,
)
from dilbert_jax.labels import LabelSpace

Example = dict[str, np.ndarray]
MASK_RATE = 0.15
ZERO_RATE = 0.9
LABEL_IOU = 0.3


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """Shapes and choices of the input pipeline.

    Attributes:
      num_frames: frames a clip is sampled to; shorter clips are padded.
      frame_buckets: the lengths that clips are padded to, ascending, the last being num_frames; () = num_frames alone.
      frames_per_step: frames per description token.
      grid_scales: boxes per side of each scale of the region grid inside the scan sector.
      grid_steps: how many times across the clip the grid is laid.
      max_annotated_regions: most annotated boxes a clip contributes in pre-training.
      max_tokens: report length in word pieces.
      guided_masking: share of pre-training examples whose masked words the knowledge graph chooses (D8).
      leak_iou: a region that overlaps a zeroed one by more than this IoU is zeroed too (D10).
      any_mismatch: another's report may be of the same patient or have the same text (D11).
      shuffle: the description tokens of half of the pre-training examples are shuffled (D9).
      report_dropout: share of pre-training examples shown without their report, as in annotation: what is masked
        must then be seen, not read. They count for MDC and MOC, not for MLM and CMM.
      augment: random gain, gamma, gain over depth, crop, shift, and mirroring where no side is named.
    """

    num_frames: int
    frames_per_step: int
    grid_scales: tuple[int, ...]
    grid_steps: int
    max_annotated_regions: int
    max_tokens: int
    guided_masking: float = 0.5
    leak_iou: float = 0.4
    any_mismatch: bool = False
    shuffle: bool = False
    report_dropout: float = 0.0
    augment: bool = True
    frame_buckets: tuple[int, ...] = ()

    def padded_length(self, num_frames: int) -> int:
        """The bucket of a clip: the smallest length that holds what is sampled of its frames."""
        wanted = min(num_frames, self.num_frames)
        return min(length for length in (*self.frame_buckets, self.num_frames) if length >= wanted)

    @property
    def num_grid_regions(self) -> int:
        return self.grid_steps * sum(scale * scale for scale in self.grid_scales)

    @property
    def num_steps(self) -> int:
        return self.num_frames // self.frames_per_step

    @property
    def max_masked_tokens(self) -> int:
        return max(1, round(MASK_RATE * self.max_tokens))


class _Layout(NamedTuple):
    """What is fixed of a study's frames and regions."""

    frame_index: np.ndarray  # int32 [T]
    sector: np.ndarray  # float32 [1, 4]
    boxes: np.ndarray  # float32 [N, 4]
    box_frames: np.ndarray  # int64 [N], among the stored frames
    labels: np.ndarray  # int32 [N]


class ExampleBuilder:
    """Builds one example from a study: pure in (index, rng), so any worker on any host gives the same one."""

    def __init__(
        self,
        store: ClipStore,
        labels: LabelSpace,
        spec: InputSpec,
        tokenizer: ReportTokenizer,
        graph: KnowledgeGraph,
        indices: Mapping[str, np.ndarray] | None = None,
    ):
        """Prepares what is fixed of every study.

        Args:
          store, labels, spec, tokenizer, graph: what examples are made of.
          indices: the studies of each split: a mismatched report comes from the clip's own. None = all are one split.
        """
        self.store, self.labels, self.spec, self.tokenizer, self.graph = store, labels, spec, tokenizer, graph
        self._organ = {c: i for i, c in enumerate(labels.organs)}
        self._condition = {c: i for i, c in enumerate(labels.conditions)}
        self._region = {c: i for i, c in enumerate(labels.regions)}
        self._entity = {c: i for i, c in enumerate(labels.entities)}
        self.reports = [tokenizer.encode(s.report, s.language, graph, spec.max_tokens) for s in store.studies]
        self._related = [related_entities(report, graph) for report in self.reports]
        self._blank = tokenizer.encode("", "en", graph, spec.max_tokens)
        self._groups = np.unique([s.group_id for s in store.studies], return_inverse=True)[1]
        self._texts = np.unique([s.report for s in store.studies], return_inverse=True)[1]
        self._has_report = np.asarray([bool(s.report.strip()) for s in store.studies])
        self._splits = np.zeros(len(store.studies), np.int32)
        for number, part in enumerate((indices or {}).values()):
            self._splits[part] = number
        self._targets = [self._clip_targets(s) for s in store.studies]
        self._layouts = [self._lay_out(s) for s in store.studies]
        self._mirrored = [
            not names_a_side(r, s.findings) for r, s in zip(self.reports, store.studies, strict=True)
        ]

    # -- labels ----------------------------------------------------------------------------------------------

    def _clip_targets(self, study: Study) -> Example:
        """Labels of the whole clip; -1 and False masks stand for unknown."""
        labels = self.labels
        statuses = entity_statuses(study, self.graph)
        known_findings = bool(study.findings or study.condition)
        held = {*study.findings, study.condition, study.organ}
        return {
            "organ": np.asarray(self._organ.get(study.organ, -1), np.int32),
            "condition": np.asarray(self._condition.get(study.condition, -1), np.int32),
            "findings": np.asarray([f in study.findings for f in labels.findings], bool),
            "findings_mask": np.asarray(known_findings and bool(labels.findings)),
            "classes": np.asarray([c in held for c in labels.classes], bool),
            "classes_mask": np.asarray(known_findings),
            "entities": np.asarray([statuses.get(e) == "present" for e in labels.entities], bool),
            "entities_mask": np.asarray([statuses.get(e) != "uncertain" for e in labels.entities], bool),
        }

    def targets(self, index: int) -> Example:
        """Labels of the whole clip: organ, condition, findings, classes, entities, and which are known."""
        return self._targets[index]

    # -- frames ----------------------------------------------------------------------------------------------

    def _lay_out(self, study: Study) -> _Layout:
        return _Layout(
            np.asarray(study.frame_index, np.int32),
            np.asarray([study.sector], np.float32),
            np.asarray(study.region_boxes, np.float32).reshape(-1, 4),
            np.asarray(study.region_frames, np.int64),
            np.asarray([self._region[label] for label in study.region_labels], np.int32),
        )

    def padded_length(self, index: int) -> int:
        """Frames of a study's examples in training. In evaluation all have num_frames: one shape, in any order."""
        return self.spec.padded_length(len(self.store.studies[index].frame_index))

    def _sample_frames(self, available: int, rng: np.random.Generator | None) -> np.ndarray:
        """Which stored frames to use: evenly spaced; in training at a random offset and stretch."""
        wanted = self.spec.num_frames
        if available <= wanted or rng is None:
            return select_evenly(available, wanted)
        span = available * rng.uniform(0.85, 1.0)
        start = rng.uniform(0.0, available - span)
        return np.minimum((start + (np.arange(wanted) + 0.5) * span / wanted).astype(np.int64), available - 1)

    # -- regions ---------------------------------------------------------------------------------------------

    def _label_grid(
        self,
        grid: np.ndarray,
        frames: np.ndarray,
        boxes: np.ndarray,
        box_frames: np.ndarray,
        labels: np.ndarray,
    ) -> np.ndarray:
        """Label of the box that each grid box overlaps most (IoU >= 0.3) in the nearest annotated frame."""
        out = np.full(len(grid), -1, np.int32)
        if not len(boxes):
            return out
        overlap = box_iou(grid, boxes)
        distance = np.abs(frames[:, None] - box_frames[None, :])
        overlap[distance > distance.min(axis=1, keepdims=True)] = 0.0
        best = overlap.argmax(axis=1)
        hit = overlap[np.arange(len(grid)), best] >= LABEL_IOU
        out[hit] = labels[best[hit]]
        return out

    # -- examples --------------------------------------------------------------------------------------------

    def _visual(
        self, index: int, rng: np.random.Generator | None, annotated: bool
    ) -> tuple[Example, np.ndarray]:
        """Frames and regions of one clip, and which of its regions are annotated boxes (bool [R])."""
        spec, study = self.spec, self.store.studies[index]
        frame_index, sector, boxes, stored, labels = self._layouts[index]
        sampled = self._sample_frames(len(frame_index), rng)
        frames = np.asarray(self.store.frames(index))[sampled]
        if spec.augment and rng is not None:
            frames, boxes, sector = augment(frames, boxes, sector, rng, self._mirrored[index])
        # Frame numbers within the sampled frames; boxes that crop or shift pushed off the image are dropped.
        box_frames = (
            np.abs(stored[:, None] - sampled[None, :]).argmin(1).astype(np.int32) if len(stored) else stored
        )
        size = np.minimum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
        keep = size > 0.01
        boxes, box_frames, labels = boxes[keep], box_frames[keep], labels[keep]

        grid, grid_frames = lay_grid(spec, sector[0], len(sampled))
        if study.region_labels:
            grid_labels = self._label_grid(grid, grid_frames, boxes, box_frames, labels)
        else:
            grid_labels = np.full(len(grid), self._region.get(study.organ, -1), np.int32)

        num_regions = spec.num_grid_regions + (spec.max_annotated_regions if annotated else 0)
        out_boxes = np.zeros((num_regions, 4), np.float32)
        out_frames, out_labels = np.zeros(num_regions, np.int32), np.full(num_regions, -1, np.int32)
        mask = np.zeros(num_regions, bool)
        count = 0
        if annotated and len(boxes):
            limit = min(len(boxes), spec.max_annotated_regions)
            chosen = (
                select_evenly(len(boxes), limit)
                if rng is None
                else np.sort(rng.permutation(len(boxes))[:limit])
            )
            count = len(chosen)
            out_boxes[:count], out_frames[:count] = boxes[chosen], box_frames[chosen]
            out_labels[:count], mask[:count] = labels[chosen], True
        end = count + len(grid)
        out_boxes[count:end], out_frames[count:end] = grid, grid_frames
        out_labels[count:end], mask[count:end] = grid_labels, True

        length = spec.num_frames if rng is None else self.padded_length(index)
        frames, frame_mask = pad_frames(frames, length)
        example = {
            "frames": frames,
            "frame_mask": frame_mask,
            "boxes": out_boxes,
            "box_frames": out_frames,
            "region_labels": out_labels,
            "region_mask": mask,
            "frame_index": frame_index[sampled[np.minimum(np.arange(length), len(sampled) - 1)]],
            "study": np.asarray(index, np.int32),
        }
        return example, np.arange(num_regions) < count

    def pretraining(
        self, index: int, rng: np.random.Generator, *, train: bool = True, guided: bool | None = None
    ) -> Example:
        """One corrupted example for MLM, MDC, MOC and CMM (PAPER section 4).

        Half of the reports are replaced by another patient's with another text (D11); `matched` says which.
        All randomness comes from `rng`; without `train` frames are evenly sampled and not augmented. `guided`: the
        graph chooses the masked words; None = in the share of the examples that the specification says.
        """
        spec = self.spec
        example, _ = self._visual(index, rng if train else None, annotated=True)
        example |= self._targets[index]

        hidden = train and rng.random() < spec.report_dropout
        partner = self._mismatched(index, rng) if not hidden and rng.random() < 0.5 else index
        report = self._blank if hidden else self.reports[partner]
        if guided is None:
            share = spec.guided_masking
            guided = share == 1 or (share > 0 and rng.random() < share)  # all or none asks no chance
        first = self._related[partner] if guided and not hidden else ()
        masked = mask_report(report, rng, self.tokenizer, rate=MASK_RATE, first=first)
        found = np.flatnonzero(masked.target_mask)[: spec.max_masked_tokens]
        positions = np.zeros(spec.max_masked_tokens, np.int32)
        positions[: len(found)] = found
        example |= {
            "token_ids": masked.token_ids,
            "token_types": masked.token_types,
            "token_mask": report.token_mask,
            "mlm_positions": positions,
            "mlm_targets": masked.targets[positions],
            "mlm_mask": np.arange(len(positions)) < len(found),
            "mlm_entities": self._entity_of_tokens(report)[positions],
            "report_classes": self._targets[partner]["classes"],
            "report_classes_mask": self._targets[partner]["classes_mask"] & (not hidden),
            "matched": np.asarray(partner == index),
            "report": self._report_text(partner, shown=not hidden),
            "own_report": self._report_text(index),
            "cmm_mask": self._has_report[index] & (not hidden),
        }

        steps = np.asarray(example["frame_mask"].reshape(-1, spec.frames_per_step).any(1))
        target = choose_share(steps, MASK_RATE, rng)
        example |= {
            "description_target": target,
            "description_zeroed": target & (rng.random(len(target)) < ZERO_RATE),
        }
        labelled = example["region_mask"] & (example["region_labels"] >= 0)
        target = choose_share(labelled, MASK_RATE, rng)
        zeroed = target & (rng.random(len(target)) < ZERO_RATE)
        overlap = box_iou(example["boxes"][zeroed], example["boxes"]) > spec.leak_iou
        # A target left visible is hidden too where it would show a zeroed one.
        example |= {"region_target": target, "region_zeroed": zeroed | overlap.any(0)}
        if spec.shuffle:
            order = np.arange(len(steps), dtype=np.int32)
            if rng.random() < 0.5:
                order[: steps.sum()] = rng.permutation(order[: steps.sum()])
            example["description_order"] = order
        return example

    def _report_text(self, index: int, shown: bool = True) -> np.ndarray:
        """A number that studies with equal reports share; -1 without a report."""
        return np.asarray(self._texts[index] if shown and self._has_report[index] else -1, np.int32)

    def _entity_of_tokens(self, report: EncodedReport) -> np.ndarray:
        """int32 [L]: the candidate entity that each word piece belongs to, or -1."""
        concepts = np.asarray([self._entity.get(e.concept, -1) for e in report.entities] + [-1], np.int32)
        return concepts[report.entity_index]  # -1, outside of any entity, is the last

    def _mismatched(self, index: int, rng: np.random.Generator) -> int:
        """A study of another group with another, non-empty report; `index` itself when there is none.

        It is of the same split: training must not see test reports, and test questions not be those that training has
        seen as somebody else's.
        """
        possible = self._has_report & (self._splits == self._splits[index])
        possible[index] = False
        if not self.spec.any_mismatch:
            possible &= (self._groups != self._groups[index]) & (self._texts != self._texts[index])
        candidates = np.flatnonzero(possible)
        return int(rng.choice(candidates)) if len(candidates) else index

    def annotation(
        self, index: int, rng: np.random.Generator, *, train: bool = True, annotated: bool | None = None
    ) -> Example:
        """One example for fine-tuning or evaluation: the clip alone, regions from the grid, no report.

        In training annotated boxes come along with their labels, masked: the network is asked what they show, and
        nothing else can look at them, so that no box gives a finding away. `annotated` says so without training, as
        where the loss is validated.
        """
        annotated = train if annotated is None else annotated
        example, is_annotated = self._visual(index, rng if train else None, annotated=annotated)
        example["region_mask"] &= ~is_annotated
        if not self.store.studies[index].region_labels:
            # Without annotated boxes every region carries the clip's organ, which is no evidence of a place.
            example["region_labels"] = np.full_like(example["region_labels"], -1)
        return example | self._targets[index] | self.blank_report()

    def blank_report(self) -> Example:
        """The entity stream of a clip without a report: [CLS] [SEP], cut to the two tokens that exist."""
        blank = self._blank
        return {
            "token_ids": blank.token_ids[:2],
            "token_types": blank.token_types[:2],
            "token_mask": blank.token_mask[:2],
        }


def lay_grid(spec: InputSpec, sector: Sequence[float], num_valid: int) -> tuple[np.ndarray, np.ndarray]:
    """The fixed multi-scale region grid inside the scan sector (D2).

    Args:
      spec: grid_scales and grid_steps.
      sector: (ymin, xmin, ymax, xmax) in [0, 1].
      num_valid: frames of the clip.

    Returns:
      Boxes float32 [G, 4] and their frames int32 [G].
    """
    low, high = np.asarray(sector[:2]), np.asarray(sector[2:])
    boxes = _unit_grid(spec.grid_scales) * np.tile(high - low, 2) + np.tile(low, 2)
    frames = ((np.arange(spec.grid_steps) + 0.5) * num_valid / spec.grid_steps).astype(np.int32)
    return np.tile(boxes.astype(np.float32), (spec.grid_steps, 1)), np.repeat(frames, len(boxes))


@functools.cache
def _unit_grid(scales: tuple[int, ...]) -> np.ndarray:
    """The boxes of every scale on the unit square, [G, 4]."""
    boxes = []
    for scale in scales:
        edges = np.linspace(0.0, 1.0, scale + 1)
        boxes += [
            (edges[i], edges[j], edges[i + 1], edges[j + 1]) for i in range(scale) for j in range(scale)
        ]
    return np.asarray(boxes)


def pad_frames(frames: np.ndarray, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads [t, S, S] with zero frames to num_frames; returns it with its frame mask bool [num_frames]."""
    mask = np.arange(num_frames) < len(frames)
    if mask.all():
        return frames, mask
    padded = np.zeros((num_frames, *frames.shape[1:]), frames.dtype)
    padded[: len(frames)] = frames
    return padded, mask


def entity_statuses(study: Study, graph: KnowledgeGraph) -> dict[str, str]:
    """Status of every concept that the report or the labels of a study speak of; labels win."""
    statuses: dict[str, str] = {}
    for entity in extract_entities(study.report, study.language, graph):
        if statuses.get(entity.concept) != "present":
            statuses[entity.concept] = entity.status
    for concept in (study.organ, study.condition, *study.findings):
        if concept:
            statuses[concept] = "present"
    return statuses


def names_a_side(report: EncodedReport, findings: Sequence[str] = ()) -> bool:
    """Whether report or findings speak of left or right (or a left lobe): mirroring makes them wrong."""
    concepts = [entity.concept for entity in report.entities]
    return any({"left", "right"} & set(concept.split("_")) for concept in (*concepts, *findings))


def choose_share(valid: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Chooses `share` of the valid positions: the expected number is exact, the rest rounds at random."""
    candidates = np.flatnonzero(valid)
    count = int(np.floor(share * len(candidates) + rng.random()))
    chosen = np.zeros(len(valid), bool)
    chosen[rng.permutation(candidates)[:count]] = True
    return chosen
