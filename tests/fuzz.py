"""Hostile configs, inputs, manifests, shards and checkpoints: python tests/fuzz.py TARGET|all [--inputs N] [--seed S]

Each input is a damaged copy of a good one and goes through what the commands call. It may be taken or refused with a
UserError. A finding is all else: another exception, a crash, more than LIMIT seconds, gigabytes of memory, a file
outside the input's directory, a program, a socket, a pickle. An input depends on (target, seed, number) alone.
"""

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import sysconfig
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pyarrow as pa
import torch
import torchvision.io  # noqa: F401  ebm.data loads it late; on a busy machine that takes longer than LIMIT
import yaml
from PIL import Image
from pyarrow import parquet

from ebm.config import HealthConfig, load_config, to_yaml
from ebm.data import ShardReader, load_manifest
from ebm.data.decode import encode_vector
from ebm.data.indexing import index_shards
from ebm.data.items import ArraySource, read_labels
from ebm.data.manifest import check_files, verify
from ebm.data.samples import Order
from ebm.data.shards import write_shards
from ebm.data.sources import Options, open_source
from ebm.errors import UserError
from ebm.runtime import checkpoint, history
from ebm.runtime.distributed import World
from ebm.runtime.run_directory import RunDirectory
from ebm.tracking.delivery import Handed, rows_between, run_id
from ebm.tracking.tracker import Records
from ebm.training.divergence import DivergenceMonitor
from ebm.training.negatives import ReplayBuffer

LIMIT = 5.0  # seconds of processor time an input
WAITING = 10  # times that in all, whatever it waits for
WARM_UP = 200  # inputs before the count begins
MEMORY = 6 << 30  # bytes that all inputs together may add
OUT = "out"  # in a target's directory: removed after each input

# ----------------------------------------------------------------------------------------------------- mutations

STRINGS = [
    *("", "\0", "a\0b", "..", ".", "../../etc/passwd", "/etc/passwd", "pipe:cat /etc/passwd", "file:///etc/passwd"),
    *("${oc.env:HOME}", "${oc.decode:${oc.env:HOME}}", "${oc.create:{a: 1}}", "${run.seed}", "${.}", "${" * 99, "$"),
    *("!!python/object/apply:os.system [id]", "a" * 5000, "\ud800", "é", "\u202e", "???", "*a", "&a", "-1", "1e400"),
    *("NaN", "null", "true", "0x" + "f" * 3000, "9" * 5000, "1:" * 300 + "1", "subprocess:Popen", "F64", "BOOL"),
    *("state.json", "manifest.json", "__key__", "__class__", "self", "directory", "kind", "import", "folder:/etc"),
]
NUMBERS = [
    *(0, 1, -1, 2, 63, 64, 65, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, -(2**63), 2**64, 10**18),
    *(10**400, -(10**400), 0.5, -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")),
]
CHUNKS = [
    *(
        b"\0",
        b"\xff",
        b"\0" * 512,
        b"[" * 100_000,
        b"{" * 3000,
        b'{"a":' * 3000,
        b"- " * 3000,
        b"\n",
        b"%",
        b"..",
        b"/",
    ),
    *(
        b"!!python/object/apply:os.system [id]",
        b"a: &a [1,1]\nb: &b [*a,*a]\nc: [*b,*b]\n",
        b"<<: *a",
        b"!!binary gA==",
    ),
    *(b"${oc.env:HOME}", b'"\\x24{oc.env:HOME}"', b"\\ud800", b"NaN", b"Infinity", b"1e999", b"\x1f\x8b\x08", b"BZh9"),
    *(b"\xfd7zXZ\0", b"%!PS-Adobe", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\x80\x04.", b"PK\3\4", b"9" * 5000, b"--- "),
    *(struct.pack("<Q", n) for n in (0, 1, 2**31, 2**32, 10**8, 2**63, 2**64 - 1)),
]


def nested(rng: random.Random):
    value = rng.choice([1, "a", []])
    for _ in range(rng.choice([3, 30, 40, 150])):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def hostile(rng: random.Random):
    kinds = [lambda: rng.choice(STRINGS), lambda: rng.choice(NUMBERS), lambda: nested(rng)]
    kinds += [lambda: rng.choice([None, True, False, [], {}, [[]], [None], {"": {}}]), lambda: rng.getrandbits(64)]
    return rng.choice(kinds)()


def mutate_bytes(rng: random.Random, data: bytes, most: int = 4) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, most)):
        at = rng.randrange(len(out) + 1)
        end = min(len(out), at + rng.choice([1, 2, 8, 64, 512, 5000]))
        kind = rng.randrange(8)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = rng.choice([0, 255, 128, 127, 10, 32, rng.randrange(256)])
        elif kind == 2:
            del out[at:end]
        elif kind == 3:
            out[at:at] = out[at:end]
        elif kind == 4:
            del out[at:]
        elif kind == 5:
            chunk = rng.choice(CHUNKS)
            out[at : at + rng.choice([0, len(chunk)])] = chunk
        elif kind == 6:
            out[at:at] = str(rng.choice([*STRINGS, *NUMBERS])).encode("utf-8", "surrogatepass")
        else:
            other = rng.randrange(len(out) + 1)
            out[at:end] = out[other : other + end - at]
    return bytes(out)


