"""Hostile files: a bounded run of the fuzzer, and by name what it and its authors found."""

import gzip
import hashlib
import json
import os
import pickle
import socket
import subprocess
import tarfile
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz import TARGETS, WARM_UP, AloneWorld, fuzz, pax_tar, sealed, small_shards, sparse_tar
from safetensors.torch import load_file, save_file

from ebm.config import MAX_BYTES, ImportConfig, load_config
from ebm.data import ShardReader, load_manifest
from ebm.data.indexing import index_shards
from ebm.data.manifest import check_files
from ebm.data.tars import MAX_HEADER, read_block
from ebm.energies import build_energy
from ebm.errors import ConfigError, DataError
from ebm.runtime import checkpoint
from ebm.runtime.files import MAX_JSON


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_inputs_are_taken_or_refused(target):
    assert fuzz(target, 1500, seed=0) == []


MISDEEDS = {
    "read": lambda: open("/etc/passwd").close(),
    "write": lambda: open(Path(tempfile.gettempdir(), "outside"), "a").close(),
    "remove": lambda: os.remove(Path(tempfile.gettempdir(), "outside")),
    "program": lambda: subprocess.run(["true"]),
    "socket": lambda: socket.socket().close(),
    "pickle": lambda: pickle.loads(pickle.dumps(Path("x"))),
    "hang": lambda: time.sleep(60),
    "loop": lambda: all(number == 0 for number in iter(int, 1)),
    "error": lambda: {}["missing"],
}


@pytest.mark.parametrize("misdeed", MISDEEDS)
def test_the_fuzzer_finds(monkeypatch, misdeed):
    numbers = iter(range(-WARM_UP, 2))
    monkeypatch.setattr("fuzz.LIMIT", 0.1)
    monkeypatch.setitem(TARGETS, "bad", lambda root: lambda rng: MISDEEDS[misdeed]() if next(numbers) == 0 else None)
    (finding,) = fuzz("bad", 2, seed=0)
    assert "input 0" in finding


# Configs


def refused(tmp_path, text: str | bytes, *overrides: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else f"data: {{shards: d}}\n{text}".encode())
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    return str(caught.value)


LAUGHS = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run: {dir: !!python/object/apply:os.system [id]}", ("run: {dir", "tag", "os.system")),
        ("run: {dir: !!python/name:os.system }", ("run: {dir", "tag")),
        ("run: {dir: !mine x}", ("run: {dir", "tag")),
        ("run:\n  dir: ${oc.env:HOME}", ("line 3", "dir: ${oc.env:HOME}", "not supported")),
        ("run:\n  dir: 'a${oc.decode:${oc.env:HOME}}'", ("line 3", "not supported")),
        ("run:\n  dir: ${oc.create:{a: 1}}", ("config.yaml",)),
        ('run:\n  dir: "\\x24{oc.env:HOME}"', ("line 3", "not supported")),
        ('? "${oc.env:HOME}"\n: 1', ("line 2", "not supported")),
        (LAUGHS, ("line 3", "aliases (*a)")),
        ("a: &a [*a]", ("line 2", "aliases")),
        (b"[" * 60_000, ("level",)),  # older libyaml overflows the stack; newer refuses by itself
        ("a: " + "[" * 40 + "]" * 40, ("levels deep",)),
        ("train: {steps: 1e400}", ("train.steps", "finite")),
        ("train: {steps: " + "9" * 5000 + "}", ("line 2", "characters")),
        ("train: {steps: " + "1:" * 5000 + "1}", ("line 2", "characters")),
        ("train: {batch_size: 0x" + "f" * 2000 + "}", ("train.batch_size",)),
        ("run: {dir: '" + "x" * MAX_BYTES + "'}", ("larger than",)),
        (b"\xff\xfe", ("utf-8",)),
        (b"1: 2\n", ("1: ",)),
    ],
)
def test_hostile_configs(tmp_path, text, words):
    message = refused(tmp_path, text)
    assert all(word in message for word in words), message
    assert len(message) < 20_000


