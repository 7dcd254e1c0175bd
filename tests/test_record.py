"""The record of a study, and what the builders share: grouping, masks, weak labels."""

import os

import numpy as np
import pytest
import source_folders
from PIL import Image

from dilbert_jax.data.grouping import group_near_duplicates, hash_image, merge_groups
from dilbert_jax.data.masks import describe_place, find_part_boxes, measure_lesion, read_mask_image
from dilbert_jax.data.reading import fit_for_storage, resolve_inside
from dilbert_jax.data.record import Record, Region, from_example, to_example
from dilbert_jax.data.weak_labels import label_report
from dilbert_jax.media import Clip, MediaError


def make_record(**changes):
    fields = {
        "study_id": "s",
        "group_id": "g",
        "frames": np.stack([source_folders.make_picture(i) for i in range(4)]),
        "organ": "liver",
        "condition": "cyst",
        "report": "肝囊肿",
        "language": "zh",
        "report_is_synthetic": False,
        "source": "a.png",
        "decoder": "none",
        "regions": (Region(1, (0.0, 0.25, 0.5, 1.0), "lesion"), Region(3, (0.0, 0.0, 1.0, 1.0), "liver")),
    }
    return Record(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"frames": np.zeros((0, 4, 4), np.uint8)}, "frames"),
        ({"frames": np.zeros((1, 4, 4), np.float32)}, "frames"),
        ({"group_id": ""}, "group_id"),
        ({"language": "de"}, "language"),
        ({"official_split": "val"}, "official_split"),
        ({"regions": (Region(0, (0.5, 0.0, 0.5, 1.0), "x"),)}, "regions.box"),
        ({"regions": (Region(4, (0.0, 0.0, 1.0, 1.0), "x"),)}, "regions.frame"),
    ],
)
def test_bad_record_is_refused_by_field(changes, field):
    with pytest.raises(ValueError, match=f"field '{field}'"):
        to_example(make_record(**changes))


def as_stored(record):
    """An example as a data source gives it, without writing files."""
    example = to_example(record)
    regions = example["regions"]
    return {
        **example,
        "frames": [f.getvalue() for f in example["frames"]],
        "regions": {key: [r[key] for r in regions] for key in ("frame", "box", "label")},
    }


def test_chosen_frames_keep_their_regions_and_order():
    record = make_record()
    back = from_example(as_stored(record), [3, 1, 0])
    np.testing.assert_array_equal(back.frames, record.frames[[3, 1, 0]])
    assert back.regions == (Region(0, (0, 0, 1, 1), "liver"), Region(1, (0, 0.25, 0.5, 1), "lesion"))
    with pytest.raises(ValueError, match=r"\[4\] asked of a clip of 4 frames"):
        from_example(as_stored(record), [4])


def test_absent_rate_and_spacing_come_back_as_none():
    back = from_example(as_stored(make_record()))
    assert back.fps is None and back.pixel_spacing_mm is None
    back = from_example(as_stored(make_record(fps=25.0, pixel_spacing_mm=(0.5, 0.25))))
    assert back.fps == 25.0 and back.pixel_spacing_mm == (0.5, 0.25)


# -- shared parts ----------------------------------------------------------------------------------


def test_storage_adapts_rate_and_spacing():
    frames = np.zeros((3, 800, 1280), np.uint8)
    stored = fit_for_storage(Clip(frames, 30.0, (0.1, 0.2), "none", "x", frame_index=(0, 10, 20)))
    assert stored.frames.shape == (3, 400, 640)
    assert stored.fps == pytest.approx(3.0)
    assert stored.pixel_spacing_mm == pytest.approx((0.2, 0.4))


def test_near_duplicates_survive_scaling_and_annotation():
    picture = source_folders.make_picture(5)
    scaled = np.asarray(Image.fromarray(picture).resize((300, 200)))
    marked = picture.copy()
    marked[40:44, 20:50] = 255
    others = [source_folders.make_picture(seed) for seed in range(20, 40)]
    hashes = np.stack([hash_image(p) for p in (picture, scaled, marked, *others)])
    assert group_near_duplicates(hashes) == [(0, 1), (0, 2), (1, 2)]


def test_groups_merge_through_chains():
    groups = merge_groups(list("abcde"), [("d", "c"), ("b", "c")])
    assert groups == {"a": "a", "b": "b", "c": "b", "d": "b", "e": "e"}


@pytest.mark.parametrize("name", ["../x.png", "/etc/passwd", "a/../../x.png", "", "a\\b.png", "a\x00.png"])
def test_paths_may_not_leave_the_folder(tmp_path, name):
    with pytest.raises(ValueError, match="media path"):
        resolve_inside(tmp_path, name)


def test_links_may_not_leave_the_folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    os.symlink(tmp_path / "secret.png", tmp_path / "data" / "link.png")
    with pytest.raises(ValueError, match="outside"):
        resolve_inside(tmp_path / "data", "link.png")


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P"])
def test_masks_of_any_mode_read_the_same(tmp_path, mode):
    mask = source_folders.ellipse(40, 50, (5, 10, 25, 40))
    source_folders.save(mask.astype(np.uint8) * 255, tmp_path / "m.png", mode)
    np.testing.assert_array_equal(read_mask_image(tmp_path / "m.png", (40, 50), "L") > 127, mask)
    with pytest.raises(MediaError, match="40 x 50 pixels for an image of 50 x 40"):
        read_mask_image(tmp_path / "m.png", (50, 40))


