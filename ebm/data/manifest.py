"""The manifest: which shards there are, how many samples each holds, and where to find them inside.

webdataset alone can neither be resumed inside a shard nor notice missing samples; counts, offsets and checksums can.
"""

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, BinaryIO, Literal
from urllib.parse import unquote, urlsplit

from braceexpand import braceexpand
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator
from tqdm import tqdm

from ebm.data.cache import Remote
from ebm.data.tars import BLOCK, MAX_BYTES, scan_shard
from ebm.data.transfer import Access, TransferError, check_url, fetch, scheme_of
from ebm.errors import ConfigError, DataError
from ebm.runtime.files import replace, sync_directory

FILE_NAME = "manifest.json"
MAX_MANIFEST = 1 << 28  # bytes


class Shard(BaseModel):
    """One tar. `offsets[i]`: byte where sample 64 i begins; `crc32[i]`: of the bytes from there to the next offset."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    samples: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    offsets: tuple[int, ...]
    crc32: tuple[Annotated[int, Field(ge=0, lt=1 << 32)], ...]

    @field_validator("name")
    @classmethod
    def _stays_inside(cls, name: str) -> str:
        path = PurePosixPath(name)
        if not name or path.is_absolute() or ".." in path.parts or set(name) & set("\\:") or not name.isprintable():
            raise ValueError("must be a plain name relative to the manifest, without ..")
        return name

    @model_validator(mode="after")
    def _blocks(self):
        sizes = [stop - start for start, stop in pairwise((*self.offsets, self.bytes))]
        if len(sizes) != -(-self.samples // BLOCK) or min(sizes) <= 0 or self.offsets[0] < 0:
            raise ValueError(f"{self.name}: offsets must rise from 0 on to the size, one for every {BLOCK} samples")
        if max(sizes) > MAX_BYTES:
            raise ValueError(f"{self.name}: {BLOCK} samples of {max(sizes)} bytes, more than {MAX_BYTES}")
        if len(self.crc32) != len(self.offsets):
            raise ValueError(f"{self.name}: there must be as many crc32 as offsets")
        return self


class Manifest(BaseModel):
    """The shards in `directory`. `shape`: (C, H, W) of the images or (D,) of the vectors; `num_classes`: None without
    labels."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Literal[2] = 2
    shape: tuple[PositiveInt, ...]
    num_classes: PositiveInt | None = None
    shards: tuple[Shard, ...] = Field(min_length=1)
    directory: Path | Remote = Field(exclude=True)

    @field_validator("shape")
    @classmethod
    def _image_or_vector(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) not in (1, 3):
            raise ValueError("must be three numbers (channels, height, width) or one (the values of a vector)")
        return shape

    @model_validator(mode="after")
    def _unique(self):
        names = [shard.name for shard in self.shards]
        if len(set(names)) != len(names):
            raise ValueError("a shard is listed twice")
        return self

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def remote(self) -> bool:
        return isinstance(self.directory, Remote)

    def path(self, shard: Shard) -> Path | str:
        """A shard's path, or its URL."""
        return self.directory.url_of(shard.name) if self.remote else self.directory / shard.name

    def open(self, shard: Shard) -> BinaryIO:
        """Raises OSError where a local shard can't be opened, DataError where another can't be fetched."""
        if self.remote:
            return self.directory.open(shard.name, shard.bytes, shard.sha256)
        return open(self.path(shard), "rb")

    def reopen(self, shard: Shard) -> BinaryIO:
        """`open`, of a shard with a URL past the cache, where it may have been damaged."""
        if self.remote:
            self.directory.cache.discard(shard.sha256)
        return self.open(shard)

    def save(self) -> Path:
        """Write manifest.json, atomically."""
        target = self.directory / FILE_NAME
        replace(target, f"{self.model_dump_json()}\n".encode())
        sync_directory(self.directory)
        return target


def is_remote(path: str | Path) -> bool:
    return scheme_of(str(path)) not in (None, "file")


def manifest_path(path: str | Path) -> Path:
    """A local directory's manifest, or the manifest itself."""
    path = str(path)
    if path.startswith("pipe:"):
        raise ConfigError(f"{path}: shards are never read from a program; give a path or a URL")
    if scheme_of(path) == "file":
        path = unquote(urlsplit(path).path)
    return Path(path) if path.endswith(".json") else Path(path) / FILE_NAME


def load_manifest(path: str | Path, access: Access | None = None) -> Manifest:
    """The manifest of a directory of shards, or the file itself: a path or a URL. Raises DataError, and ConfigError for
    a URL that `access` (default: Access()) does not allow."""
    if is_remote(path):
        return _remote_manifest(str(path), access or Access())
    file = manifest_path(path)
    try:
        with open(file, "rb") as stream:
            text = stream.read(MAX_MANIFEST + 1)
    except FileNotFoundError as error:
        raise DataError(
            f"no shards in {file.parent}: there is no {file.name}. Write shards with `python -m ebm shard --source "
            f"... --out {file.parent}`, or, for shards made elsewhere, run `python -m ebm index {file.parent}`"
        ) from error
    except OSError as error:
        raise DataError(f"{file}: {error}") from error
    if len(text) > MAX_MANIFEST:
        raise DataError(f"{file}: larger than {MAX_MANIFEST} bytes, which no manifest is")
    try:
        return _parse(text, file.parent)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: {_reason(error)}; write it anew with `python -m ebm index {file.parent}`") from error


