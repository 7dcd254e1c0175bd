"""Every builder on a generated folder of its layout: each known trap, each kind of bad file."""

import importlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pydicom.examples
import pytest
import source_folders
from PIL import Image

from dilbert_jax import datasets
from dilbert_jax.data.grouping import group_near_duplicates, hash_image, merge_groups
from dilbert_jax.data.masks import describe_place, find_part_boxes, measure_lesion, read_mask_image
from dilbert_jax.data.reading import MAX_STORED_FRAMES, fit_for_storage, resolve_inside
from dilbert_jax.data.record import EncodedFrames, Record, Region, check, from_example, to_example
from dilbert_jax.data.weak_labels import label_report
from dilbert_jax.knowledge import load_graph
from dilbert_jax.media import Clip, MediaError

SPLITS = ("train", "validation", "test")


def make_builder(name, manual_dir, data_dir, strict=False):
    module = importlib.import_module(f"dilbert_jax.data.{name}.{name}_dataset_builder")
    return module.Builder(manual_dir=manual_dir, data_dir=data_dir, strict=strict, progress=False)


def prepare(name, tmp_path, strict=False):
    """Prepares tmp_path/source and returns (builder, records by study id, split by study id)."""
    builder = make_builder(name, tmp_path / "source", tmp_path / "prepared", strict)
    builder.download_and_prepare()
    records, splits = {}, {}
    for split in SPLITS:
        for example in builder.as_data_source(split, decoders={"frames": EncodedFrames()}):
            record = from_example(example)
            check(record)
            records[record.study_id], splits[record.study_id] = record, split
    owners = {}
    for study_id, record in records.items():
        assert owners.setdefault(record.group_id, splits[study_id]) == splits[study_id]
    return builder, records, splits


def reasons(builder):
    return builder.preparation()["skipped_by_reason"]


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


# -- record ----------------------------------------------------------------------------------------


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


# -- BUSI ------------------------------------------------------------------------------------------


def test_busi_regions_groups_and_labels(tmp_path, source):
    source_folders.make_busi(source)
    builder, records, splits = prepare("busi", tmp_path)
    assert len(records) == 10 and builder.preparation()["skipped"] == 0
    several = records["benign_0001"]
    assert [r.label for r in several.regions] == ["lesion", "lesion"]
    np.testing.assert_allclose(several.regions[0].box, (20 / 96, 40 / 128, 50 / 96, 90 / 128), atol=0.01)
    assert records["benign_0002"].regions[0].box == several.regions[0].box  # its mask is RGBA
    assert records["normal_0001"].regions == () and records["normal_0001"].condition == "normal"
    assert several.group_id == records["malignant_0003"].group_id
    assert splits["benign_0001"] == splits["malignant_0003"]
    assert len({r.group_id for r in records.values()}) == 9
    assert all(r.report_is_synthetic and r.organ == "breast" for r in records.values())
    assert "hypoechoic" in several.findings and "ypoechoic" in several.report
    assert several.source.split(";")[0] == "benign/benign (1).png"


def test_busi_frames_keep_their_geometry(tmp_path, source):
    root = source_folders.make_busi(source)
    _, records, _ = prepare("busi", tmp_path)
    picture = np.asarray(Image.open(root / "benign" / "benign (3).png").convert("L"))
    stored = records["benign_0003"].frames[0]
    kept = stored > 0
    assert stored.shape == picture.shape
    np.testing.assert_array_equal(stored[kept], picture[kept])


def test_busi_without_masks_is_one_clear_error(tmp_path, source):
    root = source_folders.make_busi(source)
    for path in root.rglob("*_mask*.png"):
        path.unlink()
    with pytest.raises(
        ValueError, match=r"busi: .*source does not hold .*; found 10 images and not one mask"
    ):
        prepare("busi", tmp_path)
    assert not list((tmp_path / "prepared").rglob("*.array_record*"))


