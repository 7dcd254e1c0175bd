"""The builders on the partial copies under DILBERT_DATA_DIR: the counts that are known of that copy."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dilbert_jax.data.record import check, from_example
from dilbert_jax.datasets import SPLITS, open_split, prepare

pytestmark = [
    pytest.mark.xdist_group("builders_real"),  # one worker, or both would prepare the same sets
    pytest.mark.real_data,
    pytest.mark.skipif(not os.environ.get("DILBERT_DATA_DIR"), reason="DILBERT_DATA_DIR is not set"),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Prepares a set once; returns (builder, records with one decoded frame, split by study id)."""
    folder = tmp_path_factory.mktemp("prepared")
    done = {}

    def get(name):
        if name not in done:
            source = Path(os.environ["DILBERT_DATA_DIR"]) / name
            builder = prepare(name, source, folder, progress=False)
            records, splits, lengths = {}, {}, {}
            for split in SPLITS:
                for example in open_split(builder, split):
                    length = len(example["frames"])
                    # Two frames at most are decoded; all regions are read from the example itself.
                    record = from_example(example, sorted({0, length - 1}))
                    check(record)
                    records[record.study_id], splits[record.study_id] = record, split
                    lengths[record.study_id] = length
            owners = {}
            for study_id, record in records.items():
                assert owners.setdefault(record.group_id, splits[study_id]) == splits[study_id]
            done[name] = builder.preparation(), records, splits, lengths
        return done[name]

    return get


def total(preparation, key):
    counts = Counter()
    for split in preparation["splits"].values():
        counts.update(split[key])
    return counts


def test_busi_counts(prepared):
    preparation, records, _, _ = prepared("busi")
    assert preparation["kept"] == 165 and preparation["skipped"] == 0
    assert total(preparation, "conditions") == {"benign_lesion": 85, "malignant_lesion": 50, "normal": 30}
    assert total(preparation, "regions") == {"lesion": 95 + 51}
    labels = Counter(
        records[s].condition for s in records for p in records[s].source.split(";")[1:] if "_mask" in p
    )
    assert labels == {"benign_lesion": 95, "malignant_lesion": 51, "normal": 30}


def test_busi_same_pixels_stay_together(prepared):
    _, records, _splits, _ = prepared("busi")
    same = records["benign_0433"], records["malignant_0145"]
    np.testing.assert_array_equal(same[0].frames, same[1].frames)
    assert same[0].group_id == same[1].group_id
    assert records["benign_0333"].group_id == records["malignant_0077"].group_id


def test_usss_counts(prepared):
    preparation, records, splits, lengths = prepared("usss")
    assert preparation["skipped"] == 0
    frames = Counter()
    for study_id, record in records.items():
        frames[study_id[:3], record.official_split] += lengths[study_id]
    assert frames == {
        ("rus", "train"): 306,
        ("rus", "test"): 114,
        ("aus", "train"): 11,
        ("aus", "test"): 7,
    }
    subjects = {r.group_id for s, r in records.items() if s.startswith("rus")}
    assert subjects == {f"rus_{letter}" for letter in "abcdefgij"}
    assert {r.group_id for s, r in records.items() if splits[s] == "test" and s.startswith("rus")} == {
        "rus_a",
        "rus_b",
        "rus_g",
    }
    masks = sum(p.count("annotations/") for r in records.values() for p in r.source.split(";"))
    assert masks == 34
    assert max(lengths.values()) == 8


def test_pocus_counts(prepared):
    preparation, records, _, lengths = prepared("pocus")
    clips = {s: r for s, r in records.items() if s.startswith("clip")}
    assert len(clips) == 75 and len(records) == 87
    assert Counter(r.condition for r in clips.values()) == {
        "normal": 42,
        "bacterial_pneumonia": 23,
        "covid19": 7,
        "viral_pneumonia": 3,
    }
    assert Counter(r.source.split("/")[1] for r in clips.values()) == {"convex": 67, "linear": 8}
    suffixes = Counter(Path(r.source).suffix.lower() for r in clips.values())
    assert suffixes == {".mp4": 33, ".avi": 21, ".mpeg": 16, ".gif": 3, ".mov": 2}
    assert preparation["kept"] + preparation["skipped"] == 375
    assert preparation["skipped_by_reason"] == {"media file absent from this copy": 288}
    assert all(record.report for record in records.values())
    # Thinned to 128 frames, a long clip has a low rate; what stays is its length in time.
    assert all(clip.fps and 1 < lengths[s] / clip.fps < 60 and clip.fps <= 60 for s, clip in clips.items())
    assert all(2 <= lengths[s] <= 128 for s in clips)
    assert {r.group_id for s, r in records.items() if "pat3image" in s} == {"charlotte_patient_3"}


@pytest.mark.slow  # 840 stills
def test_kmve_counts(prepared):
    preparation, records, splits, lengths = prepared("kmve")
    assert preparation["kept"] == 420
    assert preparation["kept"] + preparation["skipped"] == 5152 + 738
    assert preparation["skipped_by_reason"] == {"image absent from this copy": 5470}
    found = Counter((r.organ, r.official_split) for r in records.values())
    expected = {(o, s): n for o in ("thyroid", "breast", "liver") for s, n in (("train", 110), ("test", 30))}
    assert found == expected
    assert all(splits[s] == "test" for s, r in records.items() if r.official_split == "test")
    assert Counter(lengths.values()) == {2: 419, 1: 1}
    assert all(r.language == "zh" and r.report and not r.report_is_synthetic for r in records.values())


@pytest.mark.slow
def test_kmve_frames_are_those_of_the_report(prepared):
    _, records, _, _ = prepared("kmve")
    record = records[min(records)]
    folder = Path(os.environ["DILBERT_DATA_DIR"]) / "kmve" / "Data"
    picture = np.asarray(Image.open(folder / record.source.split(";")[0]).convert("L"))
    kept = record.frames[0] > 0
    np.testing.assert_array_equal(record.frames[0][kept], picture[kept])
