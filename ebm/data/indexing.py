"""Shards made elsewhere: which members make a sample, what its label is, and what is passed over; their manifests, and
their samples as a source, to be written anew."""

import glob
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

from braceexpand import braceexpand
from tqdm import tqdm

from ebm.data.decode import decode_vector, read_vector_shape, show
from ebm.data.items import Item, Label, LabelTable, image_item, numbered
from ebm.data.manifest import (
    FILE_NAME,
    LeftOut,
    Manifest,
    Origin,
    Shard,
    fingerprint,
    is_remote,
    load_manifest,
    manifest_path,
)
from ebm.data.tars import (
    BLOCK,
    BY_FIRST_DOT,
    Grouping,
    Scan,
    crc32,
    image_suffixes,
    main_suffixes,
    parse_label,
    read_block,
    read_range,
    scan_shard,
)
from ebm.errors import ConfigError, DataError

UNFINISHED = ".unfinished"  # a directory of shards that are being written
SHOWN = 20  # problems that a message lists


class Scanned(NamedTuple):
    """A readable shard: its name in the manifest, and what is in it."""

    name: str
    scan: Scan


def index_shards(
    where: str | Path,
    progress: bool = False,
    *,
    labels: LabelTable | None = None,
    label: str | None = None,
    grouping: Grouping = BY_FIRST_DOT,
    on_error: Literal["fail", "skip"] = "fail",
    out: str | Path | None = None,
) -> Manifest:
    """Scans shards made elsewhere and writes their manifest beside them, replacing one that is there, or to `out`.

    Args:
        where: a directory, or a pattern (`*`, `?`, `{000..099}`).
        labels: classes by key; else from the members that `label` names (tars.read_label; default `cls`).
        on_error: `skip` leaves out shards that can't be read, and counts the samples that a reader with
            data.on_error=skip will pass over.

    Raises DataError with a list of what can't be used, and the option that settles what is ambiguous.
    """
    if is_remote(where):
        raise ConfigError(f"{where}: index the shards where they are, and upload {FILE_NAME} beside them")
    paths = find_shards(str(where))
    directory = Path(os.path.commonpath([path.parent for path in paths]))
    target = _target(directory, out)
    before = _classes_before(target)
    bar = tqdm(paths, desc="indexing", unit="shard", disable=None if progress else True)
    found, bad = _scan_all(bar, directory, grouping, "none" if labels else label or "cls")
    if bad and on_error == "fail":
        raise DataError(_listed(bad, "shards can't be used", "mend or remove them, or give --on-error skip"))
    if not found:
        raise DataError(_listed(bad, "shards can't be used", "none is left"))
    left_out = [LeftOut(reason="shards that can't be read", count=len(bad), first=bad[0])] if bad else []
    manifest = assemble(
        directory,
        found,
        grouping=grouping,
        labels=labels,
        label=label,
        on_error=on_error,
        left_out=left_out,
        classes_before=before,
        root=None if target.parent.resolve() == directory.resolve() else str(directory.resolve()),
    )
    manifest.model_copy(update={"directory": target.parent}).save(target)
    return manifest if manifest.root is None else load_manifest(target)


def find_shards(where: str) -> list[Path]:
    """The .tar files in a directory or that match a pattern, sorted. Raises DataError."""
    patterns = [f"{glob.escape(where)}/*.tar"] if Path(where).is_dir() else list(braceexpand(where))
    folders = [Path(where)] if Path(where).is_dir() else [Path(pattern).parent for pattern in patterns]
    for folder in dict.fromkeys(folders):
        if (folder / UNFINISHED).exists():
            raise DataError(
                f"{folder / UNFINISHED}: shards are being written here, or a command that wrote them was killed; run "
                f"that command again, which goes on where it was, or remove {folder}"
            )
    paths = sorted({Path(p) for pattern in patterns for p in glob.glob(pattern)})
    missing = [p for p in patterns if not glob.glob(p)]
    if missing:
        packed = sorted(p for end in ("*.tar.gz", "*.tgz") for p in glob.glob(f"{glob.escape(where)}/{end}"))
        hint = f" ({len(packed)} are gzip'd, such as {packed[0]}; unpack them: `gunzip {where}/*.gz`)" if packed else ""
        raise DataError(f"no shards: nothing matches {missing[0]}; give a directory of .tar files or a pattern{hint}")
    return paths