def test_busi_bad_files_are_skipped_with_reasons(tmp_path, source):
    root = source_folders.make_busi(source)
    (root / "malignant" / "malignant (1)_mask.png").unlink()
    (root / "malignant" / "malignant (2).png").write_bytes(b"")
    source_folders.save(np.full((96, 128), 255, np.uint8), root / "normal" / "normal (3)_mask.png", "1")
    source_folders.save(np.zeros((10, 10), np.uint8), root / "benign" / "benign (4)_mask.png", "1")
    (root / "benign" / "benign (99)_mask.png").write_bytes(b"x")
    (root / "benign" / "notes.PNG").write_bytes(b"x")
    builder, records, _ = prepare("busi", tmp_path)
    assert len(records) == 6
    found = "\n".join(reasons(builder))
    for reason in (
        "lesion image without a mask",
        "is empty (0 bytes)",
        "of a normal image is not empty",
        "mask of 10 x 10 pixels for an image of 96 x 128",
        "mask whose image is absent",
        "file name is not like",
    ):
        assert reason in found
    assert builder.preparation()["skipped"] == 6


def test_strict_mode_stops_at_the_first_bad_study(tmp_path, source):
    root = source_folders.make_busi(source)
    (root / "malignant" / "malignant (1)_mask.png").unlink()
    with pytest.raises(ValueError, match=r"malignant \(1\).png: lesion image without a mask"):
        prepare("busi", tmp_path, strict=True)


def test_wrong_folder_says_what_was_expected_and_found(tmp_path, source):
    (source / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"busi: .* does not hold Dataset_BUSI_with_GT.*; found holiday.jpg"):
        prepare("busi", tmp_path)
    with pytest.raises(ValueError, match=r"kmve: .*none does not exist; it must hold Data/new_"):
        make_builder("kmve", tmp_path / "none", tmp_path / "p").download_and_prepare()
    with pytest.raises(
        ValueError, match="pocus: no folder given; manual_dir must hold data/dataset_metadata"
    ):
        make_builder("pocus", None, tmp_path / "p").download_and_prepare()


def test_split_whose_only_study_is_bad_is_cut_anew(tmp_path, source):
    root = source_folders.make_busi(source)
    _, _, splits = prepare("busi", tmp_path)
    (only,) = [name for name, split in splits.items() if split == "test"]
    label, number = only.split("_")
    mask = root / label / f"{label} ({int(number)})_mask.png"
    source_folders.save(np.zeros((5, 5), np.uint8), mask, "1")
    builder = make_builder("busi", source, tmp_path / "again")
    builder.download_and_prepare()
    assert builder.preparation()["skipped"] == 1 and builder.preparation()["kept"] == 9
    assert builder.preparation()["splits"]["test"]["studies"] >= 1


def test_set_whose_studies_are_all_bad_is_an_error(tmp_path, source):
    root = source_folders.make_busi(source)
    for path in root.rglob("*_mask.png"):
        source_folders.save(np.zeros((5, 5), np.uint8), path, "1")
    with pytest.raises(ValueError, match=r"busi: .*cannot fill 3 splits.*mask of 5 x 5 pixels"):
        prepare("busi", tmp_path)


def test_preparation_is_reproducible_and_described(tmp_path, source):
    source_folders.make_busi(source)
    first = make_builder("busi", source, tmp_path / "a")
    first.download_and_prepare()
    second = make_builder("busi", source, tmp_path / "b")
    second.download_and_prepare()
    assert first.preparation() == second.preparation()
    assert sum(s["conditions"].get("normal", 0) for s in first.preparation()["splits"].values()) == 3
    card = (tmp_path / "a/busi/1.0.0/DATASET_CARD.md").read_text(encoding="utf-8")
    assert "Licence: CC BY 4.0" in card and "| lesion | 8 |" in card and "Kept 10 studies" in card
    assert "tmp" not in json.dumps(first.preparation()).replace("timestamp", "")


# -- USSS ------------------------------------------------------------------------------------------


def test_usss_windows_masks_and_official_splits(tmp_path, source):
    source_folders.make_usss(source)
    builder, records, splits = prepare("usss", tmp_path)
    sizes = {k: len(r.frames) for k, r in records.items() if k.startswith("rus")}
    assert sizes == {"rus_c_0001": 8, "rus_c_0009": 1, "rus_c_0012": 1, "rus_d_0001": 3, "rus_a_0001": 3}
    assert {k for k, s in splits.items() if s == "test"} == {"rus_a_0001", "aus_ct1_0009"}
    masked = records["rus_a_0001"]
    assert masked.organ == "liver" and masked.condition == ""
    assert [(r.frame, r.label) for r in masked.regions] == [(1, "liver"), (1, "kidney")]
    np.testing.assert_allclose(masked.regions[0].box, (10 / 96, 20 / 128, 60 / 96, 80 / 128), atol=0.01)
    assert records["rus_c_0001"].organ == "abdomen" and records["aus_ct2_0001"].group_id == "aus_ct2"
    assert reasons(builder) == {
        "mask whose image is absent": 1,
        "training image identical to one of the official test split": 1,
    }


