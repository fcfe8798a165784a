"""Polygons on the globe as RFC 7946 wants them: cut at the 180th meridian, wound right, poles and all.

A ring that crosses the meridian becomes chains from edge to edge of the map. The chains' ends, in order along an edge,
are in turn where a region begins and where it stops; joining them so closes the parts. A pole within the region is one
more end at the edge's tip.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
"""[N, 2]: columns and rows, or longitudes and latitudes. A ring's last point is its first."""
DIGITS = 9
"""Decimals of a degree: a tenth of a millimetre."""
POLE_DEG = 90 - 1e-9


def cut(rings: Sequence[Points], *, is_left: bool) -> dict[str, Any]:
    """Make a GeoJSON geometry of an outer ring and its holes, whose longitudes may go on beyond 180 or jump there.

    is_left: the outer ring has the region on its left, as seen from above; it tells which pole lies within.
    """
    if all(_is_plain(ring) for ring in rings):
        return _geometry([[ring.round(DIGITS) for ring in rings]])
    chains, whole, turns = [], [], 0.0
    for number, ring in enumerate(map(_without_pole, rings)):
        unrolled = _unrolled(ring)
        parts = list(_chains(unrolled))
        if parts:
            chains += parts
        else:
            whole.append(unrolled - (360 * _strips(unrolled)[0], 0))
        if number == 0:
            turns = unrolled[-1, 0] - unrolled[0, 0]
    if sum(chain[end, 0] == 180 for chain in chains for end in (0, -1)) % 2:
        pole = 90.0 if (turns > 0) == is_left else -90.0
        chains.append(np.array([(-180, pole), (180, pole)]))
    outer = [ring.round(DIGITS) for ring in _join(chains)] if chains else [whole.pop(0).round(DIGITS)]
    polygons = [[ring] for ring in outer if np.ptp(ring[:, 0]) > 0]
    for hole in whole:
        point = hole[:2].mean(0)  # rings touch at corners only
        home = next((polygon for polygon in polygons if _is_inside(point, polygon[0])), polygons[0])
        home.append(hole.round(DIGITS))
    return _geometry(polygons)


def shoelace(ring: Points) -> float:
    """Measure the area within a ring, positive where it runs counterclockwise."""
    x, y = (ring - ring[0]).T
    return float(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1])) / 2


def turned(degrees: NDArray[np.float64]) -> NDArray[np.float64]:
    """Take differences of longitudes the short way round: -180 to 180."""
    short: NDArray[np.float64] = degrees - 360 * np.rint(degrees / 360)
    return short


def _is_plain(ring: Points) -> bool:
    longitude, latitude = ring.T
    return bool(
        (np.abs(longitude) <= 180).all() and (np.abs(np.diff(longitude)) < 180).all()
        and (np.abs(latitude) < POLE_DEG).all()
    )  # fmt: skip


def _geometry(polygons: list[list[Points]]) -> dict[str, Any]:
    """Wind outer rings counterclockwise and holes clockwise."""
    wound = [
        [(ring if (shoelace(ring) > 0) == (number == 0) else ring[::-1]).tolist() for number, ring in enumerate(rings)]
        for rings in polygons
    ]
    is_one = len(wound) == 1
    return {"type": "Polygon" if is_one else "MultiPolygon", "coordinates": wound[0] if is_one else wound}


def _without_pole(ring: Points) -> Points:
    """Put two corners in the place of one at a pole, which has any longitude: at those of its neighbours."""
    corners = ring[:-1]
    polar = np.abs(corners[:, 1]) > POLE_DEG
    lone = np.flatnonzero(polar & ~np.roll(polar, 1) & ~np.roll(polar, -1))
    split = np.insert(corners, lone, corners[lone], axis=0)
    first = lone + np.arange(len(lone))
    split[first, 0] = corners[lone - 1, 0]
    split[first + 1, 0] = corners[(lone + 1) % len(corners), 0]
    return np.concatenate([split, split[:1]])


def _unrolled(ring: Points) -> Points:
    """Let longitudes go on where they jump by a turn."""
    turns = -np.rint(np.diff(ring[:, 0]) / 360).cumsum()
    unrolled: Points = ring + np.column_stack([360 * np.append(0, turns), np.zeros(len(ring))])
    return unrolled


def _strips(ring: Points) -> NDArray[np.float64]:
    """Count which turn of the globe each point is on."""
    return np.floor((ring[:, 0] + 180) / 360)


def _chains(ring: Points) -> Iterator[Points]:
    """Cut an unrolled ring at its crossings of the meridian, on the map of -180 to 180 degrees."""
    strips, count = _strips(ring), len(ring) - 1
    steps = np.diff(strips)
    crossings = np.flatnonzero(steps)
    edge = 360 * np.maximum(strips[:-1], strips[1:]) - 180
    (x, y), (dx, dy) = ring[:-1].T, np.diff(ring, axis=0).T
    latitude = y + dy * np.divide(edge - x, dx, out=np.zeros(count), where=steps != 0)
    inside = ring[:-1] - np.column_stack([360 * strips[:-1], np.zeros(count)])
    for here, there in zip(crossings, [*crossings[1:], *(crossings[:1] + count)], strict=True):
        last = there % count
        between = inside[np.arange(here + 1, there + 1) % count]
        yield np.array([(-180 * steps[here], latitude[here]), *between, (180 * steps[last], latitude[last])])


def _join(chains: Sequence[Points]) -> Iterator[Points]:
    """Close the chains to rings: along each edge of the map, every other stretch between their ends is region."""
    partners = {}
    for side in (-180, 180):
        ends = sorted(
            (chain[end, 1], number, end) for number, chain in enumerate(chains) for end in (0, -1)
            if chain[end, 0] == side
        )  # fmt: skip
        for (_, *one), (_, *other) in zip(ends[::2], ends[1::2], strict=True):
            partners[tuple(one)], partners[tuple(other)] = tuple(other), tuple(one)
    left = dict.fromkeys(range(len(chains)))
    while left:
        number, begin = next(iter(left)), 0
        parts = []
        while number in left:
            del left[number]
            parts.append(chains[number] if begin == 0 else chains[number][::-1])
            number, begin = partners[number, -1 if begin == 0 else 0]
        yield np.concatenate([*parts, parts[0][:1]])


def _is_inside(point: Points, ring: Points) -> bool:
    """Find out whether a ray to the east crosses the ring an odd number of times."""
    (x0, y0), (x1, y1) = ring[:-1].T, ring[1:].T
    crosses = (y0 > point[1]) != (y1 > point[1])
    x = x0[crosses] + (point[1] - y0[crosses]) / (y1 - y0)[crosses] * (x1 - x0)[crosses]
    return bool((x > point[0]).sum() % 2)
