"""What the reader does with damaged shards and unfit images: never less data without a word."""

import io
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import tarfile
import time

import numpy as np
import psutil
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo
from runs import ROOT

from ebm.data import ShardReader, load_manifest
from ebm.data.decode import decode, encode, read_header
from ebm.data.indexing import index_shards
from ebm.data.items import ArraySource
from ebm.data.manifest import check_files
from ebm.data.shards import write_shards
from ebm.errors import DataError


def reader(manifest, streams=(0, 1), shape=(1, 8, 8), **options):
    settings = {"seed": 0, "num_streams": 2, "per_stream": 10, "window": 32, "workers": 0} | options
    return ShardReader(manifest, shape, streams=list(streams), **settings)


@pytest.fixture
def shards(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (200, 8, 8, 1), dtype=np.uint8)
    source = ArraySource("test", images, np.arange(200) % 10)
    return write_shards(source, tmp_path, samples_per_shard=100, workers=1, progress=False)


def damage(manifest, shard: int, key: str, at: int):
    """Flip bits `at` bytes into the header of a member; returns its path."""
    path = manifest.path(manifest.shards[shard])
    with tarfile.open(path) as tar:
        offset = tar.getmember(key).offset
    data = bytearray(path.read_bytes())
    data[offset + at] ^= 0xFF
    path.write_bytes(bytes(data))
    return path


def drain(one: ShardReader, samples: int):
    """(keys, skipped) over the batches until every stream has gone through `samples`."""
    keys, skipped = [], 0
    while min(position.samples for position in one.positions.values()) < samples:
        batch = next(one)
        keys += batch.keys
        skipped += batch.skipped
    return keys, skipped


def test_missing_shard(shards):
    path = shards.path(shards.shards[1])
    path.unlink()
    with pytest.raises(DataError, match=r"shard-000001.tar: listed in manifest.json, but can't be found"):
        check_files(shards)
    for on_error in ("fail", "skip"):
        with pytest.raises(DataError, match=r"shard-000001.tar: can't be read"):
            drain(reader(shards, on_error=on_error), 100)


def test_wrong_size(shards):
    path = shards.path(shards.shards[0])
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(DataError, match=f"shard-000000.tar: has {size - 1} bytes, manifest.json says {size}"):
        check_files(shards)


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_shard(shards, workers):
    path = shards.path(shards.shards[0])
    os.truncate(path, shards.shards[0].offsets[1] + 5000)
    one = reader(shards, workers=workers)
    with pytest.raises(DataError, match=r"shard-000000.tar: changed since .* samples 64 to 99 .* \(after key 000065:"):
        drain(one, 100)
    one.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_skipping_is_the_same_on_every_world_size_and_resumes(shards, workers):
    for key in ("000007.png", "000150.png", "000151.png"):
        damage(shards, int(key[:6]) // 100, key, 512 + 20)
    shards = index_shards(shards.directory, on_error="skip")
    whole = reader(shards, on_error="skip", max_skipped=0.1)
    batches, positions = [], []
    for _ in range(45):
        batches.append(next(whole))
        positions.append(dict(whole.positions))
    total = sum(batch.skipped for batch in batches)
    assert 9 <= total <= 15, "3 an epoch, in 4 to 5 epochs"
    assert sum(position.samples for position in positions[-1].values()) == 45 * 20 + total
    alone = [reader(shards, [v], on_error="skip", max_skipped=0.1, workers=workers) for v in (0, 1)]
    for batch in batches:
        parts = [next(one) for one in alone]
        assert parts[0].keys + parts[1].keys == batch.keys
        assert parts[0].errors + parts[1].errors == batch.errors
    for one in alone:
        one.close()
    for k in range(0, 40, 7):
        resumed = reader(shards, on_error="skip", max_skipped=0.1, positions=positions[k])
        found = next(resumed)
        assert (found.keys, found.errors) == (batches[k + 1].keys, batches[k + 1].errors)


def test_damaged_image_names_shard_and_key(shards):
    damage(shards, 1, "000123.png", 512 + 20)
    with pytest.raises(DataError, match=r"shard-000001.tar: changed since .* samples 0 to 63 .* \(key 000123: "):
        drain(reader(shards), 100)
    with pytest.raises(DataError, match=r"shard-000001.tar: key 000123: "):
        drain(reader(index_shards(shards.directory, on_error="skip")), 100)


def test_nothing_readable_at_all_is_an_error_even_where_skipping(shards):
    with pytest.raises(DataError, match=r"passed over 100 of its 100 samples .* key \d+: image is 1x8x8"):
        next(reader(shards, shape=(1, 9, 9), on_error="skip", max_skipped=0.99))


def test_unlabelled_where_all_should_be(shards):
    damage(shards, 0, "000099.cls", 0)  # the name: not a header checksum alone, so the member is lost
    with pytest.raises(DataError, match=r"shard-000000.tar"):
        drain(reader(shards), 100)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 8, 8)])
def test_wrong_shape(shards, shape):
    with pytest.raises(DataError, match=r"key \d+: image is 1x8x8, data.shape is .* set data.shape=\[1,8,8\]"):
        next(reader(shards, shape=shape))


def test_labels_above_num_classes(shards):
    with pytest.raises(DataError, match=r"key \d+: .cls is \d, not below num_classes=5"):
        drain(reader(shards, num_classes=5), 100)
    assert drain(reader(shards, num_classes=10), 100)[0]


