"""Vectors: written, read and refused as images are; toy densities against their own formulas."""

import io
import math

import numpy as np
import pytest
import torch
from test_data_damage import bounded

from ebm.__main__ import main
from ebm.config import load_config
from ebm.data import ShardReader, load_manifest, sources
from ebm.data.decode import MAX_HEADER, decode_vector, encode_vector, read_vector_shape
from ebm.data.indexing import index_shards
from ebm.data.items import ArraySource
from ebm.data.reader import read_all
from ebm.data.shards import ensure_shards, write_shards
from ebm.data.sources import open_source
from ebm.errors import ConfigError, DataError
from ebm.inference.images import load_array, to_array
from ebm.streams import generator, owned_streams

FOUR_PEAKS = sources.known_density("four_peaks")[0]

VECTORS = np.random.default_rng(0).normal(size=(300, 5)).astype(np.float32)


def make(path, vectors=VECTORS, labels=None, **options):
    return write_shards(ArraySource("test", vectors, labels), path, progress=False, **options)


def npy(array: np.ndarray, **options) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array, **options)
    return out.getvalue()


def forged(header: str, data: bytes = b"\0" * 8) -> bytes:
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode() + data


# Shards


def test_every_vector_comes_back_bit_for_bit(tmp_path):
    labels = np.arange(300) % 3
    written = make(tmp_path / "a", labels=labels, samples_per_shard=110)
    assert (written.shape, written.samples, written.num_classes) == ((5,), 300, 3)
    (written.directory / "manifest.json").unlink()
    assert index_shards(tmp_path / "a") == written == load_manifest(tmp_path / "a")
    vectors, found, keys = (list(part) for part in zip(*read_all(written, (5,), batch=64), strict=True))
    assert torch.cat(vectors).dtype == torch.float32
    assert np.array_equal(torch.cat(vectors).numpy(), VECTORS) and np.array_equal(torch.cat(found).numpy(), labels)
    assert [key for part in keys for key in part] == [f"{i:06d}" for i in range(300)]


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 1)])
def test_every_vector_once_an_epoch_beside_its_key(tmp_path, world, workers):
    manifest, seen = make(tmp_path, samples_per_shard=110), {}
    for rank in range(world):
        streams = owned_streams(2, rank, world)
        one = ShardReader(
            manifest, (5,), seed=0, num_streams=2, streams=streams, per_stream=10, window=64, workers=workers
        )
        for _ in range(15):
            batch = next(one)
            assert batch.images.dtype == torch.float32 and batch.images.shape == (10 * len(streams), 5)
            for (stream, key), vector in zip(batch.keys, batch.images.numpy(), strict=True):
                seen.setdefault(stream, []).append(key)
                assert np.array_equal(vector, VECTORS[int(key)])
        one.close()
    assert sorted(seen[0] + seen[1]) == [f"{i:06d}" for i in range(300)]


def test_webdatasets_own_writer(tmp_path):
    from webdataset import TarWriter

    with TarWriter(str(tmp_path / "a.tar")) as tar:
        for i, vector in enumerate(VECTORS[:3]):
            tar.write({"__key__": f"{i}", "latent.npy": vector, "json": {"i": i}})
    manifest = index_shards(tmp_path)
    ((vectors, labels, keys),) = read_all(manifest, (5,))
    assert manifest.shape == (5,) and keys == ["0", "1", "2"] and labels.tolist() == [-1] * 3
    assert np.array_equal(vectors.numpy(), VECTORS[:3])


