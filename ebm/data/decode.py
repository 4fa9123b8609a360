"""Encoded images and vectors to arrays, and back. Nothing is decoded before its header has been checked."""

import io
import logging
import struct
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "ppm", "pgm")
# Pillow's other formats (PostScript, for one) start programs or have seen little use on hostile input.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM")
CHANNELS = {"1": 1, "L": 1, "I;16": 1, "I;16B": 1, "I": 1, "LA": 2, "RGB": 3, "P": 3, "CMYK": 3, "RGBA": 4}
PILLOW_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
logging.getLogger("imagecodecs").setLevel(logging.ERROR)  # it warns of damage that is then raised, or does no harm


class Header(NamedTuple):
    channels: int
    height: int
    width: int
    plain: Literal["png", "jpeg"] | None  # grey or colour of 8 bits: decoded by a faster library than Pillow

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width


def read_header(data: bytes) -> Header:
    """Shape of an encoded image without decoding it; a palette or CMYK counts as RGB. Raises ValueError."""
    return _png_header(data) or _jpeg_header(data) or _pillow_header(data)


def _png_header(data: bytes) -> Header | None:
    """Of an 8-bit grey or RGB image without transparency, whole to its last chunk."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR" or len(data) < 33:
        return None
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    plain = depth == 8 and colour in (0, 2) and width and height and data.find(b"tRNS", 33, data.find(b"IDAT", 33)) < 0
    return Header(1 if colour == 0 else 3, height, width, "png") if plain and data.endswith(PNG_END) else None


def _jpeg_header(data: bytes) -> Header | None:
    """Of a grey or colour image with 8 bits a sample: its frame header, the segment SOF0, 1 or 2."""
    at = 2 if data[:2] == b"\xff\xd8" else len(data)
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker in (0xC0, 0xC1, 0xC2):
            depth, height, width, channels = struct.unpack(">BHHB", data[at + 4 : at + 10])
            good = depth == 8 and channels in (1, 3) and width and height
            return Header(channels, height, width, "jpeg") if good else None
        if marker < 0xC0 or 0xD0 <= marker <= 0xDA or length < 2:  # pixels, or a segment without a length
            return None
        at += 2 + length
    return None


def _pillow_header(data: bytes) -> Header:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # Pillow's plugins raise almost anything on a broken header
        raise ValueError(f"not a readable image ({type(error).__name__})") from error
    if image.mode not in CHANNELS:
        raise ValueError(f"its pixels are of Pillow's mode {image.mode}; convert it to 8-bit grey or RGB")
    return Header(CHANNELS[image.mode], image.height, image.width, None)


def decode(data: bytes, header: Header) -> np.ndarray:
    """uint8 (C, H, W); 16-bit images keep their upper 8 bits. Raises ValueError where the data are damaged."""
    try:
        if header.plain == "png":
            array = _decode_png(data)
        elif header.plain == "jpeg":
            array = _decode_jpeg(data, header.channels)
        else:
            array = to_array(Image.open(io.BytesIO(data), formats=FORMATS)).transpose(2, 0, 1)
    except Exception as error:
        raise ValueError(f"can't be decoded ({error})") from error
    if array.shape != header.shape:
        raise ValueError(f"is {show(array.shape)} and its header says {show(header.shape)}")
    return array


def _decode_png(data: bytes) -> np.ndarray:
    """Twice as fast as Pillow, and stricter: a chunk of pixels whose checksum is wrong is an error. (torchvision's
    decode_png crashes on damaged files.)"""
    from imagecodecs import png_decode

    array = png_decode(data)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _decode_jpeg(data: bytes, channels: int) -> np.ndarray:
    """Twice as fast as Pillow, and strict about truncation (imagecodecs, faster still, takes what is cut short)."""
    from torchvision.io import ImageReadMode, decode_jpeg  # takes a second to load: for those who have JPEGs

    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode).numpy()


def to_array(image: Image.Image) -> np.ndarray:
    """A Pillow image of one of the modes in CHANNELS to uint8 (H, W, C)."""
    if image.mode.startswith("I"):
        array = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
    else:
        mode = PILLOW_MODES[CHANNELS[image.mode]]
        array = np.array(image if image.mode == mode else image.convert(mode))
    return array[:, :, None] if array.ndim == 2 else array


def to_pillow(array: np.ndarray) -> Image.Image:
    """uint8 (H, W, C) with 1 to 4 channels to a Pillow image."""
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def encode(array: np.ndarray, suffix: str) -> bytes:
    """uint8 (H, W, C) to the bytes of a `png` or `jpg` (quality 95, no chroma subsampling)."""
    out = io.BytesIO()
    if suffix == "png":
        to_pillow(array).save(out, "PNG")
    else:
        to_pillow(array).save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue()


def show(shape) -> str:
    return "x".join(str(n) for n in shape)


def describe(shape: tuple[int, ...]) -> str:
    """`images of 3x32x32`, or `vectors of 2 values`."""
    return f"images of {show(shape)}" if len(shape) == 3 else f"vectors of {shape[0]} values"


VECTOR_SUFFIX = "npy"
MAX_HEADER = 1024  # characters; numpy writes 118 for a vector
FLOAT32 = np.dtype("<f4")
HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_vector_shape(data: bytes) -> tuple[int]:
    """(D,) of an encoded vector, from its header alone. Raises ValueError."""
    return _read_header(data)[0]


def decode_vector(data: bytes, length: int) -> np.ndarray:
    """float32 (length,), read-only. Raises ValueError where the data are anything else, or not finite."""
    plain = _plain_header(length)
    if data.startswith(plain):
        start = len(plain)
    else:  # numpy's own parser takes ten times as long
        shape, start = _read_header(data)
        if shape != (length,):
            raise ValueError(f"vector has {shape[0]} values, data.shape is [{length}]; set data.shape=[{shape[0]}]")
    if len(data) != start + length * FLOAT32.itemsize:
        raise ValueError(f"can't be decoded ({len(data) - start} bytes where {length} float32 values should be)")
    vector = np.frombuffer(data, FLOAT32, offset=start)
    check_finite(vector)
    return vector


def check_finite(vector: np.ndarray) -> None:
    """Raises ValueError naming the first value that is not finite."""
    finite = np.isfinite(vector)
    if not finite.all():
        place = int(finite.argmin())
        raise ValueError(f"value {place} is {vector[place]}; all values must be finite")


def encode_vector(vector: np.ndarray) -> bytes:
    """float32 (D,) to the bytes of a .npy, as webdataset's writer does."""
    out = io.BytesIO()
    np.lib.format.write_array(out, vector.astype(FLOAT32, copy=False), allow_pickle=False)
    return out.getvalue()


@lru_cache(maxsize=8)
def _plain_header(length: int) -> bytes:
    """What numpy writes before `length` float32 values."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": (length,)})
    return out.getvalue()


def _read_header(data: bytes) -> tuple[tuple[int], int]:
    """((D,), where the values begin)."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        shape, _, dtype = HEADERS[version](file, max_header_size=MAX_HEADER)
    except Exception as error:  # numpy evaluates the header, and names of types in it, and raises almost anything
        raise ValueError(f"not a readable .npy of format 1.0 or 2.0 ({type(error).__name__})") from error
    if dtype != FLOAT32 or len(shape) != 1 or shape[0] < 1:
        raise ValueError(f"array is {dtype} {shape}; must be float32 (D,), little-endian")
    return shape, file.tell()
