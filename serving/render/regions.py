"""Connected regions of one class as polygons, in GeoJSON or a GeoPackage, with each region's size and mean uncertainty.

A region's outline runs along pixel borders, so it holds exactly the region's pixels. Coordinates are longitude and
latitude (RFC 7946) where the image is a raster that has a place on the ground, else columns and rows of pixels.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from rasterio.features import shapes

from penumbra.models.card import IGNORE
from penumbra.models.errors import TooLarge
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.raster import gdal
from penumbra.serving.render.ground import Ground, Unplaced
from penumbra.serving.render.meridian import shoelace
from penumbra.serving.render.pictures import blocks
from penumbra.serving.render.tables import means_of

MAX_EDGES = 1_000_000
"""Pixel borders between classes: all outlines together. More is noise, a document that nobody opens, and
seconds in which GDAL, which finds the outlines, lets no other thread run."""


@dataclass(frozen=True, slots=True)
class Regions:
    """What a format of regions writes: GeoJSON geometries, their properties by name, and the answer's facts.

    is_placed: whether coordinates are longitude and latitude. note: what to know of that, or empty.
    """

    geometries: list[dict[str, Any]]
    properties: list[dict[str, Any]]
    facts: dict[str, Any]
    is_placed: bool
    note: str


def find_regions(prediction: Prediction, *, min_pixels: int) -> Regions:
    """Find the regions of at least `min_pixels`. Raises TooLarge for labels that are noise."""
    labels_HW = prediction.labels_HW[:]
    _check_edges(labels_HW)
    with gdal():
        found = [
            (outline, int(label))
            for outline, label in shapes(labels_HW, mask=labels_HW != IGNORE, connectivity=4)
            if _area(outline) >= min_pixels
        ]
    outlines = [outline for outline, _ in found]
    ground: Ground | None = None
    try:
        ground = Ground(prediction.image)
        geometries, note = list(ground.to_degrees(outlines)), ground.note
    except Unplaced as why:
        ground, geometries, note = None, outlines, f"{why}, so coordinates are pixels" if str(why) else ""
    classes, measured = prediction.card.classes, _measure(prediction, outlines, ground)
    properties = [
        {"id": label, "class": classes[label].name} | measures
        for (_, label), measures in zip(found, measured, strict=True)
    ]
    facts = prediction.facts
    facts["warnings"] += [note] if note else []
    return Regions(geometries, properties, facts, ground is not None, note)


def write_geojson(prediction: Prediction, file: BinaryIO, *, min_pixels: int) -> str:
    """Write a FeatureCollection of the regions of at least `min_pixels`; returns what to know of their place, if any.

    Raises TooLarge for labels that are noise.
    """
    regions = find_regions(prediction, min_pixels=min_pixels)
    features = [
        {"type": "Feature", "geometry": geometry, "properties": properties}
        for geometry, properties in zip(regions.geometries, regions.properties, strict=True)
    ]
    coordinates = "WGS84" if regions.is_placed else "pixels"
    document = {"type": "FeatureCollection", "features": features, "coordinates": coordinates}
    file.write(json.dumps(document | {"penumbra": regions.facts}, allow_nan=False).encode())
    return regions.note


def _check_edges(labels_HW: NDArray[np.uint8]) -> None:
    edges = sum(
        np.count_nonzero(np.diff(labels_HW[rows], axis=0)) + np.count_nonzero(np.diff(labels_HW[rows], axis=1))
        for rows in blocks(len(labels_HW))
    )
    if edges > MAX_EDGES:
        raise TooLarge(
            f"the regions have {edges:,} pixel borders between them and the limit for polygons is {MAX_EDGES:,}; ask "
            "for image/png or application/json, or send parts of the image"
        )


def _area(outline: dict[str, Any]) -> int:
    """Count the pixels within an outline in pixel coordinates, its holes taken off (shoelace formula)."""
    outer, *holes = (abs(shoelace(np.array(ring))) for ring in outline["coordinates"])
    return round(outer - sum(holes))


def _measure(
    prediction: Prediction, outlines: list[dict[str, Any]], ground: Ground | None
) -> Iterator[dict[str, float]]:
    """Measure per outline its pixels, square metres where there is a ground, the expected error, and the mean of every
    map: in each block of rows every pixel is numbered by the outline that it is in."""
    height, width = prediction.labels_HW.shape
    count = len(outlines) + 1
    pixels = np.zeros(count, np.int64)
    areas_m2, sums = np.zeros(count), {name: np.zeros(count) for name in prediction.maps}
    sides_4N = _sides(outlines)
    for rows in blocks(height) if outlines else ():
        numbers = _number(sides_4N, rows, width).ravel()
        pixels += np.bincount(numbers, minlength=count)
        if ground:
            areas_m2 += np.bincount(numbers, ground.areas(rows).ravel(), count)
        for name, total in sums.items():
            total += np.bincount(numbers, prediction.maps[name][rows].ravel(), count)
    for number in range(1, count):
        num = max(int(pixels[number]), 1)
        placed = {"area_m2": float(areas_m2[number])} if ground else {}
        means = means_of({name: float(total[number] / num) for name, total in sums.items()})
        yield {"pixels": int(pixels[number]), **placed, **means}


def _sides(outlines: list[dict[str, Any]]) -> NDArray[np.int32]:
    """List the vertical sides of all outlines, holes included, from the left: their column, first row, the row after
    their last, and what the number of a pixel's outline rises by where a row crosses them [4, N]."""
    rings = [(k, is_hole, ring) for k, of in enumerate(outlines, 1) for is_hole, ring in enumerate(of["coordinates"])]
    corners = chain.from_iterable(chain.from_iterable(ring for *_, ring in rings))
    points_N2 = np.fromiter(corners, np.float64).reshape(-1, 2).astype(np.int64)
    of_point_N = np.repeat(np.arange(len(rings)), [len(ring) for *_, ring in rings])
    (x, y), (next_x, next_y) = points_N2[:-1].T, points_N2[1:].T
    of_side, goes_on = of_point_N[:-1], of_point_N[:-1] == of_point_N[1:]
    doubled_areas = np.bincount(of_side, (x * next_y - next_x * y) * goes_on, len(rings))
    rises = np.array([k if is_hole else -k for k, is_hole, _ in rings]) * np.sign(doubled_areas).astype(np.int64)
    sides_4N = np.stack([x, np.minimum(y, next_y), np.maximum(y, next_y), rises[of_side] * np.sign(next_y - y)])
    return sides_4N[:, goes_on & (y != next_y)].astype(np.int32)


def _number(sides_4N: NDArray[np.int32], rows: slice, width: int) -> NDArray[np.int32]:
    """Number the pixels [h, W] of some rows by their outlines, 0 where there is none."""
    x, top, bottom, rise = sides_4N
    top, bottom = (ends.clip(rows.start, rows.stop) - rows.start for ends in (top, bottom))
    lengths = bottom - top
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    steps_hW = np.zeros((rows.stop - rows.start, width + 1), np.int32)
    np.add.at(steps_hW, (np.repeat(top, lengths) + within, np.repeat(x, lengths)), np.repeat(rise, lengths))
    numbers: NDArray[np.int32] = steps_hW[:, :width].cumsum(1, dtype=np.int32)
    return numbers
