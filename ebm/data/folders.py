"""Folders of images: which are splits, which are classes, and what is passed over.

A folder below the root is a split if it has a split's name and the others have too; else all are classes. Class numbers
are the places of the names in natural order, over the classes of all splits.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ebm.data.decode import IMAGE_SUFFIXES
from ebm.data.items import Item, LabelTable, image_item, natural, numbered, unique_keys
from ebm.data.manifest import LeftOut, Origin
from ebm.errors import DataError

SUFFIXES = (*IMAGE_SUFFIXES, "jfif", "tif", "tiff", "gif")
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
WHOLE = (".", "")  # splits that take all of a root, whose folders are then classes
SIZES = 100_000  # files up to which the fingerprint has their sizes, beside their names


@dataclass(frozen=True)
class FileSource:
    """Image files below `root`, as (relative path, key, label)."""

    root: str
    files: list[tuple[str, str, int | None]]
    classes: tuple[str, ...] | None = None
    left_out: tuple[LeftOut, ...] = ()
    origin: Origin | None = None

    def __len__(self) -> int:
        return len(self.files)

    def key_and_label(self, i: int) -> tuple[str, int | None]:
        return self.files[i][1:]

    def item(self, i: int) -> Item:
        name, key, label = self.files[i]
        path = Path(self.root) / name
        try:
            return image_item(key, str(path), path.read_bytes(), label)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: can't be read as an image ({error}); mend or remove it") from error


def open_folder(root: Path, split: str, labels: LabelTable | None = None) -> FileSource:
    """The images of a split below `root`, sorted by path. Labels are those of `labels`, or else the first-level folders
    inside the split. Raises DataError where the structure is ambiguous, or has no such split."""
    if not root.is_dir():
        raise DataError(f"folder:{root}: {'is a file; give its folder' if root.exists() else 'no such directory'}")
    try:
        return _open(root, split, labels)
    except OSError as error:
        raise DataError(f"folder:{root}: can't be read ({error})") from error


def _open(root: Path, split: str, labels: LabelTable | None) -> FileSource:
    layout = _layout(root, split)
    base = _base(root, split, layout.splits)
    tree = _Tree()
    tree.pass_all("folders beside the splits", layout.beside)
    paths = list(tree.images(base))
    if not paths:
        said = "".join(f"; passed over {left}" for left in tree.summary())
        raise DataError(f"folder:{base}: no images below it (.{', .'.join(SUFFIXES)}){said}")
    numbers, classes = _labelled(base, paths, labels) if labels else _by_folder(base, paths, layout.splits, tree)
    keys = unique_keys(paths)
    return FileSource(
        str(base),
        list(zip(paths, keys, numbers, strict=True)),
        classes,
        tree.summary(),
        Origin(
            source=f"folder:{root.resolve()}", split=split, samples=len(paths), fingerprint=_fingerprint(base, paths)
        ),
    )


@dataclass
class _Tree:
    """Finds images, each folder once, and keeps what it passes over: names by reason."""

    seen: set[tuple[int, int]] = field(default_factory=set)
    passed: dict[str, list[str]] = field(default_factory=dict)

    def images(self, base: Path) -> Iterator[str]:
        """Paths relative to `base`, sorted. Links are followed."""
        yield from sorted(self._below(base, ""), key=lambda path: path.split("/"))

    def _below(self, base: Path, inside: str) -> Iterator[str]:
        found = os.stat(base / inside)
        self.seen.add((found.st_dev, found.st_ino))
        try:
            entries = sorted(os.scandir(base / inside), key=lambda entry: entry.name)
        except PermissionError:
            if not inside:
                raise
            self._pass("folders without the right to read", inside)
            return
        for entry in entries:
            name = f"{inside}/{entry.name}" if inside else entry.name
            if is_hidden(entry.name):
                self._pass("hidden files and folders", name)
            elif _is_dir(entry):
                target = os.stat(entry.path)
                if (target.st_dev, target.st_ino) in self.seen:
                    self._pass("links to folders that are read already", name)
                else:
                    yield from self._below(base, name)
            elif not Path(entry.path).is_file():
                self._pass("links that lead nowhere" if entry.is_symlink() else "special files", name)
            elif suffix_of(name) not in SUFFIXES:
                self._pass(f"files .{suffix_of(name)}" if suffix_of(name) else "files without suffix", name)
            else:
                yield name

    def _pass(self, reason: str, name: str) -> None:
        self.passed.setdefault(reason, []).append(name)

    def pass_all(self, reason: str, names: Iterable[str]) -> None:
        for name in names:
            self._pass(reason, name)

    def summary(self) -> tuple[LeftOut, ...]:
        return tuple(LeftOut(reason=why, count=len(names), first=names[0]) for why, names in self.passed.items())


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def suffix_of(name: str) -> str:
    return Path(name).suffix[1:].lower()


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _folders(root: Path) -> list[str]:
    return [entry.name for entry in os.scandir(root) if _is_dir(entry) and not is_hidden(entry.name)]


def _has_images(folder: Path) -> bool:
    return next(_Tree()._below(folder, ""), None) is not None


def split_of(name: str) -> str | None:
    """`train`, `val` or `test`, where a folder's name says one of them."""
    return next((split for split, names in SPLITS.items() if name.lower() in names), None)