def test_transparent_mask_pixels_are_background(tmp_path):
    pixels = np.full((20, 20, 4), 255, np.uint8)
    pixels[:, 10:, 3] = 0
    Image.fromarray(pixels, "RGBA").save(tmp_path / "m.png")
    mask = read_mask_image(tmp_path / "m.png", (20, 20), "L") > 127
    assert mask[:, :10].all() and not mask[:, 10:].any()


def paint_lesion(box, inside, below=None, height=200, width=240):
    """A lesion of grey level ``inside`` in tissue of level 100, with a strip of level ``below`` under it."""
    frame = np.full((height, width), 100, np.uint8)
    mask = source_folders.ellipse(height, width, box)
    if below is not None:
        frame[box[2] :, box[1] : box[3]] = below
    frame[mask] = inside
    return frame, mask


@pytest.mark.parametrize(
    ("box", "inside", "below", "expected"),
    [
        ((40, 60, 80, 160), 40, None, {"oval", "parallel_orientation", "hypoechoic"}),
        ((40, 60, 100, 120), 4, 200, {"round", "anechoic", "posterior_enhancement"}),
        ((20, 100, 120, 150), 40, 20, {"oval", "taller_than_wide", "hypoechoic", "posterior_shadowing"}),
        ((40, 60, 80, 160), 180, None, {"oval", "parallel_orientation", "hyperechoic"}),
        ((40, 60, 80, 160), 100, None, {"oval", "parallel_orientation", "isoechoic"}),
    ],
)
def test_lesion_measurements(box, inside, below, expected):
    frame, mask = paint_lesion(box, inside, below)
    lesion = measure_lesion(frame, mask)
    assert set(lesion.descriptors) == expected
    scale = np.asarray([200, 240, 200, 240])
    np.testing.assert_allclose(np.asarray(lesion.box) * scale, box, atol=1)


def test_star_shape_is_irregular_and_a_dot_is_not_described():
    y, x = np.mgrid[:200, :240]
    angle = np.arctan2(y - 100, x - 120)
    star = np.hypot(y - 100, x - 120) < 35 + 20 * np.cos(5 * angle)
    assert "irregular" in measure_lesion(np.full((200, 240), 100, np.uint8), star).descriptors
    dot = np.zeros((200, 240), bool)
    dot[50:54, 60:64] = True
    assert measure_lesion(np.full((200, 240), 100, np.uint8), dot).descriptors == ()


def test_parts_and_places():
    mask = np.zeros((100, 100), bool)
    mask[5:25, 5:25] = mask[60:90, 70:95] = True
    mask[50, :] = True  # a seam one pixel thin
    assert find_part_boxes(mask, 50) == [(0.05, 0.05, 0.25, 0.25), (0.6, 0.7, 0.9, 0.95)]
    assert describe_place((0.0, 0.0, 0.2, 0.2)) == "upper left"
    assert describe_place((0.4, 0.4, 0.6, 0.6)) == "central"


@pytest.mark.parametrize(
    ("text", "organ", "condition"),
    [
        (source_folders.KMVE_NORMAL, "thyroid", "normal"),
        (source_folders.KMVE_NODULE, "thyroid", "nodule"),
        ("肝右叶可见一无回声结节，边界清晰，后壁回声增强。", "liver", "cyst"),
        ("肝脏实质回声细密增强，肝内外胆管未见扩张。", "liver", "diffuse_disease"),
        ("", "liver", ""),
    ],
)
def test_weak_labels_of_chinese_reports(text, organ, condition):
    assert label_report(text, "zh", organ)[0] == condition


@pytest.mark.parametrize(
    ("text", "language", "organ", "condition"),
    [
        ("Suspicious for malignancy.", "en", "liver", ""),
        ("肝癌可能性大。", "zh", "liver", ""),
        ("Possible pancreatitis. No free fluid, normal liver.", "en", "pancreas", ""),
        ("A lesion cannot be excluded; no stone.", "en", "kidney", ""),
        ("Liver lesion, 2 cm, hypoechoic, irregular.", "en", "liver", ""),
        ("乳腺内见低回声区，形态不规则，边界不清。未见肿大淋巴结。", "zh", "breast", ""),
        ("Spleen is enlarged. No effusion.", "en", "spleen", ""),
        ("胰腺显示不清，肝大小正常。", "zh", "pancreas", ""),
        ("胆囊未显示，肝内胆管未见扩张。", "zh", "gallbladder", ""),
        ("甲状腺右叶未探及，左叶大小正常。", "zh", "thyroid", ""),
        ("The liver is not normal. No ascites.", "en", "liver", ""),
        ("子宫肌瘤3cm。", "zh", "", ""),
        ("Uterine fibroid of 3 cm without calcification.", "en", "", ""),
        ("详见附图。", "zh", "", ""),
        ("Non-diagnostic study.", "en", "liver", ""),
        ("The liver is normal. No mass.", "zh", "liver", ""),  # the wrong language
        ("超声提示胆囊结石", "zh", "gallbladder", "stone"),
        ("Cholelithiasis.", "en", "gallbladder", "stone"),
        ("Hepatomegaly.", "en", "liver", "hepatomegaly"),
        ("Splenomegaly.", "en", "spleen", "splenomegaly"),
        ("No lesion.", "en", "liver", "normal"),
        ("脾不大。", "zh", "spleen", "normal"),
        ("甲状腺大小形态正常，内回声欠均匀。", "zh", "thyroid", "normal"),
    ],
)
def test_normal_is_only_what_a_report_calls_so(text, language, organ, condition):
    assert label_report(text, language, organ)[0] == condition


def test_absent_findings_are_not_weak_labels():
    condition, findings = label_report(
        "Thyroid of normal size. No nodule, no calcification.", "en", "thyroid"
    )
    assert condition == "normal"
    assert not {"nodule", "calcification"} & set(findings)
