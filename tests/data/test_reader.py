"""The reader: every sample once an epoch, whatever the ranks and workers, and resuming to the sample."""

import numpy as np
import pytest
import torch

from ebm.data import ShardReader
from ebm.data.items import ArraySource
from ebm.data.reader import read_all
from ebm.data.samples import Order
from ebm.data.shards import write_shards
from ebm.errors import DataError
from ebm.streams import owned_streams


def images_of(n: int, shape=(3, 4, 1)) -> np.ndarray:
    """Image i carries i in its first two pixels, so that images, labels and keys can be told to belong together."""
    images = np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = np.arange(n) // 256, np.arange(n) % 256
    return images


def make(path, n: int, samples_per_shard: int):
    source = ArraySource("test", images_of(n), np.arange(n) % 10)
    return write_shards(source, path, samples_per_shard=samples_per_shard, workers=1, progress=False)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """443 samples in shards of 150, 150 and 143: blocks, windows and streams all end in the middle of a shard."""
    return make(tmp_path_factory.mktemp("shards"), 443, 150)


def reader(manifest, streams, *, num_streams=4, per_stream=8, window=50, workers=0, **options) -> ShardReader:
    return ShardReader(
        manifest,
        (1, 3, 4),
        seed=3,
        num_streams=num_streams,
        streams=streams,
        per_stream=per_stream,
        window=window,
        workers=workers,
        **options,
    )


def sequences(readers: list[ShardReader], steps: int) -> dict[int, list[str]]:
    """Keys a stream, in order, over all ranks; checks that image, label and key belong together."""
    seen = {}
    for one in readers:
        for _ in range(steps):
            batch = next(one)
            assert batch.images.dtype == torch.uint8 and batch.labels.dtype == torch.int64
            assert [v for v, _ in batch.keys] == [v for v in one.streams for _ in range(one.per_stream)]
            index = torch.tensor([int(key) for _, key in batch.keys])
            first = batch.images.long()[:, 0, 0]
            assert torch.equal(first[:, 0] * 256 + first[:, 1], index)
            assert torch.equal(batch.labels, index % 10)
            for stream, key in batch.keys:
                seen.setdefault(stream, []).append(key)
    return seen


