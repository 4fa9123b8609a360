"""Sources from files that people have: IDX files, .npz, labels, parquet; and files that lie about their size."""

import gzip
import hashlib
import io
import json
import pickle
import re
import shutil
import struct
import zipfile

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from scipy.io import savemat
from torchvision import datasets

from ebm.__main__ import main
from ebm.data import load_manifest
from ebm.data.reader import read_all
from ebm.data.shards import write_shards
from ebm.data.sources import CLASSES, Options, open_source
from ebm.data.stored import parquet_errors
from ebm.errors import DataError

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 5, 4), dtype=np.uint8)
LABELS = np.arange(7, dtype=np.uint8) % 3


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def read(spec, tmp_path, split="train", options=None):
    manifest = write_shards(
        open_source(spec, split, options or Options()), tmp_path / "written", progress=False, overwrite=True
    )
    ((images, labels, _),) = read_all(manifest, manifest.shape)
    return images.numpy(), labels.numpy(), manifest


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("name", "folder", "stem"),
    [
        ("fashion_mnist", "", "t10k"),
        ("fashion_mnist", "FashionMNIST/raw/", "t10k"),
        ("mnist", "MNIST/raw/", "t10k"),
        ("kmnist", "KMNIST/raw/", "t10k"),
        ("kmnist", "", "t10k"),
        ("emnist", "EMNIST/raw/", "emnist-balanced-test"),
        ("emnist", "gzip/", "emnist-balanced-test"),
    ],
)
def test_idx_files_on_disk(tmp_path, name, folder, stem, packed):
    for kind, array in (("images-idx3", IMAGES), ("labels-idx1", LABELS)):
        path = tmp_path / "root" / f"{folder}{stem}-{kind}-ubyte{'.gz' if packed else ''}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    images, labels, manifest = read(name, tmp_path, "test", Options(root=str(tmp_path / "root")))
    expected = IMAGES.transpose(0, 2, 1) if name == "emnist" else IMAGES
    assert np.array_equal(images[:, 0], expected) and np.array_equal(labels, LABELS)
    assert manifest.source.source == name and manifest.source.split == "test"
    assert manifest.classes == CLASSES.get(name)


@pytest.mark.parametrize("folder", ["", "raw/", "gzip/"])
def test_idx_files_of_another_set_are_not_taken(tmp_path, monkeypatch, folder):
    for kind, array in (("images-idx3", IMAGES), ("labels-idx1", LABELS)):
        path = tmp_path / "fashion-mnist" / f"{folder}train-{kind}-ubyte"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(idx(array))
    no_network(monkeypatch)
    with pytest.raises(
        DataError, match=r"mnist: its files are not in .*, and the download failed \(OSError: no network"
    ):
        open_source("mnist", "train", Options(root=str(tmp_path / "fashion-mnist")))
    assert len(open_source("fashion_mnist", "train", Options(root=str(tmp_path / "fashion-mnist")))) == 7


def no_network(monkeypatch) -> None:
    def fail(*arguments, **options):
        raise OSError("no network")

    for name in ("urllib.request.urlopen", "torchvision.datasets.utils._urlretrieve"):
        monkeypatch.setattr(name, fail)


# Small files as torchvision's classes read them, with their checksums put in place of the published ones.

COLOURS = np.random.default_rng(1).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
CATS = [f"kind {i}" for i in range(100)]


