"""The ruler: a small classifier of the run's labelled training images, whose features the Fréchet distance is in.

The same for every run on the same data: its architecture, schedule and seed are fixed here and no config key reaches
it. It computes in float32 on the host, so that a GPU changes neither it nor the numbers it gives; the number of threads
may change its last bits, so it is kept in a file, by a hash of its data.
"""

import hashlib
import logging
import math
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ebm.inference.images import from_levels
from ebm.runtime.files import replace
from ebm.streams import derive_seed, generator

log = logging.getLogger(__name__)

VERSION = 2  # of the architecture and its training: other versions measure other distances
FEATURES = 64
WIDTHS = (32, 64, 128)
SMALLEST = 8  # pixels a side below which nothing is pooled
EPOCHS, MIN_SEEN, MAX_SEEN, BATCH = 8, 25_000, 500_000, 128
PEAK_LR, WEIGHT_DECAY, WARMUP = 4e-3, 1e-2, 0.1
NOISE = 0.3  # half of the images in [-1, 1] are trained on with noise of a standard deviation up to this
BLOCK = 512


class Classifier(nn.Module):
    """Three convolutions, each with batch normalisation and, down to 8 pixels, pooling; a 4x4 pooled map, a layer of
    64 features, a linear layer. For images of any size; those above 32 pixels are first pooled to at most that."""

    def __init__(self, channels: int, num_classes: int, size: int = 28):
        super().__init__()
        first = -(-size // 32)
        layers: list[nn.Module] = [nn.AvgPool2d(first)] if first > 1 else []
        size //= first
        for width in WIDTHS:
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.SiLU()]
            channels = width
            if size > SMALLEST:
                layers.append(nn.AvgPool2d(2))
                size //= 2
        layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(channels * 16, FEATURES), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) in [-1, 1]."""
        logits: Tensor = self.head(self.body(x))
        return logits

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The last hidden layer, (N, 64) float32, of uint8 images (N, C, H, W)."""
        blocks = range(0, len(images), BLOCK)
        return torch.cat([self.body(_channels_last(from_levels(images[i : i + BLOCK]))) for i in blocks])

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """The most probable class, (N,) int64, of uint8 images (N, C, H, W)."""
        classes: Tensor = self.head(self.features(images)).argmax(1)
        return classes

    @property
    def identity(self) -> str:
        """12 hexadecimal digits of the sha256 of the weights: distances by another ruler can't be compared."""
        digest = hashlib.sha256()
        for name, tensor in self.state_dict().items():
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]


def train_classifier(images: Tensor, labels: Tensor, seed: int = 0) -> Classifier:
    """A `Classifier` of uint8 images (N, C, H, W) with labels (N,) from 0 up; a function of these and `seed` alone."""
    if labels.min() < 0 or labels.max() < 1:
        raise ValueError(f"labels from {int(labels.min())} to {int(labels.max())}: a classifier needs 0, 1, ...")
    network = _untrained(images, labels, seed)
    steps = min(max(EPOCHS * len(images), MIN_SEEN), MAX_SEEN) // BATCH
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / (WARMUP * steps)) * (1 + math.cos(math.pi * step / steps)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    draws = generator(seed, "classifier/draws")
    order = torch.empty(0, dtype=torch.int64)
    with torch.enable_grad():
        for _ in range(steps):
            while len(order) < BATCH:
                order = torch.cat([order, torch.randperm(len(images), generator=draws)])
            chosen, order = order[:BATCH], order[BATCH:]
            x = _channels_last(_noisy(from_levels(images[chosen]), draws))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(x), labels[chosen])
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    return network.eval().requires_grad_(False)


def _untrained(images: Tensor, labels: Tensor, seed: int = 0) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "classifier/init"))
        network = Classifier(images.shape[1], int(labels.max()) + 1, min(images.shape[2:]))
    return network.to(memory_format=torch.channels_last)


def _noisy(x: Tensor, draws: torch.Generator) -> Tensor:
    """`x`, half of it with Gaussian noise, a strength an image, so that features tell shapes apart rather than traces
    of noise."""
    u = torch.rand(2, len(x), 1, 1, 1, generator=draws)
    return x + NOISE * u[0] * (u[1] < 0.5) * torch.randn(x.shape, generator=draws)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def ruler_of(images: Tensor, labels: Tensor, directory: Path | None, beside: Path | None = None) -> Classifier:
    """`train_classifier`, or what it gave before for the same data: from `beside`, the directory of the shards, or from
    `directory`, where it is kept (None: it is not). A file that can't be used is trained anew, and said."""
    name = f"ruler-{_digest(images, labels)}.safetensors"
    for place in (beside, directory):
        if place is not None and (place / name).is_file():
            network = _untrained(images, labels)
            try:
                network.load_state_dict(load_file(place / name))
                return network.eval().requires_grad_(False)
            except (OSError, SafetensorError, RuntimeError) as error:
                log.warning("%s: can't be used (%s); training the ruler's classifier anew", place / name, str(error))
    log.info("training the ruler's classifier on %d images, once for this data", len(images))
    network = train_classifier(images, labels)
    if directory is not None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            replace(directory / name, save({key: t.contiguous() for key, t in network.state_dict().items()}))
        except OSError as error:  # the measurement goes on: the next one trains it again
            log.warning("the ruler's classifier can't be kept in %s (%s)", directory, error.strerror)
    return network


def default_ruler_directory() -> Path | None:
    """A directory of the user's cache; None for a user without a home."""
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    except RuntimeError:
        return None
    return Path(cache, "ebm", "rulers")


def _digest(images: Tensor, labels: Tensor) -> str:
    """Of the data and VERSION."""
    digest = hashlib.sha256(f"{VERSION} {tuple(images.shape)}".encode())
    for tensor in (images, labels):
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()[:16]
