"""Folders of images: splits, classes and what is passed over; nothing is lost without a count."""

import io
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ebm.__main__ import main
from ebm.data import load_manifest
from ebm.data.folders import open_folder
from ebm.data.items import LabelTable, natural
from ebm.data.reader import read_all
from ebm.data.shards import write_shards
from ebm.data.sources import open_source
from ebm.errors import DataError

GREY = Image.fromarray(np.full((4, 4), 7, np.uint8))


def tree(root: Path, *names: str) -> Path:
    """Images, and for other suffixes files of text; a name that ends in / is an empty folder."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            continue
        if Path(name).suffix.lower() in (".png", ".jpg", ".tif", ".gif", ".webp"):
            GREY.save(path)
        else:
            path.write_text("not an image")
    return root


def labels_of(root: Path, split: str) -> dict[str, int | None]:
    return {name: label for name, _, label in open_folder(root, split).files}


def test_a_class_that_a_split_lacks_does_not_move_the_others(tmp_path):
    tree(tmp_path, "train/ant/0.png", "train/bee/0.png", "train/cat/0.png", "test/ant/0.png", "test/cat/0.png")
    assert labels_of(tmp_path, "train") == {"ant/0.png": 0, "bee/0.png": 1, "cat/0.png": 2}
    assert labels_of(tmp_path, "test") == {"ant/0.png": 0, "cat/0.png": 2}
    assert open_folder(tmp_path, "test").classes == ("ant", "bee", "cat")
    manifest = write_shards(open_folder(tmp_path, "test"), tmp_path / "out", progress=False)
    assert (manifest.classes, manifest.num_classes) == (("ant", "bee", "cat"), 3)
    assert load_manifest(tmp_path / "out") == manifest


def test_numbers_in_names_are_sorted_by_value(tmp_path):
    tree(tmp_path, *(f"{i}/x.png" for i in (0, 1, 10, 11, 2)))
    assert open_folder(tmp_path, "train").classes == ("0", "1", "2", "10", "11")
    assert natural(["b10", "a", "b9", "B"]) == ["B", "a", "b9", "b10"]


@pytest.mark.parametrize(
    ("there", "asked"), [("val", "validation"), ("valid", "val"), ("testing", "test"), ("Train", "train")]
)
def test_a_splits_other_names(tmp_path, there, asked):
    tree(tmp_path, f"{there}/a/0.png", f"{there}/b/0.png")
    assert len(open_folder(tmp_path, asked)) == 2


def test_a_split_that_is_not_there_is_refused(tmp_path):
    tree(tmp_path / "a", "train/a/0.png", "val/a/0.png")
    with pytest.raises(DataError, match=r"no folder for the split 'test'; it has train, val"):
        open_folder(tmp_path / "a", "test")
    tree(tmp_path / "b", "cat/0.png", "dog/0.png")
    with pytest.raises(DataError, match=r"no split 'test' in it \(it has cat, dog\)"):
        open_folder(tmp_path / "b", "test")
    tree(tmp_path / "c", "val/a/0.png", "validation/a/0.png")
    with pytest.raises(DataError, match="several folders for the split 'valid'"):
        open_folder(tmp_path / "c", "valid")


def test_a_class_that_is_named_like_a_split(tmp_path):
    tree(tmp_path, "car/0.png", "plane/0.png", "train/0.png")
    with pytest.raises(DataError, match=r"train is named like a split, and stands among other folders.*--split \."):
        open_folder(tmp_path, "train")
    assert open_folder(tmp_path, ".").classes == ("car", "plane", "train")
    assert main(["shard", "--source", f"folder:{tmp_path}", "--out", str(tmp_path / "o"), "--split", "."]) == 0


def test_what_is_left_out_is_counted_and_named(tmp_path, capsys):
    tree(
        tmp_path / "in",
        *("a/0.png", "a/1.tif", "a/2.gif", "a/deep/3.webp", "b/0.JPG", "a/._0.png", ".ipynb_checkpoints/0.png"),
        *("a/notes.txt", "a/more.txt", "Thumbs", "empty/", "only_text/x.txt", "__MACOSX/a/0.png"),
    )
    (tmp_path / "in/a/nowhere.png").symlink_to("gone.png")
    (tmp_path / "in/a/link.png").symlink_to("0.png")
    (tmp_path / "in/a/itself.png").symlink_to("itself.png")
    (tmp_path / "in/itself").symlink_to("itself")
    (tmp_path / "in/b/loop").symlink_to("..")
    source = open_folder(tmp_path / "in", "train")
    assert {name for name, _, _ in source.files} == {
        *("a/0.png", "a/1.tif", "a/2.gif", "a/deep/3.webp", "a/link.png", "b/0.JPG"),
    }
    left = {item.reason: (item.count, item.first) for item in source.left_out}
    assert left == {
        "hidden files and folders": (3, ".ipynb_checkpoints"),
        "files .txt": (3, "a/more.txt"),
        "files without suffix": (1, "Thumbs"),
        "links that lead nowhere": (3, "a/itself.png"),
        "links to folders that are read already": (1, "b/loop"),
        "class folders without images": (2, "empty"),
    }
    assert source.classes == ("a", "b")
    assert main(["shard", "--source", f"folder:{tmp_path}/in", "--out", str(tmp_path / "out"), "--rgb"]) == 0
    shown = capsys.readouterr().out
    assert "classes: 0=a 1=b" in shown and "left out: 3 hidden files and folders (first: .ipynb_checkpoints)" in shown
    assert len(load_manifest(tmp_path / "out").left_out) == 6


def test_bad_files_are_all_listed_or_left_out(tmp_path, capsys):
    tree(tmp_path / "in", *(f"{i}.png" for i in range(6)))
    for i in (0, 3, 4):
        (tmp_path / f"in/{i}.png").write_bytes(b"junk")
    command = ["shard", "--source", f"folder:{tmp_path}/in", "--out", str(tmp_path / "out")]
    assert main(command) == 4
    said = capsys.readouterr().err
    assert "3 of 6 samples can't be used" in said and all(f"{i}.png" in said for i in (0, 3, 4))
    assert not (tmp_path / "out" / ".unfinished").exists()
    assert main([*command, "--on-error", "skip"]) == 0
    manifest = load_manifest(tmp_path / "out")
    assert manifest.samples == 3 and manifest.left_out[-1].count == 3


def test_shapes_that_differ_are_told_once(tmp_path, capsys):
    tree(tmp_path / "in", *(f"{i}.png" for i in range(9)))
    for i in range(1, 9):
        Image.new("L", (4 + i, 4)).save(tmp_path / f"in/{i}.png")
    (tmp_path / "in/empty.png").write_bytes(b"")
    cut = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(cut, "JPEG")
    (tmp_path / "in/cut.jpg").write_bytes(cut.getvalue()[:-300])
    assert main(["shard", "--source", f"folder:{tmp_path}/in", "--out", str(tmp_path / "out")]) == 4
    said = capsys.readouterr().err
    assert "8 of 11 samples differ in shape from the first: all images must have one shape; give --size N" in said
    assert said.count("give --size N") == 1 and "... and 5 more" in said and "2 of 11 samples can't be used" in said
    assert "empty.png: can't be read as an image (is empty, 0 bytes)" in said and ".cpp" not in said


def test_names_that_are_not_utf_8(tmp_path, capsys):
    for i, name in enumerate((b"ab\xe9", b"ni\xf1o")):
        folder = os.path.join(os.fsencode(tmp_path), b"in", name)
        os.makedirs(folder)
        Image.new("L", (4, 4), i).save(os.path.join(folder, b"\xe9.png"))
        Path(os.fsdecode(os.path.join(folder, b"\xe9.txt"))).write_text("x")
    assert main(["shard", "--source", f"folder:{tmp_path}/in", "--out", str(tmp_path / "out")]) == 0
    manifest = load_manifest(tmp_path / "out")
    assert manifest.classes == ("ab\\udce9", "ni\\udcf1o")
    assert manifest.left_out[0].first == "ab\\udce9/\\udce9.txt"
    ((images, labels, _),) = read_all(manifest, (1, 4, 4))
    assert images.amax((1, 2, 3)).tolist() == labels.tolist() == [0, 1]


def test_labels_from_a_file(tmp_path):
    tree(tmp_path / "in", "0.png", "1.png", "2.png")
    (tmp_path / "l.csv").write_text("file,label\n0.png,dog\n1.png,cat\n2,dog\n")
    from ebm.data.sources import Options

    source = open_source(f"folder:{tmp_path}/in", "train", Options(labels=str(tmp_path / "l.csv")))
    assert [label for _, _, label in source.files] == [1, 0, 1] and source.classes == ("cat", "dog")
    with pytest.raises(DataError, match=r"1 of 3 files have none, such as 2.png"):
        open_folder(tmp_path / "in", "train", LabelTable("l", {"0.png": 1, "1.png": 0}))


NAMES = st.sampled_from(["a", "b", "train", "val", "test", "c.d", ".h", "10", "9", "é"])
FILES = st.sampled_from(["0.png", "1.jpg", "2.tif", "x.txt", "._0.png", "noext"])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.lists(NAMES, max_size=3), FILES), min_size=1, max_size=8), st.booleans())
def test_what_goes_in_is_in_the_source_or_counted(places, link):
    """For any tree and any split that can be opened; and labels are the same in every split."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "in")
        names = sorted({"/".join([*parts, file]) for parts, file in places})
        names = [name for name in names if not any(other.startswith(name + "/") for other in names)]
        tree(root, *names)
        if link:
            (root / "link").symlink_to(root, target_is_directory=True)
        found = {}
        for split in ("train", "val", "test", "."):
            try:
                found[split] = open_folder(root, split)
            except DataError:
                continue
        if "." in found:
            source = found["."]
            taken = {name for name, _, _ in source.files}
            hidden = [name for name in names if any(part.startswith(".") for part in name.split("/"))]
            other = [n for n in names if n not in hidden and Path(n).suffix not in (".png", ".jpg", ".tif")]
            assert taken | set(hidden) | set(other) == set(names) and not taken & {*hidden, *other}
            counts = {item.reason: item.count for item in source.left_out}
            assert sum(n for why, n in counts.items() if why.startswith("files ")) == len(other)
            tops = {
                "/".join(n.split("/")[: 1 + next(i for i, p in enumerate(n.split("/")) if p[0] == ".")]) for n in hidden
            }
            assert counts.get("hidden files and folders", 0) == len(tops)
        meaning: dict[int, str] = {}
        for split, source in found.items():
            for name, _, label in source.files:
                if label is not None and split != ".":
                    assert meaning.setdefault(label, name.split("/")[0]) == name.split("/")[0]
        assert len({source.classes for split, source in found.items() if split != "." and source.classes}) <= 1


