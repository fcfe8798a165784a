"""Pictures whose right answer is known without asking the server, and the checks of an answer."""

import io
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIZES = {"small": (96, 128), "medium": (512, 512), "large": (1080, 1920)}
"""Height and width in px."""


class WrongAnswer(Exception):
    """The server answered 200, and the answer is not right."""


@dataclass(frozen=True, slots=True)
class Picture:
    pixels_HW3: NDArray[np.uint8]
    png: bytes

    @property
    def brightest_HW(self) -> NDArray[np.uint8]:
        """The brightest channel: the label of the toy model `pointwise`, and of its like."""
        return self.pixels_HW3.argmax(2).astype(np.uint8)


@cache
def picture(size: str, seed: int) -> Picture:
    """A picture of a named size, the same for the same seed: flat tiles with grain, no two channels equal."""
    height, width = SIZES[size]
    rng = np.random.Generator(np.random.PCG64(seed))
    tiles = rng.integers(0, 200, (-(-height // 16), -(-width // 16), 3), dtype=np.uint8)
    pixels = np.repeat(np.repeat(tiles, 16, 0), 16, 1)[:height, :width] + rng.integers(0, 30, (height, width, 1))
    pixels = pixels.astype(np.uint8)
    pixels[..., 1] |= 1  # no ties: green is odd, red and blue are even
    pixels[..., 0] &= 254
    pixels[..., 2] &= 254
    pixels[..., 2][pixels[..., 2] == pixels[..., 0]] ^= 2
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return Picture(pixels, file.getvalue())


def check(labels_HW: NDArray[np.uint8], asked: Picture, *, exact: bool) -> None:
    """exact: labels must be the brightest channels; else of the picture's size alone. Raises WrongAnswer."""
    if labels_HW.shape != asked.pixels_HW3.shape[:2]:
        raise WrongAnswer(f"labels are {labels_HW.shape} for a picture of {asked.pixels_HW3.shape[:2]}")
    if exact and (wrong := int((labels_HW != asked.brightest_HW).sum())):
        raise WrongAnswer(f"{wrong} of {labels_HW.size} labels are not the brightest channel")
