"""Pages: complete, self-contained, escaped, small and quick."""

import copy
import json
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser

import numpy as np
import pytest
import report_samples as samples

from dilbert_jax import report

EVIL = "<script>alert(1)</script>\"'.png"
NOTICE = "Research use only. Not for clinical use."


class Page(HTMLParser):
    """What a browser would load, run and show."""

    def __init__(self, path):
        super().__init__()
        self.text, self.sources, self.scripts, self.links, self.tags, self._inside = "", [], [], [], [], None
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self._inside = tag if tag in ("script", "style") else None
        if tag == "script":
            self.scripts.append(["", attributes.get("type", "")])
        if tag in ("img", "script", "iframe", "source", "video", "embed", "object"):
            self.sources += [attributes[k] for k in ("src", "data", "srcset") if k in attributes]
        if tag == "link":
            self.sources.append(attributes.get("href"))
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        assert not [key for key in attributes if key.startswith("on")]

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1][0] += data
        elif self._inside is None:
            self.text += data

    def data(self):
        return json.loads(next(text for text, kind in self.scripts if kind == "application/json"))


def check_self_contained(page):
    assert all(source.startswith("data:image/") for source in page.sources)
    assert not re.search(
        r"(?:https?:)?//[a-z0-9-]+\.[a-z]", re.sub(r"http://www\.w3\.org/\S+", "", page.html)
    )
    assert "@import" not in page.html and "url(" not in page.html
    assert "default-src 'none'" in page.html
    assert NOTICE in page.text


@pytest.fixture(scope="module")
def frames():
    return samples.make_frames(20)


@pytest.fixture
def annotation(frames):
    return samples.make_annotation(frames)


@pytest.fixture(scope="module")
def evaluation():
    return samples.make_evaluation()


def render(annotation, frames, tmp_path):
    path = tmp_path / "annotation.html"
    report.render_annotation(annotation, frames, path)
    return Page(path)


def test_annotation_page_holds_everything(annotation, frames, tmp_path):
    page = render(annotation, frames, tmp_path)
    check_self_contained(page)
    for text in (
        annotation["description"]["en"],
        annotation["description"]["zh"],
        annotation["source"]["sha256"],
    ):
        assert text in page.text
    for entry in [
        annotation["organ"],
        annotation["condition"],
        *annotation["findings"],
        *annotation["entities"],
    ]:
        assert entry["name"]["en"] in page.text and entry["name"]["zh"] in page.text
    data = page.data()
    assert len(data["frames"]) == 20 and data["numbers"] == list(range(20))
    assert [r["box"] for r in data["regions"]] == [r["box"] for r in annotation["regions"]]
    assert [data["numbers"][r["frame"]] for r in data["regions"]] == [
        r["frame"] for r in annotation["regions"]
    ]
    assert data["entities"][0]["region_scores"] == annotation["entities"][0]["region_scores"]


def test_supported_entities_come_first(annotation, frames, tmp_path):
    annotation["entities"][5]["supported"] = True
    annotation["entities"][0]["supported"] = False
    data = render(annotation, frames, tmp_path).data()
    expected = sorted(annotation["entities"], key=lambda e: (not e["supported"], -e["score"]))
    assert [e["region_scores"] for e in data["entities"]] == [e["region_scores"] for e in expected]


def test_long_clip_embeds_few_frames_yet_all_that_are_named(tmp_path):
    frames = samples.make_frames(4, 60, 80).repeat(100, 0)
    annotation = samples.make_annotation(frames, max_steps=10)
    data = render(annotation, frames, tmp_path).data()
    assert len(data["frames"]) <= report.MAX_EMBEDDED_FRAMES
    assert {r["frame"] for r in annotation["regions"]} | set(annotation["frame_index"]) <= set(
        data["numbers"]
    )
    assert data["total"] == 400 and data["numbers"][0] == 0 and data["numbers"][-1] == 399
    assert [data["numbers"][i] for i in data["frame_index"]] == annotation["frame_index"]


