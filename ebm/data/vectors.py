"""Vectors in numpy's .npy format, read without pickle; nothing is made of a header before it has been checked."""

import io
from functools import lru_cache

import numpy as np

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
