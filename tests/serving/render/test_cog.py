"""TIFF answers are Cloud-Optimized GeoTIFFs: what a far reader needs first comes first, and overviews are there."""

import dataclasses
import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from rasterio.control import GroundControlPoint
from rasterio.transform import from_origin

from penumbra.models.card import ExtraMap
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.raster import gdal
from penumbra.serving.render import Style, render
from penumbra.serving.render.arrays import write_tiff
from tests.serving.render.test_ground import coefficients, raster
from tests.serving.render.test_render import patches, prediction

SIZE = (1100, 1300)
PLACES: dict[str, dict[str, Any]] = {
    "transform": {"crs": "EPSG:32631", "transform": from_origin(500_000, 5_800_000, 10, 10)},
    "control points": {
        "gcps": [GroundControlPoint(row, col, 4 + col / 1e5, 52 - row / 1e5) for row in (0, 9) for col in (0, 9)],
        "crs": "EPSG:4326",
    },
    "coefficients": {"rpcs": coefficients(4)},
}
PLACES["control points of no system"] = PLACES["control points"] | {"crs": rasterio.CRS()}
KINDS = [("labels",), ("overlay",), ("entropy",), ("confidence", "entropy")]
TILE_OFFSETS = 324


@pytest.fixture
def answer(tmp_path: Path, rng: np.random.Generator) -> Prediction:
    labels = patches(rng, *SIZE)
    labels[100:400, 200:500] = 255
    image = raster(tmp_path, *SIZE, **PLACES["transform"])
    return dataclasses.replace(prediction(labels, 3), image=image)


def directories(data: bytes) -> list[tuple[int, list[int]]]:
    """Offset of every directory of a classic TIFF, in order of the file's chain, and the offsets of its tiles."""
    found, offset = [], int.from_bytes(data[4:8], "little")
    while offset:
        tags = ImageFileDirectory_v2(data[:8])
        file = io.BytesIO(data)
        file.seek(offset)
        tags.load(file)
        found.append((offset, [place for place in tags[TILE_OFFSETS] if place]))
        offset = tags.next
    return found


@pytest.mark.parametrize("bands", KINDS)
def test_directories_come_before_data_and_small_overviews_before_large(
    tmp_path: Path, answer: Prediction, bands: tuple[str, ...]
) -> None:
    path = tmp_path / "answer.tif"
    with path.open("wb") as file:
        write_tiff(answer, file, bands=bands)
    data = path.read_bytes()
    assert data[:4] == b"II*\0" and b"LAYOUT=IFDS_BEFORE_DATA" in data[:200]
    found = directories(data)
    offsets, tiles = [offset for offset, _ in found], [places for _, places in found]
    assert len(found) == 3 and offsets == sorted(offsets) and offsets[-1] < min(map(min, tiles))
    assert all(max(small) < min(large) for large, small in pairwise(tiles))
    with rasterio.open(path) as dataset:
        assert dataset.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG" and dataset.compression.value == "DEFLATE"
        assert all(dataset.overviews(band) == [2, 4] for band in dataset.indexes)
        assert set(dataset.block_shapes) == {(512, 512)} and dataset.transform == PLACES["transform"]["transform"]
    assert {one.name for one in tmp_path.iterdir()} == {"a.tif", "answer.tif"}, "something was left behind"


@pytest.mark.parametrize("bands", KINDS)
def test_a_file_in_memory_is_that_on_disk(tmp_path: Path, answer: Prediction, bands: tuple[str, ...]) -> None:
    with (tmp_path / "answer.tif").open("wb") as file:
        write_tiff(answer, file, bands=bands)
    memory = io.BytesIO()
    write_tiff(answer, memory, bands=bands)
    assert memory.getvalue() == (tmp_path / "answer.tif").read_bytes()


def overview(data: bytes, level: int) -> np.ndarray:
    with rasterio.MemoryFile(data) as memory, memory.open(overview_level=level) as dataset:
        values: np.ndarray = dataset.read(1)
    return values


