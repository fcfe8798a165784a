"""Connected regions of one class as polygons: GeoJSON with each region's size and mean uncertainty.

A region's outline runs along pixel borders, so it holds exactly the region's pixels. Coordinates are longitude and
latitude (RFC 7946) where the image is a raster with a reference system, else columns and rows of pixels.
"""

import json
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from rasterio import Affine
from rasterio.features import rasterize, shapes
from rasterio.warp import transform_geom

from penumbra.models.card import IGNORE
from penumbra.models.errors import TooLarge
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.raster import Raster, gdal
from penumbra.serving.render.pictures import blocks
from penumbra.serving.render.tables import facts

MAX_EDGES = 8_000_000
"""Pixel borders between classes: all outlines together. More is noise, and a document that nobody opens."""
WGS84 = "EPSG:4326"


def write_geojson(prediction: Prediction, file: BinaryIO, *, min_pixels: int) -> None:
    """A FeatureCollection of the regions of at least `min_pixels`. Raises TooLarge for labels that are noise."""
    labels_HW = prediction.labels_HW[:]
    _check_edges(labels_HW)
    outlines = [
        (outline, int(label))
        for outline, label in shapes(labels_HW, mask=labels_HW != IGNORE, connectivity=4)
        if _area(outline) >= min_pixels
    ]
    pixels, means = _measure(prediction, [outline for outline, _ in outlines])
    place = prediction.image.place if isinstance(prediction.image, Raster) and prediction.image.place.crs else None
    features = [
        {
            "type": "Feature",
            "geometry": _placed(outline, place),
            "properties": {
                "id": label, "class": prediction.card.classes[label].name, "pixels": int(pixels[i]),
                **_metres(int(pixels[i]), place), **{f"mean_{name}": float(mean[i]) for name, mean in means.items()},
            },
        }
        for i, (outline, label) in enumerate(outlines)
    ]  # fmt: skip
    document = {"type": "FeatureCollection", "features": features, "coordinates": "WGS84" if place else "pixels"}
    with_facts = document | {"penumbra": facts(prediction)}
    file.write(json.dumps(with_facts, allow_nan=False).encode())


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
    """Pixels within an outline in pixel coordinates, its holes taken off (shoelace formula)."""
    outer, *holes = (abs(_shoelace(ring)) for ring in outline["coordinates"])
    return round(outer - sum(holes))


def _shoelace(ring: list[tuple[float, float]]) -> float:
    x, y = np.asarray(ring).T
    return float(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1])) / 2


def _measure(
    prediction: Prediction, outlines: list[dict[str, Any]]
) -> tuple[NDArray[np.int64], dict[str, NDArray[np.float64]]]:
    """Pixels, and the mean of every map, per outline: each block of rows is painted with the outlines' numbers."""
    height, width = prediction.labels_HW.shape
    count = len(outlines) + 1
    pixels = np.zeros(count, np.int64)
    sums = {name: np.zeros(count) for name in prediction.maps}
    spans = [_span(outline) for outline in outlines]
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
        for name, total in sums.items():
            total += np.bincount(numbers, prediction.maps[name][rows].ravel(), count)
    return pixels[1:], {name: total[1:] / np.maximum(pixels[1:], 1) for name, total in sums.items()}


def _span(outline: dict[str, Any]) -> tuple[float, float]:
    rows = [y for _, y in outline["coordinates"][0]]
    return min(rows), max(rows)


def _placed(outline: dict[str, Any], place: Any) -> dict[str, Any]:
    """The outline in degrees, its outer ring counterclockwise; in pixels where there is no place."""
    if place is None:
        return outline
    moved = {
        "type": "Polygon",
        "coordinates": [[place.transform * point for point in ring] for ring in outline["coordinates"]],
    }
    with gdal():
        degrees: dict[str, Any] = transform_geom(place.crs, WGS84, moved, precision=9)
    rings = degrees["coordinates"]
    wound = [ring if (_shoelace(ring) > 0) == (number == 0) else ring[::-1] for number, ring in enumerate(rings)]
    return degrees | {"coordinates": wound}


def _metres(pixels: int, place: Any) -> dict[str, float]:
    if place is None or not place.crs.is_projected:
        return {}
    metres_per_unit = place.crs.linear_units_factor[1]
    return {"area_m2": pixels * abs(place.transform.determinant) * metres_per_unit**2}