def test_usss_training_ct_with_test_images_is_left_out(tmp_path, source):
    root = source_folders.make_usss(source)
    source_folders.save(source_folders.make_picture(123), root / "AUS/images/train/ct1-3.png", "RGB")
    builder, records, _ = prepare("usss", tmp_path)
    assert "aus_ct1_0003" not in records
    assert reasons(builder)["training image of a subject of the official test split"] == 1


def test_usss_identical_images_join_the_groups_of_their_subjects(tmp_path, source):
    root = source_folders.make_usss(source)
    (root / "RUS/images/train/d9.jpg").write_bytes((root / "RUS/images/train/c5.jpg").read_bytes())
    _, records, splits = prepare("usss", tmp_path)
    assert records["rus_d_0001"].group_id == records["rus_c_0001"].group_id
    assert splits["rus_d_0001"] == splits["rus_c_0001"]


def test_usss_nearest_colour_takes_every_tint():
    from dilbert_jax.data.usss.usss_dataset_builder import MASK_COLOURS, label_colours

    mask = np.asarray([[(253, 255, 0), (10, 0, 10), (90, 8, 104), (240, 240, 240), (10, 10, 10)]], np.uint8)
    names = ["background", *MASK_COLOURS]
    assert [names[i] for i in label_colours(mask)[0]] == [
        "kidney",
        "background",
        "liver",
        "bone",
        "background",
    ]


# -- POCUS -----------------------------------------------------------------------------------------


def test_pocus_join_labels_comments_and_groups(tmp_path, source):
    source_folders.make_pocus(source)
    builder, records, _ = prepare("pocus", tmp_path)
    assert reasons(builder) == {"media file absent from this copy": 1}
    clip = records["clip_reg_pat1image_1"]
    assert clip.condition == "normal" and clip.findings == ("a_lines",)
    assert len(clip.frames) == 5 and clip.fps == pytest.approx(10.0)  # the table says 210 frames
    assert clip.report == "normal lung. healthy." and not clip.report_is_synthetic
    assert clip.group_id == records["clip_reg_pat1image_2"].group_id
    silent = records["clip_reg_pat1image_2"]
    assert silent.report_is_synthetic and "normal lung" in silent.report
    pneumonia = records["clip_pneu_northumbria_0409_set1_vid1"]
    assert pneumonia.condition == "bacterial_pneumonia" and pneumonia.report == "Effusion."
    assert pneumonia.findings == ("effusion", "consolidation")
    still = records["still_vir_liftl_case2_still"]
    assert len(still.frames) == 1 and still.fps is None and still.condition == "viral_pneumonia"


def test_pocus_licence_none_is_text(tmp_path):
    from dilbert_jax.data.pocus.pocus_dataset_builder import read_metadata

    rows = read_metadata(source_folders.make_pocus(tmp_path) / "dataset_metadata.csv")
    assert len(rows) == 6
    assert rows["Reg_pat1Image_1"][0]["License"] == "None"
    assert rows["Cov-Atlas+(45)"][0]["License"] == ""


@pytest.mark.parametrize(
    ("names", "same"),
    [
        (("Reg_pat1Image_132943", "Reg_pat1Image_133232"), True),
        (("Reg_pat1Image_132943", "Reg_pat2Image_133824"), False),
        (("Pneu_northumbria_0409_set3_vid1", "Reg_northumbria_0409_set3_vid2"), True),
        (("Pneu_northumbria_0409_set3_vid1", "Pneu_northumbria_0409_set2_vid1"), False),
        (("Pneu_liftl_pneu_case3_clip3", "Reg_liftl_pneucase3_clip1"), True),
        (("Vir_liftl_H1N1_case2_clip2", "Reg_liftl_case3_clip2"), False),
        (("Cov-Atlas+(45)", "Reg-Atlas-alines"), True),
        (("Reg_Image_181206_crop", "Reg_Image_182340_crop"), True),
        (("Pneu_Avi_Video_001", "Reg_Avi_lung-sliding-2"), True),
    ],
)
def test_pocus_groups(names, same):
    from dilbert_jax.data.pocus.pocus_dataset_builder import find_group

    assert (find_group(names[0]) == find_group(names[1])) is same