class _Layout(NamedTuple):
    """`splits`: the names of the split folders; empty where all folders are classes. `beside`: others next to them."""

    splits: list[str]
    beside: list[str]


def _layout(root: Path, split: str) -> _Layout:
    """Raises DataError where it can't be told whether a folder is a split or a class."""
    if split in WHOLE:
        return _Layout([], [])
    folders = [name for name in _folders(root) if _has_images(root / name)]
    splits = natural(name for name in folders if split_of(name))
    beside = natural(set(folders) - set(splits))
    if beside and len({split_of(name) for name in splits}) == 1:
        raise DataError(
            f"folder:{root}: {splits[0]} is named like a split, and stands among other folders. If all are classes, "
            f"give `--split .` to python -m ebm shard; if it is the split, give folder:{root / splits[0]}"
        )
    return _Layout(splits, beside if splits else [])


def _base(root: Path, split: str, splits: list[str]) -> Path:
    """The folder of a split. Raises DataError where there is none, or more than one."""
    if not splits:
        if split in ("train", *WHOLE):
            return root
        inside = ", ".join(natural(_folders(root))[:10]) or "no folders"
        raise DataError(
            f"folder:{root}: there is no split {split!r} in it (it has {inside}); all of it is the split train, of "
            "which `python -m ebm shard --holdout SHARE` keeps a part as the split test"
        )
    exact = [name for name in splits if name == split]
    same = exact or [name for name in splits if split_of(name) == split_of(split)]
    if len(same) != 1:
        which = "several folders for" if same else "no folder for"
        raise DataError(f"folder:{root}: {which} the split {split!r}; it has {', '.join(splits)}")
    return root / same[0]


def _labelled(base: Path, paths: list[str], labels: LabelTable) -> tuple[list[int | None], tuple[str, ...] | None]:
    found = [labels.of(path) for path in paths]
    missing = [path for path, label in zip(paths, found, strict=True) if label is None]
    if missing:
        raise DataError(f"labels {labels.path}: {len(missing)} of {len(paths)} files have none, such as {missing[0]}")
    return numbered(found)


def _by_folder(
    base: Path, paths: list[str], splits: list[str], tree: _Tree
) -> tuple[list[int | None], tuple[str, ...] | None]:
    nested = [path for path in paths if "/" in path]
    loose = [path for path in paths if "/" not in path]
    if nested and loose:
        raise DataError(
            f"folder:{base}: {loose[0]} is in no class folder, {nested[0]} is; move it, or point at one level"
        )
    own = {path.partition("/")[0] for path in nested}
    tree.pass_all("class folders without images", natural(set(_folders(base)) - own))
    if not nested:
        return [None] * len(paths), None
    names = own.union(
        *(
            {name for name in _folders(base.parent / other) if _has_images(base.parent / other / name)}
            for other in splits
        )
    )
    classes = tuple(natural(names))
    places = {name: place for place, name in enumerate(classes)}
    return [places[path.partition("/")[0]] for path in paths], classes


def _fingerprint(base: Path, paths: list[str]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        size = os.stat(base / path).st_size if len(paths) <= SIZES else ""
        digest.update(f"{path}\0{size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
