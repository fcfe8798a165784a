"""From a prediction to bytes: one writer per media type, and which one an Accept header asks for.

A writer takes a prediction, a style and a binary file, and goes through the answer in blocks of rows, so that an
answer whose arrays lie on disk (`penumbra.serving.spool`) is written in the memory of one block.
"""

import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import BinaryIO

from penumbra.models.errors import BadOption, NotAcceptable
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.options import DEFAULT, PROBABILITIES, SegmentOptions, Style, parse_options, parse_style
from penumbra.serving.render.arrays import write_npz, write_tiff
from penumbra.serving.render.geopackage import write_geopackage
from penumbra.serving.render.pictures import write_png
from penumbra.serving.render.regions import write_geojson
from penumbra.serving.render.tables import write_json

Write = Callable[[Prediction, Style, BinaryIO], str | None]
"""It may return a sentence that the answer's reader should know, beside its warnings."""
WRITERS: dict[str, Write] = {
    "application/json": lambda prediction, _, file: write_json(prediction, file),
    "image/png": lambda prediction, style, file: write_png(prediction, file, style.picture, levels=style.levels),
    "application/x-npz": lambda prediction, _, file: write_npz(prediction, file),
    "application/geo+json": lambda prediction, style, file: write_geojson(
        prediction, file, min_pixels=style.min_pixels
    ),
    "image/tiff": lambda prediction, style, file: write_tiff(prediction, file, bands=(style.picture,)),
    "application/geopackage+sqlite3": lambda prediction, style, file: write_geopackage(
        prediction, file, min_pixels=style.min_pixels
    ),
}
"""Answer formats by media type; the first is the answer to `*/*`."""


MAPLESS = ("image/png", "image/tiff")
"""Formats that show one picture, and need no map but its own: the default ones are not computed for them."""
WITH_MEANS = ("application/json", "application/geo+json", "application/geopackage+sqlite3")
"""Formats that tell the mean of every map, of the default ones at least."""

WITH_PROBABILITIES = "application/x-npz"
"""The format that holds arrays of any shape."""


def parse_request(media: str, fields: Mapping[str, str]) -> tuple[SegmentOptions, Style]:
    """Read what to compute and how to show it, for an answer in a media type. Raises BadOption."""
    style = parse_style(fields)
    options = parse_options(fields)
    if media in MAPLESS:
        options = replace(options, outputs=tuple(name for name in options.outputs if name != DEFAULT))
    options = options.with_maps(style.maps)
    if PROBABILITIES in options.outputs and media != WITH_PROBABILITIES:
        raise BadOption(f"outputs has {PROBABILITIES}, which {media} cannot hold; ask for {WITH_PROBABILITIES}")
    return (options.with_maps((DEFAULT,)) if media in WITH_MEANS else options), style


def without_unseen(options: SegmentOptions, media: str, style: Style) -> SegmentOptions:
    """Leave out the maps that the format does not show: on a disk they would take room for nobody."""
    return replace(options, outputs=style.maps) if media in MAPLESS else options


def render(prediction: Prediction, media: str, style: Style) -> bytes:
    """Write an answer in a media type of `WRITERS`."""
    return render_with_notes(prediction, media, style)[0]


def render_with_notes(prediction: Prediction, media: str, style: Style) -> tuple[bytes, tuple[str, ...]]:
    """Write an answer, and say what there is to say beside its warnings."""
    buffer = io.BytesIO()
    note = WRITERS[media](prediction, style, buffer)
    return buffer.getvalue(), (note,) if note else ()


def choose_format(accept: str) -> str:
    """Choose the offered media type with the highest quality in an Accept header (RFC 9110); ties go to our order.

    Raises NotAcceptable naming what is on offer.
    """
    ranges = [_media_range(part) for part in accept.split(",") if part.strip()] or [("*/*", 1.0)]
    best = max(WRITERS, key=lambda media: _quality(media, ranges))
    if _quality(best, ranges) <= 0:
        raise NotAcceptable(f"Accept is {accept[:80]!r}; on offer are {', '.join(WRITERS)}")
    return best


def _media_range(text: str) -> tuple[str, float]:
    media, *parameters = (part.strip().lower() for part in text.split(";"))
    quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
    try:
        return media, min(max(float(quality), 0.0), 1.0)
    except ValueError:
        return media, 0.0


def _quality(media: str, ranges: list[tuple[str, float]]) -> float:
    """Find the quality of the most specific range that matches."""
    for pattern in (media, media.partition("/")[0] + "/*", "*/*"):
        matching = [quality for name, quality in ranges if name == pattern]
        if matching:
            return max(matching)
    return 0.0
