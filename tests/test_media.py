"""Reading media: every test writes its own files or uses those that pydicom ships."""

import os
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from media_samples import dicom_bytes, encode, make_gray, png_bytes, read_raw, write_dicom, write_video
from PIL import Image
from pydicom.data import get_testdata_file

from dilbert_jax.media import Clip, MediaError, find_media, read_clip, read_stills
from dilbert_jax.media.codestream import count_precincts, read_frame_size

# --- video and animation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec", "container"),
    [
        ("a.mp4", "mpeg4", None),
        ("a.mov", "mpeg4", "mov"),
        ("a.avi", "mpeg4", None),
        ("a.mpeg", "mpeg1video", "mpeg"),
        ("a.mpg", "mpeg2video", "vob"),
        ("a.mkv", "mpeg4", None),
        ("a.m1v", "mpeg1video", "mpeg1video"),
        ("mjpeg.avi", "mjpeg", None),
    ],
)
def test_video_containers_decode_to_the_written_frames(tmp_path, name, codec, container):
    frames = make_gray(9)
    pixel_format = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    rate = 25
    path = write_video(tmp_path / name, frames, codec, container, rate, pixel_format)
    result = read_raw(path)
    assert result.frames.dtype == np.uint8 and result.frames.shape == frames.shape
    assert np.abs(result.frames.astype(int) - frames).mean() < 4
    assert result.fps == pytest.approx(rate, rel=0.01)
    assert codec in result.decoder and av.__version__ in result.decoder
    assert result.frame_index == tuple(range(9))


def test_video_luma_keeps_black_white_and_the_weights_of_colours(tmp_path):
    colours = np.zeros((1, 64, 64, 3), np.uint8)
    for i, colour in enumerate([(255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 255, 0)]):
        colours[0, :, i * 16 : (i + 1) * 16] = colour
    path = tmp_path / "c.avi"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=10)
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv444p"
        for frame in np.repeat(colours, 2, 0):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode(None))
    row = read_raw(path).frames[0, 32, 8::16].astype(int)
    assert np.abs(row - [255, 0, 76, 150]).max() <= 2


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".dcm"])
def test_selection_is_evenly_spaced_with_first_and_last(tmp_path, suffix):
    frames = make_gray(11)
    path = tmp_path / f"a{suffix}"
    if suffix == ".mp4":
        write_video(path, frames, "mpeg4")
    elif suffix == ".gif":
        images = [Image.fromarray(frame) for frame in frames]
        images[0].save(path, save_all=True, append_images=images[1:], duration=50)
    else:
        write_dicom(path, frames)
    everything = read_raw(path)
    assert len(everything.frames) == 11
    some = read_raw(path, max_frames=5)
    assert some.frame_index == (0, 2, 5, 8, 10)
    np.testing.assert_array_equal(some.frames, everything.frames[list(some.frame_index)])
    assert read_raw(path, max_frames=1).frame_index == (0,)
    np.testing.assert_array_equal(read_raw(path, max_frames=99).frames, everything.frames)


def test_video_counts_what_decodes_not_what_the_header_says(tmp_path):
    path = write_video(tmp_path / "a.avi", make_gray(12), "mjpeg", pixel_format="yuvj420p")
    data = bytearray(path.read_bytes())
    for tag, offset in ((b"avih", 8 + 16), (b"strh", 8 + 32)):
        at = data.index(tag) + offset
        assert int.from_bytes(data[at : at + 4], "little") == 12
        data[at : at + 4] = (40).to_bytes(4, "little")
    path.write_bytes(data)
    assert len(read_raw(path).frames) == 12
    assert read_raw(path, max_frames=3).frame_index == (0, 6, 11)


def test_gif_rgba_is_composed_over_black_with_its_own_rate(tmp_path):
    images = []
    for t in range(4):
        pixels = np.zeros((40, 50, 4), np.uint8)
        pixels[:, :25] = (10 + 60 * t, 10 + 60 * t, 10 + 60 * t, 255)
        pixels[:, 25:] = (255, 255, 255, 0)
        images.append(Image.fromarray(pixels))
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=100, disposal=2)
    result = read_raw(tmp_path / "a.gif")
    assert result.frames.shape == (4, 40, 50)
    assert result.fps == pytest.approx(10)
    assert [int(f[20, 10]) for f in result.frames] == [10, 70, 130, 190]
    assert not result.frames[:, :, 26:].any()


