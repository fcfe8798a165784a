"""An answer's arrays without loss: npz, and Cloud-Optimized GeoTIFF that lies where its image lies."""

import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, BinaryIO

import numpy as np
import rasterio
import rasterio.shutil
from numpy.lib import format as npy
from numpy.typing import NDArray

from penumbra.models.card import IGNORE
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.options import PROBABILITIES
from penumbra.serving.engine.raster import gdal
from penumbra.serving.render.pictures import blocks, overlay, palette

TILE = 512


def write_npz(prediction: Prediction, file: BinaryIO) -> None:
    """Write `labels` uint8 and the maps float32 [H, W], uncompressed: noisy maps do not shrink, and this is fast.

    And `probabilities` float32 [K, H, W] where they were asked for. The archive's comment says who answered, and the
    scores, as JSON.
    """
    arrays: dict[str, NDArray[Any]] = {"labels": prediction.labels_HW, **prediction.maps}
    if prediction.prob_KHW is not None:
        arrays[PROBABILITIES] = prediction.prob_KHW
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        about = prediction.origin | prediction.scored | {"software": "Penumbra"}
        archive.comment = json.dumps(about).encode()
        for name, values in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                header = {"descr": values.dtype.str, "fortran_order": False, "shape": values.shape}
                npy.write_array_header_1_0(entry, header)
                for rows in blocks(values.shape[0]):
                    entry.write(np.ascontiguousarray(values[rows]).data)


def write_tiff(prediction: Prediction, file: BinaryIO, *, bands: Sequence[str]) -> None:
    """Write pictures (`labels` or `overlay`, alone) or maps in float32, a band each, as a Cloud-Optimized GeoTIFF.

    An answer to a GeoTIFF lies where its image does. Where that has no measurement, labels are IGNORE and maps are NaN;
    both are what the file declares as nodata. Files over 4 GB become BigTIFF. A file on disk has another one beside it
    meanwhile: the layout has the overviews first, so the rows must be all there before it is begun.
    """
    height, width = prediction.labels_HW.shape
    with gdal(), _paths(file) as (plain, target):
        with rasterio.open(plain, "w", **_profile(prediction, bands)) as dataset:
            _annotate(dataset, prediction, bands)
            for rows in blocks(height):
                frame = rasterio.windows.Window(0, rows.start, width, rows.stop - rows.start)
                for number, values_hW in enumerate(_values(prediction, bands, rows), 1):
                    dataset.write(values_hW, number, window=frame)
        rasterio.shutil.copy(
            plain, target, driver="COG", blocksize=TILE, bigtiff="IF_SAFER", compress="DEFLATE", level=1,
            predictor="FLOATING_POINT" if _is_map(bands) else "NO",
            overview_resampling="NEAREST" if bands[0] == "labels" else "AVERAGE",
        )  # fmt: skip


@contextmanager
def _paths(file: BinaryIO) -> Iterator[tuple[str, str]]:
    """Give GDAL two paths, in memory or on the file's disk: one that is gone afterwards, and the file's content."""
    on_disk = hasattr(file, "name")
    with nullcontext(file) if on_disk else rasterio.MemoryFile(ext=".tif") as target:
        plain = f"{target.name}.rows"
        try:
            yield plain, target.name
            if not on_disk:
                file.write(target.read())
        finally:
            if rasterio.shutil.exists(plain):
                rasterio.shutil.delete(plain, driver="GTiff")


def _is_map(bands: Sequence[str]) -> bool:
    return bands[0] not in ("labels", "overlay")


def _profile(prediction: Prediction, bands: Sequence[str]) -> dict[str, Any]:
    height, width = prediction.labels_HW.shape
    place = prediction.image and prediction.image.place
    return {
        "driver": "GTiff", "height": height, "width": width, "count": 3 if bands[0] == "overlay" else len(bands),
        "dtype": "float32" if _is_map(bands) else "uint8",
        "nodata": {"labels": IGNORE, "overlay": None}.get(bands[0], np.nan),
        "crs": place and place.crs, "transform": place and place.transform,
        "tiled": True, "blockxsize": TILE, "blockysize": TILE, "bigtiff": "IF_SAFER", "interleave": "band",
    }  # fmt: skip


def _annotate(target: Any, prediction: Prediction, bands: Sequence[str]) -> None:
    """Say who answered, the classes and their colours, the bands and their units, and a place that is no transform."""
    facts = prediction.origin | prediction.shares
    target.update_tags(**{f"PENUMBRA_{name.upper()}": fact for name, fact in facts.items()})
    place = prediction.image and prediction.image.place
    if place and place.gcps:
        target.gcps = (place.gcps, place.crs or rasterio.CRS())
    if place and place.rpcs:
        target.rpcs = place.rpcs
    if bands[0] == "labels":
        colors = np.frombuffer(palette(prediction.card), np.uint8).reshape(256, 3)
        target.write_colormap(1, {k: (*color, 255) for k, color in enumerate(colors.tolist())})
        target.update_tags(1, **{f"CLASS_{k}": one.name for k, one in enumerate(prediction.card.classes)})
    if bands[0] != "overlay":
        for number, name in enumerate(bands, 1):
            target.set_band_description(number, name)
            if unit := prediction.card.unit_of(name):
                target.set_band_unit(number, unit)


def _values(prediction: Prediction, bands: Sequence[str], rows: slice) -> Iterator[NDArray[Any]]:
    """Give one block [h, W] of each band in turn."""
    if bands[0] == "labels":
        yield prediction.labels_HW[rows]
        return
    if bands[0] == "overlay":
        yield from overlay(prediction, rows).transpose(2, 0, 1)
        return
    void_hW = prediction.image.void(rows) if prediction.image else None
    for name in bands:
        values_hW = prediction.maps[name][rows]
        yield values_hW if void_hW is None else np.where(void_hW, np.float32(np.nan), values_hW)
