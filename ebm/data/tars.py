"""Tars: how their members make samples, what a manifest records of a shard and what is wrong with its samples, and
reading a block of samples from its byte offset.

webdataset groups a tar's members to samples by name. By itself it ends silently at a damaged header, so a block is
compared with the crc32 in the manifest."""

import hashlib
import io
import json
import re
import struct
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from imagecodecs import deflate_crc32
from webdataset.tariterators import base_plus_ext, group_by_keys

from ebm.data.decode import IMAGE_SUFFIXES, VECTOR_SUFFIX, read_header, read_vector_shape
from ebm.errors import DataError

# A header's name, size, checksum, type, magic and the first byte of its prefix; numbers without their final bytes.
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
# tarfile raises these on hostile headers: sizes beyond memory or 64 bits, headers nested without end.
DAMAGE = (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError, MemoryError)


class Member(tarfile.TarInfo):
    """A header that leads forwards: Python before 3.11.14 loops for ever after a negative size.

    `_block` and `_proc_member` are tarfile's hooks for subclasses, which its type stubs leave out."""

    def _block(self, count: int) -> int:
        if count < 0:
            raise tarfile.ReadError("a header with a negative size")
        blocks: int = super()._block(count)  # type: ignore[misc]
        return blocks

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in LONG_HEADERS and self.size > MAX_HEADER:
            raise tarfile.ReadError(f"a header of more than {MAX_HEADER} bytes")
        member: tarfile.TarInfo = super()._proc_member(tar)  # type: ignore[misc]
        return member


class Grouping(NamedTuple):
    """How a tar's members make samples. `dots`: whether a member's key ends at its name's first dot, as webdataset has
    it, or at the last; `image`: the suffix of the image, where a sample has several."""

    dots: Literal["first", "last"] = "first"
    image: str | None = None


BY_FIRST_DOT = Grouping()


@lru_cache(maxsize=64)
def main_suffixes(names: tuple[str, ...], image: str | None = None) -> tuple[str | None, str | None]:
    """The suffixes of a sample's image (`png`, `image.jpg`) and of its vector (`npy`, `latent.npy`), the first of each
    in tar order; None where there is none. `image`: the one suffix that counts as an image."""
    images, vectors = image_suffixes(names), [name for name in names if _ends(name, (VECTOR_SUFFIX,))]
    if image is not None:
        images = [name for name in images if name == image]
    return images[0] if images else None, vectors[0] if vectors else None


def image_suffixes(names: Iterable[str]) -> list[str]:
    return [name for name in names if _ends(name, IMAGE_SUFFIXES)]


def _ends(name: str, suffixes: tuple[str, ...]) -> bool:
    return not name.startswith("__") and name.rpartition(".")[2] in suffixes


def parse_label(data: bytes) -> int:
    """The class in a .cls member. Raises ValueError."""
    if not LABEL.fullmatch(data):
        raise ValueError(f".cls is {data[:20]!r} and must be a class number, 0 or above, in ASCII digits")
    return int(data)


def members(
    tar: tarfile.TarFile, dots: str = "first", others: dict[str, list[str]] | None = None
) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """Yields the members that are parts of samples, with key and suffix; adds others' names to `others`, by reason."""
    end = _end(tar)
    for member in tar:
        key, suffix = split_name(member.name, dots)
        if not member.isreg() or META.match(member.name) or key is None:
            if others is not None and not member.isdir():
                why = "no regular file" if not member.isreg() else "no suffix" if key is None else "metadata"
                others.setdefault(why, []).append(member.name)
            continue
        if member.sparse is not None or member.offset_data + member.size > end:
            raise tarfile.ReadError(f"{member.name} ends early, or claims more bytes than there are")
        yield member, key, suffix.lower()


def _end(tar: tarfile.TarFile) -> int:
    file = tar.fileobj
    assert isinstance(file, io.BufferedReader | io.BytesIO)
    return file.seek(0, io.SEEK_END)


def split_name(name: str, dots: str) -> tuple[str | None, str]:
    """(key, suffix) of a member's name; (None, "") where it has no suffix."""
    if dots == "first":
        key, suffix = base_plus_ext(name)
        return key, suffix or ""
    head, _, base = name.rpartition("/")
    stem, dot, suffix = base.rpartition(".")
    if not dot or not stem:
        return None, ""
    return (f"{head}/{stem}" if head else stem), suffix


def crc32(data: bytes) -> int:
    """40 times as fast as zlib's."""
    value: int = deflate_crc32(data)
    return value


def read_range(file: BinaryIO, start: int, stop: int) -> bytes:
    file.seek(start)
    return file.read(stop - start)


def read_block(data: bytes, dots: str = "first") -> Iterator[dict[str, Any]]:
    """Yields the samples in a part of a shard, in order: `__key__` and the bytes of each suffix.

    Raises ValueError at damage; where a header is damaged it may also end early.
    """
    plain = _plain_members(data, dots)
    if plain is not None:
        yield from _grouped(plain)
        return
    try:
        # webdataset's own iterator would decompress what looks like gzip, to any size.
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:", tarinfo=Member) as tar:
            yield from _grouped(((key, suffix), _extracted(tar, m)) for m, key, suffix in members(tar, dots))
    except DAMAGE as error:
        raise ValueError(reason_of(error)) from error


