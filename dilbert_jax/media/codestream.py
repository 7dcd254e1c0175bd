"""Frame sizes read from compressed streams, so that they are known before a decoder allocates."""

from collections.abc import Iterator

# Start-of-frame markers carry the size: SOF0-SOF15 without DHT, JPG and DAC [ITU-T T.81], SOF55 [T.87].
_START_OF_FRAME = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
# Boxes of a JP2 file [ITU-T T.800 I.5.1]; DICOM asks for the bare code stream, yet some writers wrap it.
_JP2_SIGNATURE = b"\x00\x00\x00\x0cjP  \r\n\x87\n"
_JPEG2000_START = b"\xff\x4f\xff\x51"


def read_frame_size(encoded: bytes) -> tuple[int, int] | None:
    """Read the size from the header of a JPEG, JPEG-LS or JPEG 2000 image.

    Args:
        encoded: one compressed frame.

    Returns:
        (rows, columns), None if no such header is found.
    """
    if encoded[:2] == b"\xff\xd8":
        return _read_jpeg_size(encoded)
    start = _find_code_stream(encoded)
    if start is None or len(encoded) < start + 24:
        return None
    width, height, left, top = _read_numbers(encoded, start + 8, 4)
    return height - top, width - left


def count_precincts(encoded: bytes) -> int:
    """Bound the precincts of a JPEG 2000 image, each of which costs a decoder memory and time.

    A header may ask for precincts of one pixel, which turns a frame of 4096 x 4096 pixels into a minute of
    work and gigabytes of bookkeeping [ITU-T T.800 A.6.1, B.6].

    Args:
        encoded: one compressed frame.

    Returns:
        Precincts over all components and resolutions, with the smallest that any COD or COC segment sets;
        0 for data that is no JPEG 2000 image.
    """
    start = _find_code_stream(encoded)
    if start is None or len(encoded) < start + 42:
        return 0
    width, height, left, top = _read_numbers(encoded, start + 8, 4)
    components = int.from_bytes(encoded[start + 40 : start + 42], "big")
    most = 0
    for marker, segment in _iterate_segments(encoded, start + 2):
        if marker == 0x52:  # COD: style, progression, layers, transform, then the coding parameters
            parameters, has_sizes = segment[5:], segment[:1]
        elif marker == 0x53:  # COC: component (one or two bytes), style, then the coding parameters
            at = 1 if components < 257 else 2
            parameters, has_sizes = segment[at + 1 :], segment[at : at + 1]
        else:
            continue
        if not parameters or not has_sizes or not has_sizes[0] & 1:
            continue
        levels, sizes = parameters[0], parameters[5:]
        count = 0
        for resolution, size in enumerate(sizes[: levels + 1]):
            step = levels - resolution
            rows, columns = (height - top >> step) + 1, (width - left >> step) + 1
            count += ((rows >> (size >> 4)) + 1) * ((columns >> (size & 15)) + 1)
        most = max(most, count * components)
    return most


def _iterate_segments(encoded: bytes, position: int) -> Iterator[tuple[int, bytes]]:
    """Marker and content of the segments in the main header and in the headers of the tile parts."""
    tile_part_end = 0
    while position + 4 <= len(encoded) and encoded[position] == 0xFF:
        marker = encoded[position + 1]
        if marker == 0x93:  # SOD: the data of a tile part, to be passed over
            if tile_part_end <= position:
                return
            position = tile_part_end
            continue
        length = int.from_bytes(encoded[position + 2 : position + 4], "big")
        segment = encoded[position + 4 : position + 2 + length]
        if marker == 0x90:  # SOT: tile, length of the tile part from here on, part, number of parts
            tile_part_end = position + int.from_bytes(segment[2:6], "big")
        yield marker, segment
        position += 2 + max(2, length)


def _read_numbers(encoded: bytes, position: int, count: int) -> list[int]:
    ends = range(position + 4, position + 4 * count + 4, 4)
    return [int.from_bytes(encoded[end - 4 : end], "big") for end in ends]


def _find_code_stream(encoded: bytes) -> int | None:
    """Start of a bare JPEG 2000 code stream or of the one in a JP2 file, None if there is none.

    pydicom walks the boxes too and never returns from one of length 0, so every box before the code stream
    must hold at least its own 8-byte header.
    """
    position = 0
    if encoded.startswith(_JP2_SIGNATURE):
        while encoded[position + 4 : position + 8] != b"jp2c":
            length = int.from_bytes(encoded[position : position + 4], "big")
            position += length
            if length < 8 or position + 8 > len(encoded):
                return None
        position += 16 if encoded[position : position + 4] == b"\0\0\0\1" else 8
    return position if encoded[position : position + 4] == _JPEG2000_START else None


def _read_jpeg_size(encoded: bytes) -> tuple[int, int] | None:
    position = 2
    while position + 9 <= len(encoded):
        if encoded[position] != 0xFF:
            return None
        marker = encoded[position + 1]
        if marker == 0xFF:
            position += 1
        elif marker in _WITHOUT_LENGTH:
            position += 2
        elif marker in _START_OF_FRAME:
            height = int.from_bytes(encoded[position + 5 : position + 7], "big")
            return height, int.from_bytes(encoded[position + 7 : position + 9], "big")
        else:
            position += 2 + max(2, int.from_bytes(encoded[position + 2 : position + 4], "big"))
    return None
