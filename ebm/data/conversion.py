"""What is done to the images of a source before they are written."""

from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageColor

from ebm.data.decode import encode, to_array, to_pillow, to_uint8
from ebm.data.items import Item
from ebm.errors import ConfigError

TWELVE_BITS = 1 << 12


@dataclass(frozen=True)
class Conversion:
    """How images are changed, in this order.

    `levels`: values of 16-bit images that become 0 and 255 (default: 0 and 65,535). `background`: a colour put under
    transparent images. `mode`: L or RGB. `size`: shorter side resized to it, then the centre square. `format`: None
    keeps PNG and JPEG files as they are where nothing else changes them, and writes PNG otherwise.
    """

    size: int | None = None
    mode: Literal["L", "RGB"] | None = None
    format: Literal["png", "jpg"] | None = None
    levels: tuple[int, int] | None = None
    background: str | None = None

    def options(self) -> dict[str, str | int | float]:
        """The settings that are not the default, for the manifest."""
        changed = {name: value for name, value in asdict(self).items() if value is not None}
        return {n: f"{v[0]},{v[1]}" if isinstance(v, tuple) else v for n, v in changed.items()}

    def image(self, image: np.ndarray) -> np.ndarray:
        """uint8 (H, W, C) of a uint8 or uint16 image. Raises ValueError where transparency has no background."""
        image = self._eight_bits(image)
        if self.background is not None and image.shape[2] in (2, 4):
            image = _over(image, self.background)
        if self.size is None and self.mode is None:
            return image
        if self.mode is not None and image.shape[2] in (2, 4) and image[..., -1].min() < 255:
            raise ValueError("is transparent in part; give --background COLOUR (white, black, #808080)")
        picture = to_pillow(image)
        if self.mode is not None:
            picture = picture.convert(self.mode)
        if self.size is not None and picture.size != (self.size, self.size):
            picture = _centre_square(picture, self.size)
        return to_array(picture)

    def _eight_bits(self, image: np.ndarray) -> np.ndarray:
        if image.dtype != np.uint16:
            return image
        if self.levels is None:
            return to_uint8(image)
        low, high = self.levels
        return np.rint((image.astype(np.float64) - low).clip(0, high - low) * (255 / (high - low))).astype(np.uint8)

    def check(self, item: Item) -> None:
        """Raises ConfigError where the settings do not fit the first sample: settings of images for a vector, or an
        image of 16 bits that seems to use only 12, and would come out nearly black."""
        if item.array.ndim == 1 and self != Conversion():
            raise ConfigError(
                f"{item.name} is a vector of {len(item.array)} values; --size, --grayscale, --rgb and --format are for "
                "images, as --range and --background are"
            )
        if item.array.dtype == np.uint8 and self.levels is not None:
            raise ConfigError(f"{item.name} has 8 bits a value; --range is for images of 16")
        if item.array.dtype == np.uint16 and self.levels is None and item.array.max() < TWELVE_BITS:
            raise ConfigError(
                f"{item.name} has 16 bits a value, and none above {item.array.max()}: taken as it is, it is nearly "
                "black. Give --range 0,4095 for 12-bit data (LOW,HIGH become 0 and 255), or --range 0,65535 to go on"
            )

    def encoded(self, item: Item, image: np.ndarray) -> tuple[bytes, str]:
        kept = item.encoded
        if kept is not None and image is item.array and self.format in (None, kept[1]):
            return kept
        suffix = self.format or "png"
        return encode(image, suffix), suffix


def parse_levels(text: str) -> tuple[int, int]:
    """(low, high) of `LOW,HIGH`. Raises ConfigError."""
    try:
        low, high = (int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--range {text}: must be LOW,HIGH, such as 0,4095") from error
    if not 0 <= low < high <= 65535:
        raise ConfigError(f"--range {text}: must be rising, and within 0,65535")
    return low, high


def check_background(colour: str) -> None:
    """Raises ConfigError."""
    try:
        ImageColor.getcolor(colour, "RGB")
    except ValueError as error:
        raise ConfigError(f"--background {colour}: must be a colour, such as white, black or #808080") from error


def _over(image: np.ndarray, background: str) -> np.ndarray:
    """A grey or colour image with transparency, over a colour; grey stays grey only over grey."""
    red, green, blue = ImageColor.getrgb(background)[:3]
    colour = (red,) if image.shape[2] == 2 and red == green == blue else (red, green, blue)
    alpha = image[..., -1:].astype(np.float64) / 255
    return np.rint(image[..., :-1] * alpha + np.array(colour) * (1 - alpha)).astype(np.uint8)


def _centre_square(picture: Image.Image, size: int) -> Image.Image:
    """Bicubic with antialiasing, of the largest centred square."""
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