def test_samples_with_both_are_read_as_data_shape_says(tmp_path):
    from test_shards import PHOTO, foreign_tar, png

    foreign_tar(tmp_path / "a.tar", {"0.npy": encode_vector(VECTORS[0]), "0.png": png()})
    manifest = index_shards(tmp_path)
    assert manifest.shape == (3, 24, 36)
    assert np.array_equal(next(read_all(manifest, (3, 24, 36)))[0][0].permute(1, 2, 0), PHOTO)
    assert np.array_equal(next(read_all(manifest, (5,)))[0][0], VECTORS[0])


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((4,), r"vector has 5 values, data.shape is \[4\]; set data.shape=\[5\]"),
        ((3, 8, 8), r"has no image, but a vector, and data.shape is \[3, 8, 8\]; set data.shape=\[D\]"),
    ],
)
def test_another_shape_names_shard_key_and_remedy(tmp_path, shape, reason):
    with pytest.raises(DataError, match=rf"shard-000000.tar: key 000000: {reason}"):
        next(read_all(make(tmp_path), shape))


def test_vectors_asked_of_images(tmp_path):
    ensure_shards(str(tmp_path), "digits", "test")
    with pytest.raises(
        DataError, match=r"key 000000: has no vector \(.npy\), and data.shape is \[64\]; set data.shape="
    ):
        next(read_all(tmp_path, (64,)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(tmp_path, value):
    bad = VECTORS[:9].copy()
    bad[7, 3] = value
    with pytest.raises(DataError, match=f"test, sample 7: value 3 is {value}; all values must be finite"):
        make(tmp_path, bad)
    with pytest.raises(ValueError, match=f"value 3 is {value}"):
        decode_vector(npy(bad[7]), 5)


# The format


def test_all_headers_that_numpy_writes():
    vector = VECTORS[0]
    spaced = forged("{'shape': (5,), 'fortran_order': True, 'descr': '<f4'}\n", vector.tobytes())
    for data in (encode_vector(vector), npy(vector, version=(2, 0)), spaced):
        assert read_vector_shape(data) == (5,) and np.array_equal(decode_vector(data, 5), vector)


HEADER = "{{'descr': {}, 'fortran_order': False, 'shape': {}, }}\n"
REFUSED = {
    "empty": (b"", "not a readable .npy"),
    "no .npy": (b"\x89PNG\r\n\x1a\n" * 9, "not a readable .npy"),
    "version 3": (npy(VECTORS[0], version=(3, 0)), "not a readable .npy of format 1.0 or 2.0"),
    "float64": (npy(VECTORS[0].astype(np.float64)), r"array is float64 \(5,\); must be float32"),
    "big-endian": (npy(VECTORS[0].astype(">f4")), r"array is >f4 \(5,\); must be float32 \(D,\), little-endian"),
    "integers": (npy(np.arange(5)), r"array is int64 \(5,\)"),
    "matrix": (npy(VECTORS[:1]), r"array is float32 \(1, 5\)"),
    "scalar": (npy(VECTORS[0, 0]), r"array is float32 \(\)"),
    "no values": (npy(VECTORS[0, :0]), r"array is float32 \(0,\)"),
    "pickle": (npy(np.array([print], object), allow_pickle=True), r"array is object"),
    "records": (npy(np.zeros(2, [("a", "<f4")])), r"array is \[\('a', '<f4'\)\]"),
    "cut header": (encode_vector(VECTORS[0])[:60], "not a readable .npy"),
    "cut values": (encode_vector(VECTORS[0])[:-1], r"can't be decoded \(19 bytes where 5 float32 values"),
    "more values": (encode_vector(VECTORS[0]) + b"\0", r"can't be decoded \(21 bytes"),
    "petabytes": (forged(HEADER.format("'<f4'", f"({1 << 50},)")), f"vector has {1 << 50} values"),
    "negative": (forged(HEADER.format("'<f4'", "(-5,)")), r"array is float32 \(-5,\)"),
    "wide type": (forged(HEADER.format("'V2147483647'", "(5,)")), r"array is \|V2147483647"),
    "nested": (forged("(" * 900), "not a readable .npy"),
    "long header": (forged(HEADER.format("'<f4'", "(5,)").ljust(MAX_HEADER + 1)), "not a readable .npy"),
    "long header, version 2": (b"\x93NUMPY\2\0\xff\xff\xff\xff{", "not a readable .npy"),
    "call": (forged(HEADER.format("'<f4'", "(5 if print('!') else 5,)")), "not a readable .npy"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_vector_is_refused_in_bounded_memory(name):
    data, reason = REFUSED[name]
    with bounded(1 << 20), pytest.raises(ValueError, match=reason):
        decode_vector(data, 5)


# Sources and commands


def test_npy_source_keeps_the_values(tmp_path, capsys):
    np.save(tmp_path / "a.npy", VECTORS)
    assert main(["shard", "--source", f"npy:{tmp_path}/a.npy", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "300 vectors of 5 values in 1 shards" in shown and "'data.shape=[5]'" in shown
    assert np.array_equal(torch.cat([x for x, _, _ in read_all(tmp_path / "out", (5,))]), VECTORS)
    assert main(["index", str(tmp_path / "out")]) == 0 and "300 vectors of 5" in capsys.readouterr().out


@pytest.mark.parametrize("option", [["--size", "8"], ["--rgb"], ["--format", "png"]])
def test_options_of_images_are_refused(tmp_path, capsys, option):
    np.save(tmp_path / "a.npy", VECTORS)
    call = ["shard", "--source", f"npy:{tmp_path}/a.npy", "--out", str(tmp_path / "out"), *option]
    assert main(call) == 2
    assert "is a vector of 5 values; --size, --grayscale, --rgb and --format are for images" in capsys.readouterr().err


@pytest.mark.parametrize("array", [VECTORS.astype(np.float64), VECTORS[0], VECTORS[:0], VECTORS[:, :, None]])
def test_arrays_that_are_no_vectors(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=r"a.npy: is float\d\d \(.*\); must be images, .* or vectors, float32 \(N, D\)"):
        open_source(f"npy:{tmp_path}/a.npy")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (["data.shape=[0]"], ("data.shape=[0]", "positive")),
        (["data.shape=[2,2]"], ("data.shape=[2, 2]", "three positive numbers", "one")),
        (["data.shape=[2]", "data.augment_flip=true"], ("shape=[2]", "augment_flip=false")),
    ],
)
def test_config(override, words):
    assert load_config(None, ["data.shape=[2]"]).data.shape == (2,)
    with pytest.raises(ConfigError) as caught:
        load_config(None, override)
    assert all(word in str(caught.value) for word in words), caught.value


def test_files_of_the_commands(tmp_path):
    """What sample writes, sample --init and score read."""
    x = torch.from_numpy(VECTORS)
    np.save(tmp_path / "a.npy", to_array(x))
    assert torch.equal(torch.from_numpy(np.array(load_array(tmp_path / "a.npy", (5,)))), x)
    with pytest.raises(DataError, match="1 of 2 samples hold non-finite"):
        to_array(torch.tensor([[0.0, 1.0], [0.0, math.inf]]))


@pytest.mark.parametrize(
    ("array", "shape", "reason"),
    [
        (VECTORS, (4,), r"float32 \(300, 5\), but the run's samples are float32 vectors \(N, 4\)"),
        (VECTORS.astype(np.float64), (5,), "float64"),
        (VECTORS[0], (5,), r"\(5,\)"),
        (VECTORS[:, :, None], (5,), r"\(300, 5, 1\)"),
        (VECTORS, (1, 8, 8), r"the run's samples are uint8 images \(N, 8, 8, 1\)"),
        (np.where(np.arange(15).reshape(3, 5) == 7, np.nan, 0).astype(np.float32), (5,), "vector 1 holds a value that"),
        (np.array([print]), (5,), "give a .npy file of float32 vectors"),
    ],
)
def test_files_that_do_not_fit(tmp_path, array, shape, reason):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=rf"a.npy: .*{reason}"):
        load_array(tmp_path / "a.npy", shape)


# Toy densities


def test_four_peaks_through_its_shards(tmp_path):
    ensure_shards(str(tmp_path), "four_peaks", "train")
    x = torch.cat([x for x, _, _ in read_all(tmp_path, (2,))])
    assert torch.equal(x, sources.sample_toy("four_peaks", "train")[0]) and x.shape == (20_000, 2)
    assert load_manifest(tmp_path).num_classes is None
    assert not torch.equal(x, sources.sample_toy("four_peaks", "test")[0])


def test_four_peaks_energy_is_the_formula():
    x, y = 0.3, -1.7
    expected = (
        -2 * math.exp(-0.2 * ((x - 2) ** 2 + (y - 2) ** 2))
        - 3 * math.exp(-0.2 * ((x + 2) ** 2 + (y - 2) ** 2))
        - math.exp(-0.3 * ((x - 2) ** 2 + (y + 2) ** 2))
        - 4 * math.exp(-0.2 * ((x + 2) ** 2 + (y + 2) ** 2))
        + 0.1 * (x**2 + y**2)
    )
    assert FOUR_PEAKS(torch.tensor([[x, y]], dtype=torch.float64)).item() == pytest.approx(expected)


def test_four_peaks_has_the_densitys_cell_probabilities():
    """Chi-squared over cells of side 1.5 (and all that is outside), their probabilities by quadrature."""
    n, cells, fine = 100_000, 8, 50
    side = torch.arange(cells * fine, dtype=torch.float64)
    inner = -6 + 12 * (side + 0.5) / (cells * fine)
    wide = torch.linspace(-25, 25, 1001, dtype=torch.float64)
    assert sources.known_density("four_peaks")[1].tolist() == [[2, 2], [-2, 2], [2, -2], [-2, -2]]

    def mass(axis):
        step = (axis[1] - axis[0]) ** 2
        return torch.exp(-FOUR_PEAKS(torch.cartesian_prod(axis, axis))) * step

    p = mass(inner).view(cells, fine, cells, fine).sum((1, 3)).flatten()
    p = torch.cat([p, mass(wide).sum()[None] - p.sum()]) / mass(wide).sum()
    x, _ = sources.four_peaks(n, generator(5, "test"))
    index = ((x + 6) / 12 * cells).floor().long()
    inside = ((index >= 0) & (index < cells)).all(1)
    flat = torch.where(inside, index[:, 0] * cells + index[:, 1], cells * cells)
    counts = torch.bincount(flat, minlength=cells * cells + 1).double()
    statistic = ((counts - n * p) ** 2 / (n * p)).sum().item()
    freedom = cells * cells
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), statistic


@pytest.mark.parametrize("name", [name for name in sources.TOYS if name != "four_peaks"])
def test_labelled_toys_have_their_moments(name):
    """Each component's mean and mean squared distance from the centre, in closed form, within 5 standard errors."""
    x, labels = sources.sample_toy(name, "train")
    assert torch.equal(x, sources.sample_toy(name, "train")[0]) and x.dtype == torch.float32
    k = torch.arange(int(labels.max()) + 1, dtype=torch.float64)
    moments = {
        "eight_gaussians": (
            2 * torch.stack([(k * math.pi / 4).cos(), (k * math.pi / 4).sin()], 1),
            4 + 2 * 0.04 + 0 * k,
        ),
        "rings": (torch.zeros(len(k), 2), (1 + k) ** 2 + 0.01),
        "two_moons": (torch.tensor([[-0.5, 2 / math.pi - 0.25], [0.5, 0.25 - 2 / math.pi]]), None),
    }
    mean, square = moments[name]
    for label in range(len(k)):
        part = x[labels == label].double()
        assert len(part) == pytest.approx(len(x) / len(k), abs=5 * math.sqrt(len(x) / len(k)))
        assert ((part.mean(0) - mean[label]).abs() < 5 * part.std(0) / math.sqrt(len(part))).all()
        if square is not None:
            r2 = part.square().sum(1)
            assert abs(r2.mean() - square[label]) < 5 * r2.std() / math.sqrt(len(part))
    test = open_source(name, "test")
    assert len(test) == 20_000 and not np.array_equal(test.arrays, x) and set(test.labels) == set(range(len(k)))


def test_a_split_that_a_toy_has_not():
    with pytest.raises(DataError, match="split 'valid': rings has train and test"):
        open_source("rings", "valid")