def _target(directory: Path, out: str | Path | None) -> Path:
    """Where the manifest goes; checked before the scan, which may take hours. Raises DataError."""
    target = directory / FILE_NAME if out is None else Path(out)
    target = target / FILE_NAME if target.is_dir() else target
    if target.suffix != ".json":
        raise DataError(f"--out {target}: must be a directory that is there, or a file that ends in .json")
    if not os.access(target.parent, os.W_OK):
        there = "can't be written to" if target.parent.exists() else "is not there"
        raise DataError(f"{target.parent}: {there}; give --out FILE.json, and data.shards=FILE.json to train")
    return target


def _classes_before(target: Path) -> tuple[str, ...] | None:
    """Class names that a manifest which is there has: the shards themselves hold only numbers."""
    try:
        return load_manifest(target).classes
    except DataError:  # there is none, or it is what this command mends
        return None


def _scan_all(
    paths: "Sequence[Path] | tqdm[Path]", directory: Path, grouping: Grouping, label: str
) -> tuple[list[Scanned], list[str]]:
    found, bad = [], []
    for path in paths:
        try:
            found.append(Scanned(path.relative_to(directory).as_posix(), scan_shard(path, grouping, label)))
        except DataError as error:
            bad.append(str(error))
    return found, bad


def assemble(
    directory: Path,
    found: Sequence[Scanned],
    *,
    grouping: Grouping = BY_FIRST_DOT,
    labels: LabelTable | None = None,
    label: str | None = None,
    on_error: Literal["fail", "skip"] = "fail",
    left_out: Sequence[LeftOut] = (),
    classes: Sequence[str] | None = None,
    classes_before: Sequence[str] | None = None,
    source: Origin | None = None,
    root: str | None = None,
) -> Manifest:
    """The manifest of scanned shards. Raises DataError where samples can't be used, differ in shape or lack labels."""
    _refuse_ambiguous(directory, found)
    bad = [f"{directory / name}: key {key}: {reason}" for name, scan in found for key, reason, _ in scan.problems]
    if bad and on_error == "fail":
        raise DataError(_listed(bad, "samples can't be used", _remedy(directory)))
    left_out = list(left_out)
    if bad:
        left_out.append(LeftOut(reason="samples that can't be read", count=len(bad), first=bad[0]))
    for why in dict.fromkeys(why for _, scan in found for why in scan.others):
        members = [member for _, scan in found for member in scan.others.get(why, [])]
        left_out.append(LeftOut(reason=f"members that are in no sample: {why}", count=len(members), first=members[0]))
    shape = _shape(directory, found, on_error, left_out)
    numbers, names = _numbers(directory, found, labels, label, on_error, left_out)
    written = label in (None, "cls") and labels is None  # the reader finds them in the .cls members
    labelled = [number for part in numbers for number in part if number is not None]
    count, known = None, None
    if labelled:
        given = names or classes or classes_before
        count = 1 + max(labelled)
        known = tuple(given) if given is not None and len(given) >= count else None  # else names of other classes
        count = count if known is None else len(known)
    shards = [
        Shard(
            name=name,
            **{field: getattr(scan, field) for field in ("samples", "bytes", "sha256", "offsets", "crc32")},
            labels=None if written or not labelled else tuple(-1 if n is None else n for n in part),
        )
        for (name, scan), part in zip(found, numbers, strict=True)
    ]
    return Manifest(
        shape=shape,
        num_classes=count,
        classes=known,
        source=source,
        left_out=tuple(left_out),
        root=root,
        dots=grouping.dots,
        image=grouping.image,
        shards=tuple(shards),
        directory=directory,
    )


def _refuse_ambiguous(directory: Path, found: Sequence[Scanned]) -> None:
    several = [(name, p) for name, scan in found for p in scan.problems if p.kind == "ambiguous"]
    if several:
        name, problem = several[0]
        raise DataError(
            f"{len(several)} samples have several images; the first: {directory / name}: key {problem.key} "
            f"{problem.reason}. Name the one to use by its suffix (--image SUFFIX), or, where dots are part of the "
            "keys, give --dots last"
        )