def mutate_tree(rng: random.Random, value, most: int = 3):
    """A copy of a JSON value with some of its parts replaced, removed, doubled, renamed or moved."""
    root = [json.loads(json.dumps(value))]
    for _ in range(rng.randint(1, most)):
        places = list(_places(root))
        holder, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind <= 2 or holder is root:
            holder[key] = hostile(rng)
        elif kind == 3:
            del holder[key]
        elif kind == 4:
            other, other_key = rng.choice(places)
            holder[key] = json.loads(json.dumps(other[other_key]))
        elif isinstance(holder, dict):
            new = rng.choice([*STRINGS, key + "x", key.upper()])
            holder[new] = holder[key] if rng.random() < 0.5 else holder.pop(key)
        else:
            holder.insert(key, holder[key])
    return root[0]


def _places(node):
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        yield node, key
        if isinstance(value, dict | list):
            yield from _places(value)


def mutate_json(rng: random.Random, value) -> bytes:
    if rng.random() < 0.3:
        return mutate_bytes(rng, json.dumps(value).encode())
    return json.dumps(mutate_tree(rng, value)).encode()


# ------------------------------------------------------------------------------------------------------- targets
# Each is given an empty directory and returns a function that makes an input from `rng` there and runs it.


def config_target(root: Path):
    path, seeds = root / "config.yaml", [(text, yaml.safe_load(text)) for text in CONFIGS]
    good = ["train.steps=3", "optim.lr=1e-4", "data.shape=[1,8,8]", "energy.kind=mlp", "sampler.temperature=0.1"]

    def override(rng: random.Random) -> str:
        if rng.random() < 0.3:
            return rng.choice(good)
        if rng.random() < 0.5:
            value = hostile(rng)
            return f"{rng.choice(good).partition('=')[0]}={value if isinstance(value, str) else json.dumps(value)}"
        return mutate_bytes(rng, rng.choice(good).encode()).decode(errors="surrogateescape")

    def run(rng: random.Random) -> None:
        text, tree = rng.choice(seeds)
        kind = rng.randrange(4)
        if kind == 0:
            text = mutate_bytes(rng, text.encode())
        elif kind < 3:
            tree = mutate_tree(rng, tree)
            lines = tree.items() if isinstance(tree, dict) else enumerate([tree])
            text = "\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in lines)
            text = (text if kind == 1 else text.replace('"', "")).encode()
        else:
            text = text.encode()
        path.write_bytes(text)
        config = load_config(path, [override(rng) for _ in range(2 if kind == 3 else rng.randrange(2))])
        path.write_text(to_yaml(config))
        if rng.random() < 0.1:  # slow
            try:
                load_config(path)
            except UserError as error:
                raise AssertionError("the resolved config of a run can't be read again") from error

    return run


CONFIGS = (
    """\
run: {dir: runs/fuzz, seed: 3}
data:
  shards: data/fuzz
  shape: [1, 8, 8]
  streams: 4
loss: {negatives: noise}
""",
    """\
data: {shards: d}
energy: {kind: import, path: "a:B", settings: {hidden: 3, names: [a, b]}}
sampler: {noise_scale: 0.005, bounds: [-1.0, 1.0]}
""",
    """\
data: {shards: d}
optim: {betas: [0.0, 0.9], grad_clip: null}
train: {steps: 800, batch_size: 128, mixed_precision: no}
tracking: {tags: [a]}
""",
)


def small_shards(root: Path, samples: int, **options):
    images = np.random.default_rng(0).integers(0, 256, (samples, 8, 8, 1), dtype=np.uint8)
    source = ArraySource("fuzz", images, np.arange(samples) % 3)
    return write_shards(source, root, workers=1, progress=False, **options)


