"""Writing, indexing and verifying shards."""

import io
import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from ebm.__main__ import main
from ebm.data import load_manifest
from ebm.data.indexing import index_shards
from ebm.data.items import ArraySource
from ebm.data.manifest import Manifest, verify
from ebm.data.reader import read_all
from ebm.data.shards import ensure_shards, write_shards
from ebm.data.sources import open_source
from ebm.errors import DataError

PHOTO = np.random.default_rng(1).integers(0, 256, (24, 36, 3), dtype=np.uint8)


def array_source(n=150, shape=(5, 6, 3)):
    images = np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)
    return ArraySource("test", images, np.arange(n) % 3)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def test_digits_are_the_real_ones_and_lossless(tmp_path):
    manifest = write_shards(open_source("digits", "train"), tmp_path, progress=False)
    assert (manifest.samples, manifest.shape, manifest.num_classes) == (1437, (1, 8, 8), 10)
    images, labels, _ = (part[0] for part in zip(*read_all(manifest, (1, 8, 8), batch=1437), strict=True))
    source = open_source("digits", "train")
    assert np.array_equal(images.numpy(), source.arrays[:1024].transpose(0, 3, 1, 2)[: len(images)])
    assert np.array_equal(labels.numpy(), source.labels[: len(labels)])
    assert set(np.unique(source.arrays)) <= set(np.rint(np.arange(17) * 255 / 16).astype(int))
    both = np.concatenate([source.labels, open_source("digits", "test").labels])
    assert len(both) == 1797


def test_bytes_do_not_depend_on_the_workers(tmp_path):
    one = write_shards(array_source(), tmp_path / "one", samples_per_shard=40, workers=1, progress=False)
    two = write_shards(array_source(), tmp_path / "two", samples_per_shard=40, workers=2, progress=False)
    assert [s.samples for s in one.shards] == [40, 40, 40, 30]
    assert one.shards == two.shards
    for shard in one.shards:
        assert one.path(shard).read_bytes() == two.path(shard).read_bytes()
    assert sorted(os.listdir(tmp_path / "two")) == [".lock", "manifest.json", *(s.name for s in two.shards)]


def test_index_of_foreign_shards_equals_the_written_manifest(tmp_path):
    written = write_shards(array_source(), tmp_path, samples_per_shard=70, progress=False)
    (tmp_path / "manifest.json").unlink()
    assert index_shards(tmp_path) == written == load_manifest(tmp_path) == load_manifest(tmp_path / "manifest.json")
    half = index_shards(f"{tmp_path}/shard-{{000000..000001}}.tar")
    assert half.shards == written.shards[:2]
    verify(written)


def foreign_tar(path, members: dict[str, bytes]):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def png(array=PHOTO):
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def test_foreign_tar_with_folders_upper_case_and_other_members(tmp_path):
    long = "a" * 120
    foreign_tar(
        tmp_path / "x.tar",
        {"./d/1.PNG": png(), "./d/1.json": b"{}", "README": b"hello", f"d/{long}.image.png": png(), "2.jpeg": png()},
    )
    manifest = index_shards(tmp_path)
    assert (manifest.samples, manifest.num_classes, manifest.shape) == (3, None, (3, 24, 36))
    ((images, labels, keys),) = read_all(manifest, (3, 24, 36))
    assert keys == ["./d/1", f"d/{long}", "2"] and labels.tolist() == [-1] * 3
    assert all(np.array_equal(image.permute(1, 2, 0), PHOTO) for image in images)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.txt": b"x"}, "key a: has no image"),
        ({"a.png": b"x"}, "key a: not a readable image"),
        ({"a.png": png(), "a.cls": b"-1"}, "key a: .cls is b'-1'"),
        ({}, "holds no samples"),
    ],
)
def test_index_names_what_it_can_not_use(tmp_path, members, message):
    foreign_tar(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=message):
        index_shards(tmp_path)


