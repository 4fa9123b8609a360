"""Samples in a tar: counting them once for the manifest, and reading a block of them from its byte offset.

webdataset groups a tar's members to samples by name. Left to itself it ends without a word at a damaged header, so
everything here compares with what should be there: a scan with the file's end, a block with the manifest's count.
"""

import hashlib
import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from webdataset.tariterators import base_plus_ext, group_by_keys

from ebm.data.decode import IMAGE_SUFFIXES, read_header
from ebm.errors import DataError

BLOCK = 64  # samples between two offsets of the manifest
META = re.compile(r"__[^/]*__($|/)")  # members that webdataset passes over
MAX_HEADER = 1 << 13  # bytes of a long name or pax header; Python before 3.11.10 takes quadratic time over one
LONG_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
TAR_ERRORS = (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError)  # tarfile's at damage


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
    """One shard. `shape`: (C, H, W) of its first image; `max_label`: None without labels; `unlabelled`: samples."""

    samples: int
    bytes: int
    sha256: str
    offsets: list[int]
    shape: tuple[int, int, int]
    max_label: int | None
    unlabelled: int


def image_suffix(suffixes) -> str | None:
    """The suffix of a sample's image (`png`, `image.jpg`), the first in tar order; None where there is none."""
    return next((s for s in suffixes if s.rpartition(".")[2] in IMAGE_SUFFIXES), None)


def parse_label(data: bytes) -> int:
    """The class in a .cls member. Raises ValueError."""
    if not re.fullmatch(rb"\s*[0-9]{1,9}\s*", data):
        raise ValueError(f".cls is {data[:20]!r} and must be a class number, 0 or above, in ASCII digits")
    return int(data)


def scan_shard(path: Path) -> Scan:
    """Everything the manifest records of one shard. Raises DataError naming the shard and what is wrong with it."""
    try:
        with open(path, "rb") as file:
            samples = _samples(path, file)
            digest = hashlib.file_digest(_rewound(file), "sha256").hexdigest()
    except (OSError, *TAR_ERRORS) as error:
        remedy = "only plain tars can be read from the middle: decompress .tar.gz" if path.suffix != ".tar" else ""
        raise DataError(f"{path}: not a readable tar ({error}). {remedy}".strip()) from error
    if not samples:
        raise DataError(f"{path}: holds no samples (members such as KEY.png with KEY.cls)")
    labels = [s.label for s in samples if s.label is not None]
    return Scan(
        samples=len(samples),
        bytes=path.stat().st_size,
        sha256=digest,
        offsets=[s.offset for s in samples[::BLOCK]],
        shape=samples[0].shape,
        max_label=max(labels, default=None),
        unlabelled=len(samples) - len(labels),
    )


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The regular files. Raises tarfile.TarError where one claims more bytes than there are, as a sparse file does."""
    end = tar.fileobj.seek(0, io.SEEK_END)
    for member in tar:
        if not member.isreg() or META.match(member.name):
            continue
        if member.sparse is not None or member.offset_data + member.size > end:
            raise tarfile.ReadError(f"{member.name!r} claims more bytes than the shard holds")
        yield member


class _Sample(NamedTuple):
    offset: int
    shape: tuple[int, int, int] | None  # of the first sample alone
    label: int | None


def _rewound(file):
    file.seek(0)
    return file


def _samples(path: Path, file) -> list[_Sample]:
    samples, key, group = [], None, {}
    with tarfile.open(fileobj=file, mode="r:", tarinfo=Member) as tar:
        for member in _members(tar):
            prefix, suffix = base_plus_ext(member.name)
            if prefix is None:
                continue
            if prefix != key and group:
                samples.append(_sample(path, tar, key, group, first=not samples))
                group = {}
            if suffix.lower() in group:
                raise DataError(f"{path}: key {prefix} has two members .{suffix}; keys must be unique")
            key = prefix
            group[suffix.lower()] = member
        if group:
            samples.append(_sample(path, tar, key, group, first=not samples))
        _check_end(path, file, tar.offset)
    return samples


def _sample(path: Path, tar: tarfile.TarFile, key: str, group: dict, first: bool) -> _Sample:
    image = image_suffix(group)
    if image is None:
        found = ", ".join(f".{s}" for s in group)
        raise DataError(f"{path}: key {key} has no image (found {found}; images are .{', .'.join(IMAGE_SUFFIXES)})")
    try:
        shape = read_header(tar.extractfile(group[image]).read()).shape if first else None
        label = parse_label(tar.extractfile(group["cls"]).read(64)) if "cls" in group else None
    except ValueError as error:
        raise DataError(f"{path}: key {key}: {error}") from error
    return _Sample(min(member.offset for member in group.values()), shape, label)


def _check_end(path: Path, file, offset: int) -> None:
    """After the last member there are zeros alone; else a damaged header or a second archive hides samples."""
    file.seek(offset)
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            raise DataError(f"{path}: damaged or unexpected data after its last readable member, at byte {offset}")


def read_block(file, start: int, stop: int) -> Iterator[dict]:
    """The webdataset samples between two byte offsets of an open shard, in order: `__key__` and a suffix a member.

    Raises tarfile.TarError, ValueError or OSError at damage; where a header is damaged it may just end early.
    """
    file.seek(start)
    # webdataset's own iterator would decompress what looks like gzip, to any size.
    with tarfile.open(fileobj=io.BytesIO(file.read(stop - start)), mode="r:", tarinfo=Member) as tar:
        members = ({"fname": m.name, "data": tar.extractfile(m).read(), "__url__": ""} for m in _members(tar))
        yield from group_by_keys(members)