def test_pocus_bad_rows_and_files(tmp_path, source):
    data = source_folders.make_pocus(source)
    table = data / "dataset_metadata.csv"
    table.write_text(table.read_text().replace("COVID-19,,,", "Covid-twenty,,,"))
    (data / "pocus_videos/convex/Stranger.mp4").write_bytes(b"x")
    (data / "pocus_images/convex/Vir_liftl_case2_still.JPG").write_bytes(b"\xff\xd8\xff broken")
    (data / "pocus_videos/convex/Reg_more_1.gif").write_bytes(
        (data / "pocus_videos/convex/Reg_pat1Image_1.gif").read_bytes()
    )
    with table.open("a") as file:
        file.write("Reg_more_1,regular,,0,0,0,0,0,0,1,,,,5\n")
    builder = make_builder("pocus", source, tmp_path / "prepared")
    studies = list(builder._studies(source))
    assert {s.study_id for s in studies} >= {"clip_reg_more_1", "still_vir_liftl_case2_still"}
    with pytest.raises(MediaError, match=r"Vir_liftl_case2_still.JPG"):
        next(s for s in studies if s.study_id.startswith("still")).read()
    skipped = dict(builder._skips)
    assert skipped["pocus_videos/convex/Stranger.mp4"] == "no row in dataset_metadata.csv"
    assert "'Covid-twenty'" in skipped["pocus_videos/linear/Cov-Atlas+(45).gif"]
    table.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"columns \['Filename', .* are absent"):
        list(builder._studies(source))


# -- KMVE ------------------------------------------------------------------------------------------


def test_kmve_reports_splits_and_absent_images(tmp_path, source):
    source_folders.make_kmve(source)
    builder, records, splits = prepare("kmve", tmp_path)
    assert reasons(builder) == {"image absent from this copy": 3}
    assert {k for k, s in splits.items() if s == "test"} == {"thyroid_11", "thyroid_12"}
    assert len(records) == 6 and {len(r.frames) for k, r in records.items() if k != "thyroid_2"} == {2}
    assert len(records["thyroid_2"].frames) == 1  # lists one image twice
    nodule = records["thyroid_1"]
    assert nodule.condition == "nodule" and {"nodule", "hypoechoic"} <= set(nodule.findings)
    assert nodule.report == source_folders.KMVE_NODULE and nodule.language == "zh"
    assert not nodule.report_is_synthetic
    assert records["thyroid_4"].condition == "normal"


def test_kmve_png_among_jpegs_and_shared_images(tmp_path, source):
    data = source_folders.make_kmve(source)
    source_folders.save(source_folders.make_picture(3), data / "Thyroid_report/3_1.jpeg.png", "RGB")
    os.replace(data / "Thyroid_report/3_1.jpeg.png", data / "Thyroid_report/3_1.jpeg")
    (data / "Thyroid_report/1_1.jpeg").write_bytes((data / "Thyroid_report/11_1.jpeg").read_bytes())
    builder, records, _ = prepare("kmve", tmp_path)
    assert "PNG" in records["thyroid_3"].decoder and len(records["thyroid_3"].frames) == 2
    assert "thyroid_1" not in records
    assert reasons(builder)["training report that shares an image with the official val part"] == 1


