"""Clips at the model's resolution: placement, even selection, boxes that follow, the store on disk."""

import hashlib
import json
import pickle

import numpy as np
import pytest
import source_folders
from small_export import make_small_export
from tiny import tiny_run_config

from dilbert_jax.clips import (
    Placement,
    find_sector,
    open_clip_store,
    place_on_canvas,
    select_evenly,
)
from dilbert_jax.data.record import Record, Region, decode_png, encode_png
from dilbert_jax.experiment import open_experiment


def make_example(record):
    """What TFDS hands over for a record: bytes for text and frames, regions as arrays."""
    regions = record.regions
    return {
        "study_id": record.study_id.encode(),
        "group_id": record.group_id.encode(),
        "frames": [encode_png(frame) for frame in record.frames],
        "organ": record.organ.encode(),
        "condition": record.condition.encode(),
        "findings": [f.encode() for f in record.findings],
        "report": record.report.encode(),
        "language": record.language.encode(),
        "report_is_synthetic": np.bool_(record.report_is_synthetic),
        "regions": {
            "frame": np.asarray([r.frame for r in regions], np.int32),
            "box": np.asarray([r.box for r in regions], np.float32).reshape(-1, 4),
            "label": [r.label.encode() for r in regions],
        },
    }


def make_record(name, frames, regions=()):
    return Record(
        study_id=name, group_id=f"group {name}", frames=frames, organ="liver", condition="cyst",
        findings=("anechoic",), report="肝内见无回声囊肿。", language="zh", report_is_synthetic=True,
        source="", decoder="", regions=regions,
    )  # fmt: skip


@pytest.fixture
def records(rng):
    long = rng.integers(20, 255, (12, 30, 60)).astype(np.uint8)
    regions = tuple(Region(frame, (0.2, 0.1, 0.7, 0.6), "lesion") for frame in (0, 3, 11))
    return [
        ("train", make_record("long", long, regions)),
        ("test", make_record("still", rng.integers(20, 255, (1, 50, 25)).astype(np.uint8))),
    ]


def open_store(folder, records, fingerprint="a", stored_frames=4):
    examples = ((split, make_example(record)) for split, record in records)
    return open_clip_store(
        examples, decode_png, folder=folder, fingerprint=fingerprint, size=32, stored_frames=stored_frames
    )


@pytest.mark.parametrize(("height", "width"), [(30, 60), (60, 30), (48, 48), (7, 200)])
def test_the_aspect_is_kept_and_the_rest_is_black(height, width):
    canvas, placement = place_on_canvas(np.full((2, height, width), 200, np.uint8), 32)
    assert canvas.shape == (2, 32, 32) and canvas.dtype == np.uint8
    rows, columns = np.flatnonzero(canvas[0].any(1)), np.flatnonzero(canvas[0].any(0))
    assert max(len(rows), len(columns)) == 32
    scale = 32 / max(height, width)
    assert (len(rows), len(columns)) == (round(height * scale), round(width * scale))
    assert set(np.unique(canvas)) <= {0, 200}
    sector = (rows[0] / 32, columns[0] / 32, (rows[-1] + 1) / 32, (columns[-1] + 1) / 32)
    assert find_sector(canvas) == sector
    np.testing.assert_allclose(placement.to_canvas(np.asarray([0.0, 0.0, 1.0, 1.0])), sector)
    assert abs((rows[0]) - (31 - rows[-1])) <= 1 and abs(columns[0] - (31 - columns[-1])) <= 1


def test_boxes_return_from_the_canvas(rng):
    low = rng.uniform(0, 0.5, (50, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.01, 0.5, (50, 2))], -1)
    for shape in ((30, 60), (61, 17)):
        _, placement = place_on_canvas(np.zeros((1, *shape), np.uint8), 32)
        np.testing.assert_allclose(placement.to_frame(placement.to_canvas(boxes)), boxes, atol=1e-12)
    outside = Placement(0.25, 0.0, 0.5, 1.0).to_frame(np.asarray([0.0, 0.1, 0.9, 0.2]))
    np.testing.assert_allclose(outside, [0.0, 0.1, 1.0, 0.2])


