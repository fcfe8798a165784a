"""What a raster file says of itself beside its values: which band is which, how it is turned, and where it lies."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio import Affine
from rasterio.control import GroundControlPoint

from penumbra.models.card import RGB, InputSpec
from penumbra.models.errors import BadImage, BadOption

GREY = ("grey",)
MAY_BE_ALPHA = re.compile("$|band|a$|.*(alpha|mask|transp|opac)").match
"""Matches names that leave this open. A band of another name is not alpha, though GDAL says it of the fourth."""
READ_AS_GREY = "the image is in colour, and is read as grey: its brightness by ITU-R 601"
SPELT = {"gray": "grey", "undefined": "", "alpha": ""}
"""What a colour interpretation says of a band, where it is another word or says nothing."""
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
class Reading:
    """What a network reads, and which of an image's bands a caller chose for it, by numbers from 1 or by names."""

    spec: InputSpec
    chosen: tuple[str, ...] = ()


MOST_NAMED = 12
"""Bands of a file that a warning names."""
RGB8 = Reading(InputSpec())
"""Red, green and blue of 8 bits."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a raster lies, as rasterio has it: crs and transform, or control points, or rational coefficients."""

    crs: Any = None
    transform: Any = PIXELS
    gcps: Any = ()
    rpcs: Any = None

    def __str__(self) -> str:
        """Put it as text, which is the same for the same place."""
        points = [(one.row, one.col, one.x, one.y, one.z) for one in self.gcps]
        return f"{self.crs and self.crs.to_wkt()} {tuple(self.transform)} {points} {self.rpcs}"


def fit_points(place: Place) -> tuple[Affine | None, float, list[GroundControlPoint]]:
    """Fit a transform to the control points of a place with a system; None for fewer than three, or on one line, or
    where one is not a number.

    Gives also how far it misses them at most, and the points with all longitudes on one side of the 180th meridian.
    """
    x, y, columns, rows = values = np.array([(one.x, one.y, one.col, one.row) for one in place.gcps]).reshape(-1, 4).T
    if not np.isfinite(values).all():  # LAPACK may search for ever, and lets no other thread run
        return None, np.inf, [*place.gcps]
    if place.crs.is_geographic:
        x = x - 360 * np.rint((x - x[:1]) / 360)
    pixels, ground = np.column_stack([columns, rows, np.ones(len(x))]), np.column_stack([x, y])
    fit, _, rank, _ = np.linalg.lstsq(pixels, ground)
    points = [GroundControlPoint(*point) for point in zip(rows, columns, x, y, strict=True)]
    if rank < 3:
        return None, np.inf, points
    return Affine(*fit.T.ravel()), float(np.abs(pixels @ fit - ground).max()), points


def make_upright(values: NDArray[Any], flips: Flips) -> NDArray[Any]:
    """Make stored values [bands, h, w] upright."""
    exchange, rows, columns = flips
    upright = values.swapaxes(1, 2) if exchange else values
    return upright[:, :: -1 if rows else 1, :: -1 if columns else 1]


def choose_bands(dataset: Any, reading: Reading = RGB8) -> tuple[list[int], int, tuple[str, ...]]:
    """Choose the bands that a network reads, or instead of colours those of grey or of four inks; that of alpha or 0;
    and say what to know of it.

    Names of bands are followed before colour interpretations, which writers set without being asked. Raises BadImage,
    and BadOption for what the caller chose.
    """
    bands, kinds = reading.spec.bands, [colour.name for colour in dataset.colorinterp]
    names = [(text or "").strip().lower() for text in dataset.descriptions]
    said = [name or SPELT.get(kind, kind) for name, kind in zip(names, kinds, strict=True)]
    alpha = next((i for i, kind in enumerate(kinds, 1) if kind == "alpha" and MAY_BE_ALPHA(names[i - 1])), 0)
    are_colours = bands == RGB and not reading.chosen
    found, warnings = _find_colours(kinds, names, alpha) if are_colours else find_bands(reading, said)
    if alpha in found and not are_colours:
        alpha = 0
    unused = [i for i in range(1, len(said) + 1) if i != alpha and i not in found]
    if unused and not reading.chosen:
        read_as = {1: GREY, len(INKS): INKS}.get(len(found), RGB) if bands == RGB else bands
        left = ", ".join(f"{i} ({_shown(said[i - 1])})" for i in unused[:MOST_NAMED])
        left += f" and {len(unused) - MOST_NAMED} more" if len(unused) > MOST_NAMED else ""
        warnings.insert(0, f"the image is read as {', '.join(read_as)} from {_numbers(found)}; not used: band {left}")
    if any(dataset.scales[i - 1] != 1 or dataset.offsets[i - 1] != 0 for i in found):
        warnings.append("the file's scale and offset of its values are not applied")
    return found, alpha, tuple(warnings)


