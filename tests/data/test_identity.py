"""Shards remember what they were made from; other inputs are refused."""

import numpy as np
import pytest
from PIL import Image

from ebm.data import load_manifest
from ebm.data.items import ArraySource
from ebm.data.shards import ensure_shards, write_shards
from ebm.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine").mkdir()
    for i in range(5):
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(tmp_path / f"mine/{i}.png")
    return tmp_path / "mine"


def refused(shards, source, split="train", match=""):
    with pytest.raises(ConfigError, match=match):
        ensure_shards(str(shards), source, split)


def test_digits_there_and_a_folder_asked_for_and_the_other_way_round(tmp_path, folder):
    ensure_shards(str(tmp_path / "digits"), "digits", "train")
    refused(
        tmp_path / "digits",
        f"folder:{folder}",
        match=rf"made from digits \(split train, 1437 samples\), not from folder:{folder} \(split train, 5 samples\).*"
        r"give data.source=null.*set data.shards to another directory",
    )
    ensure_shards(str(tmp_path / "out"), f"folder:{folder}", "train")
    ensure_shards(str(tmp_path / "out"), f"folder:{folder}", "train")
    refused(tmp_path / "out", "digits", match=r"not from digits")
    refused(tmp_path / "digits", "digits", "test", match=r"digits \(split train.*not from digits \(split test\)")
    assert load_manifest(tmp_path / "digits").source.source == "digits"


def test_a_folder_that_grew_or_changed(tmp_path, folder):
    ensure_shards(str(tmp_path / "out"), f"folder:{folder}", "train")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "9.png")
    refused(
        tmp_path / "out",
        f"folder:{folder}",
        match=r"has changed since .* 5 samples\), it is .* 6 samples\).*--overwrite",
    )
    (folder / "9.png").unlink()
    ensure_shards(str(tmp_path / "out"), f"folder:{folder}", "train")
    Image.fromarray(np.random.default_rng(0).integers(0, 9, (8, 8), dtype=np.uint8)).save(folder / "3.png")
    refused(tmp_path / "out", f"folder:{folder}", match="has changed since")


def test_a_folder_that_moved_or_went_is_still_the_same(tmp_path, folder, monkeypatch):
    ensure_shards(str(tmp_path / "out"), f"folder:{folder}", "train")
    monkeypatch.chdir(tmp_path)
    ensure_shards("out", "folder:mine", "train")
    folder.rename(tmp_path / "elsewhere")
    ensure_shards("out", f"folder:{tmp_path}/elsewhere", "train")
    ensure_shards("out", "folder:mine", "train")
    refused(tmp_path / "out", "folder:yours", match="not from folder:yours")


def test_a_folder_that_needs_options_names_the_command(tmp_path, folder):
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "odd.png")
    with pytest.raises(
        DataError, match=rf"odd.png is 9x9x1 .*give --size N(.|\n)*`python -m ebm shard --source folder:{folder} "
    ):
        ensure_shards(str(tmp_path / "out"), f"folder:{folder}", "train")


def test_arrays(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((9, 4, 4), np.uint8))
    ensure_shards(str(tmp_path / "out"), f"npy:{tmp_path}/a.npy", "train")
    np.save(tmp_path / "a.npy", np.ones((9, 4, 4), np.uint8))
    refused(tmp_path / "out", f"npy:{tmp_path}/a.npy", match="has changed since")


def test_shards_that_do_not_say_are_taken_with_a_warning(tmp_path, shown):
    write_shards(ArraySource("x", np.zeros((9, 8, 8, 1), np.uint8), None), tmp_path, progress=False)
    ensure_shards(str(tmp_path), "digits", "train")
    assert "does not say what its shards were made from; they are taken for digits" in shown()


def test_the_identity_is_of_the_contents(tmp_path):
    images = np.random.default_rng(0).integers(0, 9, (9, 8, 8, 1), dtype=np.uint8)
    one, two = (write_shards(ArraySource("x", images, None), tmp_path / n, progress=False) for n in ("a", "b"))
    other = write_shards(ArraySource("x", images[::-1], None), tmp_path / "c", progress=False)
    labelled = write_shards(ArraySource("x", images, np.arange(9)), tmp_path / "d", progress=False)
    assert one.identity == two.identity and len({one.identity, other.identity, labelled.identity}) == 3