def manifest_target(root: Path):
    manifest = small_shards(root, 80, samples_per_shard=70)
    seed = json.loads((root / "manifest.json").read_text())

    def run(rng: random.Random) -> None:
        (root / "manifest.json").write_bytes(mutate_json(rng, seed))
        found = load_manifest(root)
        verify(found)
        order = Order([s.samples for s in found.shards], seed=0, num_streams=2, window=64)
        order.segments(order.window(1, rng.choice([0, 5, 10**9])))

    assert manifest.samples == 80
    return run


def shard_target(root: Path):
    seeds = []
    for name, samples in (("few", 5), ("blocks", 70)):
        small_shards(root / name, samples)
        (tar,) = (root / name).glob("*.tar")
        seeds.append((tar.read_bytes(), json.loads((root / name / "manifest.json").read_text())["shards"][0]))
        shutil.rmtree(root / name)
    for make in (pax_tar, sparse_tar, vector_tar):
        (root / "shard.tar").write_bytes(make())
        seeds.append((make(), {"name": "shard.tar", "samples": 5, "offsets": [0]}))
    weights = [4, 1, 4, 2, 4]

    def run(rng: random.Random) -> None:
        number = rng.choices(range(len(seeds)), weights)[0]
        data, entry = seeds[number]
        vectors = number == len(seeds) - 1
        shape = [6] if vectors else [1, 8, 8]
        for _ in range(rng.randint(1, 2)):
            member = mutate_npy if vectors else mutate_png
            data = rng.choice([mutate_bytes, mutate_header, mutate_header, member])(rng, data)
        path = root / "shard.tar"
        path.write_bytes(data)
        (root / "manifest.json").unlink(missing_ok=True)
        if rng.random() < 0.5:
            index_shards(root)
        else:
            digest = hashlib.sha256(data).hexdigest()
            shard = entry | {"name": path.name, "bytes": len(data), "sha256": digest}
            shard["crc32"] = [zlib.crc32(data[a:b]) for a, b in pairwise((*shard["offsets"], len(data)))]
            manifest = {"version": 2, "shape": shape, "num_classes": rng.choice([None, 3]), "shards": [shard]}
            text = mutate_json(rng, manifest) if rng.random() < 0.3 else json.dumps(manifest).encode()
            (root / "manifest.json").write_bytes(text)
        manifest = load_manifest(root)
        check_files(manifest)
        settings = {"seed": 0, "num_streams": 1, "streams": [0], "per_stream": 2, "window": 16, "workers": 0}
        settings |= {"on_error": rng.choice(["skip", "skip", "fail"]), "max_pixels": 10_000}
        reader = ShardReader(manifest, shape, **settings)
        while reader.epoch < 1:
            next(reader)

    return run


def vector_tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(5):
            for name, data in (("npy", encode_vector(np.arange(6, dtype=np.float32))), ("cls", b"1")):
                member = tarfile.TarInfo(f"{i}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def pax_tar() -> bytes:
    """Every format that is read, and headers longer than a block."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for i, suffix in enumerate(("png", "jpg", "webp", "bmp", "ppm")):
            image = io.BytesIO()
            Image.new("L", (8, 8), 40 * i).save(image, Image.registered_extensions()[f".{suffix}"])
            for name, data in ((suffix, image.getvalue()), ("cls", b"1")):
                member = tarfile.TarInfo(f"{'é' * 120}{i}.{name}")
                member.size, member.pax_headers = len(data), {"comment": "x" * 600}
                tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def sparse_tar() -> bytes:
    """Members of every sparse kind, each of which claims a gigabyte."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for i, headers in enumerate(
            (
                {},
                {"GNU.sparse.map": "0,8", "GNU.sparse.size": str(2**30)},
                {"GNU.sparse.size": str(2**30), "GNU.sparse.offset": "0", "GNU.sparse.numbytes": "8"},
                {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**30)},
                {"size": "-512"},
            )
        ):
            member = tarfile.TarInfo(f"{i}.png")
            member.size, member.pax_headers = 512, headers
            tar.addfile(member, io.BytesIO(b"1\n0\n8\n".ljust(512, b"\0")))
    return out.getvalue()


def headers(data: bytes) -> list[int]:
    return [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]