def _extracted(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None, "a regular member"
    return file.read()


def _grouped(named: Iterable[tuple[tuple[str, str], bytes]]) -> Iterator[dict[str, Any]]:
    """webdataset's samples of ((key, suffix), content), whose names are split already."""
    found: Iterator[dict[str, Any]] = group_by_keys(
        ({"fname": name, "data": content, "__url__": ""} for name, content in named), keys=tuple
    )
    return found


def _plain_members(data: bytes, dots: str) -> list[tuple[tuple[str, str], bytes]] | None:
    """((key, suffix), content) of the members of an undamaged tar of regular files with short names in ASCII, as almost
    all shards are; None for any other. tarfile takes as long over two headers as the decoder takes over a small
    image."""
    found, places, checksums, at = [], [], [], 0
    while at + 512 <= len(data):
        if data[at] == 0:  # no name: the end, or damage
            if data[at:].strip(b"\0"):
                return None
            at = len(data)
            break
        field, size, checksum, kind, magic, prefix = HEADER.unpack_from(data, at)
        field = field.rstrip(b"\0")
        plain = magic == b"ustar" and kind == b"0" and prefix == 0 and field.isascii() and b"\0" not in field
        if not (plain and OCTAL.fullmatch(size) and OCTAL.fullmatch(checksum)):
            return None
        stop = at + 512 + int(size, 8)
        if stop > len(data):
            return None
        places.append(at // 512)
        checksums.append(int(checksum, 8))
        name = field.decode()
        key, suffix = split_name(name, dots)
        if key is not None and not META.match(name):
            found.append(((key, suffix), data[at + 512 : stop]))
        at = stop + -stop % 512
    return found if found and at == len(data) and _right(data, places, checksums) else None


def _right(data: bytes, places: list[int], checksums: list[int]) -> bool:
    """Whether the headers at these multiples of 512 bytes have these sums, their own field counted as blanks."""
    headers = np.frombuffer(data[: len(data) // 512 * 512], np.uint8).reshape(-1, 512)[places]
    headers[:, 148:156] = ord(" ")
    sums: list[int] = headers.sum(1, dtype=np.int64).tolist()
    return sums == checksums


def reason_of(error: BaseException) -> str:
    return str(error.args[0]) if error.args else type(error).__name__


MAX_JSON = 1 << 20  # bytes of a member that holds a label


class Problem(NamedTuple):
    """Why the reader would refuse a sample, or pass over it."""

    key: str
    reason: str
    kind: Literal["unusable", "ambiguous"] = "unusable"


class Scan(NamedTuple):
    """One shard. `shapes`: how many samples have each, (C, H, W) of images or (D,) of vectors where there is no image;
    `labels`: a class number, a text, or None a sample; `others`: members that belong to no sample, by why."""

    samples: int
    bytes: int
    sha256: str
    offsets: list[int]
    crc32: list[int]
    shapes: Counter[tuple[int, ...]]
    firsts: dict[tuple[int, ...], str]  # the first key of each shape
    keys: list[str]
    labels: list[int | str | None]  # None also where the sample can't be used
    usable: list[bool]
    suffixes: Counter[str]
    problems: list[Problem]
    others: dict[str, list[str]]


def read_label(members: Mapping[str, bytes], where: str) -> int | str | None:
    """A sample's label, of `where`: `cls`, a class number; another suffix, a text; `json:FIELD`, a number or text in a
    JSON object; `none`. None where the member or field is missing. Raises ValueError."""
    suffix, _, name = where.partition(":")
    if suffix not in members:
        return None
    data = members[suffix]
    if where == "cls":
        return parse_label(data)
    if name:
        try:
            value = json.loads(data[:MAX_JSON])
        except (ValueError, RecursionError) as error:
            raise ValueError(f".{suffix} is not JSON ({error})") from error
        value = value.get(name) if isinstance(value, dict) else None
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | str)):
            raise ValueError(f".{suffix}: field {name} is {str(value)[:40]!r}, and must be a class's name or number")
        return value
    try:
        return data[:1000].decode().strip()
    except UnicodeDecodeError as error:
        raise ValueError(f".{suffix} is not text") from error


def scan_shard(path: Path, grouping: Grouping = BY_FIRST_DOT, label: str = "cls") -> Scan:
    """Everything that a manifest records of one shard, and what is wrong with its samples. Raises DataError where the
    shard as a whole can't be used."""
    try:
        with _BoundedFile(path) as file:
            scanner = _Scanner(path, file, grouping, label)
            scanner.run()
            if not scanner.offsets:
                raise DataError(f"{path}: holds no samples (members such as KEY.png or KEY.npy, with KEY.cls)")
            offsets = scanner.offsets[::BLOCK]
            size = path.stat().st_size
            checksums = [crc32(read_range(file, *block)) for block in pairwise((*offsets, size))]
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, *DAMAGE) as error:
        raise DataError(f"{path}: not a readable tar ({reason_of(error)}). {_remedy(path)}".strip()) from error
    return Scan(
        samples=len(scanner.offsets),
        bytes=size,
        sha256=digest,
        offsets=offsets,
        crc32=checksums,
        shapes=scanner.shapes,
        firsts=scanner.firsts,
        keys=scanner.keys,
        labels=scanner.labels,
        usable=scanner.usable,
        suffixes=scanner.suffixes,
        problems=scanner.problems,
        others=scanner.others,
    )


def _remedy(path: Path) -> str:
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
    except OSError:
        return ""
    if not packed:
        return ""
    name = path.name.removesuffix(".gz")
    name = f"{name.removesuffix('.tgz')}.tar" if name.endswith(".tgz") else name
    target = path.with_name(name if name != path.name else f"plain-{name}")
    return f"It is gzip'd, and can't be read from the middle; unpack it: `gzip -dc {path} > {target}`"


class _BoundedFile(io.BufferedReader):
    """tarfile reads what a header asks for, and headers may ask for more than the memory."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path))

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > MAX_BYTES:
            raise tarfile.ReadError(f"{size} bytes in one piece, more than {MAX_BYTES}")
        return super().read(size)


class _Scanner:
    """Goes through a shard's members once and groups them to samples."""

    def __init__(self, path: Path, file: _BoundedFile, grouping: Grouping, label: str):
        self.path, self.file, self.grouping, self.label = path, file, grouping, label
        self.offsets: list[int] = []
        self.keys: list[str] = []
        self.labels: list[int | str | None] = []
        self.usable: list[bool] = []
        self.shapes: Counter[tuple[int, ...]] = Counter()
        self.firsts: dict[tuple[int, ...], str] = {}
        self.suffixes: Counter[str] = Counter()
        self.problems: list[Problem] = []
        self.others: dict[str, list[str]] = {}

    def run(self) -> None:
        key, seen = "", set[str]()
        group: dict[str, tarfile.TarInfo] = {}
        with tarfile.open(fileobj=self.file, mode="r:", tarinfo=Member) as tar:
            for member, prefix, suffix in members(tar, self.grouping.dots, self.others):
                if prefix != key and group:
                    self._close(key, group)
                    seen.add(key)
                    group = {}
                if prefix in seen:
                    raise DataError(
                        f"{self.path}: key {prefix} comes again after others; a key's members must be together"
                    )
                if suffix in group:
                    raise DataError(f"{self.path}: key {prefix} has two members .{suffix}; keys must be unique")
                key, group[suffix] = prefix, member
            _check_end(self.path, self.file, tar.offset)
        if group:
            self._close(key, group)

    def _close(self, key: str, group: dict[str, tarfile.TarInfo]) -> None:
        self.offsets.append(min(member.offset for member in group.values()))
        self.keys.append(key)
        self.suffixes.update(group.keys())
        suffix, label, shape = self.label.partition(":")[0], None, None
        try:
            shape = self._shape(key, group)
            if shape is not None:
                label = read_label({suffix: self._content(group[suffix])} if suffix in group else {}, self.label)
                self.shapes[shape] += 1
                self.firsts.setdefault(shape, key)
        except ValueError as error:
            self.problems.append(Problem(key, str(error)))
            shape = None
        self.labels.append(label)
        self.usable.append(shape is not None)

    def _shape(self, key: str, group: dict[str, tarfile.TarInfo]) -> tuple[int, ...] | None:
        """None, and a problem, where a sample has several images and no suffix was chosen. Raises ValueError."""
        images = image_suffixes(group)
        if len(images) > 1 and self.grouping.image is None:
            self.problems.append(Problem(key, f"has {len(images)} images: .{', .'.join(images)}", "ambiguous"))
            return None
        image, vector = main_suffixes(tuple(group), self.grouping.image)
        if image is not None:
            return read_header(self._content(group[image])).shape
        if vector is not None:
            return read_vector_shape(self._content(group[vector]))
        found = ", ".join(f".{suffix}" for suffix in group)
        wanted = f" .{self.grouping.image}" if self.grouping.image else ""
        raise ValueError(
            f"has no image{wanted} and no vector (found {found}; images are .{', .'.join(IMAGE_SUFFIXES)}, vectors "
            f".{VECTOR_SUFFIX})"
        )

    def _content(self, member: tarfile.TarInfo) -> bytes:
        return read_range(self.file, member.offset_data, member.offset_data + member.size)


def _check_end(path: Path, file: BinaryIO, offset: int) -> None:
    """Raises DataError unless only zeros follow the last member: a damaged header or a second archive hides samples."""
    file.seek(offset)
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            raise DataError(f"{path}: damaged or unexpected data after its last readable member, at byte {offset}")
