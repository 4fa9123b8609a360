"""Going through a shard once: all that its manifest records, and what is wrong with its samples."""

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from ebm.data.decode import IMAGE_SUFFIXES, VECTOR_SUFFIX, read_header, read_vector_shape
from ebm.data.tars import (
    BLOCK,
    BY_FIRST_DOT,
    DAMAGE,
    MAX_BYTES,
    Grouping,
    Member,
    crc32,
    image_suffixes,
    main_suffixes,
    members,
    parse_label,
    read_range,
    reason_of,
)
from ebm.errors import DataError

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
