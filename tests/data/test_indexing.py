"""Shards made elsewhere: which members make a sample, labels from anywhere, and a count of all that is passed over."""

import gzip
import io
import json
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ebm.__main__ import main
from ebm.data import ShardReader, load_manifest
from ebm.data.indexing import index_shards
from ebm.data.items import LabelTable, read_labels
from ebm.data.manifest import check_files
from ebm.data.reader import read_all
from ebm.data.shards import write_shards
from ebm.data.sources import Options, open_source
from ebm.data.tars import Grouping, scan_shard
from ebm.errors import DataError


def png(value: int = 0, side: int = 4) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((side, side), value, np.uint8)).save(out, "PNG")
    return out.getvalue()


def tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path.parent


def read(manifest) -> dict[str, tuple[int, int]]:
    """(first pixel, label) by key."""
    found = {}
    for images, labels, keys in read_all(manifest, manifest.shape):
        found |= {k: (int(x[0, 0, 0]), int(y)) for k, x, y in zip(keys, images, labels, strict=True)}
    return found


def test_keys_with_dots(tmp_path):
    """webdataset takes `a.1.png` for the member `1.png` of the sample `a`: five images would be one."""
    tar(tmp_path / "x.tar", {f"photo.{i}.png": png(i) for i in range(5)})
    with pytest.raises(
        DataError, match=r"1 samples have several images.*has 5 images: \.0\.png, .*--image .*--dots last"
    ):
        index_shards(tmp_path)
    assert read(index_shards(tmp_path, grouping=Grouping("last"))) == {f"photo.{i}": (i, -1) for i in range(5)}
    assert load_manifest(tmp_path).dots == "last"


def test_several_images_in_a_sample_are_not_mixed_by_order(tmp_path):
    members = {"a.jpg": png(1), "a.mask.png": png(9), "b.mask.png": png(9), "b.jpg": png(2)}
    tar(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=r"2 samples have several images; the first: .*key a has 2 images"):
        index_shards(tmp_path)
    assert read(index_shards(tmp_path, grouping=Grouping(image="jpg"))) == {"a": (1, -1), "b": (2, -1)}
    assert read(index_shards(tmp_path, grouping=Grouping(image="mask.png"))) == {"a": (9, -1), "b": (9, -1)}
    with pytest.raises(DataError, match=r"key a: has no image \.png"):
        index_shards(tmp_path, grouping=Grouping(image="png"))


def test_a_sample_without_a_label_is_not_passed_over_in_silence(tmp_path, capsys):
    tar(tmp_path / "x.tar", {"a.png": png(1), "a.cls": b"1", "b.png": png(2), "c.png": png(3), "c.cls": b"0"})
    assert main(["index", str(tmp_path)]) == 4
    assert "1 of 3 samples have no label; the first: " in capsys.readouterr().err
    assert main(["index", str(tmp_path), "--label", "none"]) == 0
    assert load_manifest(tmp_path).num_classes is None
    assert main(["index", str(tmp_path), "--on-error", "skip"]) == 0
    assert "left out: 1 samples without a label" in capsys.readouterr().out
    manifest = load_manifest(tmp_path)
    one = ShardReader(manifest, manifest.shape, seed=0, num_streams=1, streams=[0], per_stream=2, window=8, workers=0,
                      on_error="skip", max_skipped=0.5)  # fmt: skip
    assert {key for _, key in next(one).keys} == {"a", "c"}


def test_labels_as_people_have_them(tmp_path):
    members = {}
    for i, name in enumerate(("dog", "cat", "dog")):
        members |= {
            f"{i}.png": png(i),
            f"{i}.txt": name.encode(),
            f"{i}.json": json.dumps({"id": 7 * i, "t": name}).encode(),
        }
    tar(tmp_path / "x.tar", members)
    assert index_shards(tmp_path).num_classes is None
    for label in ("txt", "json:t"):
        manifest = index_shards(tmp_path, label=label)
        assert manifest.classes == ("cat", "dog") and read(manifest) == {"0": (0, 1), "1": (1, 0), "2": (2, 1)}
    assert read(index_shards(tmp_path, label="json:id")) == {"0": (0, 0), "1": (1, 7), "2": (2, 14)}
    with pytest.raises(DataError, match=r"--label cls: no sample has it; members are \.png, \.txt, \.json"):
        index_shards(tmp_path, label="cls")
    (tmp_path / "l.csv").write_text("key,label\n0,dog\n1,cat\n2,bird\n")
    (tmp_path / "l.json").write_text(json.dumps({"0": 5, "1.png": 4, "2": "3"}))
    manifest = index_shards(tmp_path, labels=read_labels(str(tmp_path / "l.csv")))
    assert manifest.classes == ("bird", "cat", "dog") and [y for _, y in read(manifest).values()] == [2, 1, 0]
    table = read_labels(str(tmp_path / "l.json"))
    assert [table.of(key) for key in ("0", "2", "x/0.jpg")] == [5, 3, 5]
    with pytest.raises(DataError, match=r"has none of the keys, such as '0'"):
        index_shards(tmp_path, labels=LabelTable("l", {"z": 1}))


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        '{"a": [1]}',
        '{"a": true}',
        "{",
        '{"a": 1.5}',
        '{"a": -1}',
        '{"a": 1000000000}',
        '{"a": 1' + "0" * 5000 + "}",
    ],
)
def test_label_files_that_are_none(tmp_path, text):
    (tmp_path / "l.json").write_text(text)
    with pytest.raises(DataError, match=r"labels .*l\.json"):
        read_labels(str(tmp_path / "l.json"))