def test_an_overview_of_labels_has_labels_of_its_pixels(answer: Prediction) -> None:
    small = overview(render(answer, "image/tiff", Style()), 0)
    corners = [answer.labels_HW[y::2, x::2] for y in (0, 1) for x in (0, 1)]
    assert (np.stack(corners) == small).any(0).all() and (small == 255).mean() == pytest.approx(90_000 / 1_430_000)


def test_an_overview_of_a_map_is_the_mean_of_what_was_measured(answer: Prediction) -> None:
    answer.maps["entropy"][:301, :401] = np.nan
    small = overview(render(answer, "image/tiff", Style("entropy")), 0)
    quarters = answer.maps["entropy"].reshape(550, 2, 650, 2)
    assert np.array_equal(np.isnan(small), np.isnan(quarters).all((1, 3))) and np.isnan(small).any()
    known = ~np.isnan(small)
    assert np.allclose(small[known], np.nanmean(quarters.transpose(0, 2, 1, 3)[known], axis=(1, 2)), atol=1e-6)


@pytest.mark.parametrize("kind", PLACES)
def test_every_way_of_placing_a_raster_is_kept(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    image = raster(tmp_path, *SIZE, **PLACES[kind])
    data = render(dataclasses.replace(prediction(patches(rng, *SIZE), 3), image=image), "image/tiff", Style())
    with gdal(), rasterio.MemoryFile(data) as memory, memory.open() as dataset:
        gcps, crs = dataset.gcps
        assert dataset.transform == image.place.transform and (dataset.crs or crs) == image.place.crs
        assert [(point.row, point.col, point.x, point.y) for point in gcps] == [
            (point.row, point.col, point.x, point.y) for point in image.place.gcps
        ]
        assert dataset.rpcs == image.place.rpcs


def test_a_failure_leaves_no_file_beside_the_answer(tmp_path: Path, answer: Prediction) -> None:
    (tmp_path / "full").mkdir()
    with (tmp_path / "full" / "answer.tif").open("wb") as file, pytest.raises(KeyError):
        write_tiff(answer, file, bands=("entropy", "no map"))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["answer.tif"]


@pytest.mark.parametrize("size", [(40, 30), (513, 700), SIZE])
@pytest.mark.parametrize("bands", KINDS)
def test_rio_cogeo_finds_nothing_to_say_even_strictly(
    tmp_path: Path, rng: np.random.Generator, bands: tuple[str, ...], size: tuple[int, int]
) -> None:
    cogeo = pytest.importorskip("rio_cogeo")
    found = dataclasses.replace(
        prediction(patches(rng, *size), 3), image=raster(tmp_path, *size, **PLACES["transform"])
    )
    with (tmp_path / "answer.tif").open("wb") as file:
        write_tiff(found, file, bands=bands)
    assert cogeo.cog_validate(tmp_path / "answer.tif", strict=True, quiet=True) == (True, [], [])


def test_a_label_has_its_class_name_and_colour_and_a_map_its_unit(answer: Prediction) -> None:
    with rasterio.MemoryFile(render(answer, "image/tiff", Style())) as memory, memory.open() as dataset:
        names = {f"CLASS_{k}": one.name for k, one in enumerate(answer.card.classes)}
        assert names.items() <= dataset.tags(1).items() and dataset.nodata == 255
        assert [dataset.colormap(1)[k][:3] for k in range(3)] == [one.color for one in answer.card.classes]
    own = ExtraMap("distance", "to the prototype", "the unit of features")
    maps = answer.maps | {"distance": answer.maps["entropy"]}
    answer = dataclasses.replace(answer, card=dataclasses.replace(answer.card, extra_maps=(own,)), maps=maps)
    file = io.BytesIO()
    write_tiff(answer, file, bands=("confidence", "entropy", "distance"))
    with rasterio.MemoryFile(file.getvalue()) as memory, memory.open() as dataset:
        assert dataset.descriptions == ("confidence", "entropy", "distance") and np.isnan(dataset.nodata)
        assert dataset.units == (None, "nats", "the unit of features")
