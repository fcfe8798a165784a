"""Images, and what is known of them beside their pixels; TIFF files of any size, read where windows are cut."""

import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.errors import NodataShadowWarning, NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window as Frame

from penumbra.models.card import RGB
from penumbra.models.errors import BadImage
from penumbra.serving.engine import layout
from penumbra.serving.engine.directories import BLOCK_PIXELS, find_directory
from penumbra.serving.engine.layout import RGB8, Place, Reading
from penumbra.serving.engine.values import brightness, check_type, examine, to_8_bits, to_type

CACHE_BYTES = 192 * 2**20
"""GDAL's cache of decoded blocks; by default a twentieth of the memory. It holds a row of windows of 120,000 px."""
PIECE_PIXELS = 2**20
"""As many are read together to find white, or to fill the memory."""
DRIVERS = {"TIFF": "GTiff", "PNG": "PNG"}
RASTER_FAULTS = (RasterioError, CPLE_BaseError, OSError, ValueError, TypeError, MemoryError, LookupError, OverflowError)


@contextmanager
def gdal() -> Iterator[None]:
    """Bound GDAL's cache, and keep it from files beside the one it is given."""
    for kind in (NotGeoreferencedWarning, NodataShadowWarning):  # a picture without a place, or with much to say
        warnings.simplefilter("ignore", kind)
    with rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES, GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", GDAL_PAM_ENABLED="NO"):
        yield


