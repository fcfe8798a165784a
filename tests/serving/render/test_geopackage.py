"""GeoPackages: GDAL, through pyogrio, reads the same regions from them as from GeoJSON."""

import dataclasses
import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rasterio.transform import from_origin

from penumbra.serving.engine.answer import Prediction
from penumbra.serving.render import Style, render
from tests.serving.render.test_ground import raster
from tests.serving.render.test_render import patches, prediction

SIZE = (120, 90)
MEDIA = "application/geopackage+sqlite3"
STYLE = Style(min_pixels=4)
PLACES: dict[str, Any] = {
    "utm": {"crs": "EPSG:32631", "transform": from_origin(500_000, 5_800_000, 10, 10)},
    "across the 180th meridian": {"crs": "EPSG:4326", "transform": from_origin(179.5, 10, 0.01, 0.01)},
    "nowhere": {},
}


@pytest.fixture(params=PLACES)
def answer(request: pytest.FixtureRequest, tmp_path: Path, rng: np.random.Generator) -> Prediction:
    found, place = prediction(patches(rng, *SIZE), 3), PLACES[request.param]
    return dataclasses.replace(found, image=raster(tmp_path, *SIZE, **place)) if place else found


def test_gdal_reads_the_regions_that_geojson_has(answer: Prediction, tmp_path: Path) -> None:
    pyogrio, shapely = pytest.importorskip("pyogrio.raw"), pytest.importorskip("shapely")
    (tmp_path / "a.gpkg").write_bytes(render(answer, MEDIA, STYLE))
    document = json.loads(render(answer, "application/geo+json", STYLE))
    meta, _, geometries, columns = pyogrio.read(tmp_path / "a.gpkg", layer="regions")
    assert meta["geometry_type"] == "MultiPolygon" and len(geometries) == len(document["features"]) > 50
    is_placed = document["coordinates"] == "WGS84"
    assert (meta["crs"] == "EPSG:4326") == is_placed
    named = dict(zip(meta["fields"], columns, strict=True))
    assert named.keys() == document["features"][0]["properties"].keys()
    for number, (feature, geometry) in enumerate(zip(document["features"], geometries, strict=True)):
        found, expected = shapely.from_wkb(geometry), shapely.geometry.shape(feature["geometry"])
        parts = expected.geoms if expected.geom_type == "MultiPolygon" else [expected]
        assert [one.equals_exact(other) for one, other in zip(found.geoms, parts, strict=True)] == [True] * len(parts)
        assert {name: column[number] for name, column in named.items()} == feature["properties"]


def test_what_the_standard_asks_of_the_file_is_there(answer: Prediction, tmp_path: Path) -> None:
    (tmp_path / "a.gpkg").write_bytes(render(answer, MEDIA, STYLE))
    assert (tmp_path / "a.gpkg").read_bytes()[68:72] == b"GPKG"
    database = sqlite3.connect(tmp_path / "a.gpkg")
    assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert database.execute("PRAGMA foreign_key_check").fetchall() == []
    systems = {row[0] for row in database.execute("SELECT srs_id FROM gpkg_spatial_ref_sys")}
    assert {-1, 0, 4326} <= systems
    contents = database.execute("SELECT data_type, description, min_x, max_x FROM gpkg_contents").fetchone()
    assert contents[0] == "features" and json.loads(contents[1])["model"] == answer.card.name
    assert contents[2] < contents[3]
    database.close()


def test_the_same_answer_has_the_same_bytes(answer: Prediction) -> None:
    assert render(answer, MEDIA, STYLE) == render(answer, MEDIA, STYLE)


def test_an_answer_without_regions_is_an_empty_table(rng: np.random.Generator, tmp_path: Path) -> None:
    pyogrio = pytest.importorskip("pyogrio")
    (tmp_path / "a.gpkg").write_bytes(render(prediction(np.full(SIZE, 255), 3), MEDIA, STYLE))
    about = pyogrio.read_info(tmp_path / "a.gpkg", layer="regions")
    assert about["features"] == 0 and "class" in about["fields"]