def test_a_clip_read_in_part_shows_the_numbers_of_its_source(annotation, frames, tmp_path):
    path = tmp_path / "annotation.html"
    report.render_annotation(annotation, frames, path, source_frames=range(0, 100, 5))
    page = Page(path)
    data = page.data()
    assert data["numbers"] == list(range(0, 100, 5)) and data["total"] == 96
    assert [r["frame"] for r in data["regions"]] == [r["frame"] for r in annotation["regions"]]
    assert "embeds 20 of the 96 frames" in page.text
    assert data["delay"] == round(1000 * 96 / 20 / 24)
    with pytest.raises(ValueError, match="3 source_frames for 20 frames"):
        report.render_annotation(annotation, frames, path, source_frames=[0, 1, 2])


def test_a_hundred_noisy_frames_are_quick_and_below_eight_megabytes(rng, tmp_path):
    frames = rng.integers(0, 256, (100, 600, 800), dtype=np.uint8)  # noise is the worst case for JPEG
    annotation = samples.make_annotation(frames)
    path = tmp_path / "annotation.html"
    seconds = []
    for _ in range(3):
        start = time.process_time()
        report.render_annotation(annotation, frames, path)
        seconds.append(time.process_time() - start)
    assert path.stat().st_size < 8_000_000
    assert min(seconds) < 1.5


def test_frames_are_never_scaled_up_and_keep_their_grey_values():
    flat = np.full((3, 40, 50), 120, np.uint8)
    uri = report.encode_frames(flat)[1]
    import base64
    import io

    from PIL import Image

    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
    assert image.shape == (40, 50) and np.abs(image.astype(int) - 120).max() <= 2


@pytest.mark.parametrize("still", [True, False])
def test_annotation_page_without_labels_regions_or_entities(still, annotation, frames, tmp_path):
    bare = {**annotation, "organ": None, "condition": None, "findings": [], "entities": [], "regions": []}
    bare["source"] = {
        **annotation["source"],
        "fps": None,
        "pixel_spacing_mm": None,
        "num_frames": 1 if still else 20,
    }
    bare["frame_index"] = [0]
    page = render(bare, frames[:1] if still else frames, tmp_path)
    assert page.data()["first"] == 0 and page.text.count("names none") == 3
    assert ("1 frame," in page.text) is still


def test_regions_without_a_label_are_shown_as_regions(annotation, frames, tmp_path):
    for region in annotation["regions"]:
        region.update(label="", probability=None)
        region.pop("name")
    assert {r["text"] for r in render(annotation, frames, tmp_path).data()["regions"]} == {"region"}


def test_nothing_in_an_annotation_can_inject(annotation, frames, tmp_path):
    annotation["source"]["file"] = annotation["source"]["decoder"] = EVIL
    annotation["entities"][0]["name"] = {"en": EVIL, "zh": EVIL}
    annotation["regions"][0]["name"] = {"en": "</script><img src=x>", "zh": ""}
    annotation["description"] = {"en": EVIL, "zh": EVIL}
    annotation["model"]["dataset"] = "</title><img src=x>"
    page = render(annotation, frames, tmp_path)
    check_self_contained(page)
    assert EVIL in page.text and "img" not in page.tags
    assert len(page.scripts) == 2 and not any("alert(" in text for text, _ in page.scripts)
    assert page.data()["regions"][0]["text"].startswith("</script>")


def test_a_frame_outside_the_clip_is_named(annotation, frames, tmp_path):
    with pytest.raises(ValueError, match="names frame 19, but the clip passed has 10 frames"):
        render(annotation, frames[:10], tmp_path)
    with pytest.raises(ValueError, match="expected uint8"):
        render(annotation, frames.astype(float), tmp_path)


def test_report_shows_what_was_measured(annotation, frames, evaluation, tmp_path):
    annotation["reference"] = {
        "organ": "liver",
        "condition": "stone",
        "findings": ["mass"],
        "report": "A mass.",
        "report_is_synthetic": True,
    }
    path = tmp_path / "report.html"
    report.render_report(
        evaluation,
        samples.make_history(30),
        [(annotation, frames)],
        path,
        graph=samples.GRAPH,
        notices=["Short run."],
    )
    page = Page(path)
    check_self_contained(page)
    student = evaluation["networks"]["student"]
    interval = student["annotation"]["organ"]["macro"]["f1"]
    assert f"{interval['value']:.2f} {interval['low']:.2f}–{interval['high']:.2f}" in page.text
    for task in ("mlm", "mdc", "moc"):
        assert f"{student['pretraining'][task]['recall_at_1']:.3f}" in page.text
    for text in (
        evaluation["command"],
        evaluation["device"],
        "Synthetic reports.",
        "Short run.",
        "majority of training",
        "every finding, always",
        "liver ✓",
        "stone ✗",
        "Synthetic report: A mass.",
        annotation["description"]["zh"],
        "乳腺",
    ):
        assert text in page.text, text
    # Organ, condition: bars and confusion; findings: bars; four stages; two matches; a strip of six frames.
    assert page.tags.count("img") == 5 + 4 + 2 + 6