CLASSES = st.sets(st.sampled_from(["ant", "bee", "10", "9", "c d", "Ant", "test2"]), min_size=1)


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.sampled_from(["train", "val", "testing"]), CLASSES, min_size=1))
def test_a_class_has_one_number_in_every_split(there):
    """Whichever classes each split has: the number is the place of the name among those of all, by value."""
    with tempfile.TemporaryDirectory() as folder:
        tree(Path(folder), *(f"{split}/{name}/0.png" for split, names in there.items() for name in names))
        every = natural(set().union(*there.values()))
        for split, names in there.items():
            source = open_folder(Path(folder), split)
            assert source.classes == tuple(every)
            assert {path.split("/")[0]: label for path, _, label in source.files} == {n: every.index(n) for n in names}


def test_written_labels_are_those_of_the_folders(tmp_path):
    tree(tmp_path / "in", "train/b/0.png", "train/a/1.png", "test/c/2.png")
    write_shards(open_folder(tmp_path / "in", "train"), tmp_path / "out", progress=False)
    ((_, labels, keys),) = read_all(tmp_path / "out", (1, 4, 4))
    assert dict(zip(keys, labels.tolist(), strict=True)) == {"a/1": 0, "b/0": 1}
    assert os.listdir(tmp_path / "out").count(".unfinished") == 0