def cifar(root, cls, monkeypatch) -> None:
    folder, labels = root / cls.base_folder, "fine_labels" if cls is datasets.CIFAR100 else "labels"
    folder.mkdir(parents=True)
    sums = {}
    names = [name for name, _ in (*cls.train_list, *cls.test_list)]
    for name in names:
        first = 0 if name in ("train", "data_batch_1") else 4 if name in ("test", "test_batch") else 6
        rows = slice(first, 4 if first == 0 else 6)
        batch = {"data": COLOURS[rows].transpose(0, 3, 1, 2).reshape(-1, 3072), labels: [9, 3, 5, 2, 8, 7][rows]}
        (folder / name).write_bytes(pickle.dumps(batch | {"coarse_labels": [0]}))
    (folder / cls.meta["filename"]).write_bytes(pickle.dumps({cls.meta["key"]: CATS}))
    for file in folder.iterdir():
        sums[file.name] = hashlib.md5(file.read_bytes()).hexdigest()
    monkeypatch.setattr(cls, "train_list", [[name, sums[name]] for name, _ in cls.train_list])
    monkeypatch.setattr(cls, "test_list", [[name, sums[name]] for name, _ in cls.test_list])
    monkeypatch.setattr(cls, "meta", cls.meta | {"md5": sums[cls.meta["filename"]]})


def shard(tmp_path, name: str, *options: str) -> tuple[np.ndarray, list[int], object]:
    """(images (N, C, H, W), labels, manifest) that the command wrote."""
    out = str(tmp_path / "out")
    assert main(["shard", "--source", name, "--out", out, "--overwrite", *options]) == 0
    manifest = load_manifest(out)
    ((images, labels, _),) = read_all(manifest, manifest.shape)
    return images.numpy(), labels.tolist(), manifest


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_cifar_on_disk(tmp_path, monkeypatch, kind):
    no_network(monkeypatch)
    cls = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind]
    cifar(tmp_path / "root", cls, monkeypatch)
    images, labels, manifest = shard(tmp_path, kind, "--root", f"{tmp_path}/root")
    assert np.array_equal(images, COLOURS[:4].transpose(0, 3, 1, 2)) and labels == [9, 3, 5, 2]
    assert manifest.classes == tuple(CATS) and manifest.num_classes == 100
    for root in ("root", f"root/{cls.base_folder}"):  # also where the folder itself is given
        images, labels, _ = shard(tmp_path, kind, "--root", f"{tmp_path}/{root}", "--split", "test")
        assert np.array_equal(images, COLOURS[4:].transpose(0, 3, 1, 2)) and labels == [8, 7]


def test_files_that_are_not_as_published(tmp_path, monkeypatch, capsys):
    no_network(monkeypatch)
    cifar(tmp_path / "root", datasets.CIFAR100, monkeypatch)
    (tmp_path / "root/cifar-100-python/test").write_bytes(b"cut")
    assert main(["shard", "--source", "cifar100", "--root", f"{tmp_path}/root", "--out", f"{tmp_path}/out"]) == 4
    said = capsys.readouterr().err
    assert f"cifar100: its files are not in {tmp_path}/root, or not as they were published" in said
    assert "torchvision.datasets.CIFAR100" in said and "--root" in said


def test_stl10_on_disk(tmp_path, monkeypatch):
    no_network(monkeypatch)
    folder = tmp_path / "root/stl10_binary"
    folder.mkdir(parents=True)
    colours = np.random.default_rng(2).integers(0, 256, (5, 3, 96, 96), dtype=np.uint8)
    for name, array in (("train_X", colours), ("test_X", colours[:2]), ("unlabeled_X", colours[2:])):
        array.transpose(0, 1, 3, 2).tofile(folder / f"{name}.bin")  # by columns
    np.array([1, 10, 3, 4, 5], np.uint8).tofile(folder / "train_y.bin")  # from 1 on
    np.array([2, 1], np.uint8).tofile(folder / "test_y.bin")
    sums = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(datasets.STL10, part, [[name, sums[name]] for name, _ in getattr(datasets.STL10, part)])
    root = ("--root", f"{tmp_path}/root")
    assert shard(tmp_path, "stl10", *root)[2].classes is None
    (folder / "class_names.txt").write_text("".join(f"{name}\n" for name in CATS[:10]))
    images, labels, manifest = shard(tmp_path, "stl10", *root)
    assert np.array_equal(images, colours) and labels == [0, 9, 2, 3, 4] and manifest.classes == tuple(CATS[:10])
    images, labels, _ = shard(tmp_path, "stl10", "--root", str(folder), "--split", "test")
    assert np.array_equal(images, colours[:2]) and labels == [1, 0]
    images, labels, manifest = shard(tmp_path, "stl10", *root, "--split", "unlabeled")
    assert np.array_equal(images, colours[2:]) and labels == [-1] * 3 and manifest.classes is None


