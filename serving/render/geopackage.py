"""Regions as a GeoPackage (OGC 12-128r19): one SQLite file that GIS programs open, with a table of multipolygons."""

import json
import sqlite3
import struct
from collections.abc import Sequence
from contextlib import closing
from typing import Any, BinaryIO

import numpy as np

from penumbra.serving.engine.answer import Prediction
from penumbra.serving.render.regions import Regions, find_regions

TABLE = "regions"
APPLICATION_ID, VERSION = 0x47504B47, 10400
"""How a GeoPackage of version 1.4 says in SQLite's header what it is: GPKG."""
WGS84, PIXELS = 4326, -1
"""Reference systems by number: longitude and latitude, and a plane of no place, whose rows grow downward here."""
WRITTEN = "1970-01-01T00:00:00.000Z"
"""The time of the last change, which must be said, is the same for all: the same answer has the same bytes."""
MULTIPOLYGON, POLYGON = 6, 3
"""Kinds of geometry in well-known binary."""
SCHEMA = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {VERSION};
CREATE TABLE gpkg_spatial_ref_sys (srs_name TEXT NOT NULL, srs_id INTEGER PRIMARY KEY, organization TEXT NOT NULL,
  organization_coordsys_id INTEGER NOT NULL, definition TEXT NOT NULL, description TEXT);
CREATE TABLE gpkg_contents (table_name TEXT NOT NULL PRIMARY KEY, data_type TEXT NOT NULL, identifier TEXT UNIQUE,
  description TEXT DEFAULT '', last_change DATETIME NOT NULL DEFAULT '{WRITTEN}', min_x DOUBLE, min_y DOUBLE,
  max_x DOUBLE, max_y DOUBLE, srs_id INTEGER REFERENCES gpkg_spatial_ref_sys(srs_id));
CREATE TABLE gpkg_geometry_columns (table_name TEXT NOT NULL UNIQUE REFERENCES gpkg_contents(table_name),
  column_name TEXT NOT NULL, geometry_type_name TEXT NOT NULL,
  srs_id INTEGER NOT NULL REFERENCES gpkg_spatial_ref_sys(srs_id), z TINYINT NOT NULL, m TINYINT NOT NULL,
  PRIMARY KEY (table_name, column_name));
"""
SYSTEMS = (
    ("Undefined Cartesian", PIXELS, "NONE", PIXELS, "undefined", "columns and rows of pixels"),
    ("Undefined geographic", 0, "NONE", 0, "undefined", ""),
    ("WGS 84", WGS84, "EPSG", WGS84, 'GEOGCS["WGS 84",DATUM["WGS_1984",SPHEROID["WGS 84",6378137,298.257223563,'
     'AUTHORITY["EPSG","7030"]],AUTHORITY["EPSG","6326"]],PRIMEM["Greenwich",0],UNIT["degree",0.0174532925199433],'
     'AUTHORITY["EPSG","4326"]]', "longitude and latitude"),
)  # fmt: skip
"""The reference systems that every GeoPackage has."""


def write_geopackage(prediction: Prediction, file: BinaryIO, *, min_pixels: int) -> str:
    """Write what `write_geojson` writes; the answer's facts are JSON in the table's description.

    Raises TooLarge for labels that are noise.
    """
    regions = find_regions(prediction, min_pixels=min_pixels)
    with closing(sqlite3.connect(":memory:")) as database:
        database.executescript(SCHEMA)
        database.executemany("INSERT INTO gpkg_spatial_ref_sys VALUES (?, ?, ?, ?, ?, ?)", SYSTEMS)
        _fill(database, regions)
        database.commit()
        file.write(database.serialize())
    return regions.note


def _fill(database: sqlite3.Connection, regions: Regions) -> None:
    system = WGS84 if regions.is_placed else PIXELS
    kinds = {"class": "TEXT", "id": "INTEGER", "pixels": "INTEGER"}
    names = list(dict.fromkeys(name for one in regions.properties for name in one)) or list(kinds)
    columns = "".join(f', "{name}" {kinds.get(name, "DOUBLE")}' for name in names)
    boxes = [_box(geometry) for geometry in regions.geometries]
    extent = (*np.min(boxes, 0)[:2].tolist(), *np.max(boxes, 0)[2:].tolist()) if boxes else (None,) * 4
    database.execute(f"CREATE TABLE {TABLE} (fid INTEGER PRIMARY KEY AUTOINCREMENT, geom MULTIPOLYGON{columns})")
    database.execute(
        "INSERT INTO gpkg_contents VALUES (?, 'features', ?, ?, ?, ?, ?, ?, ?, ?)",
        (TABLE, TABLE, json.dumps(regions.facts, allow_nan=False), WRITTEN, *extent, system),
    )
    database.execute("INSERT INTO gpkg_geometry_columns VALUES (?, 'geom', 'MULTIPOLYGON', ?, 0, 0)", (TABLE, system))
    rows = zip(regions.geometries, boxes, regions.properties, strict=True)
    database.executemany(
        f"INSERT INTO {TABLE} VALUES (NULL, ?{', ?' * len(names)})",
        ((_binary(geometry, box, system), *map(one.get, names)) for geometry, box, one in rows),
    )


def _polygons(geometry: dict[str, Any]) -> list[Any]:
    return [geometry["coordinates"]] if geometry["type"] == "Polygon" else list(geometry["coordinates"])


def _box(geometry: dict[str, Any]) -> tuple[float, float, float, float]:
    """Give least x and y and largest x and y; outer rings tell."""
    points = np.concatenate([np.asarray(polygon[0], float) for polygon in _polygons(geometry)])
    (x0, y0), (x1, y1) = points.min(0).tolist(), points.max(0).tolist()
    return x0, y0, x1, y1


def _binary(geometry: dict[str, Any], box: Sequence[float], system: int) -> bytes:
    """Make a geometry's header, with its box as x0, x1, y0, y1, and its well-known binary, little-endian both."""
    x0, y0, x1, y1 = box
    polygons = _polygons(geometry)
    parts = [struct.pack("<2sBBi4d", b"GP", 0, 0b11, system, x0, x1, y0, y1)]
    parts.append(struct.pack("<BII", 1, MULTIPOLYGON, len(polygons)))
    for rings in polygons:
        parts.append(struct.pack("<BII", 1, POLYGON, len(rings)))
        for ring in rings:
            parts += (struct.pack("<I", len(ring)), np.asarray(ring, "<f8").tobytes())
    return b"".join(parts)