def test_kmve_bad_index(tmp_path, source):
    data = source_folders.make_kmve(source)
    index = json.loads((data / "new_Thyroid2.json").read_text(encoding="utf-8-sig"))
    index["train"] += [
        {"uid": 90, "finding": " ", "image_path": ["1_1.jpeg"], "split": "train"},
        {"uid": 91, "finding": "x", "image_path": ["../../1_1.jpeg"], "split": "train"},
        {"uid": 92, "finding": "x", "image_path": ["1_1.jpeg"], "split": "dev"},
        "nonsense",
    ]
    (data / "new_Thyroid2.json").write_text(json.dumps(index), encoding="utf-8")
    builder, records, _ = prepare("kmve", tmp_path)
    assert len(records) == 6
    found = "\n".join(reasons(builder))
    assert "'finding' holds no text" in found and "leads outside" in found and "'dev'" in found
    (data / "new_Thyroid2.json").write_text("{broken")
    with pytest.raises(ValueError, match=r"new_Thyroid2.json: not valid UTF-8 JSON"):
        list(builder._studies(source))


# -- CLUST -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", ["TrainingSet", "Training"])
def test_clust_layouts_and_landmarks(tmp_path, source, training):
    source_folders.make_clust(source, training)
    _, records, _ = prepare("clust", tmp_path)
    assert set(records) == {"cil-01", "eth-01-1", "eth-01-2", "med-02-1"}
    assert records["eth-01-1"].group_id == records["eth-01-2"].group_id == "eth-01"
    for record in records.values():
        assert record.organ == "liver" and len(record.frames) == 6 and record.fps is None
        assert [r.frame for r in record.regions] == [0, 2, 5]  # annotations count from 1
        ymin, xmin, ymax, xmax = record.regions[0].box
        assert (ymin + ymax) / 2 * 96 == pytest.approx(34, abs=0.01)
        assert (xmin + xmax) / 2 * 128 == pytest.approx(41.5, abs=0.01)
        assert record.findings == ("respiratory_motion",)
    assert records["cil-01"].pixel_spacing_mm == pytest.approx((0.4, 0.5))
    assert "8 mm" in records["cil-01"].report  # 20 pixels of 0.4 mm
    assert records["med-02-1"].pixel_spacing_mm is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("frame x y", "line 2: 'frame x y'"),
        ("3 10", "line 2: '3 10'"),
        ("2.5 1 1", "line 2"),
        ("9 10 10", "frame 9 has no image"),
        ("2 500 10", r"frame 2 has \(500, 10\), outside"),
    ],
)
def test_clust_bad_annotation_skips_one_sequence(tmp_path, source, line, message):
    root = source_folders.make_clust(source)
    (root / "CIL-01/Annotation/CIL-01_2.txt").write_text(f"1 5 5\n{line}\n")
    builder = make_builder("clust", source, tmp_path / "prepared")
    studies = {s.study_id: s for s in builder._studies(source)}
    with pytest.raises(ValueError, match=message):
        studies["cil-01"].read()
    assert len(studies["med-02-1"].read().regions) == 3


def test_clust_window_is_consecutive_and_holds_most_annotations():
    from dilbert_jax.data.clust.clust_dataset_builder import Landmark, choose_window

    points = {n: (1.0, 1.0) for n in (1, *range(300, 400, 10))}
    window = choose_window(list(range(1, 1001)), [Landmark("a", points)])
    assert len(window) == MAX_STORED_FRAMES and window == list(range(window[0], window[0] + 128))
    assert window[0] <= 300 and window[-1] >= 390


# -- AHJUUI ----------------------------------------------------------------------------------------


def test_export_studies_groups_and_privacy(tmp_path, source):
    source_folders.make_export(source)
    _builder, records, _ = prepare("ahjuui", tmp_path)
    assert len(records) == 8 and len({r.group_id for r in records.values()}) == 4
    assert [len(records[f"s{i}"].frames) for i in range(3)] == [1, 2, 1]
    assert records["s1"].regions[0].frame == 1 and records["s1"].regions[0].label == "lesion"
    assert records["s1"].condition == "nodule" and records["s0"].condition == "normal"
    stored = b"".join(p.read_bytes() for p in (tmp_path / "prepared").rglob("*") if p.is_file())
    assert b"Private" not in stored