def test_omniglot_on_disk(tmp_path, monkeypatch, capsys):
    """Unpacked, or as its archive, in any of the places where people have it."""
    no_network(monkeypatch)
    drawn = {}
    for place in ("a/omniglot-py", "b", "c/python", "d/omniglot-py"):
        for i, name in enumerate(("Greek/character10/1_1.png", "Greek/character2/1_1.png", "Latin/character1/1_1.png")):
            path = tmp_path / place / "images_background" / name
            path.parent.mkdir(parents=True)
            drawn[i] = np.random.default_rng(i).integers(0, 2, (105, 105), dtype=np.uint8) * 255
            Image.fromarray(drawn[i]).convert("1").save(path)
    packed = tmp_path / "d/omniglot-py"
    shutil.make_archive(str(packed / "images_background"), "zip", packed, "images_background")
    shutil.rmtree(packed / "images_background")
    for root in "abcd":
        images, labels, manifest = shard(tmp_path, "omniglot", "--root", f"{tmp_path}/{root}")
        assert manifest.classes == ("Greek, character2", "Greek, character10", "Latin, character1")
        assert labels == [1, 0, 2] and all(np.array_equal(images[i, 0], drawn[i]) for i in drawn)
    test = ["--root", f"{tmp_path}/a", "--split", "test"]
    assert main(["shard", "--source", "omniglot", "--out", f"{tmp_path}/o", *test]) == 4
    assert "omniglot: its files are not in" in capsys.readouterr().err


def test_svhn_on_disk(tmp_path, monkeypatch):
    no_network(monkeypatch)
    file = tmp_path / "root/test_32x32.mat"
    file.parent.mkdir()
    savemat(file, {"X": COLOURS.transpose(1, 2, 3, 0), "y": np.array([[1], [10], [3], [4], [5], [9]], np.uint8)})
    entry = [*datasets.SVHN.split_list["test"][:2], hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", datasets.SVHN.split_list | {"test": entry})
    images, labels, _ = shard(tmp_path, "svhn", "--root", f"{tmp_path}/root", "--split", "test")
    assert np.array_equal(images, COLOURS.transpose(0, 3, 1, 2)) and labels == [1, 0, 3, 4, 5, 9]


def test_celeba_on_disk(tmp_path, monkeypatch):
    no_network(monkeypatch)
    folder = tmp_path / "root/celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06d}.jpg" for i in range(4)]
    for name, colour in zip(names, COLOURS, strict=False):
        Image.fromarray(colour).save(folder / "img_align_celeba" / name, quality=95)
    lists = {"list_eval_partition": [0, 1, 0, 2], "identity_CelebA": [1, 2, 3, 4]}
    lists |= {f"list_{kind}": [1, 1, -1, 1] for kind in ("bbox_celeba", "landmarks_align_celeba", "attr_celeba")}
    sums = {}
    for name, values in lists.items():
        head = "4\nsome names\n" if len(set(values)) == 2 else ""
        (folder / f"{name}.txt").write_text(head + "".join(f"{n} {v}\n" for n, v in zip(names, values, strict=True)))
        sums[f"{name}.txt"] = hashlib.md5((folder / f"{name}.txt").read_bytes()).hexdigest()
    files = [(key, sums.get(name, md5), name) for key, md5, name in datasets.CelebA.file_list]
    monkeypatch.setattr(datasets.CelebA, "file_list", files)
    images, labels, _ = shard(tmp_path, "celeba", "--root", f"{tmp_path}/root")
    kept = [np.asarray(Image.open(folder / "img_align_celeba" / names[i])) for i in (0, 2)]
    assert labels == [-1, -1] and np.abs(images.transpose(0, 2, 3, 1).astype(int) - np.array(kept)).max() <= 2


