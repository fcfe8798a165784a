"""Pictures of an answer: labels in the model's colours, overlays, and maps as grey levels, as PNG of any size.

Our own PNG writer takes rows as they come. It is several times as fast as Pillow's on these pictures: few colours in
long runs need no filter and no search for matches, and noise does not get smaller by searching longer.
"""

import io
import json
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor
from PIL.PngImagePlugin import PngInfo

from penumbra.models.card import IGNORE, KNOWN_MAPS, UNITLESS, Card
from penumbra.models.card import RGB as COLOURS
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.kernels import FloatArray
from penumbra.serving.engine.windows import normalise

BLOCK = 512
"""Rows that are worked on at a time; a multiple of the tiles of our TIFFs."""
GREY, RGB, PALETTE = 0, 2, 3
UP = 2
"""PNG's filter that takes a row's difference to the row above."""
OPACITY = 140
"""Weight of the labels' colours in an overlay, in 256ths."""
STRIPE_PX, STRIPES = 4, 128
"""Width of the stripes where there is no label, and how many cross a large picture, so that they show at any size."""
HEAT = ("#000004", "#1c1044", "#4f127b", "#812581", "#b5367a", "#e55064", "#fb8761", "#fec287", "#fcfdbf")
"""From certain to uncertain, in equal steps: magma, whose lightness grows evenly and which needs no sense of hue."""


class PngWriter:
    """Writes rows from the top, uint8 or uint16 [h, W] or uint8 [h, W, 3], in the order of the picture."""

    def __init__(self, file: BinaryIO, size: tuple[int, int], *, color: int, depth: int = 8) -> None:
        self._file, self._filtered = file, color != PALETTE
        self._deflate = zlib.compressobj(1, strategy=zlib.Z_DEFAULT_STRATEGY if color == RGB else zlib.Z_RLE)
        self._above = np.zeros(0, np.uint8)
        file.write(b"\x89PNG\r\n\x1a\n")
        self.chunk(b"IHDR", struct.pack(">IIBBBBB", size[1], size[0], depth, color, 0, 0, 0))
        self.chunk(b"tEXt", b"Software\0Penumbra")

    def chunk(self, kind: bytes, body: bytes) -> None:
        self._file.write(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)))

    def add(self, rows: NDArray[Any]) -> None:
        plain = np.ascontiguousarray(rows.astype(rows.dtype.newbyteorder(">"), copy=False))
        plain_hn = plain.view(np.uint8).reshape(len(rows), -1)
        lines = np.empty((len(rows), plain_hn.shape[1] + 1), np.uint8)
        lines[:, 0] = UP if self._filtered else 0
        lines[:, 1:] = plain_hn
        if self._filtered:
            lines[1:, 1:] -= plain_hn[:-1]
            if self._above.size:
                lines[0, 1:] -= self._above
            self._above = plain_hn[-1]
        self._send(self._deflate.compress(lines.data))

    def end(self) -> None:
        self._send(self._deflate.flush())
        self.chunk(b"IEND", b"")

    def _send(self, data: bytes) -> None:
        if data:
            self.chunk(b"IDAT", data)


def blocks(height: int) -> Iterator[slice]:
    """Cover a height with slices of up to BLOCK rows."""
    return (slice(y, min(y + BLOCK, height)) for y in range(0, height, BLOCK))


def write_png(prediction: Prediction, file: BinaryIO, picture: str, *, levels: int) -> None:
    """Write `labels` as indices of the model's palette, transparent where there is no label, `overlay` in colour, or a
    map in grey `levels`."""
    height, width = prediction.labels_HW.shape
    about: dict[str, Any] = {"picture": picture}
    draw: Callable[[slice], NDArray[Any]]
    if picture == "labels":
        png, draw = PngWriter(file, (height, width), color=PALETTE), prediction.labels_HW.__getitem__
        png.chunk(b"PLTE", palette(prediction.card))
        png.chunk(b"tRNS", b"\xff" * IGNORE + b"\0")
    elif picture == "overlay":
        png, draw = PngWriter(file, (height, width), color=RGB), partial(overlay, prediction)
    else:
        black, white = range_of(picture, prediction.card, prediction.maps[picture])
        png = PngWriter(file, (height, width), color=GREY, depth=16 if levels > 256 else 8)
        unit = "" if picture in UNITLESS else "nats" if picture in KNOWN_MAPS else "the model's"
        about = {"map": picture, "white": white, "black": black, "unit": unit}  # turns its grey into values again
        draw = partial(quantised, prediction.maps[picture], black=black, white=white, levels=levels)
    png.chunk(b"tEXt", b"Penumbra\0" + json.dumps(about | prediction.origin | prediction.scored).encode())
    for rows in blocks(height):
        png.add(draw(rows))
    png.end()