def test_boxes_follow_the_pixels_onto_the_canvas():
    frame = np.zeros((1, 40, 80), np.uint8)
    frame[0, 10:20, 40:72] = 255
    canvas, placement = place_on_canvas(frame, 40)
    box = placement.to_canvas(np.asarray([10 / 40, 40 / 80, 20 / 40, 72 / 80])) * 40
    np.testing.assert_allclose(box, [15, 20, 20, 36], atol=1e-9)
    assert canvas[0, 16:19, 21:35].min() > 200
    canvas[0, 14:21, 19:37] = 0
    assert not canvas.any()


def test_a_black_clip_has_the_whole_canvas_as_sector():
    assert find_sector(np.zeros((2, 8, 8), np.uint8)) == (0.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize("available", [1, 3, 4, 5, 12, 127, 1000])
@pytest.mark.parametrize("wanted", [1, 4, 12])
def test_selection_is_even_rising_and_inside(available, wanted):
    chosen = select_evenly(available, wanted)
    assert len(chosen) == min(available, wanted)
    assert chosen[0] >= 0 and chosen[-1] < available
    steps = np.diff(chosen)
    assert (steps >= 1).all()
    if available <= wanted:
        np.testing.assert_array_equal(chosen, np.arange(available))
    else:
        assert np.ptp(steps) <= 1 if len(steps) else chosen[0] == available // 2
        assert abs(chosen[0] - (available - 1 - chosen[-1])) <= 1


def test_the_store_keeps_what_the_examples_say(tmp_path, records):
    store = open_store(tmp_path, records)
    assert len(store) == 2
    long, still = store.studies
    assert (long.study_id, long.group_id, long.split, still.split) == ("long", "group long", "train", "test")
    assert (long.organ, long.condition, long.findings) == ("liver", "cyst", ("anechoic",))
    assert (long.report, long.language, long.report_is_synthetic) == ("肝内见无回声囊肿。", "zh", True)
    assert long.frame_index == (1, 4, 7, 10) and still.frame_index == (0,)
    expected, placement = place_on_canvas(records[0][1].frames[[1, 4, 7, 10]], 32)
    np.testing.assert_array_equal(store.frames(0), expected)
    assert store.frames(1).shape == (1, 32, 32)
    # Boxes of frames 0, 3 and 11 move to the nearest kept frames 1, 4 and 10.
    assert long.region_frames == (0, 1, 3) and long.region_labels == ("lesion",) * 3
    np.testing.assert_allclose(
        long.region_boxes, np.tile(placement.to_canvas(np.asarray([0.2, 0.1, 0.7, 0.6])), (3, 1)), atol=1e-6
    )
    assert still.region_boxes == ()


def test_a_reopened_store_is_identical_and_reads_no_example(tmp_path, records):
    first = open_store(tmp_path, records)

    def no_examples():
        raise AssertionError("the store was there")
        yield

    again = open_clip_store(
        no_examples(), decode_png, folder=tmp_path, fingerprint="a", size=32, stored_frames=4
    )
    assert again.studies == first.studies
    np.testing.assert_array_equal(again.pixels, first.pixels)
    np.testing.assert_array_equal(again.offsets, first.offsets)


def test_a_pickled_store_maps_its_file_anew(tmp_path, records):
    store = open_store(tmp_path, records)
    again = pickle.loads(pickle.dumps(store))
    assert isinstance(again.pixels, np.memmap) and again.studies == store.studies
    for index in range(len(store)):
        np.testing.assert_array_equal(again.frames(index), store.frames(index))


def test_other_data_or_sizes_have_their_own_store(tmp_path, records):
    first = open_store(tmp_path, records)
    more = open_store(tmp_path, records, stored_frames=6)
    other = open_store(tmp_path, records[:1], fingerprint="b")
    assert (len(first.frames(0)), len(more.frames(0)), len(other)) == (4, 6, 1)


@pytest.mark.parametrize("left", ["pixels only", "broken pixels", "temporary files", "nothing"])
def test_a_half_written_store_is_built_anew(tmp_path, records, left):
    whole = open_store(tmp_path, records)
    studies, pixels = whole.studies, np.array(whole.pixels)
    (folder,) = tmp_path.iterdir()
    (folder / "studies.json").unlink()
    if left == "broken pixels":
        (folder / "pixels.npy").write_bytes(b"\x93NUMPY")
    elif left == "temporary files":
        (folder / "pixels.npy").rename(folder / "pixels.1.tmp")
    elif left == "nothing":
        (folder / "pixels.npy").unlink()
    again = open_store(tmp_path, records)
    assert again.studies == studies
    np.testing.assert_array_equal(again.pixels, pixels)


def test_a_build_that_fails_leaves_no_store_behind(tmp_path, records):
    def broken():
        yield "train", make_example(records[0][1])
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        open_clip_store(broken(), decode_png, folder=tmp_path, fingerprint="a", size=32, stored_frames=4)
    assert len(open_store(tmp_path, records)) == 2


def test_corrected_reports_and_labels_reach_the_next_run(tmp_path):
    export = make_small_export(tmp_path / "export")
    config = tiny_run_config(name="ahjuui", manual_dir=str(export), data_dir=str(tmp_path / "prepared"))
    before = open_experiment(config, tmp_path / "run1").store
    lines = [json.loads(line) for line in (export / "manifest.jsonl").read_text("utf-8").splitlines()]
    lines[0].update(report="Liver cyst, corrected.", condition="cyst", findings=["hypoechoic"])
    (export / "manifest.jsonl").write_text(
        "\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8"
    )
    after = open_experiment(config, tmp_path / "run2").store
    by_id = {study.study_id: study for study in after.studies}
    corrected = by_id["study00"]
    assert (corrected.report, corrected.condition, corrected.findings) == (
        "Liver cyst, corrected.",
        "cyst",
        ("hypoechoic",),
    )
    assert {s.study_id: s for s in before.studies if s.study_id != "study00"} == {
        name: study for name, study in by_id.items() if name != "study00"
    }


def test_reports_that_are_cut_are_counted(tmp_path, caplog):
    export = make_small_export(tmp_path / "export")
    lines = [json.loads(line) for line in (export / "manifest.jsonl").read_text("utf-8").splitlines()]
    for line, report in zip(lines, ("; " * 30, "; " * 31, "; " * 40), strict=False):
        line["report"] = report  # with [CLS] and [SEP] 32, 33 and 42 word pieces
    for line in lines[3:]:
        line["report"] = "No mass."
    (export / "manifest.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    config = tiny_run_config(name="ahjuui", manual_dir=str(export), data_dir=str(tmp_path / "prepared"))
    store = open_experiment(config, tmp_path / "run").store
    training = sum(study.split == "train" for study in store.studies)
    assert config.data.max_tokens == 32
    (warning,) = [r.getMessage() for r in caplog.records if "longer than" in r.getMessage()]
    assert warning.startswith(f"ahjuui: 2 of {training} training reports are longer than data.max_tokens")


def test_terms_of_ones_own_reach_the_preparation(tmp_path):
    export = make_small_export(tmp_path / "export")
    terms = tmp_path / "terms.json"
    terms.write_text('{"schema": "dilbert-jax/knowledge/1"}')
    config = tiny_run_config(name="ahjuui", manual_dir=str(export), data_dir=str(tmp_path / "prepared"))
    assert open_experiment(config, tmp_path / "run1").dataset["graph_fingerprint"] == ""
    config.data.graph_file = str(terms)
    fingerprint = hashlib.sha256(terms.read_bytes()).hexdigest()
    assert open_experiment(config, tmp_path / "run2").dataset["graph_fingerprint"] == fingerprint


def test_classes_that_no_training_study_has_are_named(tmp_path, caplog):
    source_folders.make_usss(tmp_path / "usss")
    config = tiny_run_config(
        name="usss", manual_dir=str(tmp_path / "usss"), data_dir=str(tmp_path / "prepared")
    )
    open_experiment(config, tmp_path / "run")
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    (warning,) = [w for w in warnings if "longer than" not in w]
    assert warning.startswith("usss: no training study has the organ liver, ") and "data.folds" in warning