@pytest.mark.parametrize("data", [b"", b"\0\0\x08\x03", idx(IMAGES)[:-1], idx(IMAGES)[:4] + b"\xff" * 12])
def test_damaged_idx_files(tmp_path, data):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(data)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte or its labels can't be read"):
        open_source("mnist", "train", Options(root=str(tmp_path)))


def test_no_home(tmp_path, monkeypatch):
    from ebm.data import sources

    monkeypatch.delenv("EBM_DATASETS", raising=False)
    monkeypatch.setenv("HOME", "")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    with pytest.raises(DataError, match=r"no home directory for downloads \(HOME is not set\); give --root DIR"):
        sources.default_root()
    with pytest.raises(DataError, match="write the path in full"):
        open_source("folder:~/pictures")


def test_a_home_directory_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save(tmp_path / "a.npy", IMAGES)
    assert len(open_source("npy:~/a.npy")) == 7


def test_npz(tmp_path):
    np.savez(tmp_path / "a.npz", x=IMAGES, y=LABELS)
    images, labels, manifest = read(f"npy:{tmp_path}/a.npz", tmp_path)
    assert np.array_equal(images[:, 0], IMAGES) and np.array_equal(labels, LABELS)
    assert manifest.source.source.endswith("a.npz#x,y")
    np.savez(tmp_path / "b.npz", x_train=IMAGES, y_train=LABELS, x_test=IMAGES[:3], y_test=LABELS[:3])
    assert len(open_source(f"npy:{tmp_path}/b.npz", "train")) == 7
    assert len(open_source(f"npy:{tmp_path}/b.npz", "test")) == 3
    np.savez(tmp_path / "c.npz", a=IMAGES, b=IMAGES, l=LABELS)
    with pytest.raises(DataError, match=r"not plain which arrays are the split 'train': a u1 7x5x4.*#IMAGES,LABELS"):
        open_source(f"npy:{tmp_path}/c.npz")
    assert np.array_equal(read(f"npy:{tmp_path}/c.npz#b,l", tmp_path)[1], LABELS)
    with pytest.raises(DataError, match="must be IMAGES or IMAGES,LABELS of a, b, l"):
        open_source(f"npy:{tmp_path}/c.npz#z")
    (tmp_path / "d.npz").write_bytes(b"PK junk")
    with pytest.raises(DataError, match=r"not a readable \.npz"):
        open_source(f"npy:{tmp_path}/d.npz")


def test_labels_for_arrays(tmp_path):
    np.save(tmp_path / "a.npy", IMAGES)
    np.save(tmp_path / "l.npy", LABELS)
    np.save(tmp_path / "short.npy", LABELS[:3])
    np.save(tmp_path / "float.npy", LABELS.astype(float))
    labels = read(f"npy:{tmp_path}/a.npy", tmp_path, options=Options(labels=f"{tmp_path}/l.npy"))[1]
    assert np.array_equal(labels, LABELS)
    for name, reason in (("short", "7 samples, and 3 labels"), ("float", "must be class numbers")):
        with pytest.raises(DataError, match=reason):
            open_source(f"npy:{tmp_path}/a.npy", "train", Options(labels=f"{tmp_path}/{name}.npy"))


@pytest.mark.parametrize("shape", [(1 << 40, 28, 28), (1 << 62, 1 << 40), (1 << 200,)])
def test_headers_of_terabytes(tmp_path, shape):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
    (tmp_path / "a.npy").write_bytes(out.getvalue() + b"\0" * 64)
    with pytest.raises(DataError, match=r"a\.npy"):
        open_source(f"npy:{tmp_path}/a.npy")
    with pytest.raises(DataError, match=r"a\.npy"):
        open_source(f"npy:{tmp_path}/b.npy", "train", Options(labels=f"{tmp_path}/a.npy"))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("TMP", "did you mean folder:TMP?"),
        ("TMP/a.npz", "did you mean npy:TMP/a.npz?"),
        ("a.parquet", "did you mean parquet:a.parquet?"),
        ("CIFAR-10", "did you mean cifar10?"),
        ("nothing", "'nothing' is not known; use one of digits, mnist"),
        ("folder:TMP/a.npz", "is a file; give its folder"),
        ("folder:TMP/b", "no such directory"),
    ],
)
def test_sources_that_are_none(tmp_path, spec, words):
    (tmp_path / "a.npz").touch()
    with pytest.raises(DataError) as caught:
        open_source(spec.replace("TMP", str(tmp_path)))
    assert words.replace("TMP", str(tmp_path)) in str(caught.value)


