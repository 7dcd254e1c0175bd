"""Media that cannot be read: one clear error each, and no harm done."""

import io
import os
import time
import types
import warnings
import zlib
from pathlib import Path

import av
import numpy as np
import pydicom
import pytest
from media_samples import (
    dicom_bytes,
    encode,
    gif_bytes,
    make_gray,
    make_region,
    png_bytes,
    video_bytes,
    write_dicom,
    write_video,
)
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)

from dilbert_jax.media import MediaError, clip, dicom, read_clip


def _huge_png():
    data = bytearray(png_bytes())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


def _sound_only():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        frame.sample_rate = 44100
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def _encapsulated(frames_bytes, syntax=JPEGBaseline8Bit, **elements):
    sizes = {"Rows": 24, "Columns": 40, "NumberOfFrames": 1} | elements
    return dicom_bytes(encapsulate(frames_bytes), syntax=syntax, **sizes)


def _wide_jpeg2000():
    data = bytearray(encode(make_gray(1, 24, 40)[0], "JPEG2000", no_jp2=True))
    data[8:16] = (60_000).to_bytes(4, "big") * 2
    return bytes(data)


def _endless_jp2():
    """A JP2 file with a box of length 0 before its code stream; a walk over the boxes never gets past it."""
    data = encode(make_gray(1, 24, 40)[0], "JPEG2000")
    at = data.index(b"jp2c") - 4
    return data[:at] + b"\0\0\0\0uuid" + data[at:]


def _damaged_jp2_sample():
    """A file that pydicom ships, a byte changed: its last box before the code stream ends on zeros."""
    data = bytearray(Path(get_testdata_file("GDCMJ2K_TextGBR.dcm", download=False)).read_bytes())
    assert data[2408:2416] == b"\0\0\0\x1cuuid"
    data[2411] = 0x35
    return bytes(data)


def _tiny_precincts(side=1024):
    data = bytearray(encode(make_gray(1, side, side)[0], "JPEG2000", no_jp2=True, precinct_size=(64, 64)))
    at = data.index(b"\xff\x52") + 14
    data[at : at + 6] = bytes(6)
    return bytes(data)


def _deep_dicom():
    item = b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    nested = (b"\x08\x00\x40\x11SQ\x00\x00\xff\xff\xff\xff" + item) * 20_000
    whole = dicom_bytes(make_gray(1))
    at = whole.index(b"\x08\x00\x16\x00UI")
    return whole[:at] + nested


