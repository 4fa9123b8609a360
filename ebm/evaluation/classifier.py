"""The ruler: a small classifier of the run's labelled training images, whose features the Fréchet distance is in.

The same for every run on the same shards: its architecture, schedule and seed are fixed here and no config key
reaches it. It computes on the host, so that a GPU changes neither it nor the numbers it gives.
"""

import math

import torch
from torch import Tensor, nn

from ebm.inference.images import from_levels
from ebm.streams import derive_seed, generator

FEATURES = 64
STEPS, BATCH = 400, 64
PEAK_LR, WEIGHT_DECAY = 5e-3, 1e-2
NOISE = 0.5  # images in [-1, 1] are trained on with noise of a standard deviation up to this
BLOCK = 512


class Classifier(nn.Module):
    """Two convolutions, a 4x4 pooled map, a layer of 64 features, a linear layer; for images of 8x8 up to 64x64."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, FEATURES),
            nn.SiLU(),
        )
        self.head = nn.Linear(FEATURES, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) in [-1, 1]."""
        return self.head(self.body(x))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The last hidden layer, (N, 64) float32, of uint8 images (N, C, H, W)."""
        return torch.cat([self.body(from_levels(block)) for block in images.split(BLOCK)])

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """The most probable class, (N,) int64, of uint8 images (N, C, H, W)."""
        return self.head(self.features(images)).argmax(1)


def train_classifier(images: Tensor, labels: Tensor, seed: int = 0) -> Classifier:
    """A `Classifier` of uint8 images (N, C, H, W) with labels (N,) from 0 up; a function of these and `seed` alone."""
    classes = int(labels.max()) + 1
    if labels.min() < 0 or classes < 2:
        raise ValueError(f"labels from {int(labels.min())} to {classes - 1}: a classifier needs 0, 1, ...")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "classifier/init"))
        network = Classifier(images.shape[1], classes)
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / STEPS)) / 2)
    draws = generator(seed, "classifier/draws")
    with torch.enable_grad():
        for _ in range(STEPS):
            chosen = torch.randint(len(images), (BATCH,), generator=draws)
            x = _noisy(from_levels(images[chosen]), draws)
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    return network.eval().requires_grad_(False)


def _noisy(x: Tensor, draws: torch.Generator) -> Tensor:
    """`x` with Gaussian noise, a strength an image, so that features tell shapes apart rather than traces of noise."""
    strength = NOISE * torch.rand(len(x), 1, 1, 1, generator=draws)
    return x + strength * torch.randn(x.shape, generator=draws)
