"""From bytes to pixels: any common picture becomes [H, W, C] of a card's bands and type, or one sentence why not.

The header is checked before a pixel is decoded. Orientation (EXIF) is applied, so an answer has the size that
a viewer shows. Grey is repeated to three channels, deep values become 8 bits (`penumbra.serving.engine.values`),
palettes and CMYK are converted, and of several frames the first is taken. Where alpha is 0 nothing was measured.
"""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from penumbra.models.card import RGB, InputSpec
from penumbra.models.errors import BadImage, TooLarge, first_line
from penumbra.serving.engine.arrays import array_header, is_array
from penumbra.serving.engine.damage import check_png, has_all_rows, read_jpeg, shorten_webp, slim_png
from penumbra.serving.engine.layout import FLIPS, RGB8, Place, Reading, find_bands, make_upright
from penumbra.serving.engine.options import PILLOW_PIXELS, Limits
from penumbra.serving.engine.raster import PIECE_PIXELS, Pixels, Raster, open_file, open_raster
from penumbra.serving.engine.values import brightness, check_type, examine, to_type

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")
SUFFIXES = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".tif", ".tiff", ".btf", ".tf8", ".bmp")
"""How their files' names end."""
STARTS = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG", b"BM": "BMP", b"RIFF": "WEBP"}
"""First bytes -> format, of those that are no TIFF."""
PNG_DEPTH = 24
"""Place of the bits per channel in a PNG."""
WEBP_DAMAGE = "the WEBP image is damaged, and its pixels there are a guess (it ends before its data do)"
PILLOW_FAULTS = (OSError, ValueError, SyntaxError, TypeError, EOFError, KeyError, IndexError, OverflowError,
                 MemoryError, NotImplementedError, RuntimeError, struct.error, zlib.error)  # fmt: skip
"""What Pillow raises on malformed files; hostile ones reach corners that its own exception types do not name."""


@dataclass(frozen=True, slots=True)
class Header:
    """A header says what is known of a picture before any pixel is read: its height and width, as a viewer shows them,
    and where it lies. read: gives the picture, a TIFF as a raster of which no pixel is read yet, all else decoded."""

    size: tuple[int, int]
    place: Place | None
    read: Callable[[], Raster]


def open_image(source: bytes | Path, limits: Limits, reading: Reading = RGB8) -> Raster:
    """Open an encoded picture. Raises as `read_header`, and BadImage for what only its pixels tell."""
    with read_header(source, limits, reading) as header:
        return header.read()