def quantised(values_HW: FloatArray, rows: slice, *, black: float, white: float, levels: int) -> NDArray[Any]:
    """Spread rows' values evenly over grey levels from black to white: uint8, or uint16 above 256 levels."""
    above = np.nan_to_num(values_HW[rows] - np.float32(black))
    steps = np.rint(np.clip(above * np.float32((levels - 1) / (white - black)), 0, levels - 1))
    grey = steps.astype(np.uint16) if levels > 256 else np.rint(steps * (255 / (levels - 1))).astype(np.uint8)
    return cast(NDArray[Any], grey)


def range_of(name: str, card: Card, values_HW: FloatArray) -> tuple[float, float]:
    """Find the values of a map that are shown black and white: 0 and 1 for shares, 0 and ln K for nats, and for a
    model's own maps the least, or 0, and the largest, or 0."""
    if name in KNOWN_MAPS:
        return 0.0, 1.0 if name in UNITLESS else math.log(max(card.num_classes, 2))
    black = white = 0.0
    for values_hW in (values_HW[rows] for rows in blocks(values_HW.shape[0])):  # what follows passes over NaN
        black = min(black, float(np.fmin.reduce(values_hW, axis=None, initial=0)))
        white = max(white, float(np.fmax.reduce(values_hW, axis=None, initial=0)))
    return black, white if white > black else 1.0


def palette(card: Card) -> bytes:
    """Make 768 bytes: the classes' colours by id, black for other ids, and for IGNORE a colour that no class has: black
    too, or else a magenta."""
    colors = np.zeros((256, 3), np.uint8)
    colors[: card.num_classes] = [c.color for c in card.classes]
    free = ({(0, 0, 0)} | {(255, green, 255) for green in range(256)}) - {c.color for c in card.classes}
    colors[IGNORE] = min(free)
    return colors.tobytes()


def paint(labels_hW: NDArray[np.uint8], card: Card, *, y0: int = 0, stripe_px: int = STRIPE_PX) -> NDArray[np.uint8]:
    """Paint rows of labels from row y0 on in the model's colours, [h, W, 3]; where there is none, in black and white
    stripes, which no class can look like."""
    colors_hW3 = np.frombuffer(palette(card), np.uint8).reshape(256, 3)[labels_hW]
    y, x = np.nonzero(labels_hW == IGNORE)
    colors_hW3[y, x] = (255 * ((x + y + y0) // stripe_px % 2)).astype(np.uint8)[:, None]
    return colors_hW3


def shown(prediction: Prediction, rows: slice = slice(None)) -> NDArray[np.uint8]:
    """Show the image's red, green and blue, or its first band where it has none of them, uint8 [h, W, 3].

    Where it is not of 8 bits, black and white are two standard deviations from the mean of what the network saw, or 0
    and 1 of what it is given where its card names no mean.
    """
    assert prediction.image is not None
    spec, values = prediction.card.input, prediction.image[rows, :]
    bands = [spec.bands.index(band) for band in COLOURS] if {*COLOURS} <= {*spec.bands} else [0, 0, 0]
    if spec.dtype == "uint8":
        return np.asarray(values if spec.bands == COLOURS else values[:, :, bands], np.uint8)
    seen = normalise(values, spec)[:, :, :: -1 if spec.order == "BGR" else 1][:, :, bands]
    return (255 * (seen / 4 + 0.5 if any(spec.mean) else seen)).clip(0, 255).astype(np.uint8)


def overlay(prediction: Prediction, rows: slice = slice(None)) -> NDArray[np.uint8]:
    """Lay the labels' colours over the image, [h, W, 3]."""
    assert prediction.image is not None
    height, width = prediction.labels_HW.shape
    stripe_px = max(STRIPE_PX, max(height, width) // STRIPES)
    colors_hW3 = paint(prediction.labels_HW[rows], prediction.card, y0=rows.indices(height)[0], stripe_px=stripe_px)
    blended_hW3 = shown(prediction, rows) * np.uint16(256 - OPACITY) + colors_hW3 * np.uint16(OPACITY)
    return (blended_hW3 >> 8).astype(np.uint8)


def write_heat(values_HW: FloatArray, file: BinaryIO, *, top: float) -> None:
    """Write a map as a PNG in colours from dark (0) to light (`top` and above)."""
    about = PngInfo()
    about.add_text("Software", "Penumbra")
    heat_picture(values_HW, top=top).save(file, "PNG", pnginfo=about)


def heat_picture(values_HW: FloatArray, *, top: float) -> Image.Image:
    """Draw a map in colours from dark (0) to light (`top` and above); what is no number is dark."""
    grey = np.clip(np.nan_to_num(values_HW) * (255 / top), 0, 255).astype(np.uint8)
    stops, places = np.array([ImageColor.getrgb(tone) for tone in HEAT]), np.linspace(0, 255, len(HEAT))
    table = np.stack([np.interp(range(256), places, stops[:, band]) for band in range(3)], -1)
    return Image.fromarray(np.rint(table).astype(np.uint8)[grey])


def thumbnail(picture: Image.Image, longest_px: int, kind: str) -> bytes:
    """Shrink a picture in place until no side is longer, and write it in a format of Pillow's."""
    picture.thumbnail((longest_px, longest_px))
    picture.save(file := io.BytesIO(), kind)
    return file.getvalue()
