"""Clips and predictions of the annotation tests."""

import dataclasses

import numpy as np

from dilbert_jax.annotation import build_visual, compose
from dilbert_jax.thresholds import Thresholds

CYST = ("liver", "cyst", "anechoic", "posterior_enhancement")
FRAMES = np.full((12, 30, 60), 90, np.uint8)


def with_buckets(context, *lengths):
    return dataclasses.replace(context, spec=dataclasses.replace(context.spec, frame_buckets=lengths))


def make_prediction(context, concepts):
    """Probabilities of one clip that is sure of `concepts`."""
    labels, regions = context.labels, context.spec.num_grid_regions
    num = len(labels.entities)

    def spread(ids):
        return np.asarray([0.8 if c in concepts else 0.1 for c in ids])

    organ, condition = spread(labels.organs), spread(labels.conditions)
    logits = np.random.default_rng(0).normal(size=(num, regions))
    return {
        "organ": organ / organ.sum(),
        "condition": condition / condition.sum(),
        "findings": spread(labels.findings),
        "entities": spread(labels.entities),
        "frame_scores": np.linspace(0, 1, num * 2).reshape(num, 2),
        "region_scores": 1 / (1 + np.exp(-logits)),
        "region_logits": logits,
    }


def make_annotation(context, frames, concepts, thresholds=None):
    visual, boxes = build_visual(context, frames)
    prediction = make_prediction(context, concepts=concepts)
    thresholds = thresholds or Thresholds({}, {})
    return compose(context, prediction, visual, boxes, thresholds, source={"file": "a"}, model={"step": 1})