def test_a_hundred_frames_read_well_under_a_second(tmp_path):
    path = write_video(tmp_path / "a.mp4", make_gray(100, 480, 640), "mpeg4")
    read_clip(path)
    start = time.perf_counter()
    assert read_clip(path).frames.shape == (100, 480, 640)
    assert time.perf_counter() - start < 1.0


# --- stills -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.tif"])
def test_grayscale_stills_keep_their_values(tmp_path, name):
    frame = make_gray(1)[0]
    Image.fromarray(frame).save(tmp_path / name)
    result = read_raw(tmp_path / name)
    assert result.frames.shape == (1, 64, 96) and result.fps is None and result.pixel_spacing_mm is None
    assert np.abs(result.frames[0].astype(int) - frame).max() <= (12 if name == "a.jpg" else 0)
    assert result.decoder.startswith("pillow ") and result.source == str(tmp_path / name)


def test_every_mode_becomes_luma(tmp_path):
    rgb = np.zeros((8, 8, 3), np.uint8)
    rgb[...] = (200, 100, 50)
    expected = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    image = Image.fromarray(rgb)
    for mode in ("RGB", "RGBA"):
        image.convert(mode).save(tmp_path / f"{mode}.png")
    image.quantize(4).save(tmp_path / "P.png")
    image.convert("CMYK").save(tmp_path / "CMYK.tif")
    for name in ("RGB.png", "RGBA.png", "P.png", "CMYK.tif"):
        assert np.abs(read_raw(tmp_path / name).frames[0].astype(int) - expected).max() <= 3, name
    Image.fromarray(np.eye(8) > 0).save(tmp_path / "1.png")
    np.testing.assert_array_equal(read_raw(tmp_path / "1.png").frames[0], np.eye(8, dtype=np.uint8) * 255)
    wide = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    for name in ("16.png", "16.tif"):
        Image.fromarray(wide).save(tmp_path / name)
        np.testing.assert_array_equal(read_raw(tmp_path / name).frames[0], wide >> 8)
    half = Image.fromarray(np.full((8, 8, 4), (255, 255, 255, 128), np.uint8))
    half.save(tmp_path / "half.png")
    assert abs(int(read_raw(tmp_path / "half.png").frames[0, 0, 0]) - 128) <= 1


def test_content_decides_not_the_name(tmp_path):
    frame = make_gray(1)[0]
    (tmp_path / "image.dcm").write_bytes(encode(frame, "PNG"))
    np.testing.assert_array_equal(read_raw(tmp_path / "image.dcm").frames[0], frame)
    video = write_video(tmp_path / "clip.mp4", make_gray(3), "mpeg4").rename(tmp_path / "clip.jpg")
    assert len(read_raw(video).frames) == 3
    cine = write_dicom(tmp_path / "noextension", make_gray(2))
    assert len(read_raw(cine).frames) == 2


def test_read_stills_joins_images_of_one_size(tmp_path):
    frames = make_gray(3)
    paths = []
    for t, frame in enumerate(frames):
        paths.append(tmp_path / f"{t}.png")
        Image.fromarray(frame).save(paths[-1])
    result = read_stills(paths)
    assert isinstance(result, Clip) and result.fps is None and result.frame_index == (0, 1, 2)
    np.testing.assert_array_equal(result.frames, frames)
    np.testing.assert_array_equal(read_stills(paths[::-1]).frames, frames[::-1])
    Image.fromarray(frames[0][:-1]).save(paths[1])
    with pytest.raises(MediaError, match=r"1\.png: has 63 x 96 pixels and the sequence starts with 64 x 96"):
        read_stills(paths)
    cine = write_dicom(tmp_path / "cine.dcm", frames)
    with pytest.raises(MediaError, match="holds several frames"):
        read_stills([cine])
    with pytest.raises(ValueError, match="non-empty list"):
        read_stills([])
    with pytest.raises(ValueError, match="non-empty list"):
        read_stills(str(paths[0]))


# --- finding ----------------------------------------------------------------------------------------------


