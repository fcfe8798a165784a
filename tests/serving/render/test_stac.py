"""The STAC item beside a raster's answer: valid, in its place, with its classes, and never over somebody's file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rasterio.transform import from_origin

from penumbra.models.errors import BadOption
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.raster import gdal
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.files.predict import predict_file
from tests.conftest import picture
from tests.export.test_cards import check_item
from tests.serving.files.test_large import tiff

OPTIONS = SegmentOptions(model="toy-latent", outputs=("confidence", "entropy"))
MERIDIAN = {"crs": "EPSG:4326", "transform": from_origin(179.5, 10, 0.01, 0.01)}
NOWHERE: dict[str, Any] = {"crs": None, "transform": None}


@pytest.fixture(scope="module")
def segmenter(toy_store: Path) -> Any:
    with Segmenter.open(toy_store, threads=1, device="cpu", tuning=Tuning(samples_per_call=4)) as opened:
        yield opened


def item_of(segmenter: Segmenter, folder: Path, rng: np.random.Generator, **facts: Any) -> dict[str, Any]:
    with gdal():
        source = tiff(folder / "scene.tif", picture(rng, 60, 90), **facts)
    predict_file(segmenter, source, OPTIONS, folder / "out")
    found: dict[str, Any] = json.loads((folder / "out" / "scene_item.json").read_text())
    return found


def test_an_item_is_valid_and_its_files_are_there(
    segmenter: Segmenter, tmp_path: Path, rng: np.random.Generator
) -> None:
    found = item_of(segmenter, tmp_path, rng)
    check_item(found)
    assert all((tmp_path / "out" / asset["href"]).is_file() for asset in found["assets"].values())
    assert {"labels", "maps", "encode.ts", "decode.ts"} == {*found["assets"]}
    assert [band.get("unit") for band in found["assets"]["maps"]["bands"]] == [None, "nats"]
    (labels,) = found["assets"]["labels"]["bands"]
    assert labels["nodata"] == 255 and labels["classification:classes"][-1]["nodata"]
    assert found["properties"]["proj:code"] == "EPSG:32632" and found["properties"]["proj:shape"] == [60, 90]
    west, south, east, north = found["bbox"]
    assert (west, north) == pytest.approx((7.74, 45.14), abs=0.02) and east > west and north > south


def test_a_system_without_a_code_is_told_in_the_second_form_of_well_known_text(
    segmenter: Segmenter, tmp_path: Path, rng: np.random.Generator
) -> None:
    found = item_of(segmenter, tmp_path, rng, crs="+proj=laea +lat_0=45 +lon_0=8 +datum=WGS84 +units=m")
    assert found["properties"]["proj:code"] is None and found["properties"]["proj:wkt2"].startswith("PROJCRS[")


def test_an_item_across_the_180th_meridian_has_its_west_in_the_east(
    segmenter: Segmenter, tmp_path: Path, rng: np.random.Generator
) -> None:
    found = item_of(segmenter, tmp_path, rng, **MERIDIAN)
    check_item(found)
    assert found["bbox"] == pytest.approx([179.5, 9.4, -179.6, 10])


def test_a_picture_without_a_place_has_an_item_without_one(
    segmenter: Segmenter, tmp_path: Path, rng: np.random.Generator
) -> None:
    found = item_of(segmenter, tmp_path, rng, **NOWHERE)
    check_item(found)
    assert found["geometry"] is None and "bbox" not in found


def test_an_item_takes_the_place_of_our_own_and_of_no_other(
    segmenter: Segmenter, tmp_path: Path, rng: np.random.Generator
) -> None:
    item_of(segmenter, tmp_path, rng)
    names = [*item_of(segmenter, tmp_path, rng)]
    assert names.index("properties") < names.index("geometry"), "an outline may be longer than what is looked at"
    (tmp_path / "out" / "scene_item.json").write_text('{"somebody": "else"}')
    with pytest.raises(BadOption, match=r"scene_item\.json is in the way"):
        item_of(segmenter, tmp_path, rng)
