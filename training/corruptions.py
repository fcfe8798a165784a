"""Spoil pictures as sensors, lenses and weather do, rescale them, and paste objects that are of no class into them.

A picture is uint8 [H, W, 3] of any size, also a single crop, and stays one; nothing here knows a model. The names are
those of Hendrycks & Dietterich 2019 (but for `darken`, our own: their brightness makes lighter), the constants our own,
for pictures of about 400 px; severity 1 is seen at once, 3 leaves the scene just recognisable. All chance comes from
the generator that is given.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from penumbra.models.card import IGNORE
from penumbra.models.errors import BadOption

Picture = NDArray[np.uint8]
SEVERITIES = (1, 2, 3)
FOG_GREY = 225
TRAINING_OBJECTS = ("coffee.png", "brick.png", "gravel.png", "rocket.jpg", "stripes", "clouds")
EVALUATION_OBJECTS = ("chelsea.png", "astronaut.png", "coins.png", "hubble_deep_field.jpg", "checkerboard", "speckles")
"""What is pasted: scikit-image's photographs (public domain or CC0) by file, and textures. What evaluations paste is
never what a training has seen."""
OBJECT_SHARE = (0.12, 0.26)
"""Diameter of an object, of the picture's shorter side."""


def gaussian_noise(image_HW3: Picture, severity: int, rng: np.random.Generator) -> Picture:
    """Add normal noise, independent for every pixel and channel, as a sensor at a high gain does."""
    sigma = 255 * (0.04, 0.08, 0.14)[severity - 1]
    return _to_bytes(image_HW3 + sigma * rng.standard_normal(image_HW3.shape, np.float32))


def gaussian_blur(image_HW3: Picture, severity: int, rng: np.random.Generator) -> Picture:
    """Blur by a Gaussian, as a lens out of focus does."""
    return np.array(Image.fromarray(image_HW3).filter(ImageFilter.GaussianBlur((1, 2, 3.5)[severity - 1])))


def motion_blur(image_HW3: Picture, severity: int, rng: np.random.Generator) -> Picture:
    """Average the picture along a line of random direction."""
    length, angle = (5, 9, 15)[severity - 1], rng.uniform(0, np.pi)
    height, width = image_HW3.shape[:2]
    padded = np.pad(image_HW3, ((length, length), (length, length), (0, 0)), mode="edge")
    total_HW3 = np.zeros(image_HW3.shape, np.float32)
    for step in np.arange(length) - length // 2:
        y, x = length + round(step * np.sin(angle)), length + round(step * np.cos(angle))
        total_HW3 += padded[y : y + height, x : x + width]
    return _to_bytes(total_HW3 / length)


def fog(image_HW3: Picture, severity: int, rng: np.random.Generator) -> Picture:
    """Lay a light grey veil over the picture, whose density varies in clouds."""
    density_HW1 = (0.3, 0.5, 0.7)[severity - 1] * (0.75 + 0.5 * _clouds(image_HW3.shape[:2], rng)[..., None])
    return _to_bytes((1 - density_HW1) * image_HW3 + density_HW1 * FOG_GREY)


def darken(image_HW3: Picture, severity: int, rng: np.random.Generator) -> Picture:
    """Multiply by less than one, as less light does."""
    return _to_bytes((0.6, 0.35, 0.2)[severity - 1] * image_HW3.astype(np.float32))


def contrast(image_HW3: Picture, severity: int, rng: np.random.Generator) -> Picture:
    """Pull all values towards the mean of each channel."""
    mean_3 = image_HW3.mean((0, 1), dtype=np.float32)
    return _to_bytes(mean_3 + (0.6, 0.4, 0.2)[severity - 1] * (image_HW3 - mean_3))