def mutate_header(rng: random.Random, data: bytes) -> bytes:
    """Change a field of a tar header and make its checksum right again."""
    if not (found := headers(data)):
        return mutate_bytes(rng, data)
    out, at = bytearray(data), rng.choice(found)
    start, size, value = rng.choice(
        [
            (124, 12, lambda: b"%011o\0" % rng.choice([0, 1, 511, 2**20, 8**11 - 1])),
            (124, 12, lambda: rng.choice([b"\x80", b"\xff"]) + rng.choice([1, 2**40, 2**64 - 512]).to_bytes(11, "big")),
            (124, 12, lambda: b"\xff" * 10 + rng.choice([b"\xfe\0", b"\0\0"])),
            (156, 1, lambda: rng.choice([*b"01234567SLKxgXVDNM\0\xff"]).to_bytes(1, "big")),
            (0, 100, lambda: rng.choice(STRINGS).encode("utf-8", "surrogatepass")[:90] + rng.choice([b"", b".png"])),
            (0, 512, lambda: mutate_bytes(rng, bytes(out[at : at + 512]), 1)),
        ]
    )
    out[at + start : at + start + size] = value().ljust(size, b"\0")[:size]
    out[at : at + 512] = sealed(out[at : at + 512])
    return bytes(out)


def sealed(header: bytes) -> bytes:
    """A tar header with its checksum made right."""
    return header[:148] + b"%06o\0 " % sum(header[:148] + b" " * 8 + header[156:]) + header[156:]


def mutate_png(rng: random.Random, data: bytes) -> bytes:
    """Change a chunk of a PNG and make its checksum right again."""
    ihdr = data.find(b"IHDR", rng.randrange(len(data) + 1))
    if ihdr < 4 or ihdr + 21 > len(data):
        return mutate_bytes(rng, data)
    out = bytearray(data)
    if rng.random() < 0.7:
        start, value = rng.choice([(0, 2**31 - 1), (4, 2**31 - 1), (0, 100), (4, 0), (8, 0x10060000), (8, 0x08030000)])
        out[ihdr + 4 + start : ihdr + 8 + start] = value.to_bytes(4, "big")
    else:
        out[ihdr + 4 + rng.randrange(13)] = rng.randrange(256)
    out[ihdr + 17 : ihdr + 21] = zlib.crc32(out[ihdr : ihdr + 17]).to_bytes(4, "big")
    return bytes(out)


def mutate_npy(rng: random.Random, data: bytes) -> bytes:
    """Change the header of an array, its length kept, or its values."""
    at = data.find(b"\x93NUMPY", rng.randrange(len(data) + 1))
    if at < 0:
        return mutate_bytes(rng, data)
    header = data[at + 10 : at + 128]
    if rng.random() < 0.2:
        return data[: at + 6] + mutate_bytes(rng, data[at + 6 : at + 152], 1)[:146] + data[at + 152 :]
    words = ["'<f4'", "(6,)", "False", "'descr'", "'shape'", "{", "}"]
    values = ["'>f4'", "'|O'", "'V2147483647'", "[('a', '<f4')]", "(-6,)", f"({2**62},)", f"({2**70},)", "()", "(6, 1)"]
    values += [
        "(" * 60,
        "[" * 60,
        "-" * 60,
        "9" * 70,
        "1e999",
        "True",
        "None",
        "'a'",
        "{}",
        "(2, 3)",
        "b'x'",
        "print(1)",
    ]
    header = header.replace(rng.choice(words).encode(), rng.choice(values).encode(), 1)
    return data[: at + 10] + header.ljust(118)[:118] + data[at + 128 :]


class AloneWorld:
    """A run of one process, as `checkpoint.save` sees it."""

    is_main, rank, size = True, 0, 1

    def barrier(self) -> None:
        pass

    def gather(self, value) -> list:
        return [value]

    def raise_together(self, error) -> None:
        assert error is None, error