@pytest.mark.parametrize(
    "override",
    [
        "run.dir=${oc.env:HOME}",
        "run.dir=${run.seed}",
        "run={dir: !!python/name:os.system }",
        "data=" + "[" * 60_000,
        "." * 5000 + "=1",
        "[" * 60_000 + "=1",
        "run.dir=" + "x" * 5000,
        "run=&a [*a]",
        "a\\=#=" + "[" * 60_000,
        "optim.lr=" + "1:" * 400 + "1.5",  # a float in base 60, larger than any
    ],
)
def test_hostile_overrides(tmp_path, override):
    refused(tmp_path, "", override)


def test_endless_files_are_no_configs(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_config("/dev/zero")
    path = tmp_path / "huge.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match="larger than"):
        load_config(path)


def test_a_config_starts_no_program(tmp_path):
    settings = {"args": ["touch", str(tmp_path / "started")]}
    with pytest.raises(ConfigError, match="no class of torch"):
        build_energy(ImportConfig(path="subprocess:Popen", settings=settings), (1, 8, 8), 0)
    assert not list(tmp_path.iterdir())


# Manifests and shards


@pytest.mark.parametrize("name", ["../a.tar", "/etc/passwd", "a/../../b.tar", "pipe:cat x", "a\0b", "\ud800.tar", ""])
def test_manifests_stay_in_their_directory(tmp_path, name):
    small_shards(tmp_path, 5)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"][0]["name"] = name
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="name"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"), [("samples", 10**18), ("samples", -1), ("offsets", [-1]), ("offsets", [0, 1])]
)
def test_manifests_claim_no_more_than_they_list(tmp_path, key, value):
    small_shards(tmp_path, 5)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"][0][key] = value
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=key):
        load_manifest(tmp_path)


def member(name: str = "a.png", size: int = 0, kind: bytes = tarfile.REGTYPE, data: bytes = b"") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT) + data.ljust(-(-len(data) // 512) * 512, b"\0")


RECORD = b"12 path=abc\n"
HOSTILE_TARS = {
    "sparse": sparse_tar(),
    "negative": member("b.txt") + member("__a__", size=-512),  # leads back to itself
    "negative_pax": member(size=17, kind=tarfile.XHDTYPE, data=b"17 size=-1024000\n") + member("a.txt"),
    "terabyte": member(size=1 << 40),
    "long_header": member(size=MAX_HEADER + 1, kind=tarfile.XHDTYPE, data=b"1" * (MAX_HEADER + 1)) + member(),
    "header_of_headers": member(size=len(RECORD), kind=tarfile.XHDTYPE, data=RECORD) * 5000 + member(),
    "cut_sparse": sealed(member(kind=tarfile.GNUTYPE_SPARSE)[:482] + b"\1" + b"\0" * 29),
    "compressed": gzip.compress(pax_tar() * 100),
}


@pytest.mark.parametrize("data", HOSTILE_TARS.values(), ids=HOSTILE_TARS)
def test_hostile_tars(tmp_path, data):
    path = tmp_path / "shard.tar"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"shard\.tar"):
        index_shards(tmp_path)
    digest = hashlib.sha256(data).hexdigest()
    shard = {"name": path.name, "samples": 5, "bytes": len(data), "sha256": digest, "offsets": [0]}
    shard["crc32"] = [zlib.crc32(data)]
    (tmp_path / "manifest.json").write_text(json.dumps({"shape": [1, 8, 8], "shards": [shard]}))
    manifest = load_manifest(tmp_path)
    check_files(manifest)
    reader = ShardReader(manifest, (1, 8, 8), seed=0, num_streams=1, streams=[0], per_stream=1, window=8, workers=0)
    with pytest.raises(DataError, match=r"shard\.tar"):
        next(reader)


def test_pax_headers_are_read(tmp_path):
    (tmp_path / "shard.tar").write_bytes(pax_tar())
    assert index_shards(tmp_path, on_error="skip").samples == 5
    assert len(list(read_block(pax_tar()))) == 5


# Checkpoints

STATE = {
    "step": 3,
    "positions": {"0": [12, 0], "1": [12, 0]},
    "reset_chains": 0,
    "good": True,
    "divergence": {"rollbacks": 0, "step_scale": 1.0},
    "skipped_samples": 0,
    "skipped_steps": 0,
    "skipped_in_row": 0,
    "step_size": None,
    "scaler": None,
}


@pytest.fixture
def saved(tmp_path):
    return save(tmp_path, {"model": {"w": torch.ones(2, 3)}})


def save(root, files):
    saver = checkpoint.Saver(root, AloneWorld())
    saver.start(3, files, STATE)
    return saver.finish(keep=1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step": "3"}, "'step'"),
        ({"step": -1}, "'step'"),
        ({"step": 10**30}, "'step'"),
        ({"skipped_steps": 0.5}, "'skipped_steps'"),
        ({"skipped_in_row": None}, "'skipped_in_row'"),
        ({"positions": {"0": [12, 0], "1": [2**63, 0]}}, "'positions.1.0'"),
        ({"positions": {"0": [12, 0]}}, "'positions'"),
        ({"positions": {"0": [12, 0], "1": [1, 0], "2": [1, 0]}}, "'positions'"),
        ({"positions": [12, 12]}, "'positions'"),
        ({"scaler": {"scale": "inf"}}, "'scaler.scale'"),
        ({"step_size": 0.0}, "'step_size'"),
    ],
)
def test_hostile_states(saved, changes, words):
    assert checkpoint.read_state(saved, streams=2).positions == STATE["positions"]
    (saved / "state.json").write_text(json.dumps(STATE | changes))
    with pytest.raises(DataError, match=words) as caught:
        checkpoint.read_state(saved, streams=2)
    assert "state.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"step": 1e999}', "{}", " " * (MAX_JSON + 1)])
