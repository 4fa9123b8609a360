"""Encoded images to uint8 arrays, and back. Nothing is decoded before its header has been checked."""

import io
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "ppm", "pgm")
# Pillow's other formats (PostScript, for one) start programs or have seen little use on hostile input.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM")
CHANNELS = {"1": 1, "L": 1, "I;16": 1, "I;16B": 1, "I": 1, "LA": 2, "RGB": 3, "P": 3, "CMYK": 3, "RGBA": 4}
PILLOW_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


class Header(NamedTuple):
    channels: int
    height: int
    width: int
    image: Image.Image  # opened, not yet decoded

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width


def read_header(data: bytes) -> Header:
    """Shape of an encoded image without decoding it; a palette or CMYK counts as RGB. Raises ValueError."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # Pillow's plugins raise almost anything on a broken header
        raise ValueError(f"not a readable image ({type(error).__name__})") from error
    if image.mode not in CHANNELS:
        raise ValueError(f"its pixels are of Pillow's mode {image.mode}; convert it to 8-bit grey or RGB")
    return Header(CHANNELS[image.mode], image.height, image.width, image)


def decode(data: bytes, header: Header) -> np.ndarray:
    """uint8 (C, H, W); 16-bit images keep their upper 8 bits. Raises ValueError where the data are damaged."""
    image = header.image
    try:
        if image.format == "JPEG" and image.mode in ("L", "RGB"):
            array = _decode_jpeg(data, header.channels)
        else:
            array = to_array(image).transpose(2, 0, 1)
    except Exception as error:
        raise ValueError(f"can't be decoded ({error})") from error
    if array.shape != header.shape:
        raise ValueError(f"is {show(array.shape)} and its header says {show(header.shape)}")
    return array


def _decode_jpeg(data: bytes, channels: int) -> np.ndarray:
    """About twice as fast as Pillow, and strict about truncation."""
    from torchvision.io import ImageReadMode, decode_jpeg  # takes seconds to load: for those who have JPEGs

    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode).numpy()


def to_array(image: Image.Image) -> np.ndarray:
    """A Pillow image of one of the modes in CHANNELS to uint8 (H, W, C)."""
    if image.mode.startswith("I"):
        array = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
    else:
        array = np.asarray(image.convert(PILLOW_MODES[CHANNELS[image.mode]]))
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