def checkpoint_target(root: Path):
    torch.manual_seed(0)
    model, ema = (torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1)) for _ in range(2))
    optimizer, buffer = torch.optim.AdamW(model.parameters(), fused=True), ReplayBuffer((4,), 6, [0, 1], 0)
    order = Order([100, 30], seed=0, num_streams=2, window=16)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    files = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": checkpoint.pack_optimizer(optimizer)}
    files |= {f"stream_{v:04d}": buffer.stream_state(v) for v in buffer.streams}
    state = {"step": 3, "positions": {"0": [12, 0], "1": [12, 1]}, "skipped_samples": 0, "skipped_steps": 0}
    state |= {"skipped_in_row": 0, "world_size": 1, "scaler": {"scale": 65536.0, "_growth_tracker": 0}}
    monitor = DivergenceMonitor(HealthConfig())
    state |= {"reset_chains": 0, "good": True, "divergence": monitor.state()}
    saver = checkpoint.Saver(root, AloneWorld())
    saver.start(3, files, state)
    path = saver.finish(keep=1)
    good = {file.name: file.read_bytes() for file in path.iterdir()}

    def load() -> None:
        found = checkpoint.newest_valid(root)  # a text that can't be printed raises
        if found is None:
            return
        meta = checkpoint.read_state(found, streams=2)
        monitor.load(meta.divergence)
        model.load_state_dict(checkpoint.read_tensors(found, "model", model.state_dict()))
        ema.load_state_dict(checkpoint.read_tensors(found, "ema", ema.state_dict()))
        fresh = torch.optim.AdamW(model.parameters(), fused=True)
        checkpoint.load_optimizer(found, fresh)
        fresh.step()
        for i, v in enumerate(buffer.streams):
            buffer.load_stream(i, checkpoint.read_tensors(found, f"stream_{v:04d}", buffer.stream_state(i)))
            window = order.window(v, meta.positions[str(v)][0])
            np.arange(order.end(window) - 16, order.end(window))
            order.segments(window)
        torch.zeros((), dtype=torch.int64) + meta.skipped_steps + meta.skipped_in_row + meta.skipped_samples
        torch.zeros((), dtype=torch.int64).fill_(meta.step)

    def run(rng: random.Random) -> None:
        name = rng.choice(sorted(good))
        data = good[name]
        if name.endswith(".json"):
            data = mutate_json(rng, json.loads(data))
        elif rng.random() < 0.5:
            end = 8 + struct.unpack("<Q", data[:8])[0]
            header = mutate_json(rng, json.loads(data[8:end]))
            data = struct.pack("<Q", len(header)) + header + data[end:]
        else:
            data = mutate_bytes(rng, data[:200], 2) + data[200:] if rng.random() < 0.5 else mutate_bytes(rng, data)
        try:
            (path / name).write_bytes(data)
            if name != "manifest.json" and rng.random() < 0.8:
                manifest = json.loads(good["manifest.json"])
                manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                (path / "manifest.json").write_text(json.dumps(manifest))
            load()
        finally:
            for changed in (name, "manifest.json"):
                (path / changed).write_bytes(good[changed])

    return run


def records_target(root: Path):
    """What a run writes beside its checkpoints, and reads again."""
    config = load_config(None, [f"run.dir={root / 'run'}"])
    run_dir = RunDirectory(config, World(config.train))
    run_dir.begin(0, 5)
    monitor = DivergenceMonitor(HealthConfig()).state()
    rollback = {"from": 9, "to": 4, "rollbacks": 1, "reason": "not finite", "divergence": monitor}
    values = {
        "attempts.json": json.loads((run_dir.path / "attempts.json").read_text()),
        "environment.json": json.loads((run_dir.path / "environment.json").read_text()),
        "rollbacks.json": [rollback, rollback | {"rollbacks": 2}],
    }
    lines = [{"step": step, "train/loss": step / 3, "energy/auc": "NaN"} for step in range(1, 6)]
    texts = {"wandb_step": b"abcd 40 3-5 12-30\n", "wandb_id": b"abcd"}

    def read(name: str) -> None:
        path = run_dir.path
        if name == "metrics.jsonl":
            list(rows_between(path / name, 2, 4))
            Records(path / name, 3).close()
            assert all(json.loads(line)["step"] <= 3 for line in (path / name).open("rb"))
        elif name in texts:
            handed = Handed(path, run_id(path, {}), 1.0)
            assert isinstance(handed.lacks(4), bool) and handed.first_lacking <= handed.step + 1
            handed.miss(50), handed.rewind(10)
        else:
            history.read_starts(path / "environment.json")
            run_dir.failed("a reason")
            run_dir.starts_before()
            run_dir.resume_point()

    def run(rng: random.Random) -> None:
        name = rng.choice([*values, *texts, "metrics.jsonl"])
        if name in values:
            data = mutate_json(rng, values[name])
        elif name in texts:
            data = mutate_bytes(rng, texts[name])
        else:
            data = b"\n".join(
                mutate_json(rng, line) if rng.random() < 0.5 else json.dumps(line).encode() for line in lines
            )
            data = mutate_bytes(rng, data + b"\n", 1) if rng.random() < 0.3 else data + b"\n"
        (run_dir.path / name).write_bytes(data)
        try:
            read(name)
        finally:
            (run_dir.path / name).unlink()

    return run