@contextmanager
def read_header(source: bytes | Path, limits: Limits, reading: Reading = RGB8) -> Iterator[Header]:
    """Read the header of an encoded picture, which is open meanwhile.

    Raises BadImage, BadOption for bands that were chosen, and TooLarge for pixels over the limit.
    """
    with ExitStack() as opened:
        if raster := open_raster(source, reading):
            header = Header(raster.shape[:2], raster.place, lambda: raster)
        elif is_array(source):
            (height, width, num_bytes), array = opened.enter_context(array_header(source))
            usual = reading.spec.num_bands * np.dtype(reading.spec.dtype).itemsize
            limits = replace(limits, pixels=min(limits.pixels, PILLOW_PIXELS))  # it is held whole, also of a job
            check_pixels(-(-height * num_bytes // usual), width, limits)  # all bands are unpacked, of whatever type
            header = Header((height, width), None, lambda: check_array(array(), limits, reading))
        else:
            picture, kind, file = opened.enter_context(_header(source, limits))
            upright = picture.size if FLIPS[_orientation(picture)][0] else picture.size[::-1]
            header = Header(upright, None, lambda: _decode(picture, kind, file, reading))
        check_pixels(*header.size, limits)
        yield header


@contextmanager
def _header(source: bytes | Path, limits: Limits) -> Iterator[tuple[Image.Image, str, BinaryIO]]:
    """Give a picture of which only the header is read so far, its format, and the file that it is read from."""
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as opened:
        file: BinaryIO = opened
        kind = _kind_of(file)
        if kind == "PNG":
            file = io.BytesIO(slim_png(file.read()))
        try:
            picture = Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError:
            raise TooLarge(_pixels_sentence(f"more than {PILLOW_PIXELS:,}", limits)) from None
        except PILLOW_FAULTS:
            raise BadImage(
                f"the {kind} image is damaged, or of a kind that is not read ({_fault(kind, file)})"
            ) from None
        yield picture, kind, file


def _kind_of(file: BinaryIO) -> str:
    """Tell the format by a file's first bytes. Raises BadImage where it is none of those that are read."""
    head = file.read(12)
    if not head:
        raise BadImage(f"the image is empty (0 bytes); one of {', '.join(FORMATS)} is wanted")
    for start, kind in STARTS.items():
        if head.startswith(start) and (kind != "WEBP" or head[8:] == b"WEBP"):
            file.seek(0)
            return kind
    num_bytes = file.seek(0, io.SEEK_END)
    raise BadImage(
        f"the image cannot be read: {num_bytes} bytes starting {head[:8]!r} are none of {', '.join(FORMATS)}"
    )


def _fault(kind: str, file: BinaryIO) -> str:
    """Say why Pillow does not open a file: its own search for a format keeps that to itself."""
    file.seek(0)
    try:
        Image.OPEN[kind][0](file, "")
    except (SyntaxError, OSError, ValueError) as error:
        if error.__cause__ is None:  # else Pillow stumbled
            return first_line(error)
    except PILLOW_FAULTS:
        pass
    return "its header is broken or ends too early"


def _orientation(picture: Image.Image) -> int:
    """Read how a picture lies (EXIF); one whose header cannot be read is upright."""
    try:  # of a PNG, its own `getexif` decodes the pixels, and tells of a fault in them this once only
        orientation: int = Image.Image.getexif(picture).get(ExifTags.Base.Orientation, 1)
    except PILLOW_FAULTS:
        return 1
    return orientation if orientation in FLIPS else 1


def check_pixels(height: int, width: int, limits: Limits) -> None:
    """Raises TooLarge when an image has more pixels than one request may have."""
    if height * width > limits.pixels:
        raise TooLarge(_pixels_sentence(f"{width}x{height} = {width * height:,}", limits))


def _pixels_sentence(measured: str, limits: Limits) -> str:
    return f"the image has {measured} pixels and the limit is {limits.pixels:,}; send a smaller image or parts of it"


def check_array(image: Pixels, limits: Limits, reading: Reading = RGB8) -> Raster:
    """Check an image against what a network reads, and make an array [H, W, C] a raster.

    Raises BadImage, TooLarge, and BadOption for bands that were chosen.
    """
    spec, found, dtype = reading.spec, f"{image.dtype} {list(image.shape)}", image.dtype.newbyteorder("=")
    if reading.chosen and isinstance(image, np.ndarray) and image.ndim == 3:
        image = image[:, :, [band - 1 for band in find_bands(reading, [""] * image.shape[2])[0]]]
    if dtype != spec.dtype or len(image.shape) != 3 or image.shape[2] != spec.num_bands or 0 in image.shape:
        bands = "" if spec.bands == RGB else f" of {', '.join(spec.bands)}"
        raise BadImage(f"the image is {found}; {spec.dtype} [height, width, {spec.num_bands}]{bands} is wanted")
    check_pixels(image.shape[0], image.shape[1], limits)
    if isinstance(image, Raster):
        return image
    image = np.require(image, dtype, ("C", "A"))
    if dtype == np.uint8:
        return Raster(image)
    void_HW = np.logical_not(np.isfinite(image).all(2)) if dtype.kind == "f" else None
    return _as_raster(to_type(image.transpose(2, 0, 1), spec, None).transpose(1, 2, 0), void_HW, (), spec)


def _decode(picture: Image.Image, kind: str, file: BinaryIO, reading: Reading) -> Raster:
    try:
        return _decode_pixels(picture, kind, file, reading)
    except PILLOW_FAULTS as error:
        raise BadImage(f"the {kind} image is damaged or truncated ({first_line(error)})") from None


def _decode_pixels(picture: Image.Image, kind: str, file: BinaryIO, reading: Reading) -> Raster:
    file.seek(0)
    data = file.read()
    read = read_jpeg(data, "CMYK" if picture.mode == "CMYK" else "RGB") if kind == "JPEG" else None
    if read:
        pixels, warnings = read
        if picture.mode == "CMYK":  # as everybody since Adobe's first version, the file has it inverted
            pixels = np.asarray(Image.fromarray(255 - pixels, "CMYK").convert("RGB"))
        upright = make_upright(pixels.transpose(2, 0, 1), FLIPS[_orientation(picture)]).transpose(1, 2, 0)
        return _of_colours(upright, None, warnings, reading)
    if kind == "PNG":
        check_png(data)
        if data[PNG_DEPTH] == 16:  # of colours, Pillow keeps the high byte only, whatever the low one holds
            return open_file(data, "PNG", reading, orientation=_orientation(picture)).load()
    shown = ImageOps.exif_transpose(picture)
    last_row = picture.crop((0, picture.height - 1, picture.width, picture.height))
    if kind == "PNG" and not np.asarray(last_row).any() and not has_all_rows(data):
        raise BadImage("the PNG image is damaged or truncated (its data end before its last row)")
    void_HW = None
    if shown.has_transparency_data:
        void_HW = np.asarray(shown.convert("RGBA").getchannel("A")) == 0
    is_one = not getattr(picture, "is_animated", False)  # of several frames nothing can be told by the data's end
    warnings = (WEBP_DAMAGE,) if kind == "WEBP" and is_one and _goes_astray(data) else ()
    return _of_colours(np.asarray(shown.convert("RGB")), void_HW, warnings, reading)


def _goes_astray(webp: bytes) -> bool:
    """Find out whether the decoder ends before the data do."""
    short = shorten_webp(webp)
    try:
        return short is not None and bool(Image.open(io.BytesIO(short), formats=["WEBP"]).load())
    except PILLOW_FAULTS:
        return False


def _of_colours(
    pixels_HW3: NDArray[np.uint8], void_HW: NDArray[np.bool_] | None, warnings: tuple[str, ...], reading: Reading
) -> Raster:  # fmt: skip
    """Make a raster of red, green and blue in the card's bands."""
    spec, pixels_HWC = reading.spec, pixels_HW3
    check_type(pixels_HWC.dtype, spec)
    found, of_bands = find_bands(reading, RGB)
    if found != [1, 2, 3]:
        pixels_HWC = pixels_HWC[:, :, [band - 1 for band in found]]
    if len(found) > spec.num_bands:
        if (pixels_HWC[:, :, :1] != pixels_HWC[:, :, 1:]).any():
            warnings += tuple(of_bands)
        pixels_HWC = brightness(pixels_HWC)
    return _as_raster(pixels_HWC, void_HW, warnings, spec)


def _as_raster(
    pixels_HWC: NDArray[Any], void_HW: NDArray[np.bool_] | None, warnings: tuple[str, ...], spec: InputSpec
) -> Raster:  # fmt: skip
    """Make a raster, and say what there is to know of its values where it is not void."""
    if void_HW is not None and not void_HW.any():
        void_HW = None
    step = max(1, PIECE_PIXELS // pixels_HWC.shape[1])
    parts = [slice(y, y + step) for y in range(0, len(pixels_HWC), step)]
    values = (pixels_HWC[rows] if void_HW is None else pixels_HWC[rows][~void_HW[rows]] for rows in parts)
    _, of_values = examine(values, pixels_HWC.dtype, spec, num_values=pixels_HWC.size)
    return Raster(np.ascontiguousarray(pixels_HWC), void_HW=void_HW, warnings=warnings + of_values)
