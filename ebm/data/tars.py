"""Samples in a tar: counting them once for the manifest, and reading a block of them from its byte offset.

webdataset groups a tar's members to samples by name. Left to itself it ends without a word at a damaged header, so
everything here compares with what should be there: a scan with the file's end, a block with the manifest's crc32.
"""

import hashlib
import io
import re
import struct
import tarfile
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from imagecodecs import deflate_crc32 as crc32  # 40 times as fast as zlib's
from webdataset.tariterators import base_plus_ext, group_by_keys

from ebm.data.decode import IMAGE_SUFFIXES, VECTOR_SUFFIX, read_header, read_vector_shape
from ebm.errors import DataError

# Of a header: name, size, checksum, type, magic, first byte of the name's prefix; size and checksum without their ends.
HEADER, OCTAL = struct.Struct("100s 24x 11s 13x 6s 2x c 100x 5s 83x B"), re.compile(rb"[0-7]+")
LABEL = re.compile(rb"\s*[0-9]{1,9}\s*")
BLOCK = 64  # samples between two offsets of the manifest
MAX_BYTES = 1 << 30  # of a block, which is read at once
META = re.compile(r"__[^/]*__($|/)")  # members that webdataset passes over
MAX_HEADER = 1 << 13  # bytes of a long name or pax header; Python before 3.11.10 takes quadratic time over one
LONG_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
# What tarfile raises on hostile headers: sizes beyond memory and beyond 64 bits, one header inside another for ever.
DAMAGE = (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError, MemoryError)


class Member(tarfile.TarInfo):
    """A header that leads forwards: Python before 3.11.14 goes round for ever after a negative size."""

    def _block(self, count: int) -> int:
        if count < 0:
            raise tarfile.ReadError("a header with a negative size")
        return super()._block(count)

    def _proc_member(self, tar):  # tarfile's hook for subclasses
        if self.type in LONG_HEADERS and self.size > MAX_HEADER:
            raise tarfile.ReadError(f"a header of more than {MAX_HEADER} bytes")
        return super()._proc_member(tar)


class Scan(NamedTuple):
    """One shard. `shape`: (C, H, W) of its first image, or (D,) of its first vector where that has none; `max_label`:
    None without labels; `unlabelled`: samples."""

    samples: int
    bytes: int
    sha256: str
    offsets: list[int]
    crc32: list[int]
    shape: tuple[int, ...]
    max_label: int | None
    unlabelled: int


@lru_cache(maxsize=64)
def main_suffixes(names: tuple[str, ...]) -> tuple[str | None, str | None]:
    """The suffixes of a sample's image (`png`, `image.jpg`) and of its vector (`npy`, `latent.npy`), the first of each
    in tar order; None where there is none."""
    ends = {name: name.rpartition(".")[2] for name in names if not name.startswith("__")}
    image = next((name for name, end in ends.items() if end in IMAGE_SUFFIXES), None)
    return image, next((name for name, end in ends.items() if end == VECTOR_SUFFIX), None)


def parse_label(data: bytes) -> int:
    """The class in a .cls member. Raises ValueError."""
    if not LABEL.fullmatch(data):
        raise ValueError(f".cls is {data[:20]!r} and must be a class number, 0 or above, in ASCII digits")
    return int(data)


def scan_shard(path: Path) -> Scan:
    """Everything the manifest records of one shard. Raises DataError naming the shard and what is wrong with it."""
    try:
        with _BoundedFile(path) as file:
            samples = _samples(path, file)
            if not samples:
                raise DataError(f"{path}: holds no samples (members such as KEY.png or KEY.npy, with KEY.cls)")
            offsets = [s.offset for s in samples[::BLOCK]]
            size = path.stat().st_size
            checksums = [crc32(read_range(file, *block)) for block in pairwise((*offsets, size))]
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, *DAMAGE) as error:
        remedy = "only plain tars can be read from the middle: decompress .tar.gz" if path.suffix != ".tar" else ""
        raise DataError(f"{path}: not a readable tar ({_reason(error)}). {remedy}".strip()) from error
    labels = [s.label for s in samples if s.label is not None]
    return Scan(
        samples=len(samples),
        bytes=size,
        sha256=digest,
        offsets=offsets,
        crc32=checksums,
        shape=samples[0].shape,
        max_label=max(labels, default=None),
        unlabelled=len(samples) - len(labels),
    )


class _Sample(NamedTuple):
    offset: int
    shape: tuple[int, ...] | None  # of the first sample alone
    label: int | None


