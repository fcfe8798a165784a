"""Polygons on the ground: whatever places a raster, a pixel's centre lies in the region of its label and no other."""

import dataclasses
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import rasterio
from click.testing import CliRunner
from rasterio import Affine
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.rpc import RPC
from rasterio.transform import RPCTransformer, from_origin
from rasterio.warp import transform

from penumbra.__main__ import main
from penumbra.serving.engine.raster import Raster, open_raster
from penumbra.serving.render import Style, render
from tests.conftest import picture
from tests.serving.render.test_render import patches, prediction
from tests.serving.server import until

HEIGHT, WIDTH = 24, 31
LOCAL = 'LOCAL_CS["site grid",UNIT["metre",1]]'
MOON = (
    'GEOGCS["Moon 2000",DATUM["D_Moon_2000",SPHEROID["Moon_2000_IAU_IAG",1737400,0]],PRIMEM["Reference_Meridian",0],'
    'UNIT["Decimal_Degree",0.0174532925199433]]'
)
TURNED = Affine.translation(500_000, 5_800_000) * Affine.rotation(31) * Affine.scale(0.5, -0.7)

AFFINE: dict[str, tuple[str, Affine]] = {
    "UTM": ("EPSG:32631", from_origin(500_000, 5_800_000, 0.5, 0.5)),
    "rotated": ("EPSG:32631", TURNED),
    "south up": ("EPSG:32631", Affine(0.5, 0, 500_000, 0, 0.5, 5_800_000)),
    "Web Mercator at 52 degrees": ("EPSG:3857", from_origin(556_597, 6_800_125, 0.3, 0.3)),
    "feet": ("EPSG:2263", from_origin(980_000, 200_000, 1.5, 1.5)),
    "degrees": ("EPSG:4326", from_origin(4, 52, 1e-5, 1e-5)),
    "another datum": ("EPSG:28992", from_origin(155_000, 463_000, 1, 1)),
    "UTM 60 across the 180th meridian": ("EPSG:32660", from_origin(833_000, 200_500, 100, 100)),
    "UTM 1 across the 180th meridian": ("EPSG:32601", from_origin(165_000, 200_500, 100, 100)),
    "Pacific Mercator across the 180th meridian": ("EPSG:3832", from_origin(3_331_000, 1_000_000, 1000, 1000)),
    "degrees across the 180th meridian": ("EPSG:4326", from_origin(179.9, 10, 0.01, 0.01)),
    "degrees below -180": ("EPSG:4326", from_origin(-180.1, 10, 0.01, 0.01)),
    "degrees that begin at the 180th meridian": ("EPSG:4326", from_origin(180, 10, 0.01, 0.01)),
    "degrees that end at the 180th meridian": ("EPSG:4326", from_origin(180 - WIDTH * 0.25, 10, 0.25, 0.25)),
    "the whole earth": ("EPSG:4326", from_origin(-180, 90, 360 / WIDTH, 180 / HEIGHT)),
    "the whole earth from Greenwich on": ("EPSG:4326", from_origin(0, 90, 360 / WIDTH, 180 / HEIGHT)),
    "centres of pixels at the poles": ("EPSG:4326", from_origin(-180, 94, 360 / WIDTH, 188 / HEIGHT)),
    "a corner at the north pole": ("EPSG:3413", from_origin(-300_000, 250_000, 25_000, 25_000)),
    "the north pole within a pixel": ("EPSG:3413", from_origin(-312_000, 243_000, 25_000, 25_000)),
    "the south pole": ("EPSG:3031", from_origin(-312_000, 243_000, 25_000, 25_000)),
    "almost all of the earth about its north pole": ("EPSG:6931", from_origin(-9e6, 9e6, 18e6 / WIDTH, 18e6 / HEIGHT)),
}  # fmt: skip


def raster(folder: Path, height: int = HEIGHT, width: int = WIDTH, **facts: Any) -> Raster:
    profile = {"driver": "GTiff", "height": height, "width": width, "count": 3, "dtype": "uint8"}
    with rasterio.open(folder / "a.tif", "w", **profile | facts) as target:
        target.write(np.full((3, height, width), 9, np.uint8))
    found = open_raster(folder / "a.tif")
    assert found is not None
    return found


def regions(image: Raster, labels_HW: np.ndarray) -> dict[str, Any]:
    answer = dataclasses.replace(prediction(labels_HW, 3), image=image)
    document: dict[str, Any] = json.loads(render(answer, "application/geo+json", Style()))
    return document


