"""Damage to real shards, byte by byte: each kind is detected, named and counted, and costs no other sample."""

import gzip
import io
import json
import os
import re
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from ebm.data import ShardReader, load_manifest
from ebm.data.decode import encode, encode_vector
from ebm.data.indexing import index_shards
from ebm.data.items import ArraySource, Conversion
from ebm.data.manifest import Manifest, Shard, check_files
from ebm.data.shards import write_shards
from ebm.errors import DataError

SHARDS, SIZE = 5, 70  # blocks of 64 and 6 samples
STREAMS = 2
LENGTH = SHARDS * SIZE // STREAMS
KEYS = [f"{i:06d}" for i in range(SHARDS * SIZE)]
IMAGES = np.random.default_rng(0).integers(0, 256, (SHARDS * SIZE, 8, 8, 1), dtype=np.uint8)
VECTORS = np.random.default_rng(0).normal(size=(SHARDS * SIZE, 6)).astype(np.float32)


def make(directory: Path, format="png") -> Manifest:
    """Shards of images as `png` or `jpg`, or of vectors as `npy`."""
    samples, format = (VECTORS, None) if format == "npy" else (IMAGES, format)
    source = ArraySource("test", samples, np.arange(len(samples)) % 10)
    return write_shards(
        source, directory, samples_per_shard=SIZE, workers=1, conversion=Conversion(format=format), progress=False
    )


def reader(directory, streams=(0, 1), **options) -> ShardReader:
    settings = {"seed": 0, "num_streams": STREAMS, "per_stream": 1, "window": 64, "workers": 0, "num_classes": 10}
    settings |= {"on_error": "skip", "max_skipped": 0.99, "max_pixels": 64}
    manifest = load_manifest(directory)
    return ShardReader(manifest, manifest.shape, streams=list(streams), **settings | options)


def shard(directory: Path, number: int = 0) -> Path:
    return directory / f"shard-{number:06d}.tar"


# Damage to the bytes of a shard. `at` in flip and cut: from a member's data; its header is the 512 bytes before them.


def data_of(path: Path, name: str) -> tuple[int, int]:
    with tarfile.open(path) as tar:
        member = tar.getmember(name)
        return member.offset_data, member.size