@pytest.mark.parametrize("num_streams", [4, 8])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_sample_once_an_epoch_and_the_same_on_every_world_size(shards, num_streams, world):
    steps = 3 * (443 // num_streams + 1) // 8 + 1
    ranks = [reader(shards, owned_streams(num_streams, r, world), num_streams=num_streams) for r in range(world)]
    seen = sequences(ranks, steps)
    order = ranks[0].order
    orders = []
    for epoch in range(3):
        parts = [seen[v][epoch * order.length(v) : (epoch + 1) * order.length(v)] for v in range(num_streams)]
        union = [key for part in parts for key in part]
        assert len(union) == len(set(union)) == 443
        orders.append(union)
    assert orders[0] != orders[1] != orders[2]
    one = sequences([reader(shards, list(range(num_streams)), num_streams=num_streams)], steps)
    assert seen == one


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_and_what_they_keep_do_not_change_the_sequence(shards, monkeypatch, workers):
    monkeypatch.setattr("ebm.data.samples.KEPT", 0)  # in this process
    many, none = reader(shards, [0, 1, 2, 3], workers=workers), reader(shards, [0, 1, 2, 3])
    for _ in range(60):
        a, b = next(many), next(none)
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        assert a.keys == b.keys and a.skipped == b.skipped == 0
        assert many.positions == none.positions
    many.close()


def test_resuming_after_any_batch_goes_on_exactly_there(shards):
    whole = reader(shards, [0, 1, 2, 3])
    batches, positions = [], []
    for _ in range(32):
        positions.append(dict(whole.positions))
        batches.append(next(whole))
    assert whole.epoch > 2
    for k in range(30):
        resumed = reader(shards, [0, 1, 2, 3], positions=positions[k])
        for expected in batches[k : k + 2]:
            found = next(resumed)
            assert found.keys == expected.keys and torch.equal(found.images, expected.images)


def test_resuming_on_another_world_size_with_workers(shards):
    whole = reader(shards, [0, 1, 2, 3])
    for _ in range(11):
        next(whole)
    halves = [reader(shards, [r, r + 2], positions=whole.positions, workers=r) for r in (0, 1)]
    expected = sequences([whole], 9)
    assert sequences(halves, 9) == expected
    halves[1].close()


@pytest.mark.parametrize(
    ("n", "num_streams", "per_stream", "window"), [(1437, 4, 32, 512), (101, 8, 16, 7), (9, 8, 5, 64)]
)
def test_uneven_sizes(tmp_path, n, num_streams, per_stream, window):
    manifest = make(tmp_path, n, max(1, n // 3))
    one = reader(manifest, list(range(num_streams)), num_streams=num_streams, per_stream=per_stream, window=window)
    seen = sequences([one], 2 * n // (num_streams * per_stream) + 2)
    first = [key for v in range(num_streams) for key in seen[v][: one.order.length(v)]]
    assert sorted(first) == [f"{i:06d}" for i in range(n)]


def test_order_depends_on_the_seed_and_shuffles():
    def first_window(seed):
        order = Order([100, 100, 100], seed=seed, num_streams=1, window=100)
        return order.segments(order.window(0, 0)), order.ranks(order.window(0, 0))

    assert first_window(0) == first_window(0) != first_window(1)
    assert first_window(0)[1] != list(range(100)) and sorted(first_window(0)[1]) == list(range(100))


def test_windows_tile_every_epoch():
    order = Order([64, 65, 63, 11], seed=0, num_streams=3, window=10)
    for stream in range(3):
        position, sizes = 0, []
        while position < 2 * order.length(stream):
            window = order.window(stream, position)
            assert window.first == 0 and window.start < window.stop <= order.length(stream)
            assert order.window(stream, order.end(window) - 1)[:5] == window[:5]
            assert sum(hi - lo for _, lo, hi in order.segments(window)) == window.stop - window.start <= 10
            position = order.end(window)
            sizes.append(window.stop - window.start)
        assert position == 2 * order.length(stream) == sum(sizes)


def test_fewer_samples_than_streams(tmp_path):
    with pytest.raises(DataError, match=r"3 samples, fewer than data.streams=4"):
        reader(make(tmp_path, 3, 3), [0, 1, 2, 3])


def test_a_small_set_is_decoded_once_and_a_large_one_read_again(tmp_path, monkeypatch):
    for kept, error in ((1 << 20, None), (1 << 10, "changed since the manifest was made")):
        monkeypatch.setattr("ebm.data.samples.KEPT", kept)
        manifest = make(tmp_path / str(kept), 80, 80)
        one = reader(manifest, [0, 1, 2, 3])
        while one.epoch < 1:
            next(one)
        path = manifest.path(manifest.shards[0])
        path.write_bytes(bytes(path.stat().st_size))
        if error is None:
            sequences([one], 10)
        else:
            with pytest.raises(DataError, match=error):
                sequences([one], 10)


def test_the_global_generator_is_left_alone(shards):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for workers in (0, 1):
        one = reader(shards, [0, 1, 2, 3], workers=workers)
        next(one)
        one.close()
    assert torch.equal(torch.get_rng_state(), before)


def test_read_all_is_in_file_order(shards):
    blocks = list(read_all(shards.directory, (1, 3, 4), batch=100))
    assert [key for _, _, keys in blocks for key in keys] == [f"{i:06d}" for i in range(443)]
    images = torch.cat([images for images, _, _ in blocks])
    assert torch.equal(images, torch.from_numpy(images_of(443)).permute(0, 3, 1, 2))
    assert torch.equal(torch.cat([labels for _, labels, _ in blocks]), torch.arange(443) % 10)