def _find_colours(kinds: list[str], names: list[str], alpha: int) -> tuple[list[int], list[str]]:
    """Find red, green and blue, four inks, or grey."""
    others = [band for band in range(1, len(kinds) + 1) if band != alpha]
    named, tagged = _positions(RGB, names), _positions(INKS, kinds) or _positions(RGB, kinds)
    grey = _positions(("gray",), kinds) or others[:1] or [alpha]
    found = named or tagged or (others[:3] if len(others) >= 3 else grey)
    warnings = []
    if named and tagged and named != tagged:
        warnings.append(f"the names of {_numbers(named)} are red, green and blue, and were followed; by their colour "
                        f"interpretation these are {_numbers(tagged)}")  # fmt: skip
    claims = [names[band - 1] for band in found]
    if len(found) == 3 and any(name not in ("", colour) for name, colour in zip(claims, RGB, strict=True)):
        warnings.append(f"red, green and blue are read from {_numbers(found)}, whose names are "
                        f"{', '.join(map(_shown, claims))}")  # fmt: skip
    return found, warnings


def find_bands(reading: Reading, said: Sequence[str]) -> tuple[list[int], list[str]]:
    """Find the bands that a network reads among an image's, by what these are called, and say what to know of it.

    Where nothing is said of as many as are missing, they are taken in their order. Colours stand for grey. Raises
    BadImage, and BadOption for what the caller chose.
    """
    if reading.chosen:
        return _pick_bands(reading, said), []
    bands = reading.spec.bands
    missing = [band for band in bands if band not in said]
    if missing and bands == GREY and (colours := _positions(RGB, said)):
        return colours, [READ_AS_GREY]
    silent = [i for i, text in enumerate(said, 1) if text in {"", *GREY} - {*bands}]
    if missing and len(missing) != len(silent):
        raise BadImage(
            f"{_described(said)}; the model reads {', '.join(bands)}: name the bands so, or give their numbers in this "
            "order with the option bands"
        )
    taken = dict(zip(missing, silent, strict=False))
    found = [taken.get(band) or said.index(band) + 1 for band in bands]
    if not missing or (len(said) == 1 and bands == GREY):
        return found, []
    return found, [f"the file does not name {', '.join(missing)}, read from {_numbers([*taken.values()])}"]


def _pick_bands(reading: Reading, said: Sequence[str]) -> list[int]:
    """Find the bands that a caller chose, by numbers from 1 or by names. said: their names. Raises BadOption."""
    chosen, bands = reading.chosen, reading.spec.bands
    if len(chosen) != len(bands):
        raise BadOption(f"bands names {len(chosen)}; the model reads {len(bands)}: {', '.join(bands)}")
    numbered = [*enumerate(said, 1)]
    places = {name: i for i, name in reversed(numbered) if name} | {str(i): i for i, _ in numbered}
    for one in chosen:
        if one.lower() not in places:
            raise BadOption(f"bands has {one[:40]!r}; {_described(said)}")
    return [places[one.lower()] for one in chosen]


def _positions(names: Sequence[str], found: Sequence[str]) -> list[int]:
    """Find where all of them are, counted from 1; nothing where one is missing."""
    return [found.index(name) + 1 for name in names] if set(names) <= set(found) else []


def _numbers(bands: list[int]) -> str:
    return f"band{'s' * (len(bands) > 1)} {', '.join(map(str, bands))}"


def _shown(name: str) -> str:
    return ascii(name)[1:-1][:40] or "no name"


def _described(said: Sequence[str]) -> str:
    """Say which bands an image has, the first of them by name."""
    names = ", ".join(f"{i} ({_shown(name)})" for i, name in enumerate(said[:12], 1))
    return f"the image has {len(said)} bands: {names}{' ...' * (len(said) > 12)}"


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