def encoded(image: Image.Image, format: str) -> bytes:
    out = io.BytesIO()
    image.save(out, format)
    return out.getvalue()


def one_sample(directory, members: dict[str, bytes]):
    with tarfile.open(directory / "x.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return index_shards(directory)


GRADIENT = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def test_unusual_images_decode_to_their_pixels(tmp_path):
    grey = Image.fromarray(GRADIENT)
    cases = {
        "palette": (grey.convert("P"), "PNG", 3),
        "sixteen": (Image.fromarray(GRADIENT.astype(np.uint16) << 8), "PNG", 1),
        "alpha": (Image.merge("RGBA", [grey] * 4), "PNG", 4),
        "cmyk": (Image.merge("CMYK", [grey] * 4), "JPEG", 3),
        "jpeg": (grey.convert("RGB"), "JPEG", 3),
    }
    for name, (image, format, channels) in cases.items():
        (tmp_path / name).mkdir()
        manifest = one_sample(tmp_path / name, {f"a.{format.lower()}": encoded(image, format)})
        assert manifest.shape == (channels, 8, 8)
        batch = next(reader(manifest, [0], manifest.shape, num_streams=1, per_stream=1))
        if name != "cmyk":
            assert np.abs(batch.images[0].numpy().astype(int) - GRADIENT).max() <= (3 if format == "JPEG" else 0)


def test_pixel_bomb_is_refused_before_it_is_decoded(tmp_path):
    bomb = encoded(Image.new("L", (5000, 5000)), "PNG")
    manifest = one_sample(tmp_path, {"a.png": bomb})
    with pytest.raises(DataError, match="5000x5000 pixels, more than 1000000"):
        next(reader(manifest, [0], (1, 5000, 5000), num_streams=1, per_stream=1, max_pixels=1_000_000))


def test_bad_cls_after_the_index(tmp_path):
    pixels = encoded(Image.fromarray(GRADIENT), "PNG")
    one_sample(tmp_path, {"a.png": pixels, "a.cls": b"3"})
    data = bytearray((tmp_path / "x.tar").read_bytes())
    position = len(data) - data[::-1].index(b"3"[0]) - 1
    data[position] = ord("x")
    (tmp_path / "x.tar").write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"x.tar: changed since .* \(key a: .cls is b'x'"):
        next(reader(load_manifest(tmp_path), [0], num_streams=1, per_stream=1))


def test_workers_survive_the_signals_of_a_batch_system(shards):
    one = reader(shards, workers=2)
    next(one)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        for worker in workers:
            os.kill(worker.pid, signum)
            os.kill(psutil.Process(worker.pid).ppid(), signum)  # the fork server
    assert len(drain(one, 500)[0]) == 980
    one.close()
    assert not any(worker.is_alive() for worker in workers)


ENDINGS = {"forgets": "", "raises": "raise ValueError", "is killed": "os.kill(os.getpid(), 9)"}


@pytest.mark.parametrize(
    "ending",
    [
        pytest.param(code, id=name, marks=[] if name == "forgets" else pytest.mark.slow)
        for name, code in ENDINGS.items()
    ],
)
def test_no_worker_outlives_a_process_that_does_not_close_its_reader(shards, tmp_path, ending):
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, os, sys\nfrom ebm.data import ShardReader, load_manifest\n"
        "def main():\n    global one\n"
        f"    one = ShardReader(load_manifest({str(tmp_path)!r}), (1, 8, 8), seed=0, num_streams=2, streams=[0, 1],\n"
        "                      per_stream=10, window=32, workers=2)\n"
        "    next(one)\n    print(*[p.pid for p in multiprocessing.active_children()], flush=True)\n"
        f"    {ending}\n"
        "if __name__ == '__main__':\n    main()\n"
    )
    root = ROOT
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, timeout=60, env=environment)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.parametrize("channels", [1, 3])
def test_no_flipped_bit_and_no_cut_of_a_png_changes_a_pixel_unnoticed(channels):
    image = np.random.default_rng(0).integers(0, 256, (6, 7, channels), dtype=np.uint8)
    good = encode(image, "png")
    damaged = [good[:end] for end in range(len(good))]
    for bit in range(8 * len(good)):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(data))
    refused = 0
    for data in damaged:
        try:
            header = read_header(data)
            if header.shape == (channels, 6, 7):
                assert np.array_equal(decode(data, header).transpose(1, 2, 0), image)
        except ValueError:
            refused += 1
    assert refused > 0.8 * len(damaged)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("chunks", ["plain", "gamma", "profile", "text"])
def test_pngs_of_all_kinds_have_pillows_pixels(mode, chunks):
    """Chunks that a viewer would act on, and many small ones of pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 600, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).convert(mode)
    out, extra = io.BytesIO(), PngInfo()
    if chunks == "gamma":
        extra.add(b"gAMA", (30_000).to_bytes(4, "big"))
        extra.add(b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000))
    if chunks == "text":
        extra.add_text("a", "x" * 100_000, zip=True)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() if chunks == "profile" else None
    picture.save(out, "PNG", pnginfo=extra, icc_profile=profile, compress_level=0)
    header = read_header(out.getvalue())
    assert header.plain == "png" and (mode == "L" or out.getvalue().count(b"IDAT") > 1)
    expected = np.asarray(picture).reshape(40, 600, -1)
    assert np.array_equal(decode(out.getvalue(), header).transpose(1, 2, 0), expected)