def test_report_shows_how_entities_match(evaluation, tmp_path):
    matched = copy.deepcopy(evaluation)
    annotation = matched["networks"]["student"]["annotation"]
    annotation["entities"] = annotation.pop("findings")
    report.render_report(matched, [], [], tmp_path / "report.html", graph=samples.GRAPH)
    assert "Entities matched with the clip" in Page(tmp_path / "report.html").text


def test_report_of_a_run_that_has_little(evaluation, tmp_path):
    little = copy.deepcopy(evaluation)
    little.update(synthetic_reports=False, num_groups=1, baseline={}, fold=2)
    little["networks"] = {
        "teacher": {"annotation": {"organ": evaluation["networks"]["teacher"]["annotation"]["organ"]}}
    }
    path = tmp_path / "report.html"
    report.render_report(little, [], [], path)
    page = Page(path)
    check_self_contained(page)
    assert "fold 2" in page.text and "no interval can be computed" in page.text
    assert "Synthetic reports." not in page.text and "Pre-training tasks" not in page.text
    assert "Training curves" not in page.text and "Example annotations" not in page.text


def test_report_escapes_names_and_commands(annotation, frames, evaluation, tmp_path):
    annotation["source"]["file"] = EVIL
    path = tmp_path / "report.html"
    report.render_report({**evaluation, "command": EVIL, "dataset": EVIL}, [], [(annotation, frames)], path)
    page = Page(path)
    assert "script" not in page.tags and page.text.count(EVIL) >= 3


def test_index_links_clips_and_lists_failures_with_reasons(annotation, frames, tmp_path):
    path = tmp_path / "index.html"
    report.render_index(
        [
            {"file": EVIL, "annotation": annotation, "href": "a b#/annotation.html", "frames": frames},
            {"file": "x", "annotation": {**annotation, "organ": None}, "href": "javascript:alert(1)"},
            {"file": "cut.mp4", "reason": "cut.mp4: ends after 12 bytes <b>"},
        ],
        path,
    )
    page = Page(path)
    check_self_contained(page)
    assert page.links == ["a%20b%23/annotation.html"] * 2 + ["javascript%3Aalert%281%29"]
    assert "cut.mp4: ends after 12 bytes <b>" in page.text and "script" not in page.tags
    assert "2 annotated" in page.text and "1 failed" in page.text
    with pytest.raises(ValueError, match="neither 'annotation' nor 'reason'"):
        report.render_index([{"file": "y"}], path)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_the_viewer_draws_regions_and_links_in_a_browser(annotation, frames, tmp_path):
    render(annotation, frames, tmp_path)
    arguments = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
    ]
    arguments += [
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1400,1000",
        "--virtual-time-budget=2000",
    ]
    page = (tmp_path / "annotation.html").as_uri()
    shown = subprocess.run(
        ["chromium", *arguments, "--dump-dom", page], capture_output=True, text=True, timeout=120
    )
    overlay = shown.stdout.partition('id="overlay"')[2].partition("</svg>")[0]
    widths = [float(w) for w in re.findall(r'class="link"[^>]*stroke-width="([0-9.]+)"', overlay)]
    strength = np.max([e["region_scores"] for e in annotation["entities"]], axis=0)
    best = annotation["regions"][int(strength.argmax())]
    assert f"frame {best['frame']} / 19" in shown.stdout
    here = [i for i, r in enumerate(annotation["regions"]) if r["frame"] == best["frame"]]
    ranked = sorted(annotation["entities"], key=lambda e: (not e["supported"], -e["score"]))[:8]
    expected = [e["region_scores"][i] * 7 for e in ranked for i in here if e["region_scores"][i] >= 0.3]
    np.testing.assert_allclose(widths, expected, atol=0.006)
    assert overlay.count('class="box"') >= 1