def test_class_names_of_thousands_of_digits(tmp_path):
    """Python makes no number of them, by which names would be sorted."""
    (tmp_path / "l.json").write_text(json.dumps({"0": "9" * 5000, "1": "10", "2": "x"}))
    tar(tmp_path / "x.tar", {f"{i}.png": png(i) for i in range(3)})
    manifest = index_shards(tmp_path, labels=read_labels(str(tmp_path / "l.json")))
    assert manifest.classes == ("10", "9" * 5000, "x")


def test_shapes_are_all_looked_at(tmp_path, capsys):
    tar(tmp_path / "x.tar", {"a.png": png(1), "b.png": png(2, side=5), "c.png": png(3)})
    with pytest.raises(
        DataError, match=r"differ in shape .*2 of 1x4x4 \(first: .*key a\); 1 of 1x5x5 \(first: .*key b\)"
    ):
        index_shards(tmp_path)
    manifest = index_shards(tmp_path, on_error="skip")
    assert manifest.shape == (1, 4, 4) and manifest.left_out[-1].count == 1
    assert main(["shard", "--source", f"shards:{tmp_path}", "--size", "3", "--out", str(tmp_path / "o")]) == 0
    assert read(load_manifest(tmp_path / "o")) == {"a": (1, -1), "b": (2, -1), "c": (3, -1)}


def test_all_bad_shards_are_listed_or_left_out(tmp_path):
    for i in range(4):
        tar(tmp_path / f"{i}.tar", {"a.png": png(i)})
    for i in (1, 3):
        (tmp_path / f"{i}.tar").write_bytes(b"junk" * 500)
    with pytest.raises(DataError, match=r"(?s)2 shards can't be used.*1\.tar.*3\.tar"):
        index_shards(tmp_path)
    manifest = index_shards(tmp_path, on_error="skip")
    assert [shard.name for shard in manifest.shards] == ["0.tar", "2.tar"] and manifest.left_out[0].count == 2


def test_packed_tars_say_how_to_unpack_them(tmp_path):
    tar(tmp_path / "x.tar", {"a.png": png()})
    data = gzip.compress((tmp_path / "x.tar").read_bytes())
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"It is gzip'd.*gzip -dc .*x\.tar > "):
        index_shards(tmp_path)
    (tmp_path / "x.tar").rename(tmp_path / "x.tar.gz")
    with pytest.raises(DataError, match=r"1 are gzip'd, such as .*unpack them: `gunzip "):
        index_shards(tmp_path)


def test_a_directory_that_can_not_be_written_takes_its_manifest_elsewhere(tmp_path):
    shards = tar(tmp_path / "shards/x.tar", {"a.png": png(3)})
    with pytest.raises(DataError, match=r"is not there; give --out FILE\.json"):
        index_shards(shards, out=tmp_path / "nowhere" / "m.json")
    assert main(["index", str(shards), "--out", str(tmp_path / "m.json")]) == 0
    manifest = load_manifest(tmp_path / "m.json")
    check_files(manifest)
    assert read(manifest) == {"a": (3, -1)} and not (shards / "manifest.json").exists()


def mount(*arguments: str | Path) -> None:
    if subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode:
        pytest.skip("a file system can't be mounted here")


@pytest.fixture
def read_only(tmp_path):
    """A directory with a damaged shard that can't be written to. Root may write to any but that of a read-only disk."""
    shards = tar(tmp_path / "shards/x.tar", {"a.png": b"junk"})
    if os.getuid() == 0:
        mount("--bind", shards, shards)
        mount("-o", "remount,ro,bind", shards)
    else:
        shards.chmod(0o500)
    yield shards
    if os.getuid() == 0:
        subprocess.run(["umount", "-l", shards], check=False)


def test_a_directory_without_the_right_to_write_is_refused_before_the_scan(read_only):
    with pytest.raises(DataError, match=r"can't be written to; give --out FILE\.json"):
        index_shards(read_only)