def labels_target(root: Path):
    """Label files beside a folder of images and beside a shard."""
    for name in ("in/a.png", "in/b.png", "in/c 1.png"):
        (root / name).parent.mkdir(exist_ok=True)
        Image.new("L", (2, 2)).save(root / name)
    small_shards(root / "shards", 3)
    (root / "shards" / "manifest.json").unlink()
    keys = ["a.png", "b.png", "c 1.png", "000000", "000001", "000002"]
    rows = dict(zip(keys, ["dog", "cat", "7", 1, 0, "2"], strict=True))
    table = "file,label\r\n" + "".join(f'"{key}", {value}\n' for key, value in rows.items())

    def run(rng: random.Random) -> None:
        suffix = rng.choice(["csv", "json", "npy"])
        if suffix == "csv":
            data = mutate_bytes(rng, rng.choice(["\ufeff", "", "\n"]).encode() + table.encode())
        elif suffix == "json":
            data = mutate_json(rng, rows)
        else:
            data = mutate_array(rng, npy(np.arange(3)))
        path = root / f"labels.{suffix}"
        path.write_bytes(data)
        if suffix == "npy":
            np.save(root / "a.npy", np.zeros((3, 2, 2), np.uint8))
            source = open_source(f"npy:{root}/a.npy", "train", Options(labels=str(path)))
        elif rng.random() < 0.5:
            labels = read_labels(str(path))
            index_shards(root / "shards", labels=labels, on_error=rng.choice(["fail", "skip"]), out=root / "m.json")
            return
        else:
            source = open_source(f"folder:{root}/in", "train", Options(labels=str(path)))
        write_now_and_then(rng, source, root / OUT)

    return run


def write_now_and_then(rng: random.Random, source, out: Path) -> None:
    if rng.random() < 0.3:
        write_shards(source, out, workers=1, progress=False)
        load_manifest(out)


def idx_target(root: Path):
    """IDX files as those of MNIST, packed or not."""
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    good = {"images-idx3": images, "labels-idx1": np.arange(5, dtype=np.uint8)}

    def run(rng: random.Random) -> None:
        end, hit = rng.choice(["", ".gz"]), rng.choice(list(good))
        for kind, array in good.items():
            data = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
            if kind == hit and rng.random() < 0.8:
                data = mutate_idx(rng, data)
            data = gzip.compress(data, 1) if end else data
            if kind == hit and rng.random() < 0.3:
                data = mutate_bytes(rng, data)
            (root / f"train-{kind}-ubyte{end}").write_bytes(data)
        try:
            source = open_source("mnist", "train", Options(root=str(root)))
            source.item(0)
            write_now_and_then(rng, source, root / OUT)
        finally:
            for file in root.glob("*ubyte*"):
                file.unlink()

    return run