def test_json_that_is_no_state_and_no_manifest(saved, text):
    for name in ("state.json", "manifest.json"):
        (saved / name).write_text(text)
    with pytest.raises(DataError, match=r"state\.json"):
        checkpoint.read_state(saved)
    assert "manifest.json" in checkpoint.problem_of(saved)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..", "", "a\0b", "x" * 300, "\ud800"])
def test_checkpoint_manifests_that_name_other_files(saved, name):
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": ""}
    (saved / "manifest.json").write_text(json.dumps(manifest))
    problem = checkpoint.problem_of(saved)
    assert repr(name) in problem
    problem.encode()  # can be printed


@pytest.mark.parametrize("size", [float("inf"), 10**400, "many", None, {}])
def test_checkpoint_manifests_with_odd_sizes(saved, size):
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["files"]["state.json"]["bytes"] = size
    (saved / "manifest.json").write_text(json.dumps(manifest))
    assert "manifest.json" in checkpoint.problem_of(saved) or "state.json" in checkpoint.problem_of(saved)


@pytest.mark.parametrize(
    "tensors",
    [{}, {"w": torch.ones(3, 2)}, {"w": torch.ones(1)}, {"w": torch.ones(2, 3).double()}, {"v": torch.ones(2, 3)}],
)
def test_tensors_of_another_run(saved, tensors):
    assert torch.equal(checkpoint.read_tensors(saved, "model", {"w": torch.zeros(2, 3)})["w"], torch.ones(2, 3))
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(DataError, match=r"model\.safetensors: '[wv]'"):
        checkpoint.read_tensors(saved, "model", {"w": torch.zeros(2, 3)})


@pytest.mark.parametrize("length", [0, 1, 10**8, 2**63, 2**64 - 1])
def test_safetensors_headers_of_any_length(saved, length):
    file = saved / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    with pytest.raises(DataError, match=r"model\.safetensors"):
        checkpoint.read_tensors(saved, "model")


def test_optimizer_states_of_another_run(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    path = save(tmp_path, {"optimizer": checkpoint.pack_optimizer(optimizer)})
    fresh = torch.optim.AdamW(model.parameters(), fused=True)
    checkpoint.load_optimizer(path, fresh)
    assert all(torch.equal(fresh.state[p]["exp_avg"], optimizer.state[p]["exp_avg"]) for p in model.parameters())
    good = load_file(path / "optimizer.safetensors")
    for key, value in {"0.exp_avg": np.ones(4), "7.step": 1.0, "exp_avg": 1.0, "x.step": 1.0, "0.more": 1.0}.items():
        save_file(good | {key: torch.as_tensor(value, dtype=torch.float32)}, path / "optimizer.safetensors")
        with pytest.raises(DataError, match=rf"optimizer\.safetensors: '{key}'"):
            checkpoint.load_optimizer(path, fresh)
