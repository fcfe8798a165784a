"""Where a raster's pixels lie on the ground: outlines in degrees, and areas in square metres on the ellipsoid.

Every way in which GDAL says where a pixel is has its locator here: a transform in a reference system, ground control
points, rational polynomial coefficients. What has none of them, or one that leads nowhere, is `Unplaced`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio import Affine
from rasterio._err import CPLE_BaseError
from rasterio.errors import RasterioError
from rasterio.transform import GCPTransformer, RPCTransformer
from rasterio.warp import transform

from penumbra.serving.engine.layout import PIXELS, Place, fit_points
from penumbra.serving.engine.raster import Raster, gdal
from penumbra.serving.render.meridian import Points, cut, shoelace, turned

WGS84 = "EPSG:4326"
AXIS_M, FLATTENING = 6_378_137.0, 1 / 298.257223563
"""The WGS84 ellipsoid."""
FARTHEST_DEG = 95.0
"""A grid whose outermost pixels' centres are the poles reaches half a pixel beyond; farther is no latitude."""
EXACT_PX = 0.5
"""Control points that a transform meets to this are taken as that transform."""
BENT_PX = 0.1
"""An outline leaves the pixels' borders by no more than this; between points that need it, others are put."""
ROUNDS = 12
"""Halvings of one edge, at most."""
NODES = 257
"""At most as many on a side of the grid on which pixels' areas are measured; between them areas are interpolated."""
BATCH = 2**18
"""Points of outlines that are placed at a time."""
SPLINE_POINTS = 512
"""Control points that a thin-plate spline takes at most: GDAL, which lets no other thread run meanwhile, needs their
number's cube to make it, and their number again for every point that is placed."""
SPLINE_BATCH = 2**20
"""Pairs of a control point and a placed point for which GDAL is called at a time."""
FAULTS = (RasterioError, CPLE_BaseError)
CORNERS = ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5))

Outline = dict[str, Any]
"""A GeoJSON geometry."""
Locate = Callable[[Points], Points]
"""From columns and rows [N, 2] to degrees of longitude and latitude."""


class Unplaced(Exception):
    """Says in a sentence why pixels have no longitude and latitude; empty where nothing claims that they had."""


class Ground:
    """The ground under an image. note: what the caller should know of how it was found, or empty."""

    def __init__(self, image: Raster | None) -> None:
        """Raises Unplaced."""
        if not (image and image.place):
            raise Unplaced
        self._height, self._width = image.shape[:2]
        self._locate, self.note = _locator(image.place)
        self._areas_yx = self._node_areas()

    def to_degrees(self, outlines: Sequence[Outline]) -> Iterator[Outline]:
        """Turn polygons of pixels into polygons of degrees (RFC 7946), cut at the 180th meridian. Raises Unplaced."""
        rings = [[np.array(ring, float) for ring in outline["coordinates"]] for outline in outlines]
        batch = np.cumsum([sum(map(len, polygon)) for polygon in rings]) // BATCH
        for first, end in pairwise([0, *(np.flatnonzero(np.diff(batch)) + 1), len(rings)] if rings else ()):
            placed = iter(self._follow([ring for polygon in rings[first:end] for ring in polygon]))
            for polygon in rings[first:end]:
                is_left = (shoelace(polygon[0]) > 0) == (self._areas_yx.flat[0] > 0)
                yield cut([next(placed) for _ in polygon], is_left=is_left)

    def areas(self, rows: slice) -> NDArray[np.float64]:
        """Measure the pixels of some rows in square metres, [h, W]."""
        near_hx = _interpolate(np.abs(self._areas_yx), self._height, np.arange(rows.start, rows.stop))
        return _interpolate(near_hx.T, self._width, np.arange(self._width)).T

    def _follow(self, rings: Sequence[Points]) -> list[Points]:
        """Turn rings of pixels' corners into degrees, with points between the corners where borders are bent."""
        points, number = np.concatenate(rings), np.repeat(np.arange(len(rings)), [len(ring) for ring in rings])
        at = self._at(points)
        edges = np.flatnonzero(number[1:] == number[:-1])
        for _ in range(ROUNDS):
            middles = (points[edges] + points[edges + 1]) / 2
            at_middles = self._at(middles)
            lengths_px = np.abs(points[edges + 1] - points[edges]).sum(1)
            bent = _bends(at[edges], at_middles, at[edges + 1]) * lengths_px > BENT_PX
            bent |= lengths_px > max(self._height, self._width) / 8  # a longer one may go half round the earth
            splits = edges[bent]
            if not len(splits):
                break
            points = np.insert(points, splits + 1, middles[bent], axis=0)
            at = np.insert(at, splits + 1, at_middles[bent], axis=0)
            number = np.insert(number, splits + 1, number[splits])
            added = splits + 1 + np.arange(len(splits))
            edges = np.stack([added - 1, added], 1).ravel()
        return np.split(at, np.flatnonzero(np.diff(number)) + 1)

    def _at(self, points_N2: Points) -> Points:
        try:
            with gdal():
                at = self._locate(points_N2)
        except FAULTS:
            at = np.full(points_N2.shape, np.nan)
        if not (np.isfinite(at).all() and (np.abs(at[:, 1]) < FARTHEST_DEG).all()):
            raise Unplaced("what places the raster leads to no longitude and latitude for some of its pixels")
        at[:, 1] = at[:, 1].clip(-90, 90)
        return at

    def _node_areas(self) -> NDArray[np.float64]:
        """Measure pixels in m2 on a grid over the image; negative where its columns and rows are right-handed."""
        y, x = (np.linspace(0.5, size - 0.5, min(size, NODES)) for size in (self._height, self._width))
        centres = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
        a, b, c, d = (_cartesian(self._at(centres + corner)) for corner in CORNERS)
        normal = np.cross(c - a, d - b)
        areas: NDArray[np.float64] = np.copysign(np.linalg.norm(normal, axis=1), (normal * a).sum(1)) / 2
        return areas.reshape(len(y), len(x))