def flip(path: Path, name: str, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[data_of(path, name)[0] + at] ^= 1 << bit
    path.write_bytes(data)


def header(path: Path, name: str, at: int, value: bytes) -> None:
    """Change a field of a member's header, and its checksum with it."""
    data, start = bytearray(path.read_bytes()), data_of(path, name)[0] - 512
    data[start + at : start + at + len(value)] = value
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    path.write_bytes(data)


def cut(path: Path, name: str, at: int) -> None:
    os.truncate(path, data_of(path, name)[0] + at)


def contents(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def rewrite(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def replace(directory: Path, changes: dict[str, bytes | None]) -> None:
    """Other contents of members, None for no member, from before the manifest was made."""
    members = contents(shard(directory)) | changes
    rewrite(shard(directory), {name: data for name, data in members.items() if data is not None})
    index_shards(directory, on_error="skip")


def reversed_labels(directory: Path) -> None:
    members, size = contents(shard(directory)), shard(directory).stat().st_size
    labels = [data for name, data in members.items() if name.endswith("cls")][::-1]
    names = [name for name in members if name.endswith("cls")]
    rewrite(shard(directory), members | dict(zip(names, labels, strict=True)))
    assert shard(directory).stat().st_size == size


ONE, TAIL, WHOLE = range(66, 67), range(64, 70), range(70)  # a sample, its block of the first shard, both blocks
BLOCKS = {TAIL: "samples 64 to 69 ", WHOLE: "samples (0 to 63|64 to 69) "}


class Kind(NamedTuple):
    """`lost`: samples; `reason`: in every error's message; `resized`: check_files sees it before anything is read."""

    damage: Callable[[Path], None]
    lost: range
    reason: str
    resized: bool = False
    format: str = "png"


def changed(damage, lost, shown="", **options) -> Kind:
    """Damage after the manifest: a block is lost, and its message shows more where more can be seen."""
    return Kind(damage, lost, f"changed since the manifest was made: {BLOCKS[lost]}.*{shown}", **options)


PNG, CLS, JPG, NPY = "000066.png", "000066.cls", "000066.jpg", "000066.npy"
EIB = b"\x80\0\0\0\x7f" + b"\xff" * 7  # 8 EiB less one byte, as tar writes large numbers
LAST = {name: len(encode(IMAGES[66], name[-3:])) - 1 for name in (PNG, JPG)}
READ = {
    "truncated in a header": changed(lambda d: cut(shard(d), "000030.png", -300), WHOLE, resized=True),
    "truncated in a payload": changed(
        lambda d: cut(shard(d), PNG, 20), TAIL, r"\(after key 000065: 000066.png ends early,", resized=True
    ),
    "truncated by whole blocks": changed(
        lambda d: cut(shard(d), CLS, -512), TAIL, r"\(after key 000065: the tar ends", resized=True
    ),
    "empty": changed(lambda d: os.truncate(shard(d), 0), WHOLE, r"\(at the first header: empty", resized=True),
    "header checksum": changed(
        lambda d: flip(shard(d), CLS, -512 + 148), TAIL, r"\(after key 000065: the tar ends, or"
    ),
    "header size, larger": changed(
        lambda d: header(shard(d), PNG, 124, b"00000077777\0"), TAIL, r"\(after key 000065: 000066.png"
    ),
    "header size, 8 EiB": changed(lambda d: header(shard(d), PNG, 124, EIB), TAIL, r"\(after key 000065: .*end"),
    "header size, negative": changed(
        lambda d: header(shard(d), PNG, 124, b"\xff" * 10 + b"\xf0\0"), TAIL, r"\(after key 00006\d: "
    ),
    "pax header of 8 EiB": changed(lambda d: header(shard(d), PNG, 124, EIB + b" " * 20 + b"x"), TAIL, r"\("),
    "sparse member": changed(lambda d: header(shard(d), PNG, 156, b"S"), TAIL, r"\(after key 000065: "),
    "bit in PNG pixels": changed(lambda d: flip(shard(d), PNG, 60), TAIL, r"\(key 000066: can't be decoded"),
    "bit in a PNG that decodes": changed(lambda d: flip(shard(d), PNG, LAST[PNG]), TAIL, r"trusted\. Copy"),
    "bit in a JPEG that shows": changed(
        lambda d: flip(shard(d), JPG, LAST[JPG] - 1), TAIL, r"\(key 000066: can't be decoded", format="jpg"
    ),
    "bit in a JPEG that decodes": changed(lambda d: flip(shard(d), JPG, 340), TAIL, r"trusted\. Copy", format="jpg"),
    "bit in .cls, still a digit": changed(lambda d: flip(shard(d), CLS, 0), TAIL, r"trusted\. Copy"),
    "bit in .cls, no digit": changed(lambda d: flip(shard(d), CLS, 0, bit=6), TAIL, r"\(key 000066: .cls is b'v'"),
    "bit in a name": changed(lambda d: header(shard(d), PNG, 0, b"100066"), TAIL, r"\(key 000066: has no image"),
    "image gone": changed(lambda d: header(shard(d), PNG, 156, b"Z"), TAIL, r"\(key 000066: has no image"),
    "label gone": changed(lambda d: header(shard(d), CLS, 156, b"Z"), TAIL, r"\(key 000066: has no .cls"),
    "another shard of its size": changed(reversed_labels, WHOLE, r"trusted\. Copy"),
    "truncated in a vector": changed(
        lambda d: cut(shard(d), NPY, 130),
        TAIL,
        r"\(after key 000065: 000066.npy ends early,",
        resized=True,
        format="npy",
    ),
    "bit in a vector, still a number": changed(
        lambda d: flip(shard(d), NPY, 130), TAIL, r"trusted\. Copy", format="npy"
    ),
    "bit in a vector's header": changed(
        lambda d: flip(shard(d), NPY, 21, bit=1), TAIL, r"\(key 000066: array is >f4", format="npy"
    ),
    "vector gone": changed(
        lambda d: header(shard(d), NPY, 156, b"Z"), TAIL, r"\(key 000066: has no vector", format="npy"
    ),
    "vector of another length": Kind(
        lambda d: replace(d, {NPY: encode_vector(VECTORS[66, :5])}), ONE, "vector has 5 values", format="npy"
    ),
    "vector cut before the manifest": Kind(
        lambda d: replace(d, {NPY: encode_vector(VECTORS[66])[:-3]}), ONE, "can't be decoded", format="npy"
    ),
    "vector not finite": Kind(
        lambda d: replace(d, {NPY: encode_vector(np.float32([1, 2, np.nan, 4, 5, 6]))}),
        ONE,
        "value 2 is nan; all values must be finite",
        format="npy",
    ),
    "undecodable image": Kind(lambda d: replace(d, {PNG: b"\x89PNG\r\n\x1a\n"}), ONE, "not a readable image"),
    "undecodable pixels": Kind(lambda d: replace(d, {PNG: encode(IMAGES[66], "png")[:100]}), ONE, "can't be decoded"),
    "truncated JPEG": Kind(
        lambda d: replace(d, {JPG: encode(IMAGES[66], "jpg")[:-8]}), ONE, "can't be decoded", format="jpg"
    ),
    "too many pixels": Kind(
        lambda d: replace(d, {PNG: encode(np.zeros((9, 9, 1), np.uint8), "png")}),
        ONE,
        "image has 9x9 pixels, more than 64",
    ),
    "wrong shape": Kind(
        lambda d: replace(d, {PNG: encode(np.zeros((4, 8, 3), np.uint8), "png")}), ONE, "image is 3x4x8"
    ),
    "no label": Kind(lambda d: replace(d, {CLS: None}), ONE, "has no .cls"),
    "label out of range": Kind(lambda d: replace(d, {CLS: b"10"}), ONE, ".cls is 10, not below num_classes=10"),
}


def read(directory, ranks, steps, **options) -> tuple[dict[int, list], list[list[str]]]:
    """For each stream (position, key) after every batch; for each batch its errors. One sample a stream and batch."""
    readers, seen, errors = [reader(directory, rank, **options) for rank in ranks], {0: [], 1: []}, []
    for _ in range(steps):
        errors.append([])
        for one in readers:
            batch = next(one)
            errors[-1] += batch.errors
            assert batch.skipped == len(batch.errors)
            for stream, key in batch.keys:
                seen[stream].append((one.positions[stream].samples, key))
    for one in readers:
        one.close()
    return seen, errors


def failure(directory, streams, **options) -> str | None:
    one = reader(directory, streams, on_error="fail", **options)
    try:
        for _ in range(one.order.length(streams[0])):
            next(one)
    except DataError as error:
        return str(error)
    finally:
        one.close()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", READ)
def test_each_kind_fails_by_name_and_is_counted_when_skipped(tmp_path, monkeypatch, name, workers):
    monkeypatch.setattr("ebm.data.samples.KEPT", 0)  # in this process: workers keep what they decoded
    kind = READ[name]
    make(tmp_path, kind.format)
    kind.damage(tmp_path)
    if kind.resized:
        with pytest.raises(DataError, match=r"shard-000000.tar: has \d+ bytes, manifest.json says \d+"):
            check_files(load_manifest(tmp_path))
    else:
        check_files(load_manifest(tmp_path))
    whole, *ranks = (failure(tmp_path, streams, workers=workers) for streams in [(0, 1), (0,), (1,)])
    message = re.compile(re.escape(f"{shard(tmp_path)}: {'key 000066: ' * (len(kind.lost) == 1)}") + kind.reason)
    assert whole is not None and any(ranks)
    assert all(message.match(text) for text in (whole, *ranks) if text), (whole, *ranks)

    seen, errors = read(tmp_path, [(0, 1)], LENGTH, workers=workers)
    assert read(tmp_path, [(0,), (1,)], LENGTH, workers=workers) == (seen, errors)
    epoch = sorted(key for stream in seen.values() for position, key in stream if position <= LENGTH)
    assert epoch == [key for i, key in enumerate(KEYS) if i not in kind.lost]
    flat = [text for batch in errors for text in batch]
    assert all(message.match(text) for text in flat)
    assert len(flat) == sum(stream[-1][0] - len(stream) for stream in seen.values()) >= len(kind.lost)


def test_all_kinds_at_once_with_two_workers(tmp_path):
    """A manifest over a damaged shard of each kind."""
    parts, lost = [], 0
    kinds = [kind for kind in READ.values() if kind.format == "png"]  # a worker needs a second to load JPEG's decoder
    for i, kind in enumerate(kinds):
        make(tmp_path / str(i))
        kind.damage(tmp_path / str(i))
        part = load_manifest(tmp_path / str(i))
        parts.append(part.shards[0].model_copy(update={"name": f"{i}/{part.shards[0].name}"}))
        lost += len(kind.lost)
    Manifest(shape=(1, 8, 8), shards=parts, directory=tmp_path).save()
    total = SIZE * len(kinds)
    seen, errors = read(tmp_path, [(0, 1)], total // STREAMS, workers=2)
    assert sum(position <= total // STREAMS for stream in seen.values() for position, _ in stream) == total - lost
    assert read(tmp_path, [(0, 1)], total // STREAMS) == (seen, errors)
    assert read(tmp_path, [(0,), (1,)], total // STREAMS, workers=2) == (seen, errors)
    named = {text.split("/shard-")[0] for batch in errors for text in batch}
    assert named == {str(tmp_path / str(i)) for i in range(len(kinds))}


def test_swapped_shards_lose_both(tmp_path):
    make(tmp_path)
    shard(tmp_path, 0).rename(tmp_path / "other")
    shard(tmp_path, 1).rename(shard(tmp_path, 0))
    (tmp_path / "other").rename(shard(tmp_path, 1))
    check_files(load_manifest(tmp_path))
    assert "changed since the manifest was made" in failure(tmp_path, (0, 1))
    seen, errors = read(tmp_path, [(0, 1)], LENGTH)
    epoch = sorted(key for stream in seen.values() for position, key in stream if position <= LENGTH)
    assert epoch == KEYS[2 * SIZE :]
    assert {Path(text.split(": ")[0]).name for batch in errors for text in batch} == {
        "shard-000000.tar",
        "shard-000001.tar",
    }


def test_what_is_seen_before_anything_is_read(tmp_path):
    make(tmp_path)
    with open(shard(tmp_path), "ab") as file:
        file.write(b"garbage")
    with pytest.raises(DataError, match=r"shard-000000.tar: has \d+ bytes, manifest.json says"):
        check_files(load_manifest(tmp_path))
    shard(tmp_path).unlink()
    with pytest.raises(DataError, match=r"shard-000000.tar: listed in manifest.json, but can't be found"):
        check_files(load_manifest(tmp_path))


def append(path: Path, *names: str) -> None:
    with tarfile.open(path, "a") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))


def pax(values: dict[str, str], name: str | None = None, size: int = 0) -> bytes:
    """A pax header, and the member that it is for."""
    header = tarfile.TarInfo._create_pax_generic_header(values, tarfile.XHDTYPE, "utf-8")
    info = tarfile.TarInfo(name or "")
    info.size = size
    return header if name is None else header + info.tobuf(tarfile.USTAR_FORMAT) + b"\0" * -(-size // 512) * 512


FIRST = pax({"comment": "a member to come back to"}, "__first__")
HOSTILE = {
    "circle": (
        FIRST + pax({"size": "-1536"}, "a.png"),
        "leads back|unexpected data|ends early|negative size|invalid|are 0 samples",
    ),
    "nested": (pax({"comment": "x"}) * 5000, "recursion"),
    "sparse": (
        pax({"GNU.sparse.map": "0,512", "GNU.sparse.size": str(1 << 40)}, "a.png", 512),
        "a.png .*claims more bytes",
    ),
    "compressed": (gzip.compress(pax({"comment": "x"}, "a.png", 1 << 24)), "header|checksum"),
    "sized": (pax({"size": str(1 << 40)}, "a.png"), "end"),
}
INDEXED = {
    "key twice together": (lambda path: append(path, "a.cls", "a.cls"), "key a has two members .cls"),
    "key twice": (lambda path: append(path, PNG, CLS), "key 000066 comes again after others"),
    "no image": (lambda path: header(path, PNG, 156, b"Z"), "key 000066: has no image"),
    "label no number": (lambda path: flip(path, CLS, 0, bit=6), "key 000066: .cls is b'v' and must be a class number"),
    "empty": (lambda path: os.truncate(path, 0), "not a readable tar"),
    "truncated in a header": (lambda path: cut(path, PNG, -300), "damaged or unexpected data after"),
    "truncated in a payload": (lambda path: cut(path, PNG, 20), "not a readable tar"),
    "garbage appended": (
        lambda path: path.write_bytes(path.read_bytes() + b"garbage"),
        "damaged or unexpected data after",
    ),
    "header checksum": (lambda path: flip(path, PNG, -512 + 148), "damaged or unexpected data after"),
    "size of 8 EiB": (lambda path: header(path, PNG, 124, EIB), "not a readable tar"),
    "pax header of 8 EiB": (
        lambda path: header(path, PNG, 124, EIB + b" " * 20 + b"x"),
        "not a readable tar .*(piece|header of more)",
    ),
    "first image of 2 GiB": (
        lambda path: [path.unlink(), enlarge(path, 1 << 31)],
        "not a readable tar .*bytes in one piece",
    ),
    "block of 2 GiB": (lambda path: enlarge(path, 1 << 31), "not a readable tar .*bytes in one piece"),
}


def enlarge(path: Path, size: int) -> None:
    """A last member of this size, which takes no space on the disk."""
    append(path, "z.png")
    header(path, "z.png", 124, b"%011o\0" % size)
    os.truncate(path, path.stat().st_size + size)


@pytest.mark.parametrize("name", INDEXED)
def test_index_names_the_damage(tmp_path, name):
    damage, reason = INDEXED[name]
    make(tmp_path)
    damage(shard(tmp_path))
    with bounded(), pytest.raises(DataError, match=f"shard-000000.tar: {reason}"):
        index_shards(tmp_path)


@contextmanager
def bounded(limit: int = 64 << 20):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tars_end_in_bounded_memory(tmp_path, name):
    """Seen by the index, and by the reader behind a manifest that was forged for them."""
    data, reason = HOSTILE[name]
    shard(tmp_path).write_bytes(data)
    with bounded(), pytest.raises(DataError, match=f"(?i)shard-000000.tar: .*({reason})"):
        index_shards(tmp_path)
    entry = {"name": "shard-000000.tar", "samples": 1, "bytes": len(data), "sha256": "0" * 64}
    forged = Shard(**entry, offsets=[0], crc32=[zlib.crc32(data)])
    Manifest(shape=(1, 8, 8), shards=[forged], directory=tmp_path).save()
    one = reader(tmp_path, [0], num_streams=1)
    with bounded(), pytest.raises(DataError, match=f"(?i)is not what the manifest says: .*({reason}).* index"):
        next(one)


def test_a_block_that_would_not_fit_into_memory_is_refused(tmp_path):
    make(tmp_path)
    values = json.loads((tmp_path / "manifest.json").read_text())
    os.truncate(shard(tmp_path), 10 << 30)
    values["shards"][0]["bytes"] = 10 << 30
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"shard-000000.tar: 64 samples of \d+ bytes, more than 1073741824"):
        load_manifest(tmp_path)


def test_a_forged_count_is_an_error_even_where_skipping(tmp_path):
    make(tmp_path)
    values = json.loads((tmp_path / "manifest.json").read_text())
    values["shards"][0]["samples"] += 1
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"shard-000000.tar: is not what .* there are 6 samples where it says 7"):
        read(tmp_path, [(0, 1)], LENGTH)


def run(directory, max_skipped, streams=(0, 1), positions=None, **options):
    """(keys and errors, positions as JSON gives them back) after every batch of three epochs, and what ended them."""
    options |= {"seed": 6, "per_stream": 5, "max_skipped": max_skipped, "positions": positions}
    one, batches, states, error = reader(directory, streams, **options), [], [], None
    try:
        while min(position.samples for position in one.positions.values()) < 3 * LENGTH:
            batch = next(one)
            batches.append((batch.keys, batch.errors))
            states.append({int(v): value for v, value in json.loads(json.dumps(one.positions)).items()})
    except DataError as caught:
        error = str(caught)
    one.close()
    return batches, states, error


def test_resuming_keeps_keys_errors_and_the_cap(tmp_path):
    """Stopped after any batch, with a cap that the first epoch keeps and the second does not."""
    make(tmp_path)
    replace(tmp_path, {f"{i:06d}.png": b"" for i in (3, 5, 13, 40)})
    flip(shard(tmp_path, 1), "000139.cls", 0)
    flip(shard(tmp_path, 2), "000140.cls", 0)
    batches, states, error = run(tmp_path, 0.99)
    assert error is None
    seen = [((samples - 1) // LENGTH, skipped) for state in states for samples, skipped in state.values()]
    first, second = (max(skipped for epoch, skipped in seen if epoch == which) for which in (0, 1))
    assert first < second

    cap = first / LENGTH
    capped, _, error = run(tmp_path, cap)
    n = len(capped)
    assert capped == batches[:n] and LENGTH < max(samples for samples, _ in states[n - 1].values()) < 2 * LENGTH
    assert re.fullmatch(
        rf"stream \d of data.streams=2 has passed over \d+ of its {LENGTH} samples in an epoch, more than the share "
        rf"data.max_skipped={cap}. .* set data.max_skipped=0.9. The error now: {tmp_path}/shard-00000\d.tar: .*",
        error,
    )
    for k in range(0, n, 7):
        assert run(tmp_path, 0.99, positions=states[k])[0][: n - k] == batches[k + 1 : n + 1]
        assert run(tmp_path, cap, positions=states[k]) == (capped[k + 1 :], states[k + 1 : n], error)
    assert run(tmp_path, cap, workers=2)[::2] == (capped, error)
    alone = [run(tmp_path, cap, [v]) for v in (0, 1)]
    assert min((len(found), text) for found, _, text in alone if text) == (n, error)