JPEG_FRAME = encode(make_gray(1, 24, 40)[0], "JPEG")
BROKEN = {
    "zero_bytes.png": (lambda: b"", "0 bytes"),
    "text.png": (lambda: b"this is no image\n" * 50, "no DICOM, video or image"),
    "text.dcm": (lambda: b"(0010,0010) name\n" * 50, "no DICOM, video or image"),
    "random.mp4": (lambda: np.random.default_rng(0).bytes(5000), "no DICOM, video or image"),
    "truncated.png": (
        lambda: png_bytes(np.random.default_rng(0).integers(0, 255, (90, 90), np.uint8))[:2000],
        "decoded",
    ),
    "truncated.jpg": (
        lambda: encode(make_gray(1, 240, 320)[0], "JPEG")[:2000],
        "cannot be decoded as an image",
    ),
    "truncated.tif": (lambda: encode(make_gray(1)[0], "TIFF")[:3000], "cannot be decoded as an image"),
    "truncated.bmp": (lambda: encode(make_gray(1)[0], "BMP")[:3000], "cannot be decoded as an image"),
    "truncated.gif": (lambda: gif_bytes()[:600], "cannot be decoded as an image"),
    "only_magic.png": (lambda: b"\x89PNG\r\n\x1a\n", "cannot be decoded as an image"),
    "bomb.png": (_huge_png, "pixels"),
    "truncated.mp4": (lambda: video_bytes(".mp4", "mpeg4")[:2000], "cannot be decoded as video"),
    "truncated.avi": (lambda: video_bytes(".avi", "mpeg4", 40)[:-4000], "truncated or damaged|as video"),
    "only_ftyp.mp4": (lambda: b"\0\0\0\x18ftypisom\0\0\0\0isommp41" + b"\0" * 40, "video"),
    "only_riff.avi": (lambda: b"RIFF\xff\0\0\0AVI LIST", "video"),
    "no_frame.avi": (lambda: video_bytes(".avi", "mpeg4", 0), "no video frame can be decoded|as video"),
    "sound.mp4": (_sound_only, "holds no video stream"),
    "pack_only.mpeg": (lambda: b"\0\0\x01\xba" + b"\x21" + b"\0" * 3000, "video"),
    "only_dicm.dcm": (lambda: b"\0" * 128 + b"DICM", "DICOM"),
    "no_pixels.dcm": (lambda: dicom_bytes(b""), "no DICOM pixel data"),
    "truncated.dcm": (lambda: dicom_bytes(make_gray(4))[:-5000], "truncated"),
    "frames.dcm": (lambda: dicom_bytes(make_gray(1), NumberOfFrames=2_000_000_000), "truncated"),
    "rows.dcm": (lambda: dicom_bytes(make_gray(1), Rows=65535, Columns=65535), "limit is"),
    "zero_rows.dcm": (lambda: dicom_bytes(make_gray(1), Rows=0), "empty frame"),
    "no_rows.dcm": (lambda: dicom_bytes(b"ab"), "Rows"),
    "samples.dcm": (lambda: dicom_bytes(make_gray(1), SamplesPerPixel=7), "SamplesPerPixel"),
    "syntax.dcm": (lambda: _encapsulated([JPEG_FRAME], pydicom.uid.MPEG2MPML), "not supported"),
    "damaged_jpeg.dcm": (lambda: _encapsulated([JPEG_FRAME[:200]]), "cannot be decoded"),
    "no_jpeg.dcm": (lambda: _encapsulated([b"nothing of the kind "]), "holds no JPEG"),
    "other_size.dcm": (lambda: _encapsulated([JPEG_FRAME], Rows=99), "encoded with 24 x 40"),
    "bomb_j2k.dcm": (
        lambda: _encapsulated([_wide_jpeg2000()], JPEG2000Lossless),
        "encoded with 60000 x 60000",
    ),
    "endless_j2k.dcm": (
        lambda: _encapsulated([_endless_jp2()], JPEG2000Lossless),
        "frame 0 holds no JPEG or JPEG 2000 image",
    ),
    "endless_j2k_sample.dcm": (_damaged_jp2_sample, "frame 0 holds no JPEG or JPEG 2000 image"),
    "precincts_j2k.dcm": (
        lambda: _encapsulated([_tiny_precincts()], JPEG2000Lossless, Rows=1024, Columns=1024),
        "frame 0 is divided into about 1[0-9]{6} JPEG 2000 precincts; the limit is 262144",
    ),
    "bomb_rle.dcm": (lambda: _encapsulated([b"\0" * 9000], RLELossless), "more RLE data"),
    "truncated_jpeg.dcm": (lambda: _encapsulated([JPEG_FRAME])[:-200], "DICOM"),
    "palette.dcm": (lambda: dicom_bytes(make_gray(1), "PALETTE COLOR"), "cannot be decoded"),
    "deep.dcm": (_deep_dicom, "DICOM"),
}


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_broken_input_gives_one_clear_error(tmp_path, name, capfd):
    make, pattern = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(make())
    start = time.perf_counter()
    with warnings.catch_warnings(), pytest.raises(MediaError, match=pattern) as caught:
        warnings.simplefilter("error")
        read_clip(path)
    assert time.perf_counter() - start < 5
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert caught.value.path == path
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_video_cut_in_its_frames_is_refused(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for frame in make_gray(40):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.stack([frame] * 3, -1), format="rgb24")))
        out.mux(stream.encode(None))
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat") and len(read_clip(path).frames) == 40
    path.write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(MediaError, match="truncated or damaged after"):
        read_clip(path)


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "mpeg4"), ("a.webm", "libvpx")])
def test_matroska_shorter_than_it_says_is_refused(tmp_path, name, codec):
    path = write_video(tmp_path / name, make_gray(40), codec)
    data = path.read_bytes()
    path.write_bytes(data + b"\0" * 9)
    assert len(read_clip(path).frames) == 40
    for cut in (1, len(data) // 10, len(data) // 2, len(data) * 3 // 4):
        path.write_bytes(data[:-cut])
        with pytest.raises(
            MediaError, match=f"is truncated: it says {len(data)} bytes and has {len(data) - cut}"
        ):
            read_clip(path, max_frames=4)


def test_matroska_of_unknown_size_is_read(tmp_path):
    """A recorder that writes to a pipe cannot go back and enter the size."""
    frames, buffer = make_gray(), io.BytesIO()
    pipe = types.SimpleNamespace(write=buffer.write)
    with av.open(pipe, "w", format="matroska") as out:
        stream = out.add_stream("mpeg4", rate=20)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.stack([frame] * 3, -1), format="rgb24")))
        out.mux(stream.encode(None))
    assert b"\x18\x53\x80\x67\x01" + b"\xff" * 7 in buffer.getvalue()
    (tmp_path / "a.mkv").write_bytes(buffer.getvalue())
    assert len(read_clip(tmp_path / "a.mkv").frames) == 5


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(MediaError, match="no such file"):
        read_clip(tmp_path / "absent.png")
    with pytest.raises(MediaError, match="is a folder"):
        read_clip(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MediaError, match="not a regular file"):
        read_clip(tmp_path / "pipe")
    with pytest.raises(MediaError, match="cannot be opened"):
        read_clip("a\0b")
    with pytest.raises(ValueError, match="max_frames must be at least 1"):
        read_clip(tmp_path / "absent.png", max_frames=0)


