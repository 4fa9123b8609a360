"""Pictures of samples: grids of images, points and energies on the plane, side by side."""

import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.utils import make_grid


def grid(images: Tensor, columns: int | None = None, min_pixels: int = 256) -> np.ndarray:
    """Images (N, C, H, W) in [-1, 1] as one picture, uint8 (height, width, 3), `min_pixels` pixels wide or more: about
    square, or `columns` images wide.

    The first three channels are shown as colours; where there are fewer, the first as grey.
    """
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
