"""Every builder of a public set on a generated folder of its layout: each known trap, each kind of bad file."""

import json
import os

import numpy as np
import pytest
import source_folders
from PIL import Image
from preparing import make_builder, prepare, reasons

from dilbert_jax.data.reading import MAX_STORED_FRAMES
from dilbert_jax.media import MediaError

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
    card = (tmp_path / "a/busi/2.0.0/DATASET_CARD.md").read_text(encoding="utf-8")
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
