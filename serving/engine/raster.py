"""TIFF files read window by window, of any size, with what places them on the ground.

A `Raster` stands where an image array stands: the windows that the scheduler cuts are all that is read. Whatever is
not plain grey or colour in 8 or 16 bits (palettes, CMYK, turned pictures) is left to `penumbra.serving.engine.decode`.
"""

import io
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import rasterio
from numpy.typing import NDArray
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window as Frame

from penumbra.models.errors import BadImage

CACHE_BYTES = 192 * 2**20
"""GDAL's cache of decoded blocks; by default a twentieth of the memory. It holds a row of windows of 120,000 px."""
BLOCK_PIXELS = 2**26
"""Of a tile or strip, which is decoded as a whole: more than that no writer of rasters makes."""
MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of TIFF and BigTIFF, in either byte order."""
BITS, PHOTOMETRIC, ORIENTATION, SAMPLE_FORMAT = 258, 262, 274, 339
GREY, RGB, YCBCR = 1, 2, 6
RASTER_FAULTS = (RasterioError, OSError, ValueError, TypeError, MemoryError, IndexError, OverflowError)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a raster lies, as rasterio has it: crs and transform, or control points, or rational coefficients."""

    crs: Any
    transform: Any
    gcps: Any
    rpcs: Any


@contextmanager
def gdal() -> Iterator[None]:
    """GDAL with a bounded cache, that looks at no file beside the one it is given."""
    warnings.simplefilter("ignore", NotGeoreferencedWarning)  # a picture without a place is no fault
    with rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES, GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", GDAL_PAM_ENABLED="NO"):
        yield


class Raster:
    """A TIFF as uint8 [H, W, 3]: `raster[rows, columns]` reads just that; threads take turns.

    Grey is repeated, 16-bit values keep their high byte, and bands beyond the third are dropped. nodata: value of
    pixels that hold no measurement, or None.
    """

    def __init__(self, dataset: Any, source: object) -> None:
        self._dataset, self._source = dataset, source  # the source outlives the dataset that reads it
        self._lock = threading.Lock()
        self._pixels: NDArray[np.uint8] | None = None
        self._bands = [1, 2, 3] if dataset.count >= 3 else [1, 1, 1]
        self.shape = (int(dataset.height), int(dataset.width), 3)
        self.nodata: float | None = dataset.nodata
        gcps, gcp_crs = dataset.gcps
        self.place = Place(dataset.crs or gcp_crs, dataset.transform, gcps, dataset.rpcs)

    def __getitem__(self, part: tuple[slice, slice]) -> NDArray[np.uint8]:
        """Pixels [h, w, 3]. Raises BadImage where the file is damaged."""
        rows, columns = part
        if self._pixels is not None:
            return self._pixels[rows, columns]
        values = self._read(rows, columns, self._bands)
        if values.dtype != np.uint8:
            values = (values >> 8).astype(np.uint8)
        return np.ascontiguousarray(values.transpose(1, 2, 0))

    def load(self) -> "Raster":
        """Hold all pixels in memory from now on: for images that are small, and before threads share it."""
        self._pixels = self[:, :]
        return self

    def void(self, rows: slice) -> NDArray[np.bool_] | None:
        """Pixels of these rows that hold no measurement; None where the file does not speak of such."""
        if self.nodata is None:
            return None
        void_hW: NDArray[np.bool_] = (self._read(rows, slice(None), sorted(set(self._bands))) == self.nodata).all(0)
        return void_hW

    def _read(self, rows: slice, columns: slice, bands: list[int]) -> NDArray[Any]:
        y0, y1, _ = rows.indices(self.shape[0])
        x0, x1, _ = columns.indices(self.shape[1])
        try:
            with self._lock, gdal():
                values: NDArray[Any] = self._dataset.read(bands, window=Frame(x0, y0, x1 - x0, y1 - y0))
        except RASTER_FAULTS as error:
            raise BadImage(f"the TIFF image is damaged or truncated ({_reason(error)})") from None
        return values


Pixels = NDArray[np.uint8] | Raster
"""An image: an array [H, W, 3], or a file that is read where windows are cut from it."""


def open_raster(source: bytes | Path) -> Raster | None:
    """The raster in a TIFF file or its bytes; None where it is no TIFF, or not a plain one.

    No pixel is read. Raises BadImage where the header is broken.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        if not _is_plain(file):
            return None
    try:
        with gdal():
            held = rasterio.MemoryFile(source) if isinstance(source, bytes) else None
            dataset = rasterio.open(held.name if held else source, driver="GTiff")
    except RASTER_FAULTS as error:
        raise BadImage(f"the TIFF image cannot be read ({_reason(error)})") from None
    height, width = dataset.block_shapes[0]
    if height * width > BLOCK_PIXELS:
        raise BadImage(
            f"the TIFF image has blocks of {width}x{height} pixels, which are read whole; tiles of 512x512 are good"
        )
    return Raster(dataset, held)


def _is_plain(file: BinaryIO) -> bool:
    """Whether its first picture is upright grey or colour of 8 or 16 bits, by the header."""
    file.seek(0)
    head = file.read(16)
    if not head.startswith(MAGIC):
        return False
    try:
        tags = ImageFileDirectory_v2(head if head[2] == 43 or head[3] == 43 else head[:8])
        file.seek(tags.next)
        tags.load(file)
        bits, formats = _values(tags, BITS), _values(tags, SAMPLE_FORMAT)
    except Exception:  # a hostile directory may raise anything here, and then the ordinary decoder says what is wrong
        return False
    return (
        bits in ({8}, {16})
        and formats == {1}
        and _values(tags, ORIENTATION) == {1}
        and _values(tags, PHOTOMETRIC) <= {GREY, RGB, YCBCR}
    )


def _values(tags: ImageFileDirectory_v2, tag: int) -> set[int]:
    """All values of a tag; TIFF's default for every tag that is asked for here is 1."""
    value = tags.get(tag, 1)
    return set(value) if isinstance(value, tuple) else {value}


def _reason(error: BaseException) -> str:
    """GDAL's reason without the name of the file, which is not the caller's."""
    cause = str(error.__cause__ or error).partition("\n")[0]
    return re.sub(r"['\"]?/\S+\s*", "", cause)[:120] or type(error).__name__
