"""Image and label bytes of a stored tile: lossless WebP and PNG, decoded by an allow-list only."""

import hashlib
import io

import cv2
import numpy as np
from PIL import Image

_WEBP, _PNG = b"RIFF", b"\x89PNG\r\n\x1a\n"


def encode_image(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8 RGB to lossless WebP (the smallest of the encodings tried; about 3 ms for 256 x 256)."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "WEBP", lossless=True, quality=0, method=0, exact=True)
    return out.getvalue()


def encode_label(label: np.ndarray) -> bytes:
    """(H, W) uint8 to PNG."""
    return encode_picture(label)


def encode_picture(pixels: np.ndarray) -> bytes:
    """(H, W) or (H, W, 3) uint8 to PNG; the same pixels give the same bytes."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=6)
    return out.getvalue()


def decode_picture(data: bytes) -> np.ndarray:
    """Inverse of `encode_picture`; for files whose hash has been checked."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return np.asarray(image)


def decode_image(data: bytes, side: int) -> np.ndarray:
    """Stored image bytes to (side, side, 3) uint8 RGB.

    Raises:
        ValueError: another format or another size than the store's.
    """
    if data[:4] != _WEBP or data[8:12] != b"WEBP":
        raise ValueError(f"stored image is not WebP, it starts with {data[:12]!r}")
    return _decoded(data, cv2.IMREAD_COLOR_RGB, (side, side, 3))


def decode_label(data: bytes, side: int) -> np.ndarray:
    """Stored label bytes to (side, side) uint8.

    Raises:
        ValueError: another format or another size than the store's.
    """
    if data[:8] != _PNG:
        raise ValueError(f"stored label is not PNG, it starts with {data[:8]!r}")
    return _decoded(data, cv2.IMREAD_UNCHANGED, (side, side))


def decode_codes(data: bytes, side: int) -> np.ndarray:
    """PNG of class codes that people have made to (side, side) uint8: 8-bit grey, or the indices of a palette.

    Raises:
        ValueError: another format, size or kind: fewer bits of grey mean a scale, not codes.
    """
    if data[:8] != _PNG:
        raise ValueError(f"is not PNG, it starts with {data[:8]!r}")
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.size != (side, side):
                raise ValueError(
                    f"has {image.size[0]} x {image.size[1]} pixels, the tile has {side} x {side}"
                )
            if image.mode != "P" and stored_kind(image) != "L":
                raise ValueError(f"holds {stored_kind(image)}, expected codes in 8-bit grey or a palette")
            return np.asarray(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot be decoded ({' '.join(str(error).split())[:120]})") from error


def stored_kind(image: Image.Image) -> str:
    """Kind of the stored pixels of an opened PNG: L;2 for two bits of grey, of which Pillow makes 0, 85, 170 and 255."""
    kinds = [part[3] for part in image.tile]  # type: ignore[attr-defined]
    return str(kinds[0]) if kinds else image.mode


def _decoded(data: bytes, flags: int, shape: tuple[int, ...]) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=["WEBP", "PNG"]) as header:
            size = header.size
        if size != shape[1::-1]:  # before any pixel is decoded: the header may claim gigabytes
            raise ValueError(
                f"its header says {size[1]} x {size[0]}, the store holds {shape[0]} x {shape[1]}"
            )
        array = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except (OSError, Image.DecompressionBombError, cv2.error) as error:
        raise ValueError(f"cannot be decoded ({' '.join(str(error).split())[:120]})") from error
    if array is None or array.shape != shape or array.dtype != np.uint8:
        found = "nothing" if array is None else f"{array.shape} {array.dtype}"
        raise ValueError(f"decoded to {found}, the store holds {shape} uint8")
    return array


def tile_hash(image: bytes, label: bytes | None) -> str:
    """sha256 of a tile's stored bytes, image then label."""
    return hashlib.sha256(image + (label or b"")).hexdigest()
