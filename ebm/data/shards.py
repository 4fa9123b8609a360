"""Writing shards: samples of a source to webdataset tars and their manifest, a shard a task of a process pool.

Shards are made in OUT/.unfinished and moved to OUT when all are whole; the manifest comes last. A command that was
killed goes on with the shards that it had finished, if its source and settings are the same.
"""

import fcntl
import json
import logging
import os
import shlex
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm
from webdataset import TarWriter

from ebm.data.decode import VECTOR_SUFFIX, check_finite, encode_vector, show
from ebm.data.indexing import SHOWN, UNFINISHED, Scanned, assemble
from ebm.data.items import Conversion, Item, Source
from ebm.data.manifest import FILE_NAME, LeftOut, Manifest, is_remote, load_manifest, manifest_path
from ebm.data.sources import PATHS, identify, open_source
from ebm.data.tars import Scan, scan_shard
from ebm.errors import ConfigError, DataError
from ebm.runtime import files
from ebm.runtime.process import init_worker, worker_context

log = logging.getLogger(__name__)
TEMPORARY = ".tmp"
LOCK = ".lock"
PLAN = "plan.json"
MANY = 1000  # bad samples after which the rest is not looked at
PLAIN = Conversion()
FEW = 3  # of problems that one option mends, how many a message lists
ONE_SHAPE = ": all images must have one shape; give --size N, and --rgb or --grayscale where channels differ"