def damaged_archive() -> bytes:
    """A .npz whose first array has another byte than its checksum says."""
    out = io.BytesIO()
    np.savez(out, x=IMAGES, y=LABELS)
    data = bytearray(out.getvalue())
    data[data.index(IMAGES.tobytes())] ^= 1
    return bytes(data)


def archive(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return out.getvalue()


def header(text: str) -> bytes:
    """A .npy of format 1.0 with this header and no values."""
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.npy", b""),
        ("a.npy", b"junk"),
        ("a.npy", header("{")),  # numpy raises tokenize.TokenError
        ("a.npy", header("{'descr': '|u1', ('fortran_order',): False, 'shape': (3,)}")),
        ("a.npy", header("{'descr': ('|u1', ()), 'fortran_order': False, 'shape': (3,)}")),
        ("a.npy", header("{'descr': '|u1', 'fortran_order': False, 'shape': ()}") + b"\1"),
        ("a.npy", archive(x=b"")),  # numpy opens it as what it is
        ("a.npz", archive(x=b"no array")),
        ("a.npz", archive(x=header("}"))),
        ("a.npz", damaged_archive()),
        ("a.npz", archive()),
    ],
)
def test_damaged_arrays(tmp_path, name, data):
    """Found by tests/fuzz.py."""
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=name):
        open_source(f"npy:{tmp_path}/{name}")
    if name == "a.npy":
        np.save(tmp_path / "b.npy", IMAGES)
        with pytest.raises(DataError, match=name):
            open_source(f"npy:{tmp_path}/b.npy", "train", Options(labels=f"{tmp_path}/{name}"))


def test_a_file_that_changed_is_read_anew(tmp_path):
    for rows in (7, 3):
        np.save(tmp_path / "a.npy", IMAGES[:rows])
        table(tmp_path / "a.parquet", range(rows)[::-1])
        assert len(open_source(f"npy:{tmp_path}/a.npy")) == rows
        source = open_source(f"parquet:{tmp_path}/a.parquet")
        assert np.array_equal(source.item(0).array[:, :, 0], IMAGES[rows - 1])


def test_an_archive_that_never_ends(tmp_path):
    """Its header says 5 images; what is unpacked is no more than that, though it holds gigabytes."""
    head = struct.pack(">HBB3I", 0, 8, 3, 5, 4, 3)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + b"\0" * (1 << 26)))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS)))
    with pytest.raises(DataError, match="has more bytes where its header says"):
        open_source("mnist", "train", Options(root=str(tmp_path)))


def test_options_that_a_source_would_ignore_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", IMAGES)
    (tmp_path / "l.csv").write_text("a,1\n")
    for spec, options, reason in (
        ("digits", Options(root="/x"), "--root is for"),
        ("digits", Options(labels="l.csv"), "--labels is for"),
        (f"npy:{tmp_path}/a.npy", Options(label="txt"), "--label, --image and --dots are for shards: and parquet:"),
        (f"npy:{tmp_path}/a.npy", Options(labels=f"{tmp_path}/l.csv"), r"of an array they are a \.npy file"),
    ):
        with pytest.raises(DataError, match=reason):
            open_source(spec, "train", options)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs pyarrow; install it: pip install 'ebm\[parquet\]'"):
        open_source(f"parquet:{tmp_path}/*.parquet")


