"""Connected regions of one class as polygons, in GeoJSON or a GeoPackage, with each region's size and mean uncertainty.

A region's outline runs along pixel borders, so it holds exactly the region's pixels. Coordinates are longitude and
latitude (RFC 7946) where the image is a raster that has a place on the ground, else columns and rows of pixels.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from rasterio import Affine
from rasterio.features import rasterize, shapes

from penumbra.models.card import IGNORE
from penumbra.models.errors import TooLarge
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.raster import gdal
from penumbra.serving.render.ground import Ground, Unplaced
from penumbra.serving.render.meridian import shoelace
from penumbra.serving.render.pictures import blocks
from penumbra.serving.render.tables import means_of

MAX_EDGES = 8_000_000
"""Pixel borders between classes: all outlines together. More is noise, and a document that nobody opens."""


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
    map: each block of rows is painted with the outlines' numbers."""
    height, width = prediction.labels_HW.shape
    count = len(outlines) + 1
    pixels = np.zeros(count, np.int64)
    areas_m2, sums = np.zeros(count), {name: np.zeros(count) for name in prediction.maps}
    rings = [[y for _, y in outline["coordinates"][0]] for outline in outlines]
    spans = [(min(ring), max(ring)) for ring in rings]
    for rows in blocks(height) if outlines else ():
        painted = [
            (outline, number)
            for number, (outline, (top, bottom)) in enumerate(zip(outlines, spans, strict=True), 1)
            if top < rows.stop and bottom > rows.start
        ]
        if not painted:
            continue
        size = (rows.stop - rows.start, width)
        numbers = rasterize(painted, size, transform=Affine.translation(0, rows.start), dtype=np.int32).ravel()
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