def write_shards(
    source: Source,
    out: str | Path,
    *,
    samples_per_shard: int = 1000,
    workers: int | None = None,
    conversion: Conversion = PLAIN,
    on_error: Literal["fail", "skip"] = "fail",
    overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """Writes `source` to `out` as shard-000000.tar ... and manifest.json, last. Returns the manifest.

    The bytes depend on the source and the conversion alone, not on `workers` (default: the CPUs; vectors and a few
    shards are written in this process). One process at a time writes to `out`; others wait. `on_error="skip"` leaves
    out samples that can't be used, and counts them in the manifest.

    Raises DataError where `out` has shards already (unless `overwrite`), and with a list of the samples that can't be
    read, differ in shape from the first, or are vectors with values that are not finite.
    """
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _alone(out):
            return _write(source, out, samples_per_shard, workers, conversion, on_error, overwrite, progress)
    except (OSError, BrokenProcessPool) as error:
        raise DataError(f"{out}: shards can't be written ({error})") from error


def ensure_shards(shards: str, source: str | None, split: str) -> None:
    """Writes `shards`, a local directory, from `source` where one is given and there is no manifest yet.

    Of several jobs that begin together one writes them, and the others wait. Raises DataError, and ConfigError where
    the shards that are there were made from something else.
    """
    if source is None or is_remote(shards):
        return
    path = manifest_path(shards)
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _alone(path.parent):
                if not path.exists():
                    _write_plain(source, split, path.parent)
        except (OSError, BrokenProcessPool) as error:
            raise DataError(f"{path.parent}: shards can't be written ({error})") from error
    check_origin(load_manifest(path), source, split)


def _write_plain(source: str, split: str, out: Path) -> None:
    """Without options. Raises DataError that names the command which has them."""
    opened = open_source(source, split)
    try:
        _write(opened, out, 1000, None, PLAIN, "fail", False, True)
    except (ConfigError, DataError) as error:
        command = f"python -m ebm shard --source {shlex.quote(source)} --split {split} --out {shlex.quote(str(out))}"
        raise DataError(f"{error}\nOptions such as --size are those of `{command}`: run it first") from error


def check_origin(manifest: Manifest, source: str, split: str) -> None:
    """Raises ConfigError where the shards were made from another source or split, or where the source has changed."""
    recorded = manifest.source
    if recorded is None:
        log.warning("%s does not say what its shards were made from; they are taken for %s", manifest.directory, source)
        return
    now = identify(source, split)
    remedy = (
        f"give data.source=null to use the shards that are there; or set data.shards to another directory, which is "
        f"then written from {source}; or run `python -m ebm shard --source {source} --split {split} --out "
        f"{manifest.directory} --overwrite`"
    )
    if now is None:  # the source's files are not here: only its name can be compared
        if _name(recorded.source) != _name(source):
            raise ConfigError(
                f"the shards in {manifest.directory} were made from {recorded}, not from {source}; {remedy}"
            )
        return
    same_files = now.fingerprint is not None and now.fingerprint == recorded.fingerprint
    same_place = now.source.partition("#")[0] == recorded.source.partition("#")[0]
    if recorded.split != split or not (same_place or same_files):
        raise ConfigError(f"the shards in {manifest.directory} were made from {recorded}, not from {now}; {remedy}")
    if now.fingerprint != recorded.fingerprint:
        raise ConfigError(
            f"{now.source} has changed since the shards in {manifest.directory} were made: it was {recorded}, it is "
            f"{now}; {remedy}"
        )


def _name(source: str) -> str:
    """The kind, and the last part of a path: what stays when files move."""
    kind, colon, path = source.partition(":")
    return f"{kind}:{Path(path.partition('#')[0]).name}" if kind in PATHS and colon else source


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """While no other process writes shards to `out`. Says so before it waits."""
    with open(out / LOCK, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process writes shards to %s; waiting for it", out)
        except OSError:  # a file system without locks, where files.locked goes on without
            pass
    with files.locked(out / LOCK):
        yield


class Written(NamedTuple):
    """A finished shard, None where it has no good sample, and what is wrong with the others."""

    scan: Scan | None
    bad: list[str]


@dataclass(frozen=True)
class ShardWriter:
    """Writes shard i of a source. Called in worker processes. `shape`, `first`: of the first good sample."""

    source: Source
    conversion: Conversion
    directory: str
    samples_per_shard: int
    shape: tuple[int, ...]
    first: str

    def __call__(self, shard: int) -> Written:
        path = Path(self.directory, shard_name(shard))
        done = self._done(path)
        if done is not None:
            return done
        start, bad, count = shard * self.samples_per_shard, [], 0
        with open(f"{path}{TEMPORARY}", "wb") as file:
            with TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as tar:
                for i in range(start, min(start + self.samples_per_shard, len(self.source))):
                    try:
                        tar.write(self._sample(self.source.item(i)))
                        count += 1
                    except DataError as error:
                        bad.append(str(error))
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}{TEMPORARY}", path)
        files.replace(_notes(path), json.dumps({"samples": count, "bad": bad}).encode())
        return Written(scan_shard(path) if count else None, bad)

    def _done(self, path: Path) -> Written | None:
        """The shard that a killed command had finished, read again."""
        try:
            notes = json.loads(_notes(path).read_bytes())
            scan = scan_shard(path) if notes["samples"] else None
        except (OSError, ValueError, KeyError, DataError):  # not there, or not whole: it is written anew
            return None
        return Written(scan, notes["bad"]) if scan is None or scan.samples == notes["samples"] else None

    def _sample(self, item: Item) -> dict[str, str | bytes]:
        array = converted(item, self.conversion)
        if array.shape != self.shape:
            raise DataError(
                f"{item.name} is {show(array.shape)} (height, width, channels), {self.first} is {show(self.shape)}"
                f"{ONE_SHAPE}"
            )
        if array.ndim == 1:
            data, suffix = _encoded_vector(item), VECTOR_SUFFIX
        else:
            data, suffix = self.conversion.encoded(item, array)
        label = {} if item.label is None else {"cls": str(item.label).encode()}
        return {"__key__": item.key, suffix: data, **label}


def converted(item: Item, conversion: Conversion) -> np.ndarray:
    """uint8 (H, W, C), or float32 (D,). Raises DataError."""
    if item.array.ndim == 1:
        return item.array
    try:
        return conversion.image(item.array)
    except ValueError as error:
        raise DataError(f"{item.name}: {error}") from error


def _encoded_vector(item: Item) -> bytes:
    try:
        check_finite(item.array)
    except ValueError as error:
        raise DataError(f"{item.name}: {error}") from error
    return encode_vector(item.array)


def shard_name(shard: int) -> str:
    return f"shard-{shard:06d}.tar"


def _notes(shard: Path) -> Path:
    """The file that says that a shard is whole."""
    return shard.with_suffix(".json")


def _write(
    source: Source,
    out: Path,
    samples_per_shard: int,
    workers: int | None,
    conversion: Conversion,
    on_error: Literal["fail", "skip"],
    overwrite: bool,
    progress: bool,
) -> Manifest:
    """`write_shards`, while no other process writes to `out`."""
    origin = source.origin and source.origin.model_copy(
        update={"options": source.origin.options | conversion.options()}
    )
    unfinished = out / UNFINISHED
    finished = _finish_publishing(out)
    if finished is not None and finished.source == origin is not None:
        return finished
    _refuse_to_replace(out, overwrite)
    plan = None if origin is None else f"{origin.model_dump_json()} {samples_per_shard}"
    _prepare(unfinished, plan)
    first, item = _first(source, conversion)
    writer = ShardWriter(source, conversion, str(unfinished), samples_per_shard, first.shape, item.name)
    starts = range(0, len(source), samples_per_shard)
    found: list[Scanned] = []
    bad: list[str] = []
    with tqdm(total=len(source), desc=f"writing {out}", unit="sample", disable=None if progress else True) as bar:
        tasks = _run(writer, len(starts), workers or default_workers(item, len(starts)))
        for shard, written in enumerate(tasks):
            bad += written.bad
            if written.scan is not None:
                found.append(Scanned(shard_name(shard), written.scan))
            if on_error == "fail" and len(bad) > MANY:
                break
            bar.update(samples_per_shard)
    if bad and (on_error == "fail" or not found):
        shutil.rmtree(unfinished)
        raise DataError(_listed(bad, len(source)))
    left_out = [*source.left_out]
    if bad:
        left_out.append(LeftOut(reason="samples that can't be used", count=len(bad), first=bad[0]))
        for problem in bad:
            log.warning("left out: %s", problem)
    manifest = assemble(out, found, on_error=on_error, classes=source.classes, source=origin, left_out=left_out)
    return _publish(out, manifest)


def _listed(bad: list[str], total: int) -> str:
    if not bad:
        return "there are no samples"
    if len(bad) == 1:
        return bad[0]
    shapes = [problem.removesuffix(ONE_SHAPE) for problem in bad if problem.endswith(ONE_SHAPE)]
    others = [problem for problem in bad if not problem.endswith(ONE_SHAPE)]
    parts = []
    for problems, shown, said in (
        (shapes, FEW, f"differ in shape from the first{ONE_SHAPE}"),
        (others, SHOWN, "can't be used; mend or remove them, or give --on-error skip"),
    ):
        if problems:
            more = [f"... and {len(problems) - shown} more"] if len(problems) > shown else []
            parts.append("\n".join([f"{len(problems)} of {total} samples {said}:", *problems[:shown], *more]))
    return "\n".join(parts)


def _first(source: Source, conversion: Conversion) -> tuple[np.ndarray, Item]:
    """(array, item) of the first sample that can be used, which sets the shape. Raises DataError if there is none."""
    bad: list[str] = []
    for i in range(min(len(source), MANY)):
        try:
            item = source.item(i)
            array = converted(item, conversion)
        except DataError as error:
            bad.append(str(error))
            continue
        conversion.check(item)
        return array, item
    raise DataError(_listed(bad, len(source)))


def _refuse_to_replace(out: Path, overwrite: bool) -> None:
    there = [path for path in (out / FILE_NAME, *sorted(out.glob("*.tar"))) if path.exists()]
    if there and not overwrite:
        raise DataError(
            f"{there[0]} exists already; give --overwrite to replace it, or another --out"
            + ("" if there[0].name == FILE_NAME else f" (or use these shards: `python -m ebm index {out}`)")
        )


def _prepare(unfinished: Path, plan: str | None) -> None:
    """A directory for the shards: the one that a killed command left, if it had the same plan, or an empty one."""
    try:
        same = plan is not None and (unfinished / PLAN).read_text() == plan
    except OSError:
        same = False
    if same:
        log.info("going on with the shards in %s", unfinished)
        return
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir()
    if plan is not None:
        files.replace(unfinished / PLAN, plan.encode())


def _publish(out: Path, manifest: Manifest) -> Manifest:
    """Moves finished shards to `out`, and the manifest last. Written to .unfinished first, it says how to go on."""
    manifest.save(out / UNFINISHED / FILE_NAME)
    (out / FILE_NAME).unlink(missing_ok=True)
    names = {shard.name for shard in manifest.shards}
    for path in out.glob("shard-*.tar"):
        if path.name not in names:
            path.unlink()
    for name in names:
        if (out / UNFINISHED / name).exists():  # else it was moved before this command was killed
            os.replace(out / UNFINISHED / name, out / name)
    files.sync_directory(out)
    manifest.save()
    shutil.rmtree(out / UNFINISHED)
    return manifest


def _finish_publishing(out: Path) -> Manifest | None:
    """Completes what a command that was killed between its renames had begun."""
    try:
        manifest = load_manifest(out / UNFINISHED / FILE_NAME)
    except DataError:  # none was published
        return None
    return _publish(out, manifest.model_copy(update={"directory": out}))


def default_workers(first: Item, shards: int) -> int:
    """A worker needs seconds to start: as long as a few shards of images take, or many of vectors."""
    return len(os.sched_getaffinity(0)) if shards >= 4 and first.array.ndim > 1 else 1


def _run(writer: ShardWriter, shards: int, workers: int) -> Iterator[Written]:
    """Yields what was written, in the order of the shards."""
    workers = min(workers, shards)
    if workers <= 1:
        yield from map(writer, range(shards))
        return
    with ProcessPoolExecutor(workers, worker_context(), initializer=_set_writer, initargs=(writer,)) as pool:
        try:
            yield from pool.map(_write_one, range(shards))
        finally:
            pool.shutdown(cancel_futures=True)


_writer: ShardWriter | None = None  # a worker process's, sent once and not with every shard


def _set_writer(writer: ShardWriter) -> None:
    global _writer
    _writer = writer
    init_worker()


def _write_one(shard: int) -> Written:
    assert _writer is not None, "set when the worker started"
    return _writer(shard)
