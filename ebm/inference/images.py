"""Images as the network takes them, as files and measures hold them (256 levels, channels last), and as pictures:
grids, and points and energies on the plane."""

import io
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from ebm.errors import DataError
from ebm.streams import Generators, normal_, uniform_


def dequantize(images: Tensor, generators: Generators) -> Tensor:
    """uint8 (B, C, H, W) -> float32 in [-1, 1]: 2 (x + u) / 256 - 1 with u ~ U[0, 1), each level spread over its bin
    (Theis et al. 2016, section 3.1). With `generators=None`: 2 x / 255 - 1, no noise.
    """
    x = images.float()
    if generators is None:
        return x / 127.5 - 1
    return (x + uniform_(torch.empty_like(x), generators)) / 128 - 1


def augment(x: Tensor, generators: Generators, flip: bool, crop: int) -> Tensor:
    """Mirror half of the images left to right, and shift each by up to `crop` pixels, its edges repeated.

    Every image takes three numbers whatever is asked for, so that flip and crop do not change one another.
    """
    batch, channels, height, width = x.shape
    u = uniform_(torch.empty(batch, 3, device=x.device), generators)
    shift = (u[:, 1:] * (2 * crop + 1)).long().clamp(max=2 * crop) - crop
    rows = (torch.arange(height, device=x.device) + shift[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width, device=x.device) + shift[:, 1:]).clamp(0, width - 1)
    if flip:
        columns = torch.where(u[:, :1] < 0.5, width - 1 - columns, columns)
    image = torch.arange(batch, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[:, None, None]
    return x[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def strongly_augmented(x: Tensor, generators: Generators) -> Tensor:
    """Images (B, C, H, W), mirrored with probability 1/2, shifted by up to a quarter of a side, and a x + b with a
    contrast a ~ U[.5, 1.5) and a brightness b ~ U[-.25, .25) of each image."""
    x = augment(x, generators, flip=True, crop=max(min(x.shape[2:]) // 4, 1))
    contrast = uniform_(x.new_empty(len(x), 1, 1, 1), generators, 0.5, 1.5)
    brightness = uniform_(x.new_empty(len(x), 1, 1, 1), generators, -0.25, 0.25)
    return x * contrast + brightness


def add_noise(x: Tensor, std: float, generators: Generators) -> Tensor:
    """x + std N(0, 1)."""
    return x + std * normal_(torch.empty_like(x), generators)


def to_levels(x: Tensor, what: str = "images") -> Tensor:
    """Turns images (N, C, H, W) in [-1, 1] into uint8 on the host, each value into the number of its bin of 256, one
    outside into the nearest. Raises DataError, which calls the images `what`, where a value is not finite."""
    if not x.isfinite().all():
        bad = int((~x.isfinite()).flatten(1).any(1).sum())
        raise DataError(f"{bad} of {len(x)} {what} hold non-finite values; evaluate an earlier checkpoint of the run")
    return ((x + 1) * 128).floor().clamp(0, 255).to(torch.uint8).cpu()


def from_levels(images: Tensor) -> Tensor:
    """Turns uint8 images (N, C, H, W) into float32 in [-1, 1], each level into the middle of its bin."""
    return (images.float() + 0.5) / 128 - 1


def to_array(x: Tensor) -> np.ndarray:
    """Turns states of chains into what a file holds: images (N, C, H, W) in [-1, 1] into uint8 (N, H, W, C), as
    `to_levels` does; vectors (N, D) stay as they are. Raises DataError where a value is not finite."""
    if x.ndim == 4:
        return np.asarray(to_levels(x, "samples").permute(0, 2, 3, 1).contiguous().numpy())
    if not x.isfinite().all():
        bad = int((~x.isfinite()).any(1).sum())
        raise DataError(f"{bad} of {len(x)} samples hold non-finite values; use an earlier checkpoint of the run")
    return np.asarray(x.float().cpu().numpy())


def to_states(data: Tensor) -> Tensor:
    """Turns what a reader gives into what an energy takes: uint8 images (N, C, H, W) into float32 in [-1, 1]; vectors
    and states stay as they are."""
    return from_levels(data) if data.dtype == torch.uint8 else data


def load_array(path: str | Path, shape: tuple[int, ...]) -> np.ndarray:
    """Opens a .npy file that fits `shape`: uint8 images (N, H, W, C) for (C, H, W), (N, H, W) too where C is 1; finite
    float32 vectors (N, D) for (D,). Raises DataError."""
    try:
        array: np.ndarray = np.load(path, allow_pickle=False, mmap_mode="r")  # a header may promise terabytes
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: {error}; give a .npy file of {_expected(shape)}") from error
    if not isinstance(array, np.ndarray):  # np.load opens a .npz too
        raise DataError(f"{path}: is an archive; give a .npy file of {_expected(shape)}")
    if array.ndim == 3 and shape[0] == 1 and len(shape) == 3:
        array = array[..., None]
    dtype, tail = (np.float32, shape) if len(shape) == 1 else (np.uint8, (*shape[1:], shape[0]))
    if array.dtype != dtype or array.ndim != len(tail) + 1 or array.shape[1:] != tuple(tail):
        raise DataError(f"{path}: {array.dtype} {array.shape}, but the run's samples are {_expected(shape)}")
    if len(shape) == 1 and not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).any(1).argmax())
        raise DataError(f"{path}: vector {bad} holds a value that is not finite")
    return array


def _expected(shape: tuple[int, ...]) -> str:
    if len(shape) == 1:
        return f"float32 vectors (N, {shape[0]})"
    channels, height, width = shape
    return f"uint8 images (N, {height}, {width}, {channels})"


def grid(images: Tensor, columns: int | None = None, min_pixels: int = 256) -> np.ndarray:
    """Images (N, C, H, W) in [-1, 1] as one picture, uint8 (height, width, 3), `min_pixels` pixels wide or more: about
    square, or `columns` images wide.

    The first three channels are shown as colours; where there are fewer, the first as grey.
    """
    from torchvision.utils import make_grid  # takes a second to load: for those who draw

    images = images.detach().float().cpu()
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    columns = columns or max(1, math.ceil(math.sqrt(len(images))))
    factor = math.ceil(min_pixels / (columns * images.shape[-1]))
    images = F.interpolate(images, scale_factor=factor, mode="nearest")
    picture = make_grid(images, nrow=columns, padding=2, normalize=True, value_range=(-1, 1), pad_value=0.5)
    return np.asarray((picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def pictures(samples: dict[str, Tensor], columns: int | None = None) -> dict[str, np.ndarray]:
    """A picture of each set of samples: images (N, C, H, W) in [-1, 1] as a grid, `columns` wide; vectors (N, D) as
    points, by their first two components, all sets on one scale."""
    if all(x.ndim == 4 for x in samples.values()):
        return {name: grid(x, columns) for name, x in samples.items()}
    points = {
        n: F.pad(x.detach().float().cpu(), (0, max(0, 2 - x.shape[1])))[:, :2].numpy() for n, x in samples.items()
    }
    reach = max(float(np.quantile(np.abs(xy), 0.999)) for xy in points.values())
    return {name: landscape({"": (None, xy)}, max(1.0, reach)) for name, xy in points.items()}


def to_png(picture: np.ndarray) -> bytes:
    """A picture, uint8 (height, width, 3), as the content of a .png file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="png")
    return file.getvalue()


def side_by_side(pictures: dict[str, np.ndarray], gap: int = 8, title: int = 16) -> Image.Image:
    """Pictures in a row, their titles above."""
    width = sum(p.shape[1] for p in pictures.values()) + gap * (len(pictures) + 1)
    height = max(p.shape[0] for p in pictures.values()) + title + 2 * gap
    sheet = Image.new("RGB", (width, height), "white")
    draw, left = ImageDraw.Draw(sheet), gap
    for name, picture in pictures.items():
        draw.text((left, gap // 2), name, fill="black")
        sheet.paste(Image.fromarray(picture), (left, gap + title))
        left += picture.shape[1] + gap
    return sheet


def landscape(panels: dict[str, tuple[np.ndarray | None, np.ndarray | None]], half_width: float) -> np.ndarray:
    """Energies and points of the plane side by side, uint8 (height, width, 3).

    By title: (energies (R, R) on the square of `half_width`, rows from low y to high y, or None; points (N, 2) or
    None). All panels share one colour scale, measured from each one's lowest energy.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # loads for runs on the plane alone
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(panels), 4.3), dpi=100, layout="constrained")
    canvas, extent = FigureCanvasAgg(figure), (-half_width, half_width, -half_width, half_width)
    for axes, (title, (energies, points)) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(),
                                                 strict=True):  # fmt: skip
        if energies is not None:
            axes.imshow(energies - energies.min(), origin="lower", extent=extent, cmap="viridis_r", vmin=0, vmax=6)
        if points is not None:
            axes.scatter(*points.T, s=2, alpha=0.5, linewidths=0, color="white" if energies is not None else "black")
        axes.set(title=title, xlim=extent[:2], ylim=extent[2:], aspect="equal")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