def test_export_stated_labels_and_splits_come_first(tmp_path, source):
    manifest = source_folders.make_export(source)
    studies = [json.loads(line) for line in manifest.read_text().splitlines()]
    for i, study in enumerate(studies):
        study["split"] = ("train", "train", "validation", "test")[i // 2]
    studies[1] |= {"condition": "malignant_lesion", "findings": ["spiculated_margin"]}
    del studies[3]["organ"]
    manifest.write_text("\n".join(json.dumps(s) for s in studies))
    _, records, splits = prepare("ahjuui", tmp_path)
    assert [splits[f"s{i}"] for i in range(8)] == [s["split"] for s in studies]
    assert (records["s1"].condition, records["s1"].findings) == ("malignant_lesion", ("spiculated_margin",))
    assert records["s3"].organ == "thyroid"  # read from the report


BAD_LINES = [
    ("{not json", "not valid JSON"),
    ("[1, 2]", "a list instead of a JSON object"),
    ({"study_id": None}, "'study_id' is a NoneType; expected text"),
    ({"study_id": "s0"}, "'study_id' is that of line 1"),
    ({"study_id": " ｓ0 "}, "'study_id' is that of line 1"),
    ({"patient_id": ""}, "'patient_id' is empty"),
    ({"patient_id": " \u3000"}, "'patient_id' is empty"),
    ({"patient_id": 10023457.5}, "'patient_id' is a float; expected text or a whole number"),
    ({"patient_id": True}, "'patient_id' is a bool"),
    ({"patient_id": "p\ud800"}, "'patient_id' holds half a character"),
    ({"study_id": "\udc00"}, "'study_id' holds half a character"),
    ({"report": "cyst \ud800"}, "'report' holds half a character"),
    ({"media": "a.png"}, "'media' is a str; expected a list"),
    ({"findings": "cyst of John Doe"}, "'findings' is a str; expected a list"),
    ({"media": ["../secret.png"]}, "leads outside"),
    ({"media": ["gone.png"]}, "no file 'gone.png'"),
    ({"language": "de"}, "'language' is 'de'"),
    ({"organ": "toe"}, "'organ': 'toe' is no organ"),
    ({"findings": ["liver"]}, "'findings': 'liver' is no finding"),
    ({"split": "val"}, "'split' is 'val'"),
    ({"reprot": "x"}, "unknown field 'reprot'"),
    ({"regions": [{"media": 0, "frame": 0, "box": [0, 0, 2, 1], "organ": "liver"}]}, r"box \[0, 0, 2, 1\]"),
    ({"regions": [{"media": 3, "frame": 0, "box": [0, 0, 1, 1], "organ": "liver"}]}, "media 3 is no index"),
    ({"regions": [{"media": 0, "frame": 7, "box": [0, 0, 1, 1], "organ": "liver"}]}, "beyond the clip"),
]


@pytest.mark.parametrize(("change", "message"), BAD_LINES)
def test_export_bad_line_is_named_and_skipped(tmp_path, source, change, message):
    manifest = source_folders.make_export(source)
    lines = manifest.read_text().splitlines()
    if isinstance(change, dict):
        study = {**json.loads(lines[6]), "study_id": "bad", "patient_id": "other"}
        change = json.dumps({**study, **change})
    lines.insert(6, change)
    manifest.write_text("\n".join(lines))
    (tmp_path / "secret.png").write_bytes(b"x")
    builder = make_builder("ahjuui", source, tmp_path / "prepared")
    studies = list(builder._studies(source))
    if len(studies) == 9:  # only reading the media shows it
        with pytest.raises(ValueError, match=message):
            studies[6].read()
        return
    assert len(studies) == 8
    ((name, reason),) = builder._skips
    assert name == "manifest.jsonl line 7"
    with pytest.raises(ValueError, match=message):
        raise ValueError(reason)
    with pytest.raises(ValueError, match=r"manifest.jsonl line 7: .*strict mode"):
        prepare("ahjuui", tmp_path, strict=True)


@pytest.mark.parametrize(
    ("text", "language", "organ"),
    [
        ("双肾结石", "zh", "kidney"),
        ("胆囊结石", "zh", "gallbladder"),
        ("肝左叶囊肿", "zh", "liver"),
        ("肝肾回声对比增强", "zh", "liver"),  # a finding of the liver
        ("右肾上腺占位", "zh", ""),  # beside the kidney
        ("肺炎，未见积液", "zh", "lung"),
        ("胆囊结石。肝大小正常", "zh", "liver"),  # an organ of its own comes first
        ("Kidney stone", "en", "kidney"),
        ("Fatty liver", "en", "liver"),
        ("Renal pelvis dilated, hydronephrosis", "en", "kidney"),
        ("Cholelithiasis", "en", ""),
    ],
)
def test_export_organ_inside_a_longer_name(text, language, organ):
    from dilbert_jax.data.ahjuui.ahjuui_dataset_builder import find_labels

    assert find_labels({"report": text, "language": language}, load_graph())[0] == organ


def test_export_studies_without_an_organ_are_counted(tmp_path, source, caplog):
    manifest = source_folders.make_export(source)
    studies = [json.loads(line) for line in manifest.read_text().splitlines()]
    for study in studies[:3]:
        study["report"] = "详见附图。"
        del study["organ"]
    manifest.write_text("\n".join(json.dumps(s) for s in studies))
    prepare("ahjuui", tmp_path)
    (warning,) = [r.getMessage() for r in caplog.records if "organ" in r.getMessage()]
    assert warning.startswith("ahjuui: 3 of 8 studies have no organ")


def test_export_of_terms_of_ones_own(tmp_path, source, monkeypatch):
    monkeypatch.delenv("DILBERT_DATA_DIR", raising=False)
    manifest = source_folders.make_export(source)
    studies = [json.loads(line) for line in manifest.read_text().splitlines()]
    studies[0] |= {"organ": "uterus", "report": "子宫肌瘤3cm。"}
    studies[1] |= {"condition": "myoma", "organ": "uterus", "regions": []}
    studies[2]["report"] = "肌瘤3cm。"
    manifest.write_text("\n".join(json.dumps(s) for s in studies))
    terms = tmp_path / "terms.json"
    content = {
        "schema": "dilbert-jax/knowledge/1",
        "concepts": [
            {"id": "uterus", "type": "organ", "en": ["uterus"], "zh": ["子宫"]},
            {"id": "myoma", "type": "condition", "en": ["myoma"], "zh": ["子宫肌瘤", "肌瘤"]},
        ],
        "relations": [{"source": "uterus", "type": "shows", "target": ["normal", "myoma"]}],
    }
    terms.write_text(json.dumps(content), "utf-8")

    def labels(**options):
        records = datasets.load_records(
            "ahjuui", None, source, tmp_path / "prepared", progress=False, **options
        )
        return {r.study_id: (r.organ, r.condition) for r in records}

    found = labels(graph_file=terms)
    assert found["s0"] == found["s1"] == ("uterus", "myoma") and found["s2"] == ("thyroid", "myoma")
    plain = labels()  # another graph: prepared anew
    assert plain["s2"] == ("thyroid", "") and not {"s0", "s1"} & set(plain)
    prepared = datasets.prepare("ahjuui", source, tmp_path / "prepared", progress=False, graph_file=terms)
    assert prepared.preparation()["kept"] == 8
    with pytest.raises(ValueError, match=r"ahjuui: prepared with another graph_file"):
        datasets.prepare("ahjuui", None, tmp_path / "prepared", progress=False)
    with pytest.raises(ValueError, match=r"none.json: cannot be read"):
        datasets.prepare("ahjuui", source, tmp_path / "prepared", graph_file=tmp_path / "none.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("study_id", ["19480131"]),
        ("study_id", "19480131"),
        ("patient_id", 19480131.5),
        ("patient_id", ["19480131"]),
        ("patient_id", 1e300),
        ("media", {"a": "19480131"}),
        ("language", "19480131"),
        ("split", "19480131"),
        ("organ", "liver of 19480131"),
        ("findings", "19480131"),
        ("findings", ["19480131"]),
        ("19480131", "x"),
        ("regions", [{"media": 19480131, "frame": 0, "box": [0, 0, 1, 1], "organ": "liver"}]),
        ("regions", [{"media": 0, "frame": "19480131", "box": [0, 0, 1, 1], "organ": "liver"}]),
        ("regions", [{"media": 0, "frame": 0, "box": "19480131", "organ": "liver"}]),
        ("regions", [{"media": 0, "frame": 0, "box": [0, 0, 1, 1], "organ": "19480131"}]),
    ],
)
def test_export_messages_hide_what_may_be_a_patient(tmp_path, source, field, value):
    manifest = source_folders.make_export(source)
    study = json.loads(manifest.read_text().splitlines()[0])
    lines = [
        json.dumps(study | {"study_id": "19480131"}),
        json.dumps(study | {"study_id": "x", field: value}),
    ]
    manifest.write_text("\n".join(lines))
    builder = make_builder("ahjuui", source, tmp_path / "prepared")
    assert len(list(builder._studies(source))) == 1
    ((name, reason),) = builder._skips
    assert name == "manifest.jsonl line 2" and "field" in reason and "19480131" not in reason


