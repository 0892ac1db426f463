"""Picture files to arrays and back."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from skyrl.records import DataError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 50_000_000
"""Of one picture, where no setting says otherwise."""
SPELLED = ("iVBORw0KGgo", "/9j/", "UklGR")
"""How base64 of a PNG, JPEG or WebP file begins."""
ORIENTATION, LYING = 0x0112, (5, 6, 7, 8)
"""A camera's tag, and its values of pictures that are turned by a right angle."""
TAGGED = {"exif", "xmp", "XML:com.adobe.xmp"}
"""Pillow's names of what may hold it."""
BROKEN = (OSError, ValueError, SyntaxError, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow's readers raise for broken files, between them."""
WIDE_MODES = ("I", "F")
"""Pillow's modes of more than 8 bits; its conversion to RGB cuts them off instead of scaling."""


def picture_file(stored: Any, root: Path, read: bool = True) -> bytes:
    """The file of a picture as rows hold it: bytes, base64, a ``data:`` URL, a path inside ``root``, or a
    ``{bytes, path}`` with one of the two.

    Args:
        read: False only looks whether a path names a file, and returns nothing for it.

    Raises:
        DataError: for anything else, and a path that leaves ``root`` or names no readable file.
    """
    if isinstance(stored, dict) and stored.keys() <= {"bytes", "path"}:
        stored = stored.get("path") if stored.get("bytes") is None else stored["bytes"]
    if isinstance(stored, bytes):
        return stored
    if not isinstance(stored, str):
        got = "null" if stored is None else f"a {type(stored).__name__}"
        raise DataError(f"got {got}; allowed: a picture (bytes, path, base64, data: URL or {{bytes, path}})")
    if stored.startswith("data:") or stored.startswith(SPELLED):
        try:
            return base64.b64decode(stored.partition(",")[2] if stored.startswith("data:") else stored, validate=True)
        except binascii.Error as error:
            raise DataError(f"got {stored[:40]!r}…; allowed: base64 of a picture file ({error})") from error
    if stored.startswith(("http://", "https://")):
        raise DataError(f"got {stored!r}; pictures are not downloaded; allowed: a file beside the data")
    path = Path(stored.removeprefix("file://"))
    if ".." in path.parts or (path.is_absolute() and not path.is_relative_to(root.absolute())):
        raise DataError(f"got {stored!r}; allowed: a path inside {root} (data.picture_root names another folder)")
    try:
        if not (root / path).is_file():
            raise DataError(f"got {stored!r}, and {root} has no such file")
        return (root / path).read_bytes() if read else b""
    except (OSError, ValueError) as error:  # a name too long, a NUL in it
        raise DataError(f"got {stored[:80]!r}: {error}") from error


def decode_picture(content: bytes, where: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The RGB picture, uint8 [height, width, 3], that the bytes of a PNG, JPEG or WebP file hold. A camera's
    orientation tag is applied, and transparent pixels are shown on white, as a page would show them.

    Raises:
        DataError: naming the picture by ``where``, for other formats, broken files, more than 8 bits per channel, and
            more than ``max_pixels`` pixels, which are not decoded.
    """
    try:
        with _opened(content, where, max_pixels) as opened:
            if opened.mode.split(";")[0] in WIDE_MODES:
                raise DataError(f"{where}: got a picture with more than 8 bits per channel; allowed: 8 bits")
            picture = ImageOps.exif_transpose(opened)
            if picture.has_transparency_data:
                front = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", front.size, "white"), front)
            return np.array(picture.convert("RGB"))
    except BROKEN as error:
        raise _unreadable(content, where, error) from error


def picture_outline(content: bytes, where: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A black picture of the same size, uint8 [height, width, 3], that takes no memory: only the beginning of the file
    is read. Errors: as :func:`decode_picture`, where the beginning shows them."""
    try:
        with _opened(content, where, max_pixels) as opened:
            width, height = opened.size
            # Without such a tag Pillow would decode a whole PNG to look for one behind the picture.
            if TAGGED & opened.info.keys() and opened.getexif().get(ORIENTATION) in LYING:
                width, height = height, width
            return np.broadcast_to(np.uint8(0), (height, width, 3))
    except BROKEN as error:
        raise _unreadable(content, where, error) from error


def _opened(content: bytes, where: str, max_pixels: int) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # its limit is not ours
        opened = Image.open(io.BytesIO(content), formats=FORMATS)
    width, height = opened.size
    if width * height > max_pixels:
        raise DataError(f"{where}: got a picture of {width}x{height} pixels; data.max_pixels allows {max_pixels}")
    return opened


def _unreadable(content: bytes, where: str, error: Exception) -> DataError:
    got = f"{len(content)} bytes that begin with {content[:8]!r}"
    why = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"  # which only says that it is none
    return DataError(f"{where}: got {got}; allowed: a PNG, JPEG or WebP file{why}")


def encode_png(picture: np.ndarray, where: str) -> bytes:
    """A PNG file of an RGB picture, uint8 [height, width, 3]; decoding gives the same array. Another type or shape is a
    :class:`DataError`, which names it by ``where``."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
        raise DataError(f"{where}: got a picture of {picture.dtype} {list(picture.shape)}; allowed: uint8 [h, w, 3]")
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return file.getvalue()


def mask_picture(picture: np.ndarray, prompt_id: str, share: float, patch: int) -> np.ndarray:
    """A copy with random square patches blackened: a pure function of its arguments.

    Args:
        picture: uint8 [height, width, 3].
        prompt_id: Seeds the choice of patches.
        share: Probability, 0 … 1, with which each patch is black.
        patch: Side of a patch, pixels, at least 1; those at the right and lower edge may be cut. Another share or patch
            is a :class:`ValueError`.
    """
    if not 0 <= share <= 1 or patch < 1:
        raise ValueError(f"share is {share}, patch {patch}; allowed: 0 … 1, and 1 or more")
    height, width = picture.shape[:2]
    seed = int.from_bytes(hashlib.blake2b(prompt_id.encode(), digest_size=8).digest(), "big")
    black = np.random.default_rng(seed).random((-(-height // patch), -(-width // patch))) < share
    pixels = black.repeat(patch, axis=0).repeat(patch, axis=1)[:height, :width]
    return np.where(pixels[..., None], np.uint8(0), picture)