def mutate_idx(rng: random.Random, data: bytes) -> bytes:
    """Change a number of the header, which says sizes, or any bytes."""
    if rng.random() < 0.4:
        return mutate_bytes(rng, data)
    at = rng.choice(range(0, 4 + 4 * data[3], 4))
    number = rng.choice([0, 1, 5, 60, 2**31 - 1, 2**31, 2**32 - 1, 0x801, 0x803, 0x804, 0x8FF, 0xD03])
    return data[:at] + struct.pack(">I", number) + data[at + 4 :] + rng.choice([b"", b"", b"\0" * 3000])


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def mutate_array(rng: random.Random, data: bytes) -> bytes:
    """Change a .npy's header, its length kept, or any bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, data)
    header = data[10:128]
    old = rng.choice([rb"\(.*?\)", rb"'descr': '.*?'", rb"'.u?[a-z]\d'", rb"False", rb"'shape'", rb"\d+"])
    new = rng.choice([
        *("(5,)", "(5, 4, 3)", "(0, 4, 3)", "()", "(-5, 4)", f"({2**40}, 4, 3)", f"({2**62}, {2**40})", f"({2**70},)"),
        *("'|O'", "'<U9'", "'|u1'", "'<f4'", "'<i8'", "'>u2'", "'|V2147483647'", "[('a', '<f4')]", "True", "None"),
        *("1e999", "'descr': '|O'", "'descr': '<c8'", "'descr': ('|u1', (2, 2))", "'descr': '|b1'", "(" * 60, "9" * 60),
    ])  # fmt: skip
    header = re.sub(old, new.encode().replace(b"\\", b""), header, count=1)
    tail = data[128:] if rng.random() < 0.8 else data[128:] + b"\0" * 5000
    return data[:10] + header.ljust(118)[:118] + tail


def arrays_target(root: Path):
    """Arrays of images or vectors in .npy and .npz files, with labels inside the archive."""
    random_numbers = np.random.default_rng(0)
    images = random_numbers.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    seeds = [images, images[..., None].repeat(3, 3), images.astype(np.uint16) * 99]
    seeds += [random_numbers.random((5, 4), np.float32), np.asfortranarray(images), np.arange(5)]

    def archive(rng: random.Random) -> bytes:
        out, names = io.BytesIO(), rng.choice([("x", "y"), ("x_train", "y_train"), ("images", "labels")])
        with zipfile.ZipFile(out, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as file:
            for name, array in zip(names, (rng.choice(seeds[:5]), seeds[5]), strict=True):
                data = npy(array) if rng.random() < 0.5 else mutate_array(rng, npy(array))
                if rng.random() < 0.1:
                    name = rng.choice(STRINGS)[:100].encode("utf-8", "replace").decode().replace("\0", "")
                file.writestr(f"{name}{rng.choice(['.npy', '.npy', '.npy', '', '.txt'])}" or "x", data)
        return out.getvalue() if rng.random() < 0.7 else mutate_bytes(rng, out.getvalue())

    def run(rng: random.Random) -> None:
        suffix = rng.choice(["npy", "npz"])
        data = archive(rng) if suffix == "npz" else mutate_array(rng, npy(rng.choice(seeds)))
        (root / f"a.{suffix}").write_bytes(data)
        names = rng.choice(["", "", "#x", "#x,y", "#", "#x,y,z"]) if suffix == "npz" else ""
        source = open_source(f"npy:{root}/a.{suffix}{names}", rng.choice(["train", "train", "test"]))
        source.item(0)
        write_now_and_then(rng, source, root / OUT)

    return run


def parquet_target(root: Path):
    """Parquet files as Hugging Face's datasets write them: with one column of bytes or a struct, labels or none."""
    images = [small_png(50 * i) for i in range(5)]
    structs = [{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)]
    columns = {"image": images, "label": [0, 1, 2, 1, -1]}
    names = {"info": {"features": {"label": {"names": ["a", "b", "c"]}}}}
    tables = [
        pa.table({"image": images}),
        pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(names)}),
        pa.table({"image": structs, "label": pa.array(list("abcab")).dictionary_encode()}),
    ]
    seeds = []
    for table in tables:
        for options in ({}, {"row_group_size": 2, "compression": "zstd"}, {"data_page_version": "2.0"}):
            out = io.BytesIO()
            parquet.write_table(table, out, **options)
            seeds.append(out.getvalue())

    def run(rng: random.Random) -> None:
        (root / "a.parquet").write_bytes(mutate_parquet(rng, rng.choice(seeds)))
        options = Options(label=rng.choice([None, None, None, "none", "image"]))
        source = open_source(f"parquet:{root}/a.parquet", "train", options)
        source.item(0)
        write_now_and_then(rng, source, root / OUT)

    return run


def small_png(grey: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (3, 4), grey).save(out, "PNG")
    return out.getvalue()


def mutate_parquet(rng: random.Random, data: bytes) -> bytes:
    """Change the footer, its length kept right, or any bytes."""
    if rng.random() < 0.4:
        return mutate_bytes(rng, data)
    size = int.from_bytes(data[-8:-4], "little")
    footer = mutate_bytes(rng, data[-8 - size : -8], 2)
    return data[: -8 - size] + footer + struct.pack("<I", len(footer)) + data[-4:]


TARGETS = {
    "parquet": parquet_target,
    "labels": labels_target,
    "idx": idx_target,
    "arrays": arrays_target,
    "records": records_target,
    "config": config_target,
    "manifest": manifest_target,
    "shard": shard_target,
    "checkpoint": checkpoint_target,
}

# ---------------------------------------------------------------------------------------------------------- guard


class Hang(BaseException):
    pass


