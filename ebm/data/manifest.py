"""The manifest: which shards there are, how many samples each holds, where they begin, and what they were made from.

webdataset alone can neither be resumed inside a shard nor notice missing samples; counts, offsets and checksums can.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, BinaryIO, Literal, Self
from urllib.parse import unquote, urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from tqdm import tqdm

from ebm.data.cache import Remote
from ebm.data.tars import BLOCK, MAX_BYTES, Grouping
from ebm.data.transfer import Access, TransferError, check_url, fetch, scheme_of
from ebm.errors import ConfigError, DataError
from ebm.runtime.files import replace, sync_directory

log = logging.getLogger(__name__)
FILE_NAME = "manifest.json"
MAX_MANIFEST = 1 << 28  # bytes


class Shard(BaseModel):
    """One tar. `offsets[i]`: byte where sample 64 i begins; `crc32[i]`: of the bytes from there to the next offset.
    `labels`: the samples' classes where their .cls members do not have them; -1 for none."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    samples: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    offsets: tuple[int, ...]
    crc32: tuple[Annotated[int, Field(ge=0, lt=1 << 32)], ...]
    labels: tuple[Annotated[int, Field(ge=-1, lt=10**9)], ...] | None = None

    @field_validator("name")
    @classmethod
    def _stays_inside(cls, name: str) -> str:
        path = PurePosixPath(name)
        if not name or path.is_absolute() or ".." in path.parts or set(name) & set("\\:") or not name.isprintable():
            raise ValueError("must be a plain name relative to the manifest, without ..")
        return name

    @model_validator(mode="after")
    def _blocks(self) -> Self:
        sizes = [stop - start for start, stop in pairwise((*self.offsets, self.bytes))]
        if len(sizes) != -(-self.samples // BLOCK) or min(sizes) <= 0 or self.offsets[0] < 0:
            raise ValueError(f"{self.name}: offsets must rise from 0 on to the size, one for every {BLOCK} samples")
        if max(sizes) > MAX_BYTES:
            raise ValueError(f"{self.name}: {BLOCK} samples of {max(sizes)} bytes, more than {MAX_BYTES}")
        if len(self.crc32) != len(self.offsets):
            raise ValueError(f"{self.name}: there must be as many crc32 as offsets")
        if self.labels is not None and len(self.labels) != self.samples:
            raise ValueError(f"{self.name}: there must be as many labels as samples")
        return self


def storable(text: object) -> object:
    """File names that are not UTF-8 with \\udcXX for each such byte, since JSON can't hold them as Python does."""
    return text.encode(errors="backslashreplace").decode() if isinstance(text, str) else text


Text = Annotated[str, BeforeValidator(storable)]


class Origin(BaseModel):
    """What shards were made from. `source`: as in data.source, paths made absolute; `fingerprint`: a hash of the names
    and sizes of its files, None where the name says it all; `options`: the conversion's."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    source: Text
    split: Text
    samples: int | None = None
    fingerprint: str | None = None
    options: dict[str, Text | int | float] = {}

    def __str__(self) -> str:
        count = f", {self.samples} samples" if self.samples is not None else ""
        return f"{self.source} (split {self.split}{count})"


ENDS = 1 << 20  # bytes at either end of a file that its fingerprint covers


def fingerprint(paths: Sequence[str | Path]) -> str:
    """A hash of files' names, sizes, and first and last MiB: seconds also for large ones. Raises OSError."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{Path(path).name}\0{size}\n".encode(errors="surrogateescape"))
            digest.update(file.read(ENDS))
            file.seek(max(0, size - ENDS))
            digest.update(file.read(ENDS))
    return digest.hexdigest()


class LeftOut(BaseModel):
    """Files or samples that are not in the shards, or that the reader passes over: why, how many, and the first."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    reason: Text
    count: PositiveInt
    first: Text

    def __str__(self) -> str:
        return f"{self.count} {self.reason} (first: {self.first})"


class Manifest(BaseModel):
    """The shards in `directory`.

    `shape`: (C, H, W) of the images or (D,) of the vectors. `num_classes`: None without labels. `classes`: their names
    in order, where they have names. `root`: where the shards are, if not beside the manifest. `dots`, `image`: how
    members make samples (tars.Grouping).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Literal[2] = 2
    shape: tuple[PositiveInt, ...]
    num_classes: PositiveInt | None = None
    classes: tuple[Text, ...] | None = None
    source: Origin | None = None
    left_out: tuple[LeftOut, ...] = ()
    root: str | None = None
    dots: Literal["first", "last"] = "first"
    image: str | None = None
    shards: tuple[Shard, ...] = Field(min_length=1)
    directory: Path | Remote = Field(exclude=True)

    @field_validator("shape")
    @classmethod
    def _image_or_vector(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) not in (1, 3):
            raise ValueError("must be three numbers (channels, height, width) or one (the values of a vector)")
        return shape

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [shard.name for shard in self.shards]
        if len(set(names)) != len(names):
            raise ValueError("a shard is listed twice")
        if self.classes is not None and len(self.classes) != self.num_classes:
            raise ValueError(f"classes: {len(self.classes)} names for num_classes={self.num_classes}")
        if self.root is not None and (isinstance(self.directory, Remote) or not Path(self.root).is_absolute()):
            raise ValueError("root: must be an absolute path, of a manifest that is a local file")
        return self

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def grouping(self) -> Grouping:
        return Grouping(self.dots, self.image)

    @property
    def remote(self) -> Remote | None:
        """The URL's directory; None for local shards."""
        return self.directory if isinstance(self.directory, Remote) else None

    @property
    def local(self) -> Path:
        """The directory of local shards."""
        assert isinstance(self.directory, Path), "remote shards have no path"
        return self.directory if self.root is None else Path(self.root)

    @property
    def identity(self) -> str:
        """A hash of the shards' contents, in order: the same wherever they lie."""
        text = json.dumps([self.shape, [[shard.sha256, shard.labels] for shard in self.shards]])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def title(self) -> str:
        """What a message calls these data, wherever they lie."""
        return f"{self.samples} samples" + (f" of {self.source.source}" if self.source is not None else "")

    def path(self, shard: Shard) -> Path | str:
        """A shard's path, or its URL."""
        return self.remote.url_of(shard.name) if self.remote else self.local / shard.name

    def open(self, shard: Shard) -> BinaryIO:
        """Raises OSError where a local shard can't be opened, DataError where another can't be fetched."""
        if self.remote:
            return self.remote.open(shard.name, shard.bytes, shard.sha256)
        return open(self.local / shard.name, "rb")

    def reopen(self, shard: Shard) -> BinaryIO:
        """Like `open`, but fetches a shard with a URL again: its copy in the cache may be damaged."""
        if self.remote:
            self.remote.cache.discard(shard.sha256)
        return self.open(shard)

    def save(self, target: Path | None = None) -> Path:
        """Writes manifest.json atomically, or `target`. Returns its path."""
        assert isinstance(self.directory, Path), "a remote manifest is written where its shards are"
        target = target or self.directory / FILE_NAME
        replace(target, f"{self.model_dump_json(exclude_none=True)}\n".encode())
        sync_directory(target.parent)
        return target


def is_remote(path: str | Path) -> bool:
    return scheme_of(str(path)) not in (None, "file")


def manifest_path(path: str | Path) -> Path:
    """The manifest in a local directory, or the manifest itself."""
    path = str(path)
    if path.startswith("pipe:"):
        raise ConfigError(f"{path}: shards are never read from a program; give a path or a URL")
    if scheme_of(path) == "file":
        path = unquote(urlsplit(path).path)
    return Path(path) if path.endswith(".json") else Path(path) / FILE_NAME


def load_manifest(path: str | Path, access: Access | None = None) -> Manifest:
    """The manifest of a directory of shards, or the file itself: a path or a URL. It can be pickled, so that one rank
    reads it for all. Raises DataError, and ConfigError for a URL that `access` (default: Access()) does not allow."""
    if is_remote(path):
        return _remote_manifest(str(path), access or Access())
    file = manifest_path(path)
    try:
        with open(file, "rb") as stream:
            text = stream.read(min(os.fstat(stream.fileno()).st_size, MAX_MANIFEST) + 1)
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
            return _parse(bytes(text), directory)
        except (ValueError, RecursionError) as error:  # perhaps a body cut short, where the server gave no length
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


def prepare_cache(manifest: Manifest) -> None:
    """Makes this node's cache for shards with a URL. Raises ConfigError where it can't hold the largest of them."""
    if manifest.remote:
        manifest.remote.cache.prepare(max(shard.bytes for shard in manifest.shards))


def check_files(manifest: Manifest, on_error: Literal["fail", "skip"] = "fail", max_skipped: float = 1.0) -> None:
    """Every local shard is there and has the manifest's size. Takes as long as a listing; in a job of many ranks one
    does it for all. Shards with a URL are verified as they come: here, only the cache is prepared.

    Raises DataError naming the first shard that differs. With `on_error="skip"` it warns of each, and raises where
    their samples are more than the share `max_skipped` of all.
    """
    prepare_cache(manifest)
    if manifest.remote:
        return
    lost, wrong = 0, []
    for shard in manifest.shards:
        problem = _file_problem(manifest, shard)
        if problem is None:
            continue
        if on_error == "fail":
            raise DataError(problem)
        wrong.append(problem)
        lost += shard.samples
        log.warning("passed over: %s", problem)
    if lost > max_skipped * manifest.samples:
        raise DataError(
            f"{len(wrong)} shards are missing or damaged, with {lost} of {manifest.samples} samples, more than the "
            f"share data.max_skipped={max_skipped}. The first: {wrong[0]}"
        )


def _file_problem(manifest: Manifest, shard: Shard) -> str | None:
    path = manifest.local / shard.name
    try:
        found = path.stat().st_size
    except OSError as error:
        return f"{path}: listed in {FILE_NAME}, but can't be found ({error.strerror})"
    if found == shard.bytes:
        return None
    return (
        f"{path}: has {found} bytes, {FILE_NAME} says {shard.bytes}; copy or write it again, or, "
        f"if it was changed on purpose, run `python -m ebm index {manifest.directory}`"
    )


def verify(manifest: Manifest, progress: bool = False) -> None:
    """`check_files`, and the sha256 of every shard. Raises DataError naming the first that differs."""
    if not manifest.remote:
        check_files(manifest)
    for shard in tqdm(manifest.shards, desc="verifying", unit="shard", disable=None if progress else True):
        if manifest.remote:
            manifest.remote.verify(shard.name, shard.bytes, shard.sha256)
            continue
        path = manifest.local / shard.name
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard.sha256:
            raise DataError(f"{path}: sha256 is {found}, {FILE_NAME} says {shard.sha256}; copy or write it again")
