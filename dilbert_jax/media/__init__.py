"""Reading ultrasound media: any DICOM, video or image file becomes one grayscale, de-identified `Clip`."""

from dilbert_jax.media.clip import Clip, MediaError, printable
from dilbert_jax.media.read import find_media, read_clip, read_stills

__all__ = ["Clip", "MediaError", "find_media", "printable", "read_clip", "read_stills"]
