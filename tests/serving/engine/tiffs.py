"""TIFFs as rasterio writes them, and how the engine opens them."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin

from penumbra.serving.engine.raster import Raster, open_raster

PLACE = {"crs": "EPSG:32631", "transform": from_origin(500_000, 5_800_000, 2, 3)}
GREY = [255, 1023, 2047, 4095, 16383, 65535]


def tiff(values: np.ndarray, *, colours: str = "", names: str = "", mask: Any = None, **facts: Any) -> bytes:
    """A GeoTIFF of values [H, W] or [H, W, bands]. colours, names: of its bands, with spaces between them."""
    bands = np.atleast_3d(values).transpose(2, 0, 1)
    shape = {"count": bands.shape[0], "height": bands.shape[1], "width": bands.shape[2], "dtype": bands.dtype.name}
    with rasterio.MemoryFile() as memory:
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), memory.open(driver="GTiff", **(shape | PLACE | facts)) as file:
            if colours:
                file.colorinterp = [ColorInterp[name] for name in colours.split()]
            file.write(bands)
            for band, name in enumerate(names.split(), 1):
                file.set_band_description(band, name)
            if mask is not None:
                file.write_mask(mask)
        return bytes(memory.read())


def opened(source: bytes | Path) -> Raster:
    raster = open_raster(source)
    assert raster is not None
    return raster


def placed(raster: Raster) -> bool:
    return bool(raster.place.crs.to_epsg() == 32631 and raster.place.transform == PLACE["transform"])


def pillows(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "TIFF", **options)
    return buffer.getvalue()


def retagged(data: bytes, tag: int, value: int) -> bytes:
    """A little-endian TIFF with another value of a SHORT tag that it has, or in place of one that no reader needs."""
    place = struct.unpack_from("<I", data, 4)[0]
    entries = struct.unpack_from("<H", data, place)[0]
    changed, spare = bytearray(data), None
    for entry in range(place + 2, place + 2 + 12 * entries, 12):
        found = struct.unpack_from("<H", data, entry)[0]
        if found == tag:
            struct.pack_into("<HHII", changed, entry, tag, 3, 1, value)
            return bytes(changed)
        spare = entry if found == 284 else spare  # planar configuration, 1 by default
    assert spare is not None
    struct.pack_into("<HHII", changed, spare, tag, 3, 1, value)
    return bytes(changed)
