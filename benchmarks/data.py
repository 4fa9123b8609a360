"""Images a second from shards, against Pillow on a folder through a DataLoader, and against the raw decode limit.

python benchmarks/data.py [--sizes 32 64] [--suffix png jpg] [--workers 0 1] [--rounds 5] [--out FILE]

Writes patches of scikit-learn's two photographs as a folder of files and as shards of the same files, then reads them
in turns: `shards`, ebm.data.ShardReader (every block's crc32 and every header checked, positions kept); `folder`,
torchvision's ImageFolder with its default loader, Pillow, through torch's DataLoader in shuffled order; `limit`, the
decoder alone on bytes in memory, in as many processes. Batches of 128 uint8 images arrive in the main process; those
of the limit stay where they were decoded. Prints a table and one JSON object.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Self

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from sklearn.datasets import load_sample_images  # noqa: E402
from timing import alternate, machine, publish, ratios, spread, table  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torchvision.datasets import ImageFolder  # noqa: E402
from torchvision.transforms.v2.functional import pil_to_tensor  # noqa: E402

from ebm.data import ShardReader, load_manifest  # noqa: E402
from ebm.data.decode import decode, encode, read_header  # noqa: E402
from ebm.data.shards import write_shards  # noqa: E402
from ebm.data.sources import open_source  # noqa: E402
from ebm.runtime.process import init_worker, worker_context  # noqa: E402

BATCH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--suffix", nargs="+", choices=["png", "jpg"], default=["png", "jpg"])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--images", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the JSON object here too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result, rows = {"machine": machine(), "images": options.images, "cases": {}}, []
    for size in options.sizes:
        for suffix in options.suffix:
            with tempfile.TemporaryDirectory() as folder:
                write(Path(folder), size, suffix, options.images)
                for workers in options.workers:
                    name = f"{size}px {suffix} {workers} workers"
                    case = result["cases"][name] = measure(Path(folder), size, workers, options.rounds)
                    rates = [case["images_per_s"][side]["median"] for side in ("shards", "folder", "limit")]
                    rows.append([name, *rates, case["to_folder"], case["to_limit"]])
    print(table(["case", "shards/s", "folder/s", "limit/s", "/folder", "/limit"], rows))
    publish(result, options.out)


def write(root: Path, size: int, suffix: str, number: int) -> None:
    """`number` random patches under root/files/0, and root/shards of the same files."""
    photos, rng = load_sample_images().images, np.random.default_rng(0)
    (root / "files" / "0").mkdir(parents=True)
    for i in range(number):
        photo = photos[i % 2]
        top, left = (int(rng.integers(side - size + 1)) for side in photo.shape[:2])
        data = encode(photo[top : top + size, left : left + size], suffix)
        (root / "files" / "0" / f"{i:06d}.{suffix}").write_bytes(data)
    write_shards(open_source(f"folder:{root / 'files'}"), root / "shards", samples_per_shard=4096, progress=False)


def measure(root: Path, size: int, workers: int, rounds: int) -> dict:
    sides = {"shards": from_shards(root, size, workers), "folder": from_folder(root, workers)}
    files = sorted((root / "files" / "0").iterdir())
    with Decoders([file.read_bytes() for file in files], max(workers, 1)) as limit:
        rates = alternate(sides | {"limit": limit}, rounds)

    def ratio(other: str) -> float:
        return round(median(ratios(rates["shards"], rates[other])), 3)

    return {
        "images_per_s": {name: spread(values, 0) for name, values in rates.items()},
        "to_folder": ratio("folder"),
        "to_limit": ratio("limit"),
    }


def rate(batches, number: int) -> float:
    """Images a second of `number` batches, after the first: workers have started by then."""
    next(batches)
    start = time.perf_counter()
    for _ in islice(batches, number):
        pass
    return BATCH * number / (time.perf_counter() - start)


def from_shards(root: Path, size: int, workers: int):
    manifest = load_manifest(root / "shards")

    def run() -> float:
        reader = ShardReader(manifest, (3, size, size), seed=0, num_streams=4, streams=[0, 1, 2, 3],
                             per_stream=BATCH // 4, window=512, workers=workers)  # fmt: skip
        found = rate((batch.images for batch in reader), sum(s.samples for s in manifest.shards) // BATCH - 2)
        reader.close()
        return found

    return run


def from_folder(root: Path, workers: int):
    dataset = ImageFolder(root / "files", transform=pil_to_tensor)

    def run() -> float:
        context = worker_context() if workers else None
        loader = DataLoader(dataset, BATCH, shuffle=True, num_workers=workers, multiprocessing_context=context)
        return rate((images for images, _ in loader), len(dataset) // BATCH - 2)

    return run


class Decoders:
    """`workers` processes that decode their share of `files` over and over; a call gives their images a second."""

    def __init__(self, files: list[bytes], workers: int):
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for i in range(workers):
            ours, theirs = context.Pipe()
            self.processes.append(context.Process(target=decode_all, args=(theirs, files[i::workers]), daemon=True))
            self.processes[-1].start()
            self.pipes.append(ours)
        self.number = len(files)

    def __call__(self) -> float:
        for pipe in self.pipes:
            pipe.send(True)
        return self.number / max(pipe.recv() for pipe in self.pipes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(False)
            process.join()


def decode_all(pipe, files: list[bytes]) -> None:
    init_worker()
    while pipe.recv():
        start = time.perf_counter()
        for data in files:
            decode(data, read_header(data))
        pipe.send(time.perf_counter() - start)


if __name__ == "__main__":
    main()