def _shape(directory: Path, found: Sequence[Scanned], on_error: str, left_out: list[LeftOut]) -> tuple[int, ...]:
    """The shape of all samples; with on_error=skip the most frequent, and the others are counted. Raises DataError."""
    shapes: Counter[tuple[int, ...]] = Counter()
    firsts: dict[tuple[int, ...], str] = {}
    for name, scan in found:
        shapes.update(scan.shapes)
        for shape, key in scan.firsts.items():
            firsts.setdefault(shape, f"{directory / name}, key {key}")
    if not shapes:
        raise DataError(f"{directory}: no sample has an image or a vector that can be read")
    (most, _), *others = shapes.most_common()
    if not others:
        return most
    if on_error == "fail":
        said = "; ".join(f"{n} of {show(shape)} (first: {firsts[shape]})" for shape, n in shapes.most_common(SHOWN))
        raise DataError(
            f"samples differ in shape (channels x height x width, or values of a vector): {said}. All must have one: "
            f"write them anew with `python -m ebm shard --source shards:{directory} --size N --out DIR` (and --rgb or "
            "--grayscale), or give --on-error skip to keep the most frequent"
        )
    rest = sum(n for _, n in others)
    left_out.append(LeftOut(reason=f"samples that are not {show(most)}", count=rest, first=firsts[others[0][0]]))
    return most


def _numbers(
    directory: Path,
    found: Sequence[Scanned],
    labels: LabelTable | None,
    label: str | None,
    on_error: str,
    left_out: list[LeftOut],
) -> tuple[list[list[int | None]], tuple[str, ...] | None]:
    """(class numbers by shard, class names). Raises DataError where some samples have a label and others none."""
    values: list[list[Label | None]] = [
        [
            (labels.of(key) if labels is not None else value) if usable else None
            for key, value, usable in zip(scan.keys, scan.labels, scan.usable, strict=True)
        ]
        for _, scan in found
    ]
    missing = [
        f"{directory / name}: key {key}"
        for (name, scan), part in zip(found, values, strict=True)
        for key, value, usable in zip(scan.keys, part, scan.usable, strict=True)
        if usable and value is None
    ]
    total = sum(sum(scan.usable) for _, scan in found)
    if missing and len(missing) == total:
        _refuse_unused(found, labels, label)
    elif missing and on_error == "fail":
        raise DataError(
            f"{len(missing)} of {total} samples have no label; the first: {missing[0]}. Give --label none to take all "
            "as unlabelled, or --on-error skip, and data.on_error=skip to train on the others"
        )
    elif missing:
        left_out.append(LeftOut(reason="samples without a label", count=len(missing), first=missing[0]))
    numbers, classes = numbered([value for part in values for value in part])
    parts, at = [], 0
    for part in values:
        parts.append(numbers[at : at + len(part)])
        at += len(part)
    return parts, classes


def _refuse_unused(found: Sequence[Scanned], labels: LabelTable | None, label: str | None) -> None:
    """Raises DataError where labels were asked for, and no sample has one."""
    if labels is not None:
        raise DataError(f"labels {labels.path}: has none of the keys, such as {found[0].scan.keys[0]!r}")
    if label not in (None, "none"):
        suffixes = Counter(suffix for _, scan in found for suffix in scan.suffixes)
        raise DataError(f"--label {label}: no sample has it; members are .{', .'.join(suffixes)}")


def _listed(problems: Sequence[str], what: str, remedy: str) -> str:
    """One problem as it is, or a list of them."""
    if len(problems) == 1:
        return f"{problems[0]}. {remedy[0].upper()}{remedy[1:]}"
    more = f"\n... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return f"{len(problems)} {what}; {remedy}:\n" + "\n".join(problems[:SHOWN]) + more


def _remedy(directory: Path) -> str:
    return (
        f"write good ones with `python -m ebm shard --source shards:{directory} --on-error skip --out DIR`, or give "
        "--on-error skip, and data.on_error=skip to train"
    )


class _Shard(NamedTuple):
    """A tar to read from. `crc32`: None where it is in no manifest; `labels`: None where they are in .cls members."""

    path: str
    samples: int
    bytes: int
    offsets: tuple[int, ...]
    crc32: tuple[int, ...] | None
    labels: tuple[int | None, ...] | None