class Raster:
    """An image [H, W, C] of the bands and type that a card names; this one's pixels are in memory.

    `raster[rows, columns]` gives pixels; place says where they lie on the ground, where the format can.
    """

    place: Place | None = None

    def __init__(
        self, pixels_HWC: NDArray[Any], *, void_HW: NDArray[np.bool_] | None = None, warnings: tuple[str, ...] = ()
    ) -> None:
        self._pixels: NDArray[Any] | None = pixels_HWC
        self._void_HW, self._warnings = void_HW, warnings
        self.damage = set[str]()
        """What was found damaged so far where pixels were read, in words."""
        self.shape: tuple[int, int, int] = pixels_HWC.shape
        self.dtype = pixels_HWC.dtype

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences about what the caller should know of how the image was read."""
        return self._warnings

    def __getitem__(self, part: tuple[slice, slice]) -> NDArray[Any]:
        """Give pixels [h, w, C]. Raises BadImage where the file is damaged."""
        assert self._pixels is not None
        return self._pixels[part]

    def load(self) -> "Raster":
        """Hold all pixels in memory from now on: for images that are small, and before threads share it."""
        return self

    @property
    def num_bytes(self) -> int:
        """Count the bytes that are held of the image."""
        return sum(held.nbytes for held in (self._pixels, self._void_HW) if held is not None)

    def void(self, rows: slice) -> NDArray[np.bool_] | None:
        """Say which pixels of these rows hold no measurement; None where the image does not speak of such."""
        return None if self._void_HW is None else self._void_HW[rows]


class FileRaster(Raster):
    """A file that GDAL reads where windows are cut from it; threads take turns.

    Grey is repeated, palettes and inks become colours, and numbers have the card's type: 8 bits, or as they are
    (`penumbra.serving.engine.values`).
    """

    def __init__(
        self, dataset: Any, source: object, reading: Reading, *, kind: str, orientation: int, warnings: tuple[str, ...]
    ) -> None:  # fmt: skip
        """source: the path, or what must outlive the dataset that reads it. kind: of file, for sentences."""
        self._dataset, self._source, self._kind, self._spec = dataset, source, kind, reading.spec
        spec = reading.spec
        self._lock, self._white_lock = threading.Lock(), threading.Lock()
        self._pixels, self._void_HW, self.dtype = None, None, np.dtype(spec.dtype)
        self._bands, self._alpha, of_bands = layout.choose_bands(dataset, reading)
        self._dtype = np.dtype(dataset.dtypes[self._bands[0] - 1])
        if self._dtype.kind not in "uif":
            raise BadImage(f"the {kind} image has {self._dtype} values; whole numbers and floats are read")
        check_type(self._dtype, spec, what=f"{kind} image")
        no_mask = {"all_valid"} if self._alpha else {"all_valid", "alpha"}
        self._is_masked = any(no_mask.isdisjoint(flag.name for flag in flags) for flags in dataset.mask_flag_enums)
        self._is_inverted = dataset.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES"
        self._palette = None if self._is_inverted else layout.palette_of(dataset, self._bands[0])
        self._is_inks = spec.bands == RGB and len(self._bands) == len(layout.INKS)
        shows_colours = self.dtype == np.uint8 and (self._palette is None or spec.bands in (RGB, layout.GREY))
        if not shows_colours and (self._is_inks or self._is_inverted or self._palette is not None):
            raise BadImage(
                f"the {kind} image is of inks, of a palette, or white where values are least, and the model reads "
                f"{self.dtype} values of {', '.join(spec.bands)} as they are; convert it to these"
            )
        declared = int(dataset.tags(self._bands[0], ns="IMAGE_STRUCTURE").get("NBITS", 0))
        num_bits = declared if self._dtype.kind == "u" and declared <= 16 else 0
        self._white = 2**num_bits - 1 if num_bits or self._palette is not None else None
        self._flips = layout.FLIPS[orientation]
        size = (dataset.width, dataset.height) if self._flips[0] else (dataset.height, dataset.width)
        self.shape = (*size, spec.num_bands)
        self._nodata = dataset.nodata
        self.place, of_place = layout.read_place(dataset, self._flips, source if isinstance(source, Path) else None)
        self._warnings, self.damage = warnings + of_bands + of_place, set()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is known so far: damage is found where the file is read."""
        self._find_white()
        said = f"the {self._kind} image is damaged, and its pixels there are a guess"
        return self._warnings + tuple(f"{said} ({what})" for what in sorted(self.damage))

    def __getitem__(self, part: tuple[slice, slice]) -> NDArray[Any]:
        if self._pixels is not None:
            return self._pixels[part]
        white, values, spec = self._find_white(), self._read(*part, self._bands), self._spec
        if self._palette is not None:
            values = self._palette[values[0]].transpose(2, 0, 1)
        elif self.dtype != np.uint8:
            values = to_type(values, spec, self._nodata)
        else:
            values = to_8_bits(values, white)
            if self._is_inks:
                light = 255 - values.astype(np.uint16)
                values = (light[:3] * light[3] // 255).astype(np.uint8)
            if self._is_inverted:
                values = 255 - values
        if len(values) > spec.num_bands:
            return brightness(values.transpose(1, 2, 0))
        return np.ascontiguousarray(np.broadcast_to(values, (spec.num_bands, *values.shape[1:])).transpose(1, 2, 0))

    def load(self) -> "FileRaster":
        height, width = self.shape[:2]
        pixels, stored_rows = np.empty(self.shape, self.dtype), self._dataset.block_shapes[0][0]
        void_HW = np.empty((height, width), np.bool_) if self.can_be_void else None
        step = height if self._flips[0] else stored_rows * max(1, PIECE_PIXELS // (stored_rows * width))
        for rows in (slice(y, y + step) for y in range(0, height, step)):
            pixels[rows] = self[rows, :]
            if void_HW is not None:
                void_HW[rows] = self.void(rows)
        self._pixels, self._void_HW = pixels, void_HW
        return self

    @property
    def can_be_void(self) -> bool:
        """Whether the file speaks of pixels that hold no measurement."""
        return self._is_masked or bool(self._alpha) or self._nodata is not None or self._dtype.kind == "f"

    def void(self, rows: slice) -> NDArray[np.bool_] | None:
        """A pixel is void by mask, by alpha (0), by nodata in all bands, or by NaN or infinity in one."""
        if self._void_HW is not None or not self.can_be_void:
            return super().void(rows)
        columns = slice(None)
        values = self._read(rows, columns, self._bands)
        void_hW: NDArray[np.bool_] = (values == self._nodata).all(0) | ~np.isfinite(values).all(0)
        if self._is_masked:
            void_hW |= (self._read(rows, columns, self._bands, masks=True) == 0).all(0)
        if self._alpha:  # GDAL's mask leaves it out where there is a nodata value
            void_hW |= self._read(rows, columns, [self._alpha])[0] == 0
        return void_hW

    def _find_white(self) -> int:
        """Find the value that becomes white: one for the whole file, however it is read."""
        with self._white_lock:
            if self._white is None:
                num_values = self.shape[0] * self.shape[1] * len(self._bands)
                self._white, of_values = examine(self._measurements(), self._dtype, self._spec, num_values=num_values)
                self._warnings += of_values
            return self._white

    def _measurements(self) -> Iterator[NDArray[Any]]:
        """Read all values that are measurements, piece by piece."""
        width, height = self._dataset.width, self._dataset.height
        across = self._dataset.block_shapes[0][1]
        down = max(1, PIECE_PIXELS // across)
        for y in range(0, height, down):
            for x in range(0, width, across):
                frame = Frame(x, y, min(across, width - x), min(down, height - y))
                values = self._read_stored(frame, self._bands)
                if self._is_masked:
                    values = values[self._read_stored(frame, self._bands, masks=True) != 0]
                if self._dtype.kind == "f" or self._nodata is not None:
                    values = values[np.isfinite(values) & (values != self._nodata)]
                yield values

    def _read(self, rows: slice, columns: slice, bands: list[int], *, masks: bool = False) -> NDArray[Any]:
        """Read values, or masks, of upright pixels [bands, h, w]."""
        (y0, y1), (x0, x1) = rows.indices(self.shape[0])[:2], columns.indices(self.shape[1])[:2]
        exchange, reverse_rows, reverse_columns = self._flips
        if reverse_rows:
            y0, y1 = self.shape[0] - y1, self.shape[0] - y0
        if reverse_columns:
            x0, x1 = self.shape[1] - x1, self.shape[1] - x0
        frame = Frame(y0, x0, y1 - y0, x1 - x0) if exchange else Frame(x0, y0, x1 - x0, y1 - y0)
        return layout.make_upright(self._read_stored(frame, bands, masks=masks), self._flips)

    def _read_stored(self, frame: Frame, bands: list[int], *, masks: bool = False) -> NDArray[Any]:
        read = self._dataset.read_masks if masks else self._dataset.read
        try:
            with self._lock, gdal(), _noting_repairs(self.damage):
                values: NDArray[Any] = read(bands, window=frame)
        except RASTER_FAULTS as error:
            raise BadImage(f"the {self._kind} image is damaged or truncated ({_reason(error)})") from None
        return values


Pixels = NDArray[Any] | Raster
"""What an image may be where the engine is given one: an array [H, W, C] says nothing beside its pixels."""


def open_raster(source: bytes | Path, reading: Reading = RGB8) -> FileRaster | None:
    """Open the raster in a TIFF file or its bytes; None where it is no TIFF.

    No pixel is read. Raises BadImage where the header is broken or the image does not fit, and BadOption for bands.
    """
    with BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        found = find_directory(file)
    if not found:
        return None
    directory, of_file = found
    return open_file(source, "TIFF", reading, at=directory.offset, orientation=directory.orientation, warnings=of_file)


def open_file(
    source: bytes | Path, kind: str, reading: Reading, *, at: int = 0, orientation: int = 1,
    warnings: tuple[str, ...] = (),
) -> FileRaster:  # fmt: skip
    """Open what GDAL reads in a file of a kind (TIFF or PNG). at: offset of the TIFF's directory; 0 is the first.

    Raises as `open_raster`.
    """
    try:
        with gdal():
            kept = rasterio.MemoryFile(source) if isinstance(source, bytes) else source
            name = kept if isinstance(kept, Path) else kept.name
            dataset = rasterio.open(f"GTIFF_DIR:off:{at}:{name}" if at else name, driver=DRIVERS[kind])
            height, width = dataset.block_shapes[0]
            together = dataset.count if dataset.profile.get("interleave") == "pixel" else 1
            if height * width > BLOCK_PIXELS or height * width * together > 4 * BLOCK_PIXELS:
                raise BadImage(
                    f"the {kind} image has blocks of {width}x{height} pixels of {together} bands, which are read "
                    "whole; tiles of 512x512 are good"
                )
            return FileRaster(dataset, kept, reading, kind=kind, orientation=orientation, warnings=warnings)
    except RASTER_FAULTS as error:
        raise BadImage(f"the {kind} image cannot be read ({_reason(error)})") from None


@contextmanager
def _noting_repairs(repairs: set[str]) -> Iterator[None]:
    """Add to the set what GDAL says in this thread that it repairs."""
    listener = _listener()
    listener.repairs = repairs
    try:
        yield
    finally:
        listener.repairs = None


@cache
def _listener() -> threading.local:
    """Note each thread's repairs: rasterio tells of GDAL's warnings in the log alone."""
    listener = threading.local()

    def listen(record: logging.LogRecord) -> bool:
        repairs: set[str] | None = getattr(listener, "repairs", None)
        if repairs is not None:
            repairs.add(_plain(re.sub("^CPLE_AppDefined( in |:)", "", record.getMessage())))
        return repairs is None

    for name in ("rasterio._env", "rasterio._err"):
        log = logging.getLogger(name)
        log.setLevel(logging.WARNING)  # whatever else is logged
        log.addFilter(listen)
    return listener


def _reason(error: BaseException) -> str:
    return _plain(str(error.__cause__ or error)) or type(error).__name__


def _plain(text: str) -> str:
    """Take GDAL's first line without the name of the file, which is not the caller's."""
    text = re.sub(r"['\"]?(GTIFF_DIR:\S*?)?/\S+\s*|\S+, band \d+: ?|^\S+: ?", "", text.partition("\n")[0])
    return text[:120]