def test_find_media_lists_by_content_in_natural_order(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("frame10.png", "frame2.png", "sub/x.bin", ".hidden.png"):
        (tmp_path / name).write_bytes(png_bytes())
    (tmp_path / "notes.png").write_text("not an image, whatever its name")
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    (tmp_path / "DICOMDIR").write_bytes(dicom_bytes(make_gray(1)))
    write_dicom(tmp_path / "clip", make_gray(2))
    (tmp_path / "broken_link.png").symlink_to(tmp_path / "absent")
    names = [str(path.relative_to(tmp_path)) for path in find_media(tmp_path)]
    # What only its name calls media is listed too: reading says why it is none.
    assert names == ["broken_link.png", "clip", "frame2.png", "frame10.png", "notes.png", "sub/x.bin"]
    assert find_media(tmp_path / "table.csv") == [tmp_path / "table.csv"]
    with pytest.raises(MediaError, match="no such file or folder"):
        find_media(tmp_path / "absent")


def test_find_media_lists_what_cannot_be_opened(tmp_path, monkeypatch):
    for name in ("IM0001", "a.png"):
        (tmp_path / name).write_bytes(png_bytes())

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert [path.name for path in find_media(tmp_path)] == ["IM0001", "a.png"]


def test_a_name_that_is_not_utf_8_can_be_written(tmp_path):
    path = tmp_path / os.fsdecode(b"\xd6\xd0 \xe4\xb8\xad.png")
    path.write_bytes(png_bytes())
    assert read_clip(path).source == read_stills([path]).source == str(tmp_path / r"\udcd6\udcd0 中.png")
    path.write_bytes(b"")
    with pytest.raises(MediaError) as caught:
        read_clip(path)
    assert (
        caught.value.path == path
        and str(caught.value) == f"{tmp_path}/\\udcd6\\udcd0 中.png: is empty (0 bytes)"
    )


def test_frame_sizes_of_code_streams():
    frame = make_gray(1, 24, 40)[0]
    assert read_frame_size(encode(frame, "JPEG")) == (24, 40)
    assert read_frame_size(encode(frame, "JPEG", progressive=True)) == (24, 40)
    assert read_frame_size(encode(frame, "JPEG2000")) == (24, 40)
    assert read_frame_size(encode(frame, "PNG")) is None and read_frame_size(b"\xff\xd8\xff") is None
    # A size in a box before the code stream is not the size that a decoder will see.
    wrapped = encode(frame, "JPEG2000")
    at = wrapped.index(b"jp2c") - 4
    decoy = b"\0\0\0\x24uuid\xff\x4f\xff\x51" + (1).to_bytes(4, "big") * 6
    assert read_frame_size(wrapped[:at] + decoy + wrapped[at:]) == (24, 40)
    assert read_frame_size(b"junk" + encode(frame, "JPEG2000", no_jp2=True)) is None


def test_precincts_are_counted_in_every_header_that_sets_them():
    frame = make_gray(1, 256, 512)[0]
    plain = encode(frame, "JPEG2000", no_jp2=True)
    assert count_precincts(plain) == 0 and count_precincts(encode(frame, "JPEG")) == 0
    sized = encode(frame, "JPEG2000", no_jp2=True, precinct_size=(64, 64))
    # The finest resolution takes 4 x 8 precincts of 64 pixels, coarser ones as many or fewer.
    assert 32 <= count_precincts(sized) <= 6 * 5 * 9
    at = sized.index(b"\xff\x52") + 14
    small = sized[:at] + bytes(6) + sized[at + 6 :]
    assert count_precincts(small) >= 256 * 512
    # The same coding style as a COC of the first component, and in the header of the first tile part.
    style = small[at - 10 : at + 6]
    for marker, segment in ((b"\xff\x53", b"\0\1" + style[5:]), (b"\xff\x52", style)):
        setting = marker + (len(segment) + 2).to_bytes(2, "big") + segment
        sot = plain.index(b"\xff\x90")
        for place in (sot, sot + 12):
            assert count_precincts(plain[:place] + setting + plain[place:]) >= 256 * 512


def test_code_stream_in_a_jp2_file_reads():
    assert read_raw(get_testdata_file("GDCMJ2K_TextGBR.dcm", download=False)).frames.shape == (1, 400, 400)


def test_frame_rate_of_fractions(tmp_path):
    path = write_video(tmp_path / "a.mp4", make_gray(6), "mpeg4", rate=Fraction(30000, 1001))
    assert read_raw(path).fps == pytest.approx(29.97, rel=1e-3)