def test_missing_and_short_shards_are_passed_over(tmp_path, shown):
    for i in range(4):
        tar(tmp_path / f"{i}.tar", {f"{i}{j}.png": png(i) for j in range(10)})
    manifest = index_shards(tmp_path)
    (tmp_path / "1.tar").unlink()
    os.truncate(tmp_path / "2.tar", 3000)
    with pytest.raises(DataError, match=r"1\.tar: listed in manifest.json, but can't be found"):
        check_files(manifest)
    with pytest.raises(DataError, match=r"2 shards are missing or damaged, with 20 of 40 samples, more than .*=0.3"):
        check_files(manifest, "skip", 0.3)
    check_files(manifest, "skip", 0.6)
    assert shown().count("passed over: ") == 4
    one = ShardReader(manifest, (1, 4, 4), seed=0, num_streams=1, streams=[0], per_stream=10, window=40, workers=0,
                      on_error="skip", max_skipped=0.6)  # fmt: skip
    batches = [next(one) for _ in range(3)]
    assert {key[:1] for batch in batches[:2] for _, key in batch.keys} == {"0", "3"}
    assert sum(batch.skipped for batch in batches) >= 20


def test_the_identity_of_a_set_survives_writing_it_again(tmp_path):
    """shards:DIR relabels, takes a part, splits."""
    tar(
        tmp_path / "in/x.tar",
        {f"{i}.{end}": data for i in range(40) for end, data in (("png", png(i)), ("cls", b"%d" % (i % 4)))},
    )
    command = ["shard", "--source", f"shards:{tmp_path}/in", "--out"]
    assert main([*command, str(tmp_path / "all")]) == 0
    whole = read(load_manifest(tmp_path / "all"))
    assert whole == {str(i): (i, i % 4) for i in range(40)}
    assert main([*command, str(tmp_path / "two"), "--classes", "3,1"]) == 0
    assert read(load_manifest(tmp_path / "two")) == {str(i): (i, 0 if i % 4 == 3 else 1) for i in range(40) if i % 2}
    assert main([*command, str(tmp_path / "ten"), "--limit", "10"]) == 0
    assert len(read(load_manifest(tmp_path / "ten"))) == 10
    for split in ("train", "test"):
        assert main([*command, str(tmp_path / split), "--holdout", "0.25", "--split", split]) == 0
    parts = [read(load_manifest(tmp_path / split)) for split in ("train", "test")]
    assert not parts[0].keys() & parts[1].keys() and parts[0] | parts[1] == whole and 2 <= len(parts[1]) <= 20
    (tmp_path / "l.csv").write_text("".join(f"{i},{'even' if i % 2 == 0 else 'odd'}\n" for i in range(40)))
    source = open_source(f"shards:{tmp_path}/in", "train", Options(labels=str(tmp_path / "l.csv")))
    manifest = write_shards(source, tmp_path / "named", progress=False)
    assert manifest.classes == ("even", "odd") and read(manifest)["7"] == (7, 1)


STEMS = st.sampled_from(["a", "b", "a.x", "d/c", ".h", "__m__", "d.e/f"])
ENDS = st.sampled_from(["png", "jpg", "cls", "txt", "mask.png", "JSON", ""])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(STEMS, ENDS), min_size=1, max_size=10, unique=True), st.sampled_from(["first", "last"]))
def test_each_member_is_in_a_sample_or_counted(parts, dots):
    """For any tar that is not refused: each member is in a sample or counted; each sample is read as the image that its
    key names, or counted."""
    names = [f"{stem}.{end}" if end else stem for stem, end in parts]
    images = [name for name in names if name.lower().endswith(("png", "jpg"))]
    values = {name: 10 + i for i, name in enumerate(images)}
    contents = {name: png(values[name]) if name in values else b"3" for name in names}
    with tempfile.TemporaryDirectory() as folder:
        tar(Path(folder, "x.tar"), contents)
        try:
            manifest = index_shards(folder, grouping=Grouping(dots), on_error="skip")
        except DataError:
            return
        left = {item.reason: item.count for item in manifest.left_out}
        scan = scan_shard(Path(folder, "x.tar"), Grouping(dots))
        outside = sum(count for why, count in left.items() if why.startswith("members that are in no sample"))
        assert scan.suffixes.total() + outside == len(names)
        bad = left.get("samples that can't be read", 0) + left.get("samples without a label", 0)
        one = ShardReader(manifest, manifest.shape, seed=0, num_streams=1, streams=[0], per_stream=1, window=64,
                          workers=0, on_error="skip", max_skipped=0.99)  # fmt: skip
        found = {}
        while one.positions[0].samples < manifest.samples:
            batch = next(one)
            found |= {key: int(x[0, 0, 0]) for x, (_, key) in zip(batch.images, batch.keys, strict=True)}
        assert len(found) == manifest.samples - bad
        for key, value in found.items():
            (name,) = (name for name in images if values[name] == value)
            assert name.startswith(f"{key}.") and ("." not in name[len(key) + 1 :] or dots == "first")