def pixelate(image_HW3: Picture, severity: int, rng: np.random.Generator) -> Picture:
    """Average blocks of pixels, and show every block in one colour."""
    height, width = image_HW3.shape[:2]
    step = (2, 3, 5)[severity - 1]
    small = Image.fromarray(image_HW3).resize((-(-width // step), -(-height // step)), Image.Resampling.BOX)
    return np.array(small.resize((width, height), Image.Resampling.NEAREST))


def jpeg_compression(image_HW3: Picture, severity: int, rng: np.random.Generator) -> Picture:
    """Write the picture as a JPEG of low quality, and read it again."""
    buffer = BytesIO()
    Image.fromarray(image_HW3).save(buffer, "JPEG", quality=(25, 12, 6)[severity - 1])
    with Image.open(buffer) as spoilt:
        return np.array(spoilt)


CORRUPTIONS: dict[str, Callable[[Picture, int, np.random.Generator], Picture]] = {
    kind.__name__: kind
    for kind in (gaussian_noise, gaussian_blur, motion_blur, fog, darken, contrast, pixelate, jpeg_compression)
}


def rescale(image_HW3: Picture, label_HW: Picture, factor: float) -> tuple[Picture, Picture]:
    """Make a picture and its label larger or smaller by a factor, as another distance or another camera would."""
    size = tuple(max(1, round(factor * length)) for length in image_HW3.shape[1::-1])
    image = Image.fromarray(image_HW3).resize(size, Image.Resampling.BILINEAR)
    return np.array(image), np.array(Image.fromarray(label_HW).resize(size, Image.Resampling.NEAREST))


def paste_object(
    image_HW3: Picture, label_HW: Picture, rng: np.random.Generator, *, objects: Sequence[str] = EVALUATION_OBJECTS
) -> tuple[Picture, Picture, NDArray[np.bool_]]:
    """Paste one of the objects at a random place, round with dents: the new picture and label, and where it is.

    It is of no class, so its label is IGNORE. Raises BadOption: scikit-image, which has the photographs, is not there.
    """
    height, width = label_HW.shape
    size = min(max(4, round(rng.uniform(*OBJECT_SHARE) * min(height, width))), height, width)
    y, x = rng.integers(height - size + 1), rng.integers(width - size + 1)
    name = objects[rng.integers(len(objects))]
    inside_hw, looks_hw3 = _outline(size, rng), _looks(name, size, rng)
    object_HW = np.zeros(label_HW.shape, np.bool_)
    object_HW[y : y + size, x : x + size] = inside_hw
    pasted_HW3, void_HW = image_HW3.copy(), np.where(object_HW, np.uint8(IGNORE), label_HW)
    pasted_HW3[object_HW] = looks_hw3[inside_hw]
    return pasted_HW3, void_HW, object_HW


def _outline(size: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Draw a blob that fills most of a square: a disc whose radius swings with the angle."""
    y_hw, x_hw = np.mgrid[:size, :size] - (size - 1) / 2
    angle_hw, radius_hw = np.arctan2(y_hw, x_hw), np.full((size, size), 0.78)
    for waves in (2, 3, 5):
        radius_hw += 0.08 * np.sin(waves * angle_hw + rng.uniform(0, 2 * np.pi))
    return np.hypot(y_hw, x_hw) <= size / 2 * radius_hw


def _looks(name: str, size: int, rng: np.random.Generator) -> Picture:
    """Draw a square of one of the textures in two random colours, or cut one out of a photograph."""
    if name in TEXTURES:
        share_hw1, colors_23 = TEXTURES[name](size, rng)[..., None], 255 * rng.random((2, 3))
        return _to_bytes(share_hw1 * colors_23[0] + (1 - share_hw1) * colors_23[1])
    photograph = _read_photograph(name)
    side = rng.integers(min(photograph.size) // 3, min(photograph.size) + 1)
    x, y = (int(rng.integers(length - side + 1)) for length in photograph.size)
    return np.array(photograph.resize((size, size), Image.Resampling.BILINEAR, (x, y, x + side, y + side)))


@cache
def _read_photograph(name: str) -> Image.Image:
    """Read one of the pictures that lie in scikit-image's package. Raises BadOption: it is not installed."""
    found = find_spec("skimage")
    if found is None or found.origin is None:
        raise BadOption("pasted objects are cut from scikit-image's photographs; install penumbra-serving[training]")
    with Image.open(Path(found.origin).parent / "data" / name) as picture:
        return picture.convert("RGB")


def _stripes(size: int, rng: np.random.Generator) -> NDArray[np.floating]:
    y_hw, x_hw = np.mgrid[:size, :size]
    angle = rng.uniform(0, np.pi)
    return 0.5 + 0.5 * np.sin(2 * np.pi / rng.uniform(4, 14) * (y_hw * np.sin(angle) + x_hw * np.cos(angle)))


def _checkerboard(size: int, rng: np.random.Generator) -> NDArray[np.floating]:
    y_hw, x_hw = np.mgrid[:size, :size] // rng.integers(4, 11)
    return ((y_hw + x_hw) % 2).astype(np.float32)


def _speckles(size: int, rng: np.random.Generator) -> NDArray[np.floating]:
    return rng.random((size, size), np.float32)


def _clouds(shape: int | tuple[int, ...], rng: np.random.Generator) -> NDArray[np.floating]:
    """Draw smooth noise, 0 to 1: random grids of 2 to 16 cells, finer ones weaker, smoothly interpolated."""
    height, width = (shape, shape) if isinstance(shape, int) else shape
    clouds_hw = np.zeros((height, width), np.float32)
    for cells in (2, 4, 8, 16):
        grid = Image.fromarray(rng.random((cells, cells), np.float32))
        clouds_hw += np.array(grid.resize((width, height), Image.Resampling.BICUBIC)) / cells
    return (clouds_hw - clouds_hw.min()) / max(float(np.ptp(clouds_hw)), 1e-6)


TEXTURES = {"stripes": _stripes, "checkerboard": _checkerboard, "speckles": _speckles, "clouds": _clouds}
"""Functions of a size and a generator to the share of the first of two colours at every pixel."""


def _to_bytes(values_HW3: NDArray[np.floating]) -> Picture:
    return np.rint(values_HW3.clip(0, 255)).astype(np.uint8)