def parts(feature: dict[str, Any]) -> list[list[np.ndarray]]:
    geometry = feature["geometry"]
    polygons = [geometry["coordinates"]] if geometry["type"] == "Polygon" else geometry["coordinates"]
    return [[np.array(ring) for ring in polygon] for polygon in polygons]


def holds(rings: list[np.ndarray], points_N2: np.ndarray) -> np.ndarray:
    """Even-odd rule, for all points at once."""
    inside = np.zeros(len(points_N2), bool)
    for ring in rings:
        for (x0, y0), (x1, y1) in pairwise(ring):
            if y0 != y1:
                crosses = (y0 > points_N2[:, 1]) != (y1 > points_N2[:, 1])
                inside ^= crosses & (points_N2[:, 0] < x0 + (points_N2[:, 1] - y0) / (y1 - y0) * (x1 - x0))
    return inside


def centres(height: int = HEIGHT, width: int = WIDTH) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.mgrid[:height, :width] + 0.5
    return columns.ravel(), rows.ravel()


def degrees(crs: str, affine: Affine, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    at = np.column_stack(transform(crs, "EPSG:4326", *(affine * (columns, rows))))
    at[:, 0] = (at[:, 0] + 180) % 360 - 180
    at[:, 1] = at[:, 1].clip(-89.999999, 89.999999)  # a centre at a pole, which is on an outline there
    return at


def check(document: dict[str, Any], labels_HW: np.ndarray, at_N2: np.ndarray) -> None:
    """Every pixel's centre is in a region of its label, and in one region only; rings are as RFC 7946 wants them."""
    assert document["coordinates"] == "WGS84"
    found = np.full(len(at_N2), 255)
    for feature in document["features"]:
        for rings in parts(feature):
            inside = holds(rings, at_N2)
            assert (found[inside] == 255).all(), "two regions hold one pixel"
            found[inside] = feature["properties"]["id"]
            for number, ring in enumerate(rings):
                assert (ring[0] == ring[-1]).all() and np.abs(ring).max(0)[0] <= 180 and np.abs(ring).max(0)[1] <= 90
                x, y = (ring - ring[0]).T
                assert (np.dot(x[:-1], y[1:]) > np.dot(x[1:], y[:-1])) == (number == 0), "a ring is wound wrongly"
    assert np.array_equal(found, labels_HW.ravel())


@pytest.mark.parametrize("kind", AFFINE)
def test_every_pixel_lies_in_the_region_of_its_label(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    crs, affine = AFFINE[kind]
    labels = patches(rng, HEIGHT, WIDTH)
    labels[5:9, 4:8] = 255
    document = regions(raster(tmp_path, crs=crs, transform=affine), labels)
    check(document, labels, degrees(crs, affine, *centres()))
    assert document["penumbra"]["warnings"] == []


@pytest.mark.parametrize("kind", ["a corner at the north pole", "the north pole within a pixel", "the south pole"])
def test_a_ring_round_a_pole_has_its_hole(tmp_path: Path, kind: str) -> None:
    crs, affine = AFFINE[kind]
    labels = np.ones((HEIGHT, WIDTH), int)
    labels[3:20, 4:25] = 0
    labels[7:14, 8:18] = 2
    labels[2, 2] = 2
    document = regions(raster(tmp_path, crs=crs, transform=affine), labels)
    check(document, labels, degrees(crs, affine, *centres()))


def test_a_hole_of_a_region_that_is_cut_stays_with_its_part(tmp_path: Path) -> None:
    crs, affine = AFFINE["UTM 60 across the 180th meridian"]
    labels = np.zeros((HEIGHT, WIDTH), int)
    labels[3:6, 1:3] = labels[10:12, 26:30] = 1
    labels[15:20, 5:25] = 2
    labels[16:18, 6:8] = labels[16:18, 22:24] = 1
    document = regions(raster(tmp_path, crs=crs, transform=affine), labels)
    check(document, labels, degrees(crs, affine, *centres()))
    kinds = {feature["geometry"]["type"] for feature in document["features"]}
    assert kinds == {"Polygon", "MultiPolygon"}


@pytest.mark.parametrize("kind", ["degrees that begin at the 180th meridian", "degrees that end at the 180th meridian"])
def test_a_region_that_only_touches_the_180th_meridian_is_one_polygon(tmp_path: Path, kind: str) -> None:
    crs, affine = AFFINE[kind]
    document = regions(raster(tmp_path, crs=crs, transform=affine), np.zeros((HEIGHT, WIDTH)))
    (feature,) = document["features"]
    ((ring,),) = parts(feature)
    assert np.abs(ring[:, 0]).max() == 180 and np.ptp(ring[:, 0]) == pytest.approx(WIDTH * affine.a)


def test_a_region_of_one_pixel_is_cut_at_the_180th_meridian(tmp_path: Path) -> None:
    image = raster(tmp_path, 1, 1, crs="EPSG:4326", transform=from_origin(179.75, 10, 1, 1))
    (feature,) = regions(image, np.zeros((1, 1)))["features"]
    west, east = (rings[0] for rings in sorted(parts(feature), key=lambda rings: rings[0][0, 0]))
    assert (west[:, 0].min(), west[:, 0].max()) == (-180, -179.25)
    assert (east[:, 0].min(), east[:, 0].max()) == (179.75, 180)


# -- areas ---------------------------------------------------------------------------------------

LOCAL_KINDS = [kind for kind in AFFINE if "earth" not in kind and kind != "centres of pixels at the poles"]


def equal_area_m2(crs: str, affine: Affine, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Areas of pixels, by centres, as quadrangles in an equal-area projection about the raster's middle."""
    (longitude, latitude), *_ = degrees(crs, affine, np.array([WIDTH / 2]), np.array([HEIGHT / 2]))
    projection = f"+proj=laea +lat_0={latitude} +lon_0={longitude} +datum=WGS84"
    steps = ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5))
    (ax, ay), (bx, by), (cx, cy), (dx, dy) = (
        np.array(transform("EPSG:4326", projection, *degrees(crs, affine, columns + right, rows + down).T))
        for right, down in steps
    )
    return np.abs((cx - ax) * (dy - by) - (cy - ay) * (dx - bx)) / 2


@pytest.mark.parametrize("kind", LOCAL_KINDS)
def test_areas_are_those_on_the_ellipsoid_to_a_thousandth(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    crs, affine = AFFINE[kind]
    labels = patches(rng, HEIGHT, WIDTH)
    document = regions(raster(tmp_path, crs=crs, transform=affine), labels)
    pixels_m2 = equal_area_m2(crs, affine, *centres()).reshape(HEIGHT, WIDTH)
    for k in range(3):
        areas = [f["properties"]["area_m2"] for f in document["features"] if f["properties"]["id"] == k]
        assert sum(areas) == pytest.approx(pixels_m2[labels == k].sum(), rel=1e-3)
    ones = [f["properties"]["area_m2"] for f in document["features"] if f["properties"]["pixels"] == 1]
    assert ones and all(pixels_m2.min() * 0.999 < area < pixels_m2.max() * 1.001 for area in ones)


@pytest.mark.parametrize("origin", [-180, 0])
def test_the_whole_earth_has_its_surface(tmp_path: Path, origin: int) -> None:
    affine = from_origin(origin, 90, 0.5, 0.5)
    image = raster(tmp_path, 360, 720, crs="EPSG:4326", transform=affine)
    (feature,) = regions(image, np.zeros((360, 720)))["features"]
    assert feature["properties"]["area_m2"] == pytest.approx(510_065_621_724_088, rel=1e-4)


def test_a_tall_raster_has_other_areas_at_its_ends(tmp_path: Path) -> None:
    """The scale of Mercator changes along it, and areas are interpolated between nodes."""
    affine = from_origin(0, 10_000_000, 1000, 10_000)
    labels = np.zeros((1000, 3))
    labels[400:] = 1
    document = regions(raster(tmp_path, 1000, 3, crs="EPSG:3857", transform=affine), labels)
    for feature in document["features"]:
        rows = np.flatnonzero(labels[:, 0] == feature["properties"]["id"])
        latitude = np.radians(
            np.array(degrees("EPSG:3857", affine, np.ones(601), np.linspace(rows[0], rows[-1] + 1, 601)))
        )[:, 1]
        e2 = (2 - 1 / 298.257223563) / 298.257223563
        metres = 6_378_137.0**2 * (1 - e2) * np.cos(latitude) / (1 - e2 * np.sin(latitude) ** 2) ** 2  # M N cos
        width = np.radians(np.ptp(degrees("EPSG:3857", affine, np.array([0.0, 3]), np.zeros(2))[:, 0]))
        wanted = width * abs(np.trapezoid(metres, latitude))
        assert feature["properties"]["area_m2"] == pytest.approx(wanted, rel=1e-3)


# -- control points and coefficients ---------------------------------------------------------------


def points(place: Callable[[float, float], tuple[float, float]], count: int = 2) -> list[GroundControlPoint]:
    return [
        GroundControlPoint(row, column, *place(column, row))
        for row in np.linspace(0, HEIGHT, count)
        for column in np.linspace(0, WIDTH, count)
    ]


def in_degrees(column: float, row: float) -> tuple[float, float]:
    return 4 + column * 1e-5, 52 - row * 1e-5


def across_the_meridian(column: float, row: float) -> tuple[float, float]:
    return (179.99 + column * 1e-3 + 180) % 360 - 180, 10 - row * 1e-3


def in_utm(column: float, row: float) -> tuple[float, float]:
    return 500_000 + 0.5 * column + 0.1 * row, 5_800_000 - 0.5 * row + 0.1 * column


def curved(column: float, row: float) -> tuple[float, float]:
    return 500_000 + 0.5 * column + 0.01 * row**2, 5_800_000 - 0.5 * row + 0.008 * column * row


POINTS: dict[str, tuple[Callable[[float, float], tuple[float, float]], str, int]] = {
    "degrees": (in_degrees, "EPSG:4326", 2),
    "both sides of the 180th meridian": (across_the_meridian, "EPSG:4326", 3),
    "UTM": (in_utm, "EPSG:32631", 2),
    "curved": (curved, "EPSG:32631", 9),
}


@pytest.mark.parametrize("kind", POINTS)
def test_control_points_place_a_raster(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    place, crs, count = POINTS[kind]
    labels = patches(rng, HEIGHT, WIDTH)
    document = regions(raster(tmp_path, gcps=points(place, count), crs=crs), labels)
    x, y = np.array([place(column, row) for column, row in zip(*centres(), strict=True)]).T
    check(document, labels, degrees(crs, Affine.identity(), x, y))
    assert sum(feature["properties"]["area_m2"] for feature in document["features"]) > 0


def coefficients(longitude: float) -> RPC:
    """A camera that looks down a little askew, over a scene of 3 km."""
    return RPC(
        height_off=300, height_scale=500, lat_off=10, lat_scale=0.015, long_off=longitude, long_scale=0.015,
        line_off=HEIGHT / 2, line_scale=HEIGHT / 2, samp_off=WIDTH / 2, samp_scale=WIDTH / 2,
        line_num_coeff=[0, 0.05, -1, 0.02] + [0] * 16, line_den_coeff=[1] + [0] * 19,
        samp_num_coeff=[0, 1, 0.03, 0.1] + [0] * 16, samp_den_coeff=[1] + [0] * 19,
    )  # fmt: skip


@pytest.mark.parametrize("longitude", [4.0, 180.0, -179.995])
def test_rational_coefficients_place_a_raster_and_their_height_is_said(
    tmp_path: Path, rng: np.random.Generator, longitude: float
) -> None:
    labels = patches(rng, HEIGHT, WIDTH)
    document = regions(raster(tmp_path, rpcs=coefficients(longitude)), labels)
    columns, rows = centres()
    with RPCTransformer(coefficients(longitude)) as camera:
        x, y = camera.xy(rows - 0.5, columns - 0.5, zs=np.full(len(rows), 300), offset="center")
    check(document, labels, np.column_stack([(x + 180) % 360 - 180, y]))
    (warning,) = document["penumbra"]["warnings"]
    assert "a height of 300 m everywhere" in warning


# -- no place --------------------------------------------------------------------------------------

NOWHERE: dict[str, tuple[dict[str, Any], str]] = {
    "a site grid": ({"crs": CRS.from_wkt(LOCAL), "transform": from_origin(0, 0, 1, 1)}, "no longitude and latitude"),
    "the Moon": ({"crs": CRS.from_wkt(MOON), "transform": from_origin(4, 52, 1, 1)}, "no longitude and latitude"),
    "beyond the earth": (
        {"crs": "+proj=ortho +lat_0=50", "transform": from_origin(-6.5e6, 6.5e6, 5e5, 5e5)},
        "no longitude and latitude",
    ),
    "no latitude": ({"crs": "EPSG:4326", "transform": from_origin(4, 5200, 1, 1)}, "no longitude and latitude"),
    "a transform alone": ({"transform": from_origin(500_000, 5_800_000, 1, 1)}, "no reference system"),
    "a reference system alone": ({"crs": "EPSG:32631"}, "a reference system and no transform"),
    "points on a line": (
        {"gcps": [GroundControlPoint(k, k, 4 + k, 52 - k) for k in range(4)], "crs": "EPSG:4326"},
        "on one line",
    ),
    "one point": ({"gcps": [GroundControlPoint(1, 1, 4, 52)], "crs": "EPSG:4326"}, "fewer than three"),
    "many points": ({"gcps": points(curved, 23), "crs": "EPSG:32631"}, "has 529 ground control points on no plane"),
    **{
        f"points at {value} in {part}": (
            {"gcps": [GroundControlPoint(**{"row": k, "col": k * k, "x": k, "y": 1, part: value}) for k in range(4)]}
            | {"crs": "EPSG:4326"},
            "not all numbers",
        )
        for part in ("row", "col", "x", "y")
        for value in (np.inf, -np.inf, np.nan)
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("kind", NOWHERE)
def test_what_leads_to_no_longitude_is_answered_in_pixels_and_says_so(
    tmp_path: Path, rng: np.random.Generator, kind: str
) -> None:
    facts, sentence = NOWHERE[kind]
    labels = patches(rng, HEIGHT, WIDTH)
    document = regions(raster(tmp_path, **facts), labels)
    assert document["coordinates"] == "pixels"
    (warning,) = document["penumbra"]["warnings"]
    assert sentence in warning and warning.endswith("so coordinates are pixels")
    assert not any("area_m2" in feature["properties"] for feature in document["features"])
    every = np.concatenate([ring for feature in document["features"] for rings in parts(feature) for ring in rings])
    assert every.min(0).tolist() == [0, 0] and every.max(0).tolist() == [WIDTH, HEIGHT]


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_a_picture_that_claims_no_place_is_answered_in_pixels_without_a_word(tmp_path: Path) -> None:
    document = regions(raster(tmp_path), np.zeros((HEIGHT, WIDTH)))
    assert document["coordinates"] == "pixels" and document["penumbra"]["warnings"] == []


def test_every_surface_cuts_at_the_180th_meridian(
    client: httpx.Client, toy_store: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    crs, affine = AFFINE["UTM 60 across the 180th meridian"]
    profile = {"driver": "GTiff", "height": HEIGHT, "width": WIDTH, "count": 3, "dtype": "uint8"}
    with rasterio.open(tmp_path / "a.tif", "w", **profile, crs=crs, transform=affine) as target:
        target.write(picture(rng, HEIGHT, WIDTH).transpose(2, 0, 1))
    asked = {"content": (tmp_path / "a.tif").read_bytes(), "params": {"model": "toy-latent"}}
    headers = {"Content-Type": "image/tiff", "Accept": "application/geo+json"}
    answer = client.post("/segment", **asked, headers=headers)
    assert answer.status_code == 200, answer.text
    found = shapes_in(answer.content)
    assert {kind for _, kind, _ in found} == {"Polygon", "MultiPolygon"}
    url = client.post("/jobs", **asked, headers=headers).json()["url"]
    until(lambda: client.get(url).json()["finished"])
    assert shapes_in(client.get(f"{url}/result").content) == found
    arguments = [tmp_path / "a.tif", tmp_path / "out", "-m", "toy-latent", "--store", toy_store, "--format", "geojson"]
    done = CliRunner().invoke(main, ["batch", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    assert shapes_in((tmp_path / "out" / "a.geojson").read_bytes()) == found


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_every_surface_says_outside_of_the_document_too_why_coordinates_are_pixels(
    client: httpx.Client, toy_store: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    profile = {"driver": "GTiff", "height": HEIGHT, "width": WIDTH, "count": 3, "dtype": "uint8", "crs": "EPSG:32631"}
    with rasterio.open(tmp_path / "a.tif", "w", **profile) as target:
        target.write(picture(rng, HEIGHT, WIDTH).transpose(2, 0, 1))
    said = "the raster has a reference system and no transform, so coordinates are pixels"
    asked = {"content": (tmp_path / "a.tif").read_bytes(), "params": {"model": "toy-latent"}}
    headers = {"Content-Type": "image/tiff", "Accept": "application/geo+json"}
    assert client.post("/segment", **asked, headers=headers).headers["X-Penumbra-Warning"] == said
    url = client.post("/jobs", **asked, headers=headers).json()["url"]
    until(lambda: client.get(url).json()["finished"])
    assert client.get(f"{url}/result").headers["X-Penumbra-Warning"] == said
    arguments = [tmp_path / "a.tif", tmp_path / "out", "-m", "toy-latent", "--store", toy_store, "--format", "geojson"]
    done = CliRunner().invoke(main, ["batch", *map(str, arguments)])
    assert f"warning of 1: {said}" in done.stderr


def shapes_in(document: bytes) -> list[tuple[int, str, Any]]:
    return [
        (feature["properties"]["id"], feature["geometry"]["type"], feature["geometry"]["coordinates"])
        for feature in json.loads(document)["features"]
    ]