def png(i: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(IMAGES[i]).save(out, "PNG")
    return out.getvalue()


def table(path, rows=range(7), **columns) -> None:
    """A parquet file with a column of images, as Hugging Face's datasets have it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = {"image": pa.array([{"bytes": png(i), "path": f"{i}.png"} for i in rows])} | columns
    parquet.write_table(pa.table(made), path)


def test_parquet_as_hugging_face_writes_it(tmp_path):
    features = {"image": {"_type": "Image"}, "label": {"names": ["b", "a", "c"], "_type": "ClassLabel"}}
    for part, rows in enumerate((range(4), range(4, 7))):
        made = pa.table(
            {
                "image": pa.array([{"bytes": png(i), "path": None} for i in rows]),
                "label": pa.array([int(LABELS[i]) for i in rows], pa.int64()),
            }
        ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        parquet.write_table(made, tmp_path / f"train-0000{part}-of-00002.parquet", row_group_size=2)
        parquet.write_table(made[:1], tmp_path / f"test-0000{part}-of-00002.parquet")
    images, labels, manifest = read(f"parquet:{tmp_path}/*.parquet", tmp_path)
    assert np.array_equal(images[:, 0], IMAGES) and np.array_equal(labels, LABELS)
    assert manifest.classes == ("b", "a", "c") and len(open_source(f"parquet:{tmp_path}", "test")) == 2
    with pytest.raises(DataError, match=r"no files of the split 'valid' \(4 match; splits: test, train\)"):
        open_source(f"parquet:{tmp_path}", "valid")


def test_splits_of_parquet_files_in_folders(tmp_path):
    """As the Hub converts data sets: default/train/0000.parquet. Taken together, test images would be trained on."""
    for n, split in enumerate(("train", "test", "validation"), 2):
        table(tmp_path / f"set/default/{split}/0000.parquet", range(n))
    table(tmp_path / "set/more.parquet")
    for asked, n in (("train", 2), ("test", 3), ("val", 4), ("validation", 4)):
        source = open_source(f"parquet:{tmp_path}/set", asked)
        assert len(source) == n and [str(left)[:41] for left in source.left_out] == [
            "1 parquet files that are not named after "
        ]
    assert len(open_source(f"parquet:{tmp_path}/set/*/test/*.parquet", "test")) == 3
    table(tmp_path / "latest/contest.parquet")  # no splits
    assert len(open_source(f"parquet:{tmp_path}/latest")) == 7


@pytest.mark.parametrize(
    ("values", "classes", "labels"),
    [
        (pa.array(list("bacbacb")), ("a", "b", "c"), [1, 0, 2, 1, 0, 2, 1]),
        (pa.array(list("bacbacb"), pa.large_string()), ("a", "b", "c"), [1, 0, 2, 1, 0, 2, 1]),
        (pa.array(list("bacbacb")).dictionary_encode(), ("a", "b", "c"), [1, 0, 2, 1, 0, 2, 1]),
        (pa.array([True, False] * 3 + [True]), None, [1, 0, 1, 0, 1, 0, 1]),
        (pa.array([-1] * 7), None, [-1] * 7),  # as in test splits whose labels are secret
    ],
)
def test_labels_of_parquet_files(tmp_path, values, classes, labels):
    table(tmp_path / "a.parquet", label=values)
    _, found, manifest = read(f"parquet:{tmp_path}/a.parquet", tmp_path)
    assert found.tolist() == labels and manifest.classes == classes


def test_columns_of_parquet_files(tmp_path, capsys):
    more = {"Thumb": pa.array([png(0)] * 7), "label": pa.array([0.5] * 7), "coarse": pa.array([2, 1, 0, 2, 1, 0, 1])}
    table(tmp_path / "a.parquet", **more)
    command = ["shard", "--source", f"parquet:{tmp_path}/a.parquet", "--out", str(tmp_path / "out")]
    assert main(command) == 4 and "column label is double; classes are integers or text" in capsys.readouterr().err
    assert main([*command, "--label", "none"]) == 0 and load_manifest(tmp_path / "out").num_classes is None
    assert main([*command, "--label", "coarse", "--image", "Thumb", "--overwrite"]) == 0
    manifest = load_manifest(tmp_path / "out")
    ((images, labels, _),) = read_all(manifest, manifest.shape)
    assert labels.tolist() == [2, 1, 0, 2, 1, 0, 1] and (images[:, 0].numpy() == IMAGES[0]).all()
    assert manifest.source.options == {"label": "coarse", "image": "Thumb"}
    assert main([*command, "--image", "no"]) == 4 and "no column no of image bytes; it has" in capsys.readouterr().err
    assert main([*command, "--label", "no"]) == 4 and "--label no: no such column" in capsys.readouterr().err
    assert main([*command, "--dots", "last"]) == 4 and "--dots is for shards:" in capsys.readouterr().err
    table(tmp_path / "null.parquet", label=pa.array([1, None, 0, 1, 1, 1, 1]))
    command[2] = f"parquet:{tmp_path}/null.parquet"
    assert main([*command, "--overwrite"]) == 4 and "1 of 7 samples have no label" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--on-error", "skip"]) == 0
    assert "left out: 1 samples without a label" in capsys.readouterr().out


def test_damaged_parquet_files(tmp_path):
    table(tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    for name, data, words in (
        ("cut", whole[:-20], "cut.parquet: "),
        ("empty", b"", "empty.parquet: "),
        ("pages", whole[:8] + b"\xff" * 300 + whole[308:], "row 0: can't be read as an image"),
    ):
        (tmp_path / f"{name}.parquet").write_bytes(data)
        with pytest.raises(DataError, match=words):
            read(f"parquet:{tmp_path}/{name}.parquet", tmp_path)
    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: no single column of image bytes.*text \(string\)"):
        open_source(f"parquet:{tmp_path}/[ab].parquet")
    column = pa.array([{"bytes": None, "path": "x.png"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    parquet.write_table(pa.table({"image": column}), tmp_path / "path.parquet")
    with pytest.raises(DataError, match=r"has no bytes there, only the path x\.png"):
        read(f"parquet:{tmp_path}/path.parquet", tmp_path)


@pytest.mark.parametrize("count", [b"\x12", b"\x0d"])  # 9 and -7 rows, as the footer writes numbers
def test_parquet_files_whose_numbers_of_rows_are_wrong(tmp_path, count):
    """There are 7. Each number of the footer that says so is changed in turn."""
    table(tmp_path / "a.parquet")
    whole, path, refused = (tmp_path / "a.parquet").read_bytes(), tmp_path / "b.parquet", 0
    for place in re.finditer(b"\x16\x0e", whole):
        path.write_bytes(whole[: place.start() + 1] + count + whole[place.end() :])
        try:
            source = open_source(f"parquet:{path}")
            assert len(source) == 7
            for i in range(len(source)):
                source.item(i)
        except DataError as error:
            refused += "b.parquet" in str(error)
    assert refused >= 2  # the file's, and those of its groups


def test_parquet_errors_are_those_of_arrow():
    arrows = [error for name, error in vars(pa.lib).items() if name.startswith("Arrow") and name != "ArrowException"]
    assert len(arrows) > 5 and all(issubclass(error, parquet_errors()) for error in arrows)


def test_names_that_command_a_terminal_are_escaped(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a\x1b[2Jb.png").write_bytes(b"junk")
    assert main(["shard", "--source", f"folder:{tmp_path}/in", "--out", str(tmp_path / "out")]) == 4
    said = capsys.readouterr().err
    assert "\x1b" not in said and "a\\x1b[2Jb.png" in said
    (tmp_path / "in" / "ok.png").write_bytes(b"")
    Image.fromarray(IMAGES[0]).save(tmp_path / "in" / "ok.png")
    command = ["shard", "--source", f"folder:{tmp_path}/in", "--out", str(tmp_path / "out"), "--on-error", "skip"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err and load_manifest(tmp_path / "out").samples == 1