def test_export_ids_are_compared_without_blanks_width_and_type(tmp_path, source):
    manifest = source_folders.make_export(source)
    study = json.loads(manifest.read_text().splitlines()[0])
    ids = ("7", " 7", "７ ", 7, 7.0, "p4", "ｐ4 ")
    manifest.write_text(
        "\n".join(json.dumps(study | {"study_id": f" s{i} ", "patient_id": p}) for i, p in enumerate(ids))
    )
    studies = list(make_builder("ahjuui", source, tmp_path / "prepared")._studies(source))
    assert [s.study_id for s in studies] == [f"s{i}" for i in range(len(ids))]
    assert len({s.group_id for s in studies[:5]}) == len({s.group_id for s in studies[5:]}) == 1
    assert studies[0].group_id != studies[5].group_id


def test_export_official_splits_may_not_cut_a_patient(tmp_path, source):
    manifest = source_folders.make_export(source)
    studies = [json.loads(line) for line in manifest.read_text().splitlines()]
    studies[0]["split"], studies[1]["split"] = "train", "test"
    manifest.write_text("\n".join(json.dumps(s) for s in studies))
    where = (
        r"manifest.jsonl line 1 is in 'train', manifest.jsonl line 2 of the same patient or group in 'test'"
    )
    with pytest.raises(ValueError, match=f"ahjuui: {where}"):
        prepare("ahjuui", tmp_path)


