"""Bytes of a picture file -> an RGB picture, upright, whatever the file held. Only Pillow's raster formats are read."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from megatron_agent.errors import DataError

MAX_PICTURE_PX = 89_478_485  # Pillow's own bound against decompression bombs; 256 MiB as RGB
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")  # none that runs a helper program (EPS does)
QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that swap width and height

# Pillow's plugins raise whatever their parsing of damaged bytes happens to hit.
DAMAGED = (
    OSError, SyntaxError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, EOFError, MemoryError,
    struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


def decode_picture(data: bytes) -> Image.Image:
    """Decode completely -> RGB, first frame of an animation, EXIF orientation applied, alpha over white.

    Raises DataError: empty, unknown format, truncated, damaged, or over MAX_PICTURE_PX pixels.
    """
    try:
        opened = _open(data)
        opened.load()
        return to_rgb(ImageOps.exif_transpose(opened))
    except DataError:
        raise
    except DAMAGED as error:
        raise DataError(_why(data, error)) from error


def check_picture(data: bytes) -> tuple[int, int]:
    """(width, height) of what `decode_picture` returns, and the same errors, without its pixels where that is cheaper.

    A JPEG is read to its end, but at an eighth of its size.
    """
    return _size_px(data, read=True)


def picture_size_px(data: bytes) -> tuple[int, int]:
    """(width, height) of what `decode_picture` returns; for a JPEG from its header alone. Raises DataError."""
    return _size_px(data, read=False)


def _size_px(data: bytes, read: bool) -> tuple[int, int]:
    try:
        opened = _open(data)
        if opened.format != "JPEG":
            return decode_picture(data).size
        width, height = opened.size
        turned = opened.getexif().get(ExifTags.Base.Orientation) in QUARTER_TURNS
        if read:
            opened.draft(None, (1, 1))  # type: ignore[arg-type]  # None: any mode
            opened.load()
    except DataError:
        raise
    except DAMAGED as error:
        raise DataError(_why(data, error)) from error
    return (height, width) if turned else (width, height)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any mode -> RGB: alpha over white, 16 bit by its high byte. Raises DataError for floating point pictures."""
    if picture.mode == "RGB" and not picture.has_transparency_data:
        return picture if type(picture) is Image.Image else picture.copy()
    if picture.mode == "F":
        raise DataError("a floating point picture has no defined range; convert it to 8 bit")
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        values = np.asarray(picture).astype(np.int64)
        shift = 8 if values.max(initial=0) > 255 or picture.mode != "I" else 0
        return Image.fromarray((values >> shift).clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        with_alpha = picture.convert("RGBA")
        white = Image.new("RGBA", with_alpha.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, with_alpha).convert("RGB")
    return picture.convert("RGB")


def _open(data: bytes) -> Image.Image:
    if not data:
        raise DataError("the picture has no bytes")
    opened = Image.open(io.BytesIO(data), formats=FORMATS)
    if opened.width * opened.height > MAX_PICTURE_PX:
        raise DataError(f"picture of {opened.width}x{opened.height} px; at most {MAX_PICTURE_PX} px are decoded")
    return opened


def _why(data: bytes, error: BaseException) -> str:
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"picture over {MAX_PICTURE_PX} px: {error}"
    what = f"unreadable picture ({len(data)} bytes, starts with {data[:8]!r})"
    if isinstance(error, UnidentifiedImageError):  # its text names an address in memory
        return f"{what}: none of {', '.join(FORMATS)}"
    return f"{what}: {type(error).__name__}: {error}"