def _remote_manifest(place: str, access: Access) -> Manifest:
    check_url(place, access)
    url = place if place.endswith(".json") else f"{place.rstrip('/')}/{FILE_NAME}"
    directory = Remote(url[: url.rindex("/") + 1], access)

    def receive(body: Iterator[bytes]) -> Manifest:
        text = bytearray()
        for piece in body:
            text += piece
            if len(text) > MAX_MANIFEST:
                raise TransferError(f"larger than {MAX_MANIFEST} bytes, which no manifest is", final=True)
        try:
            return _parse(text, directory)
        except (ValueError, RecursionError) as error:  # a body cut short, where the server gave no length
            raise TransferError(_reason(error)) from error

    return fetch(url, access, receive)


def _parse(text: bytes, directory: Path | Remote) -> Manifest:
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"must be an object, found {type(values).__name__}")
    return Manifest(**(values | {"directory": directory}))


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "manifest"
        value = "" if isinstance(first["input"], dict | BaseModel) else f"={str(first['input'])[:80]!r}"
        return f"{key}{value}: {first['msg'].removeprefix('Value error, ')}"
    return f"not a manifest ({error})"


def check_files(manifest: Manifest) -> None:
    """Every shard is there and has the manifest's size. Raises DataError; takes no longer than a listing. Shards with a
    URL are verified as they come: here, only that the cache can hold the largest."""
    if manifest.remote:
        manifest.directory.cache.prepare(max(shard.bytes for shard in manifest.shards))
        return
    for shard in manifest.shards:
        path = manifest.path(shard)
        try:
            found = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: listed in {FILE_NAME}, but can't be found ({error.strerror})") from error
        if found != shard.bytes:
            raise DataError(
                f"{path}: has {found} bytes, {FILE_NAME} says {shard.bytes}; copy or write it again, or, "
                f"if it was changed on purpose, run `python -m ebm index {manifest.directory}`"
            )


def verify(manifest: Manifest, progress: bool = False) -> None:
    """`check_files`, and the sha256 of every shard. Raises DataError naming the first that differs."""
    if not manifest.remote:
        check_files(manifest)
    for shard in tqdm(manifest.shards, desc="verifying", unit="shard", disable=None if progress else True):
        if manifest.remote:
            manifest.directory.verify(shard.name, shard.bytes, shard.sha256)
            continue
        path = manifest.path(shard)
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard.sha256:
            raise DataError(f"{path}: sha256 is {found}, {FILE_NAME} says {shard.sha256}; copy or write it again")


def index_shards(where: str | Path, progress: bool = False) -> Manifest:
    """Scan shards made elsewhere and write their manifest beside them, over one that is there.

    `where`: a directory, or a pattern (`*`, `?`, `{000..099}`). Raises DataError naming what can't be used.
    """
    if is_remote(where):
        raise ConfigError(f"{where}: index the shards where they are, and upload {FILE_NAME} beside them")
    paths = find_shards(str(where))
    directory = Path(os.path.commonpath([path.parent for path in paths]))
    bar = tqdm(paths, desc="indexing", unit="shard", disable=None if progress else True)
    names = [path.relative_to(directory).as_posix() for path in paths]
    manifest = assemble(directory, names, [scan_shard(path) for path in bar])
    manifest.save()
    return manifest


def find_shards(where: str) -> list[Path]:
    patterns = [f"{glob.escape(where)}/*.tar"] if Path(where).is_dir() else list(braceexpand(where))
    paths = sorted({Path(p) for pattern in patterns for p in glob.glob(pattern)})
    missing = [p for p in patterns if not glob.glob(p)]
    if missing:
        raise DataError(f"no shards: nothing matches {missing[0]}; give a directory of .tar files or a pattern")
    return paths


def assemble(directory: Path, names: list[str], scans: list) -> Manifest:
    """A manifest of scanned shards; all their first images must have one shape. Raises DataError."""
    for name, scan in zip(names, scans, strict=True):
        if scan.shape != scans[0].shape:
            raise DataError(
                f"{directory / name} begins with a sample of {scan.shape}, {names[0]} with {scans[0].shape} (channels, "
                "height, width, or values of a vector): all must have one shape; write images with --size"
            )
    labelled = all(scan.unlabelled == 0 for scan in scans)
    shards = [
        Shard(
            name=name, **{field: getattr(scan, field) for field in ("samples", "bytes", "sha256", "offsets", "crc32")}
        )
        for name, scan in zip(names, scans, strict=True)
    ]
    return Manifest(
        shape=scans[0].shape,
        num_classes=1 + max(scan.max_label for scan in scans) if labelled else None,
        shards=shards,
        directory=directory,
    )