@dataclass(frozen=True)
class ShardSource:
    """The samples of shards. Where single samples can't be used, `item` raises DataError for these."""

    shards: tuple[_Shard, ...]
    grouping: Grouping
    ends: tuple[int, ...]  # samples up to the end of each shard
    classes: tuple[str, ...] | None = None
    left_out: tuple[LeftOut, ...] = ()
    origin: Origin | None = None

    def __len__(self) -> int:
        return self.ends[-1]

    def key_and_label(self, i: int) -> tuple[str, int | None]:
        shard, place, sample = self._sample(i)
        try:
            return sample["__key__"], shard.labels[place] if shard.labels is not None else _class_of(sample)
        except ValueError as error:
            raise DataError(f"{shard.path}: key {sample['__key__']}: {error}") from error

    def item(self, i: int) -> Item:
        key, label = self.key_and_label(i)
        shard, _, sample = self._sample(i)
        name = f"{shard.path}: key {key}"
        try:
            return self._item(key, name, sample, label)
        except ValueError as error:
            raise DataError(f"{name}: {error}") from error

    def _sample(self, i: int) -> tuple[_Shard, int, dict[str, Any]]:
        """(shard, place inside it, members)"""
        number = bisect_right(self.ends, i)
        shard, place = self.shards[number], i - (self.ends[number - 1] if number else 0)
        return shard, place, _block(shard, place // BLOCK, self.grouping)[place % BLOCK]

    def _item(self, key: str, name: str, sample: dict[str, Any], label: int | None) -> Item:
        images = image_suffixes(sample)
        if len(images) > 1 and self.grouping.image is None:
            raise ValueError(f"has {len(images)} images: .{', .'.join(images)}; give --image SUFFIX or --dots last")
        image, vector = main_suffixes(tuple(sample), self.grouping.image)
        if image is not None:
            return image_item(key, name, sample[image], label)
        if vector is None:
            raise ValueError("has no image and no vector")
        return Item(key, name, decode_vector(sample[vector], *read_vector_shape(sample[vector])), label)


def _class_of(sample: dict[str, Any]) -> int | None:
    return parse_label(sample["cls"]) if "cls" in sample else None


@lru_cache(maxsize=2)
def _block(shard: _Shard, block: int, grouping: Grouping) -> list[dict[str, Any]]:
    begin, end = (*shard.offsets, shard.bytes)[block : block + 2]
    try:
        with open(shard.path, "rb") as file:
            data = read_range(file, begin, end)
        if shard.crc32 is not None and crc32(data) != shard.crc32[block]:
            raise ValueError(f"bytes {begin} to {end - 1} changed since the manifest was made")
        found = list(read_block(data, grouping.dots))
        if len(found) != min(BLOCK, shard.samples - block * BLOCK):
            raise ValueError("its samples are not those of the manifest")
    except (OSError, ValueError) as error:
        raise DataError(f"{shard.path}: {error}") from error
    return found


def open_shards(
    where: str, split: str, labels: LabelTable | None = None, label: str | None = None, grouping: Grouping | None = None
) -> ShardSource:
    """Shards with a manifest as it has them; others, and all where a label or a grouping is given, are scanned. Raises
    DataError."""
    if labels is None and label is None and grouping is None and manifest_path(where).exists():
        manifest = load_manifest(where)
        shards = [
            _Shard(
                str(manifest.local / s.name), s.samples, s.bytes, s.offsets, s.crc32,
                None if s.labels is None else tuple(None if n < 0 else n for n in s.labels),
            )
            for s in manifest.shards
        ]  # fmt: skip
        return _source(where, split, shards, manifest.grouping, manifest.classes, manifest.left_out)
    paths, grouping = find_shards(where), grouping or Grouping()
    scans = [scan_shard(path, grouping, "none" if labels else label or "cls") for path in paths]
    values: list[Label | None] = [
        labels.of(key) if labels else value for scan in scans for key, value in zip(scan.keys, scan.labels, strict=True)
    ]
    numbers, classes = numbered(values)
    shards, at, others = [], 0, dict[str, list[str]]()
    for path, scan in zip(paths, scans, strict=True):
        part = tuple(numbers[at : at + scan.samples])
        shards.append(_Shard(str(path), scan.samples, scan.bytes, tuple(scan.offsets), None, part))
        at += scan.samples
        for reason, names in scan.others.items():
            others.setdefault(reason, []).extend(names)
    left_out = [
        LeftOut(reason=f"members that are in no sample: {r}", count=len(n), first=n[0]) for r, n in others.items()
    ]
    return _source(where, split, shards, grouping, classes, left_out)


def _source(
    where: str,
    split: str,
    shards: Sequence[_Shard],
    grouping: Grouping,
    classes: tuple[str, ...] | None,
    left_out: Sequence[LeftOut],
) -> ShardSource:
    ends = tuple(accumulate(shard.samples for shard in shards))
    origin = Origin(
        source=f"shards:{Path(where).resolve()}",
        split=split,
        samples=ends[-1],
        fingerprint=fingerprint([shard.path for shard in shards]),
    )
    return ShardSource(tuple(shards), grouping, ends, classes, tuple(left_out), origin)
