"""The scale at which a network sees a picture, and the picture at that scale, read piece by piece."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.warp import transform

from penumbra.models.card import Card
from penumbra.models.errors import BadOption
from penumbra.serving.engine.kernels import FloatArray
from penumbra.serving.engine.layout import PIXELS, Place, fit_points
from penumbra.serving.engine.options import LEAST_SCALE, MOST_SCALE
from penumbra.serving.engine.raster import RASTER_FAULTS, Raster

FAR = 1.25
"""Times larger or smaller than the card's scale from which on a picture is run at the card's."""
CARD = "card"
"""The option that asks for the card's scale, however near the picture's is."""
AT_ONCE = 2**22
"""Pixels of an image that are held as floats while it is resized."""
BELOW_HALF = 0.499
"""Added before a value is rounded down: halves, which are many, go one way whatever the last digit of their sum."""
GEOCENTRIC = "EPSG:4978"
"""The system of metres from the centre of the Earth along three axes (WGS 84)."""


def find_scale(
    card: Card, option: float | str | None, height: int, width: int, place: Place | None
) -> tuple[float, tuple[str, ...]]:
    """Find how many of the network's pixels an image's pixel becomes, and what the caller should know of that.

    option: what the caller asks for. Raises BadOption, also where the card's scale is farther off than one may ask for.
    """
    rule = card.input.resolution
    if option is not None and option != CARD:
        return float(option), ()
    if rule.kind == "none":
        if option == CARD:
            raise BadOption(
                f"scale is {CARD!r}, and the card of {card.name} names none; give a factor, or leave scale out"
            )
        return 1.0, ()
    if rule.kind == "frame":
        learned, factor = f"{card.name} learned from frames of {rule.value:g} px", rule.value / min(height, width)
    else:
        metres = metres_of(place, height, width)
        learned, factor = f"{card.name} learned from pixels of {rule.value:g} m", metres / rule.value
    if not factor:
        return 1.0, (f"{learned}, and the image does not say how large its own are; give scale",)
    if not LEAST_SCALE <= factor <= MOST_SCALE:
        raise BadOption(
            f"{learned}, so this image of {width}x{height} px would be run at {factor:.3g} times its size, and "
            f"{LEAST_SCALE:g} to {MOST_SCALE:g} is possible; give scale, for example 1"
        )
    if option == CARD:
        return factor, ()
    if 1 / FAR <= factor <= FAR:
        return 1.0, ()
    return factor, (f"{learned}, so the image was run at {factor:.3g} times its size",)


def metres_of(place: Place | None, height: int, width: int) -> float:
    """Measure a pixel at an image's centre on the ground: the side of a square as large; 0 where it has no place."""
    if place is None or place.crs is None:
        return 0.0
    at = fit_points(place)[0] if place.transform == PIXELS else place.transform
    if not at:
        return 0.0
    row, column = height / 2, width / 2
    corners = [at * (column + x, row + y) for x, y in ((0, 0), (1, 0), (0, 1))]
    try:
        corners_33 = np.transpose(transform(place.crs, GEOCENTRIC, *zip(*corners, strict=True), [0.0] * len(corners)))
    except RASTER_FAULTS:  # a system of the file's own, or a place beyond the system
        return 0.0
    area_m2 = np.linalg.norm(np.cross(*(corners_33[1:] - corners_33[0])))
    return math.sqrt(area_m2) if np.isfinite(area_m2) else 0.0


class ScaledRaster(Raster):
    """An image at another size, by a triangle as wide as a pixel of the smaller of the two (bilinear, antialiased).

    Any part of it has the same pixels as the whole. It is void nowhere: that is said of the image itself.
    """

    def __init__(self, image: Raster, size: tuple[int, int]) -> None:
        self._image = image
        self.shape, self.dtype = (*size, image.shape[2]), image.dtype
        self._void_HW = None

    def __getitem__(self, part: tuple[slice, slice]) -> NDArray[Any]:
        rows, columns = (range(*one.indices(length)) for one, length in zip(part, self.shape, strict=False))
        num_read = len(rows) * len(columns) * math.prod(self._image.shape) / math.prod(self.shape)
        if num_read > AT_ONCE and len(rows) > 1:
            ends = rows.start, rows[len(rows) // 2], rows.stop
            return np.concatenate([self[slice(*pair), part[1]] for pair in pairwise(ends)])
        if num_read > AT_ONCE and len(columns) > 1:
            ends = columns.start, columns[len(columns) // 2], columns.stop
            return np.concatenate([self[part[0], slice(*pair)] for pair in pairwise(ends)], axis=1)
        (rows_nT, weights_y), (columns_nT, weights_x) = (self._taps(axis, part[axis]) for axis in (0, 1))
        top, left = rows_nT.min(), columns_nT.min()
        pixels = self._image[top : rows_nT.max() + 1, left : columns_nT.max() + 1].astype(np.float32)
        tall = _filter(pixels, rows_nT - top, weights_y)
        values_hwC = _filter(tall.swapaxes(0, 1), columns_nT - left, weights_x).swapaxes(0, 1)
        rounded = values_hwC if self.dtype.kind == "f" else np.floor(values_hwC + BELOW_HALF)
        return np.ascontiguousarray(rounded, self.dtype)

    def _taps(self, axis: int, part: slice) -> tuple[NDArray[np.int64], FloatArray]:
        """Find of which of the image's pixels each of a part is made, and with what weights: both [pixels, taps]."""
        length, step = self._image.shape[axis], self._image.shape[axis] / self.shape[axis]
        centre_n1 = (np.arange(*part.indices(self.shape[axis]))[:, None] + 0.5) * step
        reach = max(step, 1.0)
        at_nT = np.floor(centre_n1 - reach).astype(np.int64) + np.arange(math.ceil(2 * reach) + 1)
        weight_nT = np.maximum(0, 1 - np.abs(at_nT + 0.5 - centre_n1) / reach) * ((at_nT >= 0) & (at_nT < length))
        return at_nT.clip(0, length - 1), (weight_nT / weight_nT.sum(1, keepdims=True)).astype(np.float32)


def _filter(values: FloatArray, taps_nT: NDArray[np.int64], weight_nT: FloatArray) -> FloatArray:
    """Add up weighted rows, tap by tap: the same sums whatever part is read."""
    filtered = np.zeros((len(taps_nT), *values.shape[1:]), np.float32)
    for taps_n, weight_n in zip(taps_nT.T, weight_nT.T, strict=True):
        filtered += weight_n[:, None, None] * values[taps_n]
    return filtered


def at_size(image: Raster, size: tuple[int, int]) -> Raster:
    """Give the image at another size, or itself where it has that."""
    return image if image.shape[:2] == size else ScaledRaster(image, size)


def at_card_scale(image: Raster, card: Card) -> Raster:
    """Give the image at the size at which it is run where no scale is asked for."""
    height, width = image.shape[:2]
    factor, _ = find_scale(card, None, height, width, image.place)
    return at_size(image, size_at(factor, height, width))


def size_at(factor: float, height: int, width: int) -> tuple[int, int]:
    """Give the size of an image that is so many times as large: a pixel at least."""
    return max(1, round(factor * height)), max(1, round(factor * width))
