"""Studies of a few pixels and the example builder over them."""

import dataclasses

import numpy as np

from dilbert_jax.clips import ClipStore, Study
from dilbert_jax.examples import ExampleBuilder, InputSpec, entity_statuses
from dilbert_jax.knowledge import ReportTokenizer, load_graph
from dilbert_jax.labels import build_label_space

GRAPH = load_graph()
SIZE = 32
SPEC = InputSpec(
    num_frames=4, frames_per_step=2, grid_scales=(1, 2), grid_steps=2, max_annotated_regions=3, max_tokens=24
)
REPORTS = (
    ("Liver: anechoic cyst of 12 mm with posterior enhancement.", "en", "cyst", ("anechoic",)),
    ("肾脏内见强回声结石，大小9mm，后方声影。", "zh", "stone", ("posterior_shadowing",)),
    ("Liver of normal size, homogeneous echotexture. No mass.", "en", "normal", ()),
    ("", "en", "", ()),
)

BOXES = (
    (0.2, 0.2, 0.5, 0.6),
    (0.2, 0.25, 0.5, 0.65),
    (0.2, 0.3, 0.5, 0.7),
    (0.0, 0.0, 0.9, 1.0),
    (0.6, 0.6, 0.9, 0.9),
)


def make_study(index, **changes):
    report, language, condition, findings = REPORTS[index % 4]
    boxed = index % 2 == 0
    fields = {
        "study_id": f"s{index}",
        "group_id": f"g{index // 2}",
        "split": "train",
        "organ": "kidney" if "肾" in report else "liver",
        "condition": condition,
        "findings": findings,
        "report": report,
        "language": language,
        "report_is_synthetic": False,
        "frame_index": tuple(range(0, 2 * (6 if index % 3 else 3), 2)),
        "region_frames": (0, 1, 2, 2, 2) if boxed else (),
        "region_boxes": BOXES if boxed else (),
        "region_labels": ("lesion", "lesion", "lesion", "liver", "vessel") if boxed else (),
        "sector": (0.0, 0.0, 0.9, 1.0),
    }
    return Study(**(fields | changes))


def make_builder(studies=None, indices=None, **spec):
    studies = studies or [make_study(i) for i in range(12)]
    counts = [len(s.frame_index) for s in studies]
    pixels = np.random.default_rng(0).integers(20, 255, (sum(counts), SIZE, SIZE)).astype(np.uint8)
    store = ClipStore(tuple(studies), pixels, np.concatenate([[0], np.cumsum(counts)]))
    statuses = [entity_statuses(s, GRAPH) for s in studies]
    labels = build_label_space(
        [s.organ for s in studies],
        [s.condition for s in studies],
        [s.findings for s in studies],
        [label for s in studies for label in s.region_labels],
        [[c for c, status in held.items() if status == "present"] for held in statuses],
        GRAPH,
        min_count=1,
    )
    tokenizer = ReportTokenizer.train([s.report for s in studies], 400)
    return ExampleBuilder(store, labels, dataclasses.replace(SPEC, **spec), tokenizer, GRAPH, indices)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
