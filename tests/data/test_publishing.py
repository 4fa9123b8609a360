"""Shards that are written by commands which are killed, or at the same time: whole, or not there."""

import json
import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest
from runs import ROOT

from ebm.data import load_manifest
from ebm.data.indexing import UNFINISHED, index_shards
from ebm.data.items import ArraySource
from ebm.data.manifest import Origin, verify
from ebm.data.reader import read_all
from ebm.data.shards import ensure_shards, write_shards
from ebm.data.sources import PLAIN, Options, open_source
from ebm.errors import DataError

SIZE = 20


def killed(out, source: str, at: int, options: Options = PLAIN) -> int:
    """The exit code of a process that writes shards, and ends at the `at`-th rename of a shard into its place, or of a
    finished one (at < 0)."""
    child = multiprocessing.get_context("fork").Process(target=_write, args=(out, source, at, options))
    child.start()
    child.join(60)
    return child.exitcode


def _write(out, source: str, at: int, options: Options) -> None:
    replace, calls = os.replace, []

    def counted(before, after):
        if str(after).endswith(".tar") and (UNFINISHED in str(after)) == (at < 0):
            calls.append(after)
            if len(calls) == abs(at):
                os._exit(9)
        replace(before, after)

    os.replace = counted
    write_shards(open_source(source, "train", options), out, samples_per_shard=SIZE, workers=1, progress=False)


@pytest.fixture
def source(tmp_path):
    """100 images in a .npy file."""
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 256, (100, 4, 4), dtype=np.uint8))
    return f"npy:{tmp_path}/a.npy"


@pytest.mark.parametrize("at", [1, 3, 5])
def test_killed_between_renames(tmp_path, source, at):
    assert killed(tmp_path / "out", source, at) == 9
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(DataError, match=r"\.unfinished: shards are being written here, or a command .* was killed"):
        index_shards(tmp_path / "out")
    ensure_shards(str(tmp_path / "out"), source, "train")
    manifest = load_manifest(tmp_path / "out")
    assert manifest.samples == 100 and len(manifest.shards) == 5 and not (tmp_path / "out" / UNFINISHED).exists()
    verify(manifest)


def test_finished_shards_are_kept(tmp_path, source):
    assert killed(tmp_path / "out", source, -4) == 9
    parts = tmp_path / "out" / UNFINISHED
    before = {path.name: path.stat().st_ino for path in parts.glob("*.tar")}
    assert sorted(before) == [f"shard-00000{i}.tar" for i in range(3)]
    assert killed(tmp_path / "out", source, 99) == 0
    after = {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")}
    assert len(after) == 5 and before.items() <= after.items()
    verify(load_manifest(tmp_path / "out"))


def test_shards_of_another_source_are_not_taken_up(tmp_path, source):
    assert killed(tmp_path / "out", source, -4) == 9
    np.save(tmp_path / "a.npy", np.zeros((100, 4, 4), np.uint8))
    assert killed(tmp_path / "out", source, 99) == 0
    clean = write_shards(ArraySource("a", np.zeros((100, 4, 4, 1), np.uint8), None), tmp_path / "clean",
                         samples_per_shard=SIZE, progress=False)  # fmt: skip
    assert [s.sha256 for s in load_manifest(tmp_path / "out").shards] == [s.sha256 for s in clean.shards]


@pytest.mark.parametrize(("at", "code", "label"), [(-4, 0, 1), (3, 1, 0)])
def test_shards_with_other_labels_are_not_taken_up(tmp_path, source, at, code, label):
    """They are written anew; or, where all were whole, published, and the second command is refused."""
    options = Options(labels=f"{tmp_path}/labels.npy")
    np.save(tmp_path / "labels.npy", np.zeros(100, np.int64))
    assert killed(tmp_path / "out", source, at, options) == 9
    np.save(tmp_path / "labels.npy", np.ones(100, np.int64))
    assert killed(tmp_path / "out", source, 99, options) == code
    manifest = load_manifest(tmp_path / "out")
    assert {int(y) for _, labels, _ in read_all(manifest, manifest.shape) for y in labels} == {label}
    assert manifest.source.options["labels"].startswith("labels.npy ")


def test_a_finished_shard_that_was_damaged_is_written_anew(tmp_path, source):
    assert killed(tmp_path / "out", source, -4) == 9
    (tmp_path / "out" / UNFINISHED / "shard-000001.tar").write_bytes(b"x")
    assert killed(tmp_path / "out", source, 99) == 0
    assert load_manifest(tmp_path / "out").samples == 100


def test_two_commands_into_one_directory(tmp_path):
    """One writes, the other waits and is refused: the shards are those of one of them."""
    arrays = {}
    for name, value in (("a", 1), ("b", 2)):
        arrays[name] = np.full((3000, 4, 4), value, np.uint8)
        np.save(tmp_path / f"{name}.npy", arrays[name])
    command = [sys.executable, "-m", "ebm", "shard", "--samples-per-shard", "100", "--out", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    jobs = {
        name: subprocess.Popen(
            [*command, "--source", f"npy:{tmp_path}/{name}.npy"], env=environment, stderr=subprocess.PIPE, text=True
        )
        for name in arrays
    }
    said = {name: job.communicate(timeout=120)[1] for name, job in jobs.items()}
    assert sorted(job.returncode for job in jobs.values()) == [0, 4], said
    (winner,) = (name for name, job in jobs.items() if job.returncode == 0)
    manifest = load_manifest(tmp_path / "out")
    verify(manifest)
    assert manifest.source.source == f"npy:{tmp_path}/{winner}.npy" and manifest.samples == 3000


def test_overwriting_leaves_the_old_shards_until_the_new_are_whole(tmp_path, source):
    old = write_shards(ArraySource("old", np.zeros((50, 4, 4, 1), np.uint8), None), tmp_path / "out", progress=False)
    bad = ArraySource("bad", np.full((50, 4), np.nan, np.float32), None)
    with pytest.raises(DataError, match="value 0 is nan"):
        write_shards(bad, tmp_path / "out", overwrite=True, progress=False)
    assert load_manifest(tmp_path / "out") == old
    verify(old)


def test_manifests_of_earlier_versions_load(tmp_path):
    manifest = write_shards(ArraySource("a", np.zeros((5, 4, 4, 1), np.uint8), np.arange(5)), tmp_path, progress=False)
    values = json.loads((tmp_path / "manifest.json").read_text())
    kept = ("version", "shape", "num_classes", "shards")
    values = {name: value for name, value in values.items() if name in kept}
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    loaded = load_manifest(tmp_path)
    assert loaded.shards == manifest.shards and loaded.source is None and loaded.classes is None
    assert loaded.identity == manifest.identity


def test_manifests_travel_between_ranks(tmp_path):
    import pickle

    source = ArraySource("a", np.zeros((5, 4, 4, 1), np.uint8), None, origin=Origin(source="digits", split="train"))
    manifest = write_shards(source, tmp_path, progress=False)
    assert pickle.loads(pickle.dumps(manifest)) == manifest
