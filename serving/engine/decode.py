"""From bytes to pixels: any common picture becomes uint8 [H, W, 3] RGB, or one sentence why not.

The header is checked before a pixel is decoded. Orientation (EXIF) is applied, so an answer has the size that
a viewer shows. Grey is repeated to three channels, 16-bit values keep their high byte, palettes and CMYK are
converted, alpha is dropped, and of several frames the first is taken.
"""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from penumbra.models.errors import BadImage, TooLarge
from penumbra.serving.engine.options import Limits
from penumbra.serving.engine.raster import Pixels, Raster, open_raster

SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that exchange height and width."""
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")
PILLOW_FAULTS = (OSError, ValueError, SyntaxError, TypeError, EOFError, KeyError, IndexError, OverflowError,
                 MemoryError, NotImplementedError, RuntimeError, struct.error, zlib.error)  # fmt: skip
"""What Pillow raises on malformed files; hostile ones reach corners that its own exception types do not name."""


Admit = Callable[[int, int], object]
"""Called with the answer's height and width before any pixel is decoded; it may refuse by raising."""


def open_image(source: bytes | Path, limits: Limits, *, admit: Admit | None = None) -> Pixels:
    """An encoded picture: plain TIFF as a raster of which no pixel is read yet, all else decoded.

    Raises BadImage, and TooLarge before decoding pixels over the limit.
    """
    raster = open_raster(source)
    if raster:
        _admit(raster.shape[:2], limits, admit)
        return raster
    with _header(source, limits) as picture:
        _admit(_size_as_shown(picture), limits, admit)
        try:
            return _to_rgb(ImageOps.exif_transpose(picture))
        except PILLOW_FAULTS as error:
            reason = str(error).partition("\n")[0][:120] or type(error).__name__
            raise BadImage(f"the {picture.format} image is damaged or truncated ({reason})") from None


def measure_image(source: bytes | Path, limits: Limits) -> tuple[int, int]:
    """Height and width as a viewer shows it, by the header alone. Raises as `open_image`."""
    raster = open_raster(source)
    if raster:
        size = raster.shape[:2]
    else:
        with _header(source, limits) as picture:
            size = _size_as_shown(picture)
    _admit(size, limits, None)
    return size


def decode_image(data: bytes, limits: Limits, *, admit: Admit | None = None) -> NDArray[np.uint8]:
    """Pixels of an encoded picture, as an array. Raises as `open_image`."""
    image = open_image(data, limits, admit=admit)
    return image[:, :] if isinstance(image, Raster) else image


def _admit(size: tuple[int, int], limits: Limits, admit: Admit | None) -> None:
    check_pixels(*size, limits)
    if admit:
        admit(*size)


@contextmanager
def _header(source: bytes | Path, limits: Limits) -> Iterator[Image.Image]:
    """A picture of which only the header is read so far."""
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        head = file.read(8)
        if not head:
            raise BadImage(f"the image is empty (0 bytes); one of {', '.join(FORMATS)} is wanted")
        num_bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
        try:
            picture = Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError:
            raise TooLarge(_pixels_sentence("more than 178,956,970", limits)) from None
        except PILLOW_FAULTS:
            raise BadImage(
                f"the image cannot be read: {num_bytes} bytes starting {head!r} are none of {', '.join(FORMATS)}"
            ) from None
        check_pixels(picture.height, picture.width, limits)  # here already: Pillow decodes a PNG to find its EXIF
        yield picture


def _size_as_shown(picture: Image.Image) -> tuple[int, int]:
    """Height and width once the orientation is applied; a header that cannot be read has none."""
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except PILLOW_FAULTS:
        orientation = 1
    return (picture.width, picture.height) if orientation in SIDEWAYS else (picture.height, picture.width)


def check_pixels(height: int, width: int, limits: Limits) -> None:
    """Raises TooLarge when an image has more pixels than one request may have."""
    if height * width > limits.pixels:
        raise TooLarge(_pixels_sentence(f"{width}x{height} = {width * height:,}", limits))


def _pixels_sentence(measured: str, limits: Limits) -> str:
    return f"the image has {measured} pixels and the limit is {limits.pixels:,}; send a smaller image or parts of it"


def check_array(image: Pixels, limits: Limits) -> Pixels:
    """The image itself if it is one (uint8 [H, W, 3], not empty). Raises BadImage or TooLarge."""
    if isinstance(image, Raster):
        check_pixels(image.shape[0], image.shape[1], limits)
        return image
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise BadImage(f"the image is {image.dtype} {list(image.shape)}; uint8 [height, width, 3] is wanted")
    check_pixels(image.shape[0], image.shape[1], limits)
    return np.ascontiguousarray(image)


def _to_rgb(picture: Image.Image) -> NDArray[np.uint8]:
    if picture.mode.startswith("I") or picture.mode == "F":
        return _from_deep_grey(np.asarray(picture), picture.mode)
    return np.asarray(picture.convert("RGB"))


def _from_deep_grey(values: NDArray[np.generic], mode: str) -> NDArray[np.uint8]:
    if mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"pixel mode {mode} with values outside 0..65535 is not read; 8 or 16 bits are")
    grey = (values.astype(np.uint16) >> 8).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)