class Guard:
    """Hears of what Python opens, changes and starts. `outside`: what was not the input's business."""

    STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn", "pickle.find_class")
    CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
               "os.chown", "os.utime", "os.mkfifo", "shutil.rmtree", "shutil.move", "shutil.copyfile")  # fmt: skip
    WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def __init__(self):
        self.root, self.outside = None, []
        code = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), str(Path(__file__).parent.parent)}
        # Python looks for the source of a text that it can't parse under the name that the text was given.
        self.readable = (*code, "/proc/", "/usr/lib", "/usr/share/zoneinfo", "/dev/null", "<string>", "<unknown>")
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple) -> None:
        if self.root is None:
            return
        if event in self.STARTS or event.startswith("socket."):
            self.outside.append((event, repr(args)[:200]))
        elif event == "open" and isinstance(args[0], str | bytes):
            writes = bool(args[2] & self.WRITING)
            if not self._inside(args[0]) and (writes or not os.fsdecode(args[0]).startswith(self.readable)):
                self.outside.append((event, repr(args)[:200]))
        elif event in ("os.remove", "os.rmdir") and args[1] != -1:  # below an open directory, as shutil.rmtree does
            if not self._inside(os.path.join(os.readlink(f"/proc/self/fd/{args[1]}"), os.fsdecode(args[0]))):
                self.outside.append((event, repr(args)[:200]))
        elif event in self.CHANGES:
            paths = [a for a in args[:2] if isinstance(a, str | bytes | os.PathLike)]
            if not all(self._inside(path) for path in paths):
                self.outside.append((event, repr(args)[:200]))

    def _inside(self, path) -> bool:
        return f"{os.path.abspath(os.fsdecode(path))}{os.sep}".startswith(f"{self.root}{os.sep}")


GUARD = Guard()


@contextlib.contextmanager
def guarded(root: Path | None):
    """Raises Hang, MemoryError or AssertionError for what an input must not do; without `root`, Hang alone."""

    def ring(signum, frame):
        raise Hang(f"more than {LIMIT} s")

    GUARD.root, GUARD.outside = root and os.path.abspath(root), []
    before = {name: signal.signal(name, ring) for name in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    signal.setitimer(signal.ITIMER_REAL, WAITING * LIMIT)
    try:
        yield
    except UserError:
        pass
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        for name, handler in before.items():
            signal.signal(name, handler)
        GUARD.root = None
    assert not GUARD.outside, f"outside of its directory: {GUARD.outside}"


def fuzz(target: str, inputs: int, seed: int, first: int = 0, number=None, keep: Path | None = None) -> list[str]:
    """The findings, a text each, their inputs copied to `keep`. `number`: shared memory for the current input's."""
    findings, shm = [], Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = TARGETS[target](Path(folder))
        for i in range(-WARM_UP, inputs):  # the first ones import what is imported late
            if number is not None:
                number.value = first + i
            rng = random.Random(f"{target}/{seed}/{first + i}")
            try:
                with guarded(Path(folder) if i >= 0 else None):
                    run(rng)
            except (Exception, Hang):
                where = "" if keep is None else keep / f"{target}-{seed}-{first + i}"
                findings.append(f"{target}, seed {seed}, input {first + i}: {where}\n{traceback.format_exc()}")
                print(findings[-1], flush=True)
                if keep is not None:
                    shutil.copytree(folder, where, dirs_exist_ok=True)
            shutil.rmtree(Path(folder, OUT), ignore_errors=True)
    return findings


# ------------------------------------------------------------------------------------------------------- command


def child(target: str, options, number, count) -> None:
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    count.value = len(fuzz(target, options.inputs, options.seed, options.first, number, options.keep))


def supervise(target: str, options) -> int:
    """Run one target in a process of its own, which may crash or hang for good; prints the result."""
    context = multiprocessing.get_context("spawn")
    number, count = context.RawValue("q", -1), context.RawValue("q", -1)
    process = context.Process(target=child, args=(target, options, number, count))
    start = time.monotonic()
    process.start()
    seen, since = -1, time.monotonic()
    while process.is_alive():
        process.join(5)
        if number.value != seen:
            seen, since = number.value, time.monotonic()
        elif time.monotonic() - since > 60 + WAITING * LIMIT:
            process.kill()
    findings = count.value
    if findings < 0:
        print(f"{target}, seed {options.seed}, input {number.value}: the process ended with {process.exitcode}")
        findings = 1
    seconds = time.monotonic() - start
    print(f"{target}: {options.inputs / seconds:.0f} inputs/s")
    result = {"target": target, "inputs": options.inputs, "seed": options.seed, "findings": findings}
    print(json.dumps(result | {"seconds": round(seconds, 1)}), flush=True)
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input, to try one again")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="where inputs of findings are copied")
    options = parser.parse_args()
    targets = TARGETS if options.target == "all" else [options.target]
    return 1 if sum([supervise(target, options) for target in targets]) else 0


if __name__ == "__main__":
    sys.exit(main())
