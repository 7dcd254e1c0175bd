"""Frame sizes read from compressed streams, so that they are known before a decoder allocates."""

# Start-of-frame markers carry the size: SOF0-SOF15 without DHT, JPG and DAC [ITU-T T.81], SOF55 [T.87].
_START_OF_FRAME = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}


def read_frame_size(encoded: bytes) -> tuple[int, int] | None:
    """Read the size from the header of a JPEG, JPEG-LS or JPEG 2000 image.

    Args:
        encoded: one compressed frame.

    Returns:
        (rows, columns), None if no such header is found.
    """
    start = encoded.find(b"\xff\x4f\xff\x51", 0, 4096)
    if start >= 0:
        return _read_jpeg2000_size(encoded[start + 4 :])
    if encoded[:2] == b"\xff\xd8":
        return _read_jpeg_size(encoded)
    return None


def _read_jpeg2000_size(segment: bytes) -> tuple[int, int] | None:
    """Size of the image area in a SIZ segment [ITU-T T.800 A.5.1]."""
    if len(segment) < 20:
        return None
    width, height, left, top = (int.from_bytes(segment[i : i + 4], "big") for i in (4, 8, 12, 16))
    return height - top, width - left


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