def test_unreadable_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(png_bytes())

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    # A mode of 000 does not stop a superuser, so the refusal is simulated.
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(MediaError, match=r"a\.png: cannot be opened \(Permission denied\)"):
        read_clip(path)


def test_limits_hold_before_decoding(tmp_path, monkeypatch):
    frames = make_gray(6)
    video = write_video(tmp_path / "a.mp4", frames, "mpeg4")
    cine = write_dicom(tmp_path / "a.dcm", frames)
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:])
    paths = (video, cine, tmp_path / "a.gif")
    monkeypatch.setattr(clip, "MAX_CLIP_BYTES", 3 * 64 * 96)
    for path in paths:
        with pytest.raises(MediaError, match="read fewer frames with max_frames"):
            read_clip(path)
        assert len(read_clip(path, max_frames=3).frames) == 3
    monkeypatch.setattr(clip, "MAX_DECODED_PIXELS", 5 * 64 * 96)
    for path in paths:
        with pytest.raises(MediaError, match="too much to decode"):
            read_clip(path, max_frames=2)
    monkeypatch.setattr(clip, "MAX_FRAME_PIXELS", 64 * 95)
    for path in paths:
        with pytest.raises(MediaError, match="the limit is"):
            read_clip(path, max_frames=2)


def test_deflate_bomb_is_stopped(tmp_path, monkeypatch):
    path = write_dicom(
        tmp_path / "a.dcm", np.zeros((20, 64, 64), np.uint8), syntax=DeflatedExplicitVRLittleEndian
    )
    assert path.stat().st_size < 5000 and len(read_clip(path).frames) == 20
    monkeypatch.setattr(dicom, "MAX_FILE_BYTES", 50_000)
    with pytest.raises(MediaError, match="inflates to more than"):
        read_clip(path)


def test_damaged_bytes_never_raise_anything_else(tmp_path, capfd):
    rng = np.random.default_rng(1)
    encapsulated = encapsulate([JPEG_FRAME, JPEG_FRAME])
    sources = {
        "png": png_bytes(),
        "gif": gif_bytes(),
        "jpg": encode(make_gray(1)[0], "JPEG"),
        "tif": encode(make_gray(1)[0], "TIFF"),
        "mp4": video_bytes(".mp4", "mpeg4"),
        "avi": video_bytes(".avi", "mpeg4"),
        "mpeg": video_bytes(".mpeg", "mpeg1video"),
        "dcm": dicom_bytes(
            make_gray(2), FrameTime="40", SequenceOfUltrasoundRegions=[make_region(1, 1, 50, 50)]
        ),
        "jpeg.dcm": dicom_bytes(encapsulated, syntax=JPEGBaseline8Bit, Rows=24, Columns=40, NumberOfFrames=2),
    }
    outcomes = {"read": 0, "refused": 0}
    for suffix, data in sources.items():
        path = tmp_path / f"a.{suffix}"
        for _ in range(12):
            damaged = bytearray(data)
            for position in rng.integers(0, min(len(data), 1500), 12):
                damaged[position] = rng.integers(0, 256)
            path.write_bytes(damaged)
            try:
                assert read_clip(path, max_frames=4).frames.ndim == 3
                outcomes["read"] += 1
            except MediaError:
                outcomes["refused"] += 1
    assert outcomes["read"] and outcomes["refused"]
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_library_warnings_stay_inside_and_filters_are_restored(tmp_path):
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_clip(pydicom.examples.get_path("palette_color"))
    assert not caught and warnings.filters == before
