"""Dequantisation and augmentation, against what they must be in closed form."""

import pytest
import torch

from ebm.inference.images import add_noise, augment, dequantize
from ebm.streams import StreamGenerators


def generators(streams, step=1):
    return StreamGenerators(0, streams)("test", step)


def images(n=4, shape=(3, 6, 5)):
    return torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "change",
    [
        dequantize,
        lambda x, gens: augment(x, gens, flip=True, crop=2),
        lambda x, gens: add_noise(x.float(), 0.1, gens),
    ],
)
def test_a_stream_depends_on_its_own_generator_alone(change):
    x = images(12)
    together = change(x, generators([0, 1, 2]))
    alone = change(x[4:8], generators([1]))
    assert torch.equal(together[4:8], alone)
    assert not torch.equal(change(x[4:8], generators([1], step=2)), alone)


def test_dequantize_stays_in_its_bin_and_fills_it():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(400, 1, 16, 16).contiguous()
    y = dequantize(x, generators([0]))
    low = x.float() / 128 - 1
    assert y.dtype == torch.float32 and y.min() >= -1 and y.max() <= 1
    inside = (y - low) * 128
    assert inside.min() >= 0 and inside.max() <= 1 and abs(inside.mean() - 0.5) < 0.005
    assert abs(inside.var() - 1 / 12) < 0.002


def test_dequantize_without_noise():
    y = dequantize(torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1), None)
    torch.testing.assert_close(y.flatten(), torch.tensor([-1.0, 1.0, -0.6]))


def test_nothing_asked_changes_nothing():
    assert torch.equal(augment(images(), generators([0]), flip=False, crop=0), images())


def test_half_of_the_images_are_mirrored():
    x = torch.arange(4.0).view(1, 1, 1, 4).expand(4000, 1, 2, 4)
    y = augment(x, generators([0]), flip=True, crop=0)
    mirrored = (y == x.flip(-1)).flatten(1).all(1)
    assert torch.equal(mirrored, ~(y == x).flatten(1).all(1))
    assert 0.46 < mirrored.float().mean() < 0.54


def test_shifts_are_uniform_and_repeat_the_edges():
    size, crop, n = 9, 2, 5000
    grid = torch.arange(float(size * size)).view(1, 1, size, size)
    y = augment(grid.expand(n, 1, size, size), generators([0]), flip=False, crop=crop)
    padded = torch.nn.functional.pad(grid, (crop,) * 4, mode="replicate")[0, 0]
    windows = padded.unfold(0, size, 1).unfold(1, size, 1).reshape(-1, size * size)  # 25 shifts
    which = (y.flatten(1)[:, None] == windows).all(-1)
    assert torch.equal(which.sum(1), torch.ones(n, dtype=torch.int64))
    assert (which.float().mean(0) * 25 - 1).abs().max() < 0.35


def test_flip_does_not_change_the_shifts():
    x = images(64).float()
    flipped = augment(x, generators([0]), flip=True, crop=3)
    plain, mirrored = (augment(image, generators([0]), flip=False, crop=3) for image in (x, x.flip(-1)))
    same = (plain == flipped).flatten(1).all(1) | (mirrored == flipped).flatten(1).all(1)
    assert same.all()


def test_noise_has_its_standard_deviation():
    x = torch.zeros(100, 1, 10, 10)
    assert abs(add_noise(x, 0.3, generators([0])).std() - 0.3) < 0.01