def test_index_sees_damage(tmp_path):
    foreign_tar(tmp_path / "x.tar", {f"{i}.png": png() for i in range(5)})
    data = bytearray((tmp_path / "x.tar").read_bytes())
    step = 512 + -(-len(png()) // 512) * 512
    (tmp_path / "x.tar").write_bytes(bytes(data[: 4 * step + 700]))
    with pytest.raises(DataError, match=r"x.tar: not a readable tar"):
        index_shards(tmp_path)
    data[2 * step + 148] ^= 0xFF  # a checksum
    (tmp_path / "x.tar").write_bytes(bytes(data))
    with pytest.raises(DataError, match=f"at byte {2 * step}"):
        index_shards(tmp_path)


def test_verify_sees_a_flipped_bit_and_a_size(tmp_path, capsys):
    manifest = write_shards(array_source(), tmp_path, progress=False)
    path = manifest.path(manifest.shards[0])
    assert main(["index", str(tmp_path), "--verify"]) == 0
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(bytes(data))
    assert main(["index", str(tmp_path), "--verify"]) == 4
    assert "sha256" in capsys.readouterr().err
    path.write_bytes(bytes(data[:-512]))
    with pytest.raises(DataError, match=f"has {len(data) - 512} bytes, manifest.json says {len(data)}"):
        verify(manifest)


def test_folder_with_classes_keeps_files_and_makes_keys_unique(tmp_path):
    save(tmp_path / "in/cat/a.b.png", PHOTO)
    save(tmp_path / "in/cat/a_b.png", PHOTO[::-1].copy())
    save(tmp_path / "in/dog/__x.jpg", PHOTO)
    manifest = write_shards(open_source(f"folder:{tmp_path}/in"), tmp_path / "out", progress=False)
    ((images, labels, keys),) = read_all(manifest, (3, 24, 36))
    assert keys == ["cat/a_b", "cat/a_b_", "dog/__x"]
    assert labels.tolist() == [0, 0, 1] and manifest.num_classes == 2
    assert np.array_equal(images[0].permute(1, 2, 0), PHOTO)
    with tarfile.open(tmp_path / "out/shard-000000.tar") as tar:
        data = next(tar.extractfile(m).read() for m in tar if m.name.endswith("jpg"))
    assert data == (tmp_path / "in/dog/__x.jpg").read_bytes()


def test_folder_of_different_sizes_needs_size(tmp_path, capsys):
    save(tmp_path / "in/a.png", PHOTO)
    save(tmp_path / "in/b.png", PHOTO[:20])
    save(tmp_path / "in/c.png", PHOTO[..., 0].copy())
    command = ["shard", "--source", f"folder:{tmp_path}/in", "--out", str(tmp_path / "out")]
    assert main(command) == 4
    message = capsys.readouterr().err
    assert "b.png is 20x36x3" in message and "a.png is 24x36x3" in message and "--size" in message
    assert not (tmp_path / "out/manifest.json").exists()
    assert main([*command, "--size", "16", "--grayscale"]) == 0
    assert load_manifest(tmp_path / "out").shape == (1, 16, 16)
    assert main([*command, "--size", "16"]) == 4, "an existing manifest is not replaced"
    assert main([*command, "--size", "8", "--rgb", "--overwrite", "--format", "jpg"]) == 0
    assert next(iter(read_all(tmp_path / "out", (3, 8, 8))))[0].shape == (3, 3, 8, 8)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "in/a.jpg", PHOTO, exif=exif)
    assert write_shards(open_source(f"folder:{tmp_path}/in"), tmp_path / "out", progress=False).shape == (3, 36, 24)


@pytest.mark.parametrize("shape", [(7, 4, 5), (7, 4, 5, 3)])
def test_npy(tmp_path, shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.save(tmp_path / "a.npy", array)
    manifest = write_shards(open_source(f"npy:{tmp_path}/a.npy", "test"), tmp_path / "out", progress=False)
    ((images, _, _),) = read_all(manifest, manifest.shape)
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy().reshape(shape), array)


@pytest.mark.parametrize("array", [np.zeros((2, 4, 4)), np.zeros((2, 3, 4, 5), np.uint8), np.array([object()])])
def test_npy_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=r"a\.npy"):
        open_source(f"npy:{tmp_path}/a.npy")


@pytest.mark.parametrize("spec", ["imagenet", "folder:/does/not/exist", "npy:/does/not/exist.npy", "folder:"])
def test_unknown_sources(spec):
    with pytest.raises(DataError):
        open_source(spec)


def test_shards_made_elsewhere_are_never_overwritten(tmp_path):
    foreign_tar(tmp_path / "shard-000000.tar", {"a.png": png()})
    with pytest.raises(DataError, match="python -m ebm index"):
        ensure_shards(str(tmp_path), "digits", "train")
    assert len(index_shards(tmp_path).shards) == 1
    ensure_shards(str(tmp_path), "digits", "train")
    assert load_manifest(tmp_path).samples == 1


def test_jobs_that_begin_together_write_the_shards_once(tmp_path):
    code = "import sys; from ebm.data.shards import ensure_shards; ensure_shards(sys.argv[1], 'digits', 'train')"
    command = [sys.executable, "-c", code, str(tmp_path / "digits")]
    jobs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [job.communicate(timeout=120)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0], said
    assert load_manifest(tmp_path / "digits").samples == 1437


def test_no_shards_says_how_to_make_them(tmp_path):
    with pytest.raises(DataError, match=r"no shards in .*python -m ebm shard .*python -m ebm index"):
        load_manifest(tmp_path / "missing")
    ensure_shards(str(tmp_path / "missing"), None, "train")
    assert not (tmp_path / "missing").exists()


GOOD = {"name": "a.tar", "samples": 1, "bytes": 1024, "sha256": "0" * 64, "offsets": [0], "crc32": [7]}


@pytest.mark.parametrize(
    "change",
    [
        *[{"name": name} for name in ("../a.tar", "/etc/a.tar", "x/../../a.tar", "pipe:rm")],
        *[{"samples": samples} for samples in (0, 65)],
        *[{"offsets": offsets} for offsets in ([2048], [-512], [])],
        *[{"crc32": crc32} for crc32 in ([], [1, 2], [-1], [1 << 32])],
        {"bytes": (1 << 30) + 1},
        {"sha256": "x"},
        {"surprise": 1},
    ],
)
def test_bad_manifest_entries(tmp_path, change):
    def write(shard):
        (tmp_path / "manifest.json").write_text(json.dumps({"version": 2, "shape": [1, 8, 8], "shards": [shard]}))
        return load_manifest(tmp_path)

    assert isinstance(write(GOOD), Manifest)
    with pytest.raises(DataError, match=r"manifest.json: .*shards"):
        write(GOOD | change)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"version": 3}', "[" * 100_000])
def test_bad_manifest_files(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest.json"):
        load_manifest(tmp_path)


def test_a_manifest_of_the_format_without_checksums(tmp_path):
    old = json.dumps({"version": 1, "shape": [1, 8, 8], "shards": [{k: v for k, v in GOOD.items() if k != "crc32"}]})
    (tmp_path / "manifest.json").write_text(old)
    with pytest.raises(DataError, match=r"version='1': Input should be 2; write it anew with `python -m ebm index "):
        load_manifest(tmp_path)
