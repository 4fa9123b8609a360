"""Encoded images and vectors to arrays, and back. Nothing is decoded before its header has been checked.

This is the only decoder: a file has the same pixels in a folder, in a tar and in a parquet file.
"""

import io
import logging
import re
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "ppm", "pgm")
# Pillow's other formats (PostScript, for one) start programs or have seen little use on hostile input.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM")
OWN_FORMATS = (*FORMATS, "TIFF", "GIF")  # for the files of a source, which the user names
CHANNELS = {"1": 1, "L": 1, "I;16": 1, "I;16B": 1, "I": 1, "LA": 2, "RGB": 3, "P": 3, "CMYK": 3, "RGBA": 4, "PA": 4}
TRANSPARENT = {"1": 2, "L": 2, "RGB": 4, "P": 4}  # channels where one colour or palette entry is transparent
DEEP = ("I;16", "I;16B", "I")
PILLOW_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
ORIENTATION = 0x0112  # EXIF tag
PLACE = re.compile(r"^\w+, \S+\.cpp:\d+, ")  # in torchvision's own source, with which its messages begin

VECTOR_SUFFIX = "npy"
MAX_HEADER = 1024  # characters; numpy writes 118 for a vector
FLOAT32 = np.dtype("<f4")
HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}

logging.getLogger("imagecodecs").setLevel(logging.ERROR)  # it warns of damage that is then raised, or does no harm


class Header(NamedTuple):
    """The shape of the decoded image: turned upright as its EXIF orientation says."""

    channels: int
    height: int
    width: int
    plain: Literal["png", "jpeg"] | None  # grey or colour without transparency: decoded by a faster library than Pillow
    deep: bool = False  # 16 bits a value
    orientation: int = 1  # EXIF: 1 is upright, 5 to 8 exchange height and width

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width


def read_header(data: bytes, formats: Sequence[str] = FORMATS) -> Header:
    """Shape of an encoded image, without decoding it. A palette or CMYK counts as RGB; transparency is a channel of its
    own. `formats`: the names in Pillow that are allowed. Raises ValueError."""
    return _png_header(data) or _jpeg_header(data) or _pillow_header(data, formats)


def _png_header(data: bytes) -> Header | None:
    """The header of a grey or RGB image of 8 or 16 bits, without transparency or EXIF, whole to its last chunk."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR" or len(data) < 33:
        return None
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    pixels = data.find(b"IDAT", 33)
    plain = depth in (8, 16) and colour in (0, 2) and width and height and data.endswith(PNG_END)
    if not plain or data.find(b"tRNS", 33, pixels) >= 0 or data.find(b"eXIf", 33, pixels) >= 0:
        return None
    return Header(1 if colour == 0 else 3, height, width, "png", depth == 16)


def _jpeg_header(data: bytes) -> Header | None:
    """The header of a grey or colour image with 8 bits a sample: its frame segment, SOF0, 1 or 2."""
    at, orientation = 2 if data[:2] == b"\xff\xd8" else len(data), 1
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker in (0xC0, 0xC1, 0xC2):
            depth, height, width, channels = struct.unpack(">BHHB", data[at + 4 : at + 10])
            good = depth == 8 and channels in (1, 3) and width and height
            return Header(channels, *_upright(height, width, orientation), "jpeg", False, orientation) if good else None
        if marker < 0xC0 or 0xD0 <= marker <= 0xDA or length < 2:  # pixels, or a segment without a length
            return None
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _orientation(data[at + 4 : at + 2 + length])
        at += 2 + length
    return None


def _pillow_header(data: bytes, formats: Sequence[str]) -> Header:
    image = _open(data, formats)
    if image.mode not in CHANNELS:
        raise ValueError(f"its pixels are of Pillow's mode {image.mode}; convert it to 8-bit grey or RGB")
    orientation = _orientation(image.info.get("exif"))  # Image.getexif() may decode the pixels
    channels = (
        TRANSPARENT.get(image.mode, CHANNELS[image.mode]) if "transparency" in image.info else CHANNELS[image.mode]
    )
    size = _upright(image.height, image.width, orientation)
    return Header(channels, *size, None, image.mode in DEEP, orientation)


def _open(data: bytes, formats: Sequence[str]) -> Image.Image:
    if not data:
        raise ValueError("is empty, 0 bytes")
    try:
        return Image.open(io.BytesIO(data), formats=list(formats))
    except Exception as error:  # Pillow's plugins raise almost anything on a broken header
        raise ValueError(f"not a readable image ({type(error).__name__})") from error


def _orientation(exif: object) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none or it can't be read."""
    if not isinstance(exif, bytes):
        return 1
    try:
        found = Image.Exif()
        found.load(exif)
        value = found.get(ORIENTATION, 1)
    except Exception:  # Pillow raises almost anything on damaged EXIF, which viewers pass over
        return 1
    return value if value in range(1, 9) else 1