class _BoundedFile(io.BufferedReader):
    """tarfile reads what a header asks for, and headers may ask for more than the memory."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path))

    def read(self, size: int = -1) -> bytes:
        if size > MAX_BYTES:
            raise tarfile.ReadError(f"{size} bytes in one piece, more than {MAX_BYTES}")
        return super().read(size)


def _samples(path: Path, file) -> list[_Sample]:
    samples, keys, key, group = [], set(), None, {}
    with tarfile.open(fileobj=file, mode="r:", tarinfo=Member) as tar:
        for member, prefix, suffix in _members(tar):
            if prefix != key and group:
                samples.append(_sample(path, file, key, group, first=not samples))
                keys.add(key)
                group = {}
            if prefix in keys:
                raise DataError(f"{path}: key {prefix} comes again after others; a key's members must be together")
            if suffix in group:
                raise DataError(f"{path}: key {prefix} has two members .{suffix}; keys must be unique")
            key = prefix
            group[suffix] = member
        _check_end(path, file, tar.offset)
        if group:
            samples.append(_sample(path, file, key, group, first=not samples))
    return samples


def _sample(path: Path, file, key: str, group: dict, first: bool) -> _Sample:
    image, vector = main_suffixes(tuple(group))
    if image is None and vector is None:
        found = ", ".join(f".{s}" for s in group)
        raise DataError(
            f"{path}: key {key} has no image and no vector (found {found}; images are "
            f".{', .'.join(IMAGE_SUFFIXES)}, vectors .{VECTOR_SUFFIX})"
        )
    try:
        shape = _shape(_content(file, group[image or vector]), image is not None) if first else None
        label = parse_label(_content(file, group["cls"])) if "cls" in group else None
    except ValueError as error:
        raise DataError(f"{path}: key {key}: {error}") from error
    return _Sample(min(member.offset for member in group.values()), shape, label)


def _shape(data: bytes, is_image: bool) -> tuple[int, ...]:
    return read_header(data).shape if is_image else read_vector_shape(data)


def _content(file, member: tarfile.TarInfo) -> bytes:
    return read_range(file, member.offset_data, member.offset_data + member.size)


def _check_end(path: Path, file, offset: int) -> None:
    """After the last member there are zeros alone; else a damaged header or a second archive hides samples."""
    file.seek(offset)
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            raise DataError(f"{path}: damaged or unexpected data after its last readable member, at byte {offset}")


def _members(tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """The members that webdataset takes for parts of samples, with key and suffix."""
    end = tar.fileobj.seek(0, io.SEEK_END)
    for member in tar:
        key, suffix = base_plus_ext(member.name)
        if not member.isreg() or META.match(member.name) or key is None:
            continue
        if member.sparse is not None or member.offset_data + member.size > end:
            raise tarfile.ReadError(f"{member.name} ends early, or claims more bytes than there are")
        yield member, key, suffix.lower()


def read_range(file, start: int, stop: int) -> bytes:
    file.seek(start)
    return file.read(stop - start)


def read_block(data: bytes) -> Iterator[dict]:
    """The webdataset samples in a part of a shard, in order: `__key__` and a suffix a member.

    Raises ValueError at damage; where a header is damaged it may just end early.
    """
    plain = _plain_members(data)
    if plain is not None:
        yield from _grouped(plain)
        return
    try:
        # webdataset's own iterator would decompress what looks like gzip, to any size.
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:", tarinfo=Member) as tar:
            yield from _grouped(((key, suffix), tar.extractfile(m).read()) for m, key, suffix in _members(tar))
    except DAMAGE as error:
        raise ValueError(_reason(error)) from error


def _grouped(members: Iterable[tuple[tuple[str, str], bytes]]) -> Iterator[dict]:
    """webdataset's samples of ((key, suffix), content), whose names are split once already."""
    return group_by_keys(({"fname": name, "data": content, "__url__": ""} for name, content in members), keys=tuple)


def _plain_members(data: bytes) -> list[tuple[tuple[str, str], bytes]] | None:
    """((key, suffix), content) of the members of an undamaged tar of regular files with short names in ASCII, as almost
    all shards are; None for any other. tarfile takes as long over two headers as the decoder takes over a small
    image."""
    members, places, checksums, at = [], [], [], 0
    while at + 512 <= len(data):
        if data[at] == 0:  # no name: the end, or damage
            if data[at:].strip(b"\0"):
                return None
            at = len(data)
            break
        name, size, checksum, kind, magic, prefix = HEADER.unpack_from(data, at)
        name = name.rstrip(b"\0")
        plain = magic == b"ustar" and kind == b"0" and prefix == 0 and name.isascii() and b"\0" not in name
        if not (plain and OCTAL.fullmatch(size) and OCTAL.fullmatch(checksum)):
            return None
        stop = at + 512 + int(size, 8)
        if stop > len(data):
            return None
        places.append(at // 512)
        checksums.append(int(checksum, 8))
        name = name.decode()
        parts = base_plus_ext(name)
        if parts[0] is not None and not META.match(name):
            members.append((parts, data[at + 512 : stop]))
        at = stop + -stop % 512
    return members if members and at == len(data) and _right(data, places, checksums) else None


def _right(data: bytes, places: list[int], checksums: list[int]) -> bool:
    """Whether the headers at these multiples of 512 bytes have these sums, their own field counted as blanks."""
    headers = np.frombuffer(data[: len(data) // 512 * 512], np.uint8).reshape(-1, 512)[places]
    headers[:, 148:156] = ord(" ")
    return headers.sum(1, dtype=np.int64).tolist() == checksums


def _reason(error: Exception) -> str:
    return str(error.args[0]) if error.args else type(error).__name__
