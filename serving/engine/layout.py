"""What a raster file says of itself beside its values: which band is which, how it is turned, and where it lies."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio import Affine
from rasterio.control import GroundControlPoint

COLOURS = ("red", "green", "blue")
MAY_BE_ALPHA = re.compile("$|band|a$|.*(alpha|mask|transp|opac)").match
"""Matches names that leave this open. A band of another name is not alpha, though GDAL says it of the fourth."""
INKS = ("cyan", "magenta", "yellow", "black")
FLIPS = {1: (False, False, False), 2: (False, False, True), 3: (False, True, True), 4: (False, True, False),
         5: (True, False, False), 6: (True, False, True), 7: (True, True, True), 8: (True, True, False)}  # fmt: skip
"""Orientation -> what makes the stored picture upright: exchange rows and columns, then reverse rows, columns."""
Flips = tuple[bool, bool, bool]

BESIDE = (".tab", ".TAB", "_RPC.TXT", "_rpc.txt", ".RPB", ".rpb")
"""Ends of files that say where an image with the same stem lies, and are not read."""
PIXELS = Affine.identity()
"""The transform of an image that has none."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a raster lies, as rasterio has it: crs and transform, or control points, or rational coefficients."""

    crs: Any = None
    transform: Any = PIXELS
    gcps: Any = ()
    rpcs: Any = None


def make_upright(values: NDArray[Any], flips: Flips) -> NDArray[Any]:
    """Make stored values [bands, h, w] upright."""
    exchange, rows, columns = flips
    upright = values.swapaxes(1, 2) if exchange else values
    return upright[:, :: -1 if rows else 1, :: -1 if columns else 1]


def choose_bands(dataset: Any) -> tuple[list[int], int, tuple[str, ...]]:
    """Choose the bands of grey, of red, green, blue, or of four inks; that of alpha or 0; and say what to know of it.

    Names of bands are followed before colour interpretations, which writers set without being asked.
    """
    kinds = [colour.name for colour in dataset.colorinterp]
    names = [(text or "").strip().lower() for text in dataset.descriptions]
    bands = range(1, len(kinds) + 1)
    alpha = next((band for band in bands if kinds[band - 1] == "alpha" and MAY_BE_ALPHA(names[band - 1])), 0)
    others = [band for band in bands if band != alpha]
    tagged = _positions(INKS, kinds) or _positions(COLOURS, kinds)
    named = _positions(COLOURS, names)
    grey = [kinds.index("gray") + 1] if "gray" in kinds else others[:1]
    chosen = named or tagged or (others[:3] if len(others) >= 3 else grey or [alpha])
    warnings = []
    if named and tagged and named != tagged:
        warnings.append(f"the bands' names say that {_list(named)} are red, green and blue, and were followed; their "
                        f"colour interpretation says {_list(tagged)}")  # fmt: skip
    shown = [ascii(name)[1:-1][:40] for name in names]
    unused = [f"{band} ({shown[band - 1] or kinds[band - 1]})" for band in others if band not in chosen]
    if unused:
        what = {1: "grey", 3: "red, green and blue"}.get(len(chosen), ", ".join(INKS))
        warnings.append(f"the image is read as {what} from band {_list(chosen)}; not used: band {', '.join(unused)}")
    claims = [names[band - 1] for band in chosen]
    if len(chosen) == 3 and any(name not in ("", colour) for name, colour in zip(claims, COLOURS, strict=True)):
        warnings.append(f"band {_list(chosen)} are read as red, green and blue; their names are "
                        f"{', '.join(shown[band - 1] or 'empty' for band in chosen)}")  # fmt: skip
    if any(dataset.scales[band - 1] != 1 or dataset.offsets[band - 1] != 0 for band in chosen):
        warnings.append("the file's scale and offset of its values are not applied")
    return chosen, alpha, tuple(warnings)


def _positions(names: tuple[str, ...], found: list[str]) -> list[int]:
    """Find where all of them are, counted from 1; nothing where one is missing."""
    return [found.index(name) + 1 for name in names] if set(names) <= set(found) else []


def _list(bands: list[int]) -> str:
    return ", ".join(map(str, bands))


def palette_of(dataset: Any, band: int) -> NDArray[np.uint8] | None:
    """Read the colours [values, 3] where a band's values are indices into a palette."""
    if dataset.colorinterp[band - 1].name != "palette":
        return None
    colours = np.zeros((2**16 if dataset.dtypes[band - 1] == "uint16" else 2**8, 3), np.uint8)
    for index, colour in dataset.colormap(band).items():
        colours[index] = colour[:3]
    return colours


def read_place(dataset: Any, flips: Flips, path: Path | None) -> tuple[Place, tuple[str, ...]]:
    """Read where a file lies once it is upright, also by the world file beside it; and what the caller should know.

    path: of the file, where it is one.
    """
    gcps, gcp_crs = dataset.gcps
    place = Place(dataset.crs or gcp_crs, dataset.transform, gcps, dataset.rpcs)
    if path and place.transform == PIXELS and not gcps:
        place = replace(place, transform=_world_file(path) or place.transform)
    names = [path.name + end for end in (".aux.xml", ".msk")] + [path.stem + end for end in BESIDE] if path else []
    beside = [name for name in names if path and path.with_name(name).exists()]
    warnings = [f"{ascii(name)[1:-1]} beside the image is not read" for name in beside]
    if flips == FLIPS[1]:
        return place, tuple(warnings)
    if place.rpcs:
        warnings.append("the rational coefficients (RPC) of an image that is not stored upright are not read")
    return _flipped(place, flips, dataset.height, dataset.width), tuple(warnings)


def _world_file(path: Path) -> Any:
    """Read the world file beside an image (ESRI's a.tfw, a.tifw or a.wld); None where there is none."""
    end = path.suffix[1:].lower()
    usual = (end[:1] + end[-1:] + "w", end + "w", "wld") if end else ()
    for suffix in (spelt for one in usual for spelt in (one, one.upper())):
        try:
            a, d, b, e, c, f = map(float, path.with_suffix(f".{suffix}").read_text("ascii").split())
        except (OSError, ValueError):
            continue
        return Affine(a, b, c, d, e, f) * Affine.translation(-0.5, -0.5)  # it says where a pixel's centre is
    return None


def _flipped(place: Place, flips: Flips, height: int, width: int) -> Place:
    """Move the place of a stored picture [height, width] to where it is once that is upright."""
    exchange, rows, columns = flips
    upright_height, upright_width = (width, height) if exchange else (height, width)
    stored = Affine(-1 if columns else 1, 0, upright_width * columns, 0, -1 if rows else 1, upright_height * rows)
    if exchange:
        stored = Affine(0, 1, 0, 1, 0, 0) * stored  # from upright columns and rows to stored ones
    upright = ~stored
    points = []
    for point in place.gcps:
        x, y = upright * (point.col, point.row)
        points.append(GroundControlPoint(y, x, point.x, point.y, point.z, point.id, point.info))
    transform = place.transform if place.transform == PIXELS else place.transform * stored
    return Place(place.crs, transform, points, None)