def _upright(height: int, width: int, orientation: int) -> tuple[int, int]:
    return (width, height) if orientation >= 5 else (height, width)


def decode(data: bytes, header: Header, formats: Sequence[str] = FORMATS) -> np.ndarray:
    """uint8 (C, H, W), upright; of 16-bit images the upper 8 bits. Raises ValueError where the data are damaged."""
    return to_uint8(decode_deep(data, header, formats))


def decode_deep(data: bytes, header: Header, formats: Sequence[str] = FORMATS) -> np.ndarray:
    """`decode`, with 16-bit images as uint16."""
    try:
        if header.plain == "png":
            array = _decode_png(data)
        elif header.plain == "jpeg":
            array = _decode_jpeg(data, header.channels)
        else:
            array = _pixels(_open(data, formats), header.channels).transpose(2, 0, 1)
    except Exception as error:  # decoders raise almost anything on damaged data
        raise ValueError(f"can't be decoded ({PLACE.sub('', str(error))})") from error
    array = _turn(array, header.orientation)
    if array.shape != header.shape:
        raise ValueError(f"decodes to {show(array.shape)}, its header says {show(header.shape)}")
    return array


def to_uint8(array: np.ndarray) -> np.ndarray:
    """The upper 8 bits of uint16; uint8 as it is."""
    return (array >> 8).astype(np.uint8) if array.dtype == np.uint16 else array


def _turn(array: np.ndarray, orientation: int) -> np.ndarray:
    """(C, H, W) upright: EXIF 2.3, table 6."""
    if orientation in (2, 3, 7, 8):
        array = array[:, :, ::-1]
    if orientation in (3, 4, 6, 7):
        array = array[:, ::-1]
    return array.transpose(0, 2, 1) if orientation >= 5 else array


def _decode_png(data: bytes) -> np.ndarray:
    """Twice as fast as Pillow, and stricter: a chunk of pixels whose checksum is wrong is an error. (torchvision's
    decode_png crashes on damaged files.)"""
    from imagecodecs import png_decode

    array: np.ndarray = png_decode(data)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _decode_jpeg(data: bytes, channels: int) -> np.ndarray:
    """Twice as fast as Pillow, and strict about truncation (imagecodecs, faster still, takes what is cut short)."""
    from torchvision.io import ImageReadMode, decode_jpeg  # takes a second to load: for those who have JPEGs

    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    array: np.ndarray = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode).numpy()
    return array


def _pixels(image: Image.Image, channels: int) -> np.ndarray:
    """A Pillow image of one of the modes in CHANNELS to uint8 or uint16 (H, W, C)."""
    if image.mode in DEEP:
        array = np.asarray(image)
        if array.min() < 0 or array.max() > 65535:
            raise ValueError("has values of more than 16 bits")
        array = array.astype(np.uint16)
    else:
        mode = PILLOW_MODES[channels]
        array = np.array(image if image.mode == mode else image.convert(mode))
    return array[:, :, None] if array.ndim == 2 else array


def to_array(image: Image.Image) -> np.ndarray:
    """A Pillow image of mode L, LA, RGB or RGBA to uint8 (H, W, C)."""
    return _pixels(image, CHANNELS[image.mode])


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


def show(shape: Sequence[int]) -> str:
    """3x32x32"""
    return "x".join(str(n) for n in shape)


def describe(shape: tuple[int, ...]) -> str:
    """`images of 3x32x32`, or `vectors of 2 values`."""
    return f"images of {show(shape)}" if len(shape) == 3 else f"vectors of {shape[0]} values"


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
    """((D,), the offset at which the values begin)."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        shape, _, dtype = HEADERS[version](file, max_header_size=MAX_HEADER)
    except Exception as error:  # numpy evaluates the header, and names of types in it, and raises almost anything
        raise ValueError(f"not a readable .npy of format 1.0 or 2.0 ({type(error).__name__})") from error
    if dtype != FLOAT32 or len(shape) != 1 or shape[0] < 1:
        raise ValueError(f"array is {dtype} {shape}; must be float32 (D,), little-endian")
    start = file.tell()
    if shape[0] * FLOAT32.itemsize > len(data) - start:
        raise ValueError(f"vector has {shape[0]} values by its header, and there are {len(data) - start} bytes")
    return shape, start
