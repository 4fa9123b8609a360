"""One decoder for all roads: the same bytes give the same array from a folder, a tar, and shards written anew."""

import io
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from pyarrow import parquet

from ebm.__main__ import main
from ebm.data import load_manifest
from ebm.data.decode import decode, read_header
from ebm.data.indexing import index_shards
from ebm.data.items import Conversion, image_item
from ebm.data.reader import read_all
from ebm.data.shards import write_shards
from ebm.data.sources import open_source
from ebm.errors import ConfigError

NOISE = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def exif(orientation: int) -> bytes:
    found = Image.Exif()
    found[0x0112] = orientation
    return found.tobytes()


def only(manifest) -> np.ndarray:
    ((images, _, _),) = read_all(manifest, manifest.shape)
    return images[0].numpy()


def by_every_road(data: bytes, suffix: str) -> dict[str, np.ndarray]:
    """(C, H, W) of one file: through a folder, a tar, the tar written anew, and parquet."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "in").mkdir()
        (root / f"in/a.{suffix}").write_bytes(data)
        (root / "tar").mkdir()
        with tarfile.open(root / "tar/x.tar", "w") as tar:
            tar.add(root / f"in/a.{suffix}", f"a.{suffix}")
        arrays = {"decoder": decode(data, read_header(data)), "tar": only(index_shards(root / "tar"))}
        sources = {"folder": f"folder:{root}/in", "shards": f"shards:{root}/tar"}
        parquet.write_table(pa.table({"image": [data]}), root / "a.parquet")
        sources["parquet"] = f"parquet:{root}/a.parquet"
        for road, spec in sources.items():
            arrays[road] = only(write_shards(open_source(spec), root / road, progress=False))
        return arrays


def same(arrays: dict[str, np.ndarray]) -> np.ndarray:
    first = arrays["decoder"]
    for road, array in arrays.items():
        assert np.array_equal(array, first), road
    return first


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(format, orientation):
    options = {"lossless": True} if format == "WEBP" else {"quality": 100} if format == "JPEG" else {}
    data = encoded(Image.fromarray(NOISE), format, exif=exif(orientation), **options)
    array = same(by_every_road(data, {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[format]))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data), formats=[format])))
    assert np.abs(array.transpose(1, 2, 0).astype(int) - expected).max() <= (2 if format == "JPEG" else 0)


def variants() -> dict[str, tuple[bytes, str, int]]:
    """(bytes, suffix, channels)"""
    picture = Image.fromarray(NOISE)
    palette = picture.quantize(16)
    see_through = picture.quantize(16)
    see_through.info["transparency"] = 3
    deep = (np.arange(54, dtype=np.uint16).reshape(6, 9) * 1200).astype(np.uint16)
    return {
        "grey": (encoded(picture.convert("L"), "PNG"), "png", 1),
        "one bit": (encoded(picture.convert("1"), "PNG"), "png", 1),
        "palette": (encoded(palette, "PNG"), "png", 3),
        "palette with a transparent entry": (encoded(see_through, "PNG", transparency=3), "png", 4),
        "a transparent colour": (encoded(picture, "PNG", transparency=(1, 2, 3)), "png", 4),
        "alpha": (encoded(picture.convert("RGBA"), "PNG"), "png", 4),
        "grey with alpha": (encoded(picture.convert("LA"), "PNG"), "png", 2),
        "16 bits": (encoded(Image.fromarray(deep), "PNG"), "png", 1),
        "CMYK": (encoded(picture.convert("CMYK"), "JPEG"), "jpg", 3),
        "progressive": (encoded(picture, "JPEG", progressive=True), "jpg", 3),
        "BMP": (encoded(picture, "BMP"), "bmp", 3),
        "PPM": (encoded(picture, "PPM"), "ppm", 3),
    }


@pytest.mark.parametrize("name", variants())
def test_kinds_of_images(name):
    data, suffix, channels = variants()[name]
    assert same(by_every_road(data, suffix)).shape == (channels, 6, 9)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["L", "RGB", "P", "RGBA", "LA", "CMYK", "1"]),
    st.sampled_from(["PNG", "JPEG", "WEBP", "BMP"]),
    st.integers(0, 9),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_the_same_bytes_give_the_same_array_by_every_road(mode, format, orientation, size):
    picture = Image.fromarray(np.resize(NOISE, (*size, 3)).astype(np.uint8)).convert(mode)
    try:
        data = encoded(picture, format, exif=exif(orientation))
    except (OSError, ValueError, KeyError):  # a format that has not this mode
        return
    same(by_every_road(data, {"JPEG": "jpg"}.get(format, format.lower())))


def test_twelve_bits_in_a_file_of_sixteen(tmp_path, capsys):
    values = np.linspace(0, 4095, 54).astype(np.uint16).reshape(6, 9)
    (tmp_path / "in").mkdir()
    Image.fromarray(values).save(tmp_path / "in/a.png")
    command = ["shard", "--source", f"folder:{tmp_path}/in", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "none above 4095: taken as it is, it is nearly black. Give --range 0,4095" in capsys.readouterr().err
    assert main([*command, "--range", "0,4095"]) == 0
    assert np.array_equal(only(load_manifest(tmp_path / "out"))[0], np.rint(values / 4095 * 255))
    assert main([*command, "--range", "0,65535", "--overwrite"]) == 0
    assert np.array_equal(only(load_manifest(tmp_path / "out"))[0], np.rint(values / 65535 * 255))
    for bad in ("4095", "5,5", "-1,9", "0,70000"):
        assert main([*command, f"--range={bad}"]) == 2


def test_transparency_over_a_background(tmp_path, capsys):
    image = np.dstack([NOISE, np.full((6, 9), 51, np.uint8)])
    (tmp_path / "in").mkdir()
    Image.fromarray(image).save(tmp_path / "in/a.png")
    command = ["shard", "--source", f"folder:{tmp_path}/in", "--out", str(tmp_path / "out"), "--rgb"]
    assert main(command) == 4
    assert "is transparent in part; give --background COLOUR" in capsys.readouterr().err
    assert main([*command, "--background", "white"]) == 0
    expected = np.rint(NOISE * 0.2 + 255 * 0.8)
    assert np.abs(only(load_manifest(tmp_path / "out")).transpose(1, 2, 0) - expected).max() <= 1
    assert main([*command, "--background", "nocolour", "--overwrite"]) == 2


def test_an_opaque_alpha_channel_needs_no_background():
    picture = Image.fromarray(NOISE).convert("RGBA")
    item = image_item("a", "a", encoded(picture, "PNG"), None)
    assert np.array_equal(Conversion(mode="RGB").image(item.array), NOISE)


def test_a_palette_with_transparency_takes_the_background():
    data, _, _ = variants()["palette with a transparent entry"]
    item = image_item("a", "a", data, None)
    over = Conversion(background="black").image(item.array)
    assert over.shape == (6, 9, 3) and (over[item.array[..., 3] == 0] == 0).all() and (item.array[..., 3] == 0).any()


def test_settings_of_images_are_not_for_others():
    with pytest.raises(ConfigError):
        Conversion(levels=(0, 9)).check(image_item("a", "a", encoded(Image.fromarray(NOISE), "PNG"), None))
