"""Picture files to arrays and back."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps

from skyrl.records import DataError

FORMATS = ("PNG", "JPEG")
WIDE_MODES = ("I", "F")
"""Pillow's modes of more than 8 bits; its conversion to RGB cuts them off instead of scaling."""


def decode_picture(content: bytes, where: str) -> np.ndarray:
    """The RGB picture, uint8 [height, width, 3], that the bytes of a PNG or JPEG file hold. A camera's orientation tag
    is applied, and transparent pixels are shown on white, as a page would show them.

    Raises:
        DataError: naming the picture by ``where``, for other formats, broken files, more than 8 bits per channel.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            if opened.mode.split(";")[0] in WIDE_MODES:
                raise DataError(f"{where}: got a picture with more than 8 bits per channel; allowed: 8 bits")
            picture = ImageOps.exif_transpose(opened)
            if picture.has_transparency_data:
                front = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", front.size, "white"), front)
            return np.array(picture.convert("RGB"))
    # What Pillow's readers raise for broken files, between them.
    except (OSError, ValueError, SyntaxError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        got = f"{len(content)} bytes that begin with {content[:8]!r}"
        raise DataError(f"{where}: got {got}; allowed: a PNG or JPEG file ({error})") from error


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