def test_export_bad_media_is_skipped_with_its_line(tmp_path, source):
    source_folders.make_export(source)
    (source / "clips/3_1.png").write_bytes(b"not a picture")
    builder, records, _ = prepare("ahjuui", tmp_path)
    assert len(records) == 7
    (skipped,) = builder.preparation()["skipped_studies"]
    assert (
        skipped["source"] == "manifest.jsonl line 4, clips/3_1.png"
        and "no DICOM, video or image" in skipped["reason"]
    )


def test_studies_without_a_sector_are_counted_and_named_by_their_media(tmp_path, source):
    source_folders.make_export(source)
    sector = source_folders.ellipse(240, 320, (20, 60, 220, 260))
    screen = np.where(sector, source_folders.make_picture(5, 240, 320), 0).astype(np.uint8)
    source_folders.save(screen, source / "clips/0_0.png")
    builder, _, _ = prepare("ahjuui", tmp_path)
    whole = builder.preparation()["kept_whole"]
    assert len(whole) == 7 and "clips/1_0.png;clips/1_1.png" in whole and "clips/0_0.png" not in whole
    card = (Path(builder.data_dir) / "DATASET_CARD.md").read_text(encoding="utf-8")
    assert "7 of them were not blanked" in card and "7 of them not blanked" in datasets.format_counts(
        builder.preparation()
    )


def test_export_dicom_cine_with_a_region(tmp_path, source):
    manifest = source_folders.make_export(source)
    shutil.copy(pydicom.examples.get_path("ybr_color"), source / "cine.dcm")
    study = {
        "study_id": "cine",
        "patient_id": 7,
        "media": ["cine.dcm"],
        "report": "",
        "language": "en",
        "organ": "heart",
        "regions": [{"media": 0, "frame": 29, "box": [0.25, 0.25, 0.75, 0.75], "organ": "heart"}],
    }
    with manifest.open("a") as file:
        file.write(json.dumps(study) + "\n")
    _, records, _ = prepare("ahjuui", tmp_path)
    cine = records["cine"]
    assert cine.frames.shape == (30, 240, 320) and cine.fps == pytest.approx(30.0, abs=0.1)
    assert cine.regions == (Region(29, (0.25, 0.25, 0.75, 0.75), "heart"),)
    assert cine.condition == "" and cine.findings == () and cine.report == ""
    assert "pydicom" in cine.decoder