def _locator(place: Place) -> tuple[Locate, str]:
    """Find the way from pixels to degrees, in GDAL's order of preference, and what to know of it. Raises Unplaced."""
    if place.transform != PIXELS:
        if not place.crs:
            raise Unplaced("the raster has a transform and no reference system")
        return _by_affine(place.transform, place.crs), ""
    if place.gcps:
        if not place.crs:
            raise Unplaced("the raster's ground control points have no reference system")
        return _by_points(place), ""
    if place.rpcs:
        height_m = place.rpcs.height_off
        camera = partial(RPCTransformer, place.rpcs, RPC_PIXEL_ERROR_THRESHOLD=0.01)
        return _by_transformer(camera, WGS84, height_m=height_m), (
            f"the raster was placed by rational polynomial coefficients for a height of {height_m:g} m everywhere, "
            "without a terrain model; what is higher or lower lies elsewhere"
        )
    raise Unplaced("the raster has a reference system and no transform" if place.crs else "")


def _by_affine(affine: Affine, crs: Any) -> Locate:
    return lambda points_N2: np.column_stack(transform(crs, WGS84, *(affine * tuple(points_N2.T))))


def _by_transformer(make: Callable[[], Any], crs: Any, *, height_m: float = 0, at_once: int = BATCH) -> Locate:
    def locate(points_N2: Points) -> Points:
        pieces = np.array_split(points_N2, -(-len(points_N2) // at_once) or 1)
        with make() as transformer:
            placed = [
                transformer.xy(piece[:, 1], piece[:, 0], zs=np.full(len(piece), height_m), offset="ul")
                for piece in pieces
            ]
        return np.column_stack(transform(crs, WGS84, *map(np.concatenate, zip(*placed, strict=True))))

    return locate


def _by_points(place: Place) -> Locate:
    """Locate by a transform where that meets all points, else by a thin-plate spline. Raises Unplaced."""
    affine, missed, points = fit_points(place)
    if not affine:
        raise Unplaced("ground control points of the raster are fewer than three, on one line or not all numbers")
    if missed <= EXACT_PX * math.sqrt(abs(affine.determinant)):
        return _by_affine(affine, place.crs)
    if len(points) > SPLINE_POINTS:
        raise Unplaced(
            f"the raster has {len(points):,} ground control points on no plane, and {SPLINE_POINTS} are followed"
        )
    spline = partial(GCPTransformer, points, tps=True)
    return _by_transformer(spline, place.crs, at_once=SPLINE_BATCH // len(points))


def _bends(start: Points, middle: Points, end: Points) -> NDArray[np.float64]:
    """Measure how far the middles of edges lie beside the lines between their ends, as shares of their lengths."""
    across = np.column_stack([np.cos(np.radians(middle[:, 1])), np.ones(len(middle))])
    step, half = end - start, middle - start
    step[:, 0], half[:, 0] = turned(step[:, 0]), turned(half[:, 0])
    beside, length = (np.linalg.norm(part * across, axis=1) for part in (half - step / 2, step))
    shares: NDArray[np.float64] = np.where(beside > 0, np.inf, 0.0)
    np.divide(beside, length, out=shares, where=length > 0)
    return shares


def _cartesian(at_N2: Points) -> Points:
    """Turn longitude and latitude into geocentric metres [N, 3], on the ellipsoid."""
    longitude, latitude = np.radians(at_N2).T
    eccentricity2 = FLATTENING * (2 - FLATTENING)
    normal = AXIS_M / np.sqrt(1 - eccentricity2 * np.sin(latitude) ** 2)
    across = normal * np.cos(latitude)
    z = normal * (1 - eccentricity2) * np.sin(latitude)
    return np.column_stack([across * np.cos(longitude), across * np.sin(longitude), z])


def _interpolate(nodes_nx: NDArray[np.float64], size: int, places: NDArray[np.int64]) -> NDArray[np.float64]:
    """Interpolate between nodes that are spread evenly from the first to the last of `size` places, along axis 0."""
    at = places * ((len(nodes_nx) - 1) / max(size - 1, 1))
    below = np.minimum(at.astype(int), max(len(nodes_nx) - 2, 0))
    share = (at - below)[:, None]
    above = np.minimum(below + 1, len(nodes_nx) - 1)
    between: NDArray[np.float64] = nodes_nx[below] * (1 - share) + nodes_nx[above] * share
    return between
