"""TIFF of every kind that GDAL knows: what its values mean, which of them are measurements, and where they lie."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.rpc import RPC

from penumbra.models.card import IGNORE
from penumbra.models.errors import BadImage
from penumbra.serving.engine.options import Limits, SegmentOptions
from penumbra.serving.engine.raster import open_raster
from penumbra.serving.engine.segmenter import Segmenter
from tests.conftest import FIXED, decode_image, measured, picture
from tests.serving.engine.tiffs import PLACE, opened, pillows, placed, retagged, tiff

# -- bands ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"colours": "blue green red undefined"}, {"names": "Blue Green Red NIR"}])
def test_bands_are_read_by_their_colours_or_names_and_the_one_left_out_is_named(
    how: dict[str, str], rgb: np.ndarray
) -> None:
    values = np.dstack((rgb[:, :, ::-1], np.full(rgb.shape[:2], 99, np.uint8)))
    raster = opened(tiff(values, photometric="minisblack", **how))
    assert np.array_equal(raster[:, :], rgb) and placed(raster)
    assert raster.warnings == (
        "the image is read as red, green, blue from bands 3, 2, 1; not used: band 4 "
        f"({'nir' if 'names' in how else 'no name'})",
    )


def test_of_names_and_colours_that_disagree_names_are_followed_and_it_is_said(rgb: np.ndarray) -> None:
    raster = opened(tiff(rgb[:, :, ::-1], photometric="rgb", names="blue green red"))
    assert np.array_equal(raster[:, :], rgb) and "were followed" in raster.warnings[0]


def test_bands_without_a_word_are_taken_in_order_and_nothing_is_said(rgb: np.ndarray) -> None:
    for photometric in ("minisblack", "rgb"):
        raster = opened(tiff(rgb, photometric=photometric))
        assert np.array_equal(raster[:, :], rgb) and raster.warnings == ()


@pytest.mark.parametrize("names", ["nir red green", "B02 B03 B04", "red green red_edge"])
def test_names_that_are_not_the_colours_read_are_named(names: str, rgb: np.ndarray) -> None:
    (said,) = opened(tiff(rgb, names=names)).warnings
    assert (
        said == f"red, green and blue are read from bands 1, 2, 3, whose names are {', '.join(names.lower().split())}"
    )


def test_a_fourth_band_that_is_named_otherwise_is_not_alpha(rgb: np.ndarray) -> None:
    infrared = np.where(np.arange(60) < 20, 0, rgb[:, :, 0])
    values = np.dstack((rgb, infrared.astype(np.uint8)))  # GDAL calls the fourth of four bytes alpha
    raster = opened(tiff(values, names="red green blue nir"))
    assert raster.void(slice(None)) is None and "not used: band 4 (nir)" in raster.warnings[0]
    for name in ("alpha", "Band_4", "transparency"):
        void = opened(tiff(values, names=f"red green blue {name}")).void(slice(None))
        assert void is not None and np.array_equal(void, infrared == 0)
    void = opened(tiff(values, names="red green blue nir", nodata=0)).void(slice(None))
    assert void is not None and np.array_equal(void, (rgb == 0).all(2))


def test_of_two_bands_grey_is_read_whichever_comes_first(rgb: np.ndarray) -> None:
    grey, alpha = rgb[:, :, 0], np.full(rgb.shape[:2], 255, np.uint8)
    for values, colours in ((np.dstack((grey, alpha)), "gray alpha"), (np.dstack((alpha, grey)), "alpha gray")):
        raster = opened(tiff(values, colours=colours))
        assert np.array_equal(raster[:, :][:, :, 2], grey) and raster.warnings == ()
    raster = opened(tiff(rgb[:, :, :2]))
    assert np.array_equal(raster[:, :][:, :, 1], grey) and "not used: band 2" in raster.warnings[0]


def test_a_scale_that_is_not_applied_is_named(rgb: np.ndarray) -> None:
    with rasterio.MemoryFile() as memory:
        with memory.open(driver="GTiff", count=3, height=40, width=60, dtype="uint8", **PLACE) as file:
            file.write(rgb.transpose(2, 0, 1))
            file.scales = (0.0001,) * 3
        assert "scale and offset" in opened(bytes(memory.read())).warnings[0]


# -- what is no measurement ----------------------------------------------------------------------


def test_mask_alpha_and_nodata_are_void_in_every_combination(rgb: np.ndarray) -> None:
    """GDAL's own mask leaves out alpha and nodata as soon as there is another."""
    values = rgb + 1
    values[:, :10] = 0
    valid, alpha = np.ones(rgb.shape[:2], bool), np.full(rgb.shape[:2], 255, np.uint8)
    valid[:, 20:30], alpha[:, 40:50] = False, 0
    for has_nodata in (False, True):
        for has_mask in (False, True):
            for has_alpha in (False, True):
                facts: dict[str, Any] = {"nodata": 0} if has_nodata else {}
                facts |= {"mask": valid} if has_mask else {}
                facts |= {"colours": "red green blue alpha"} if has_alpha else {}
                raster = opened(tiff(np.dstack((values, alpha)) if has_alpha else values, **facts))
                wanted = np.zeros(rgb.shape[:2], bool)
                wanted[:, :10] |= has_nodata
                wanted[:, 20:30] |= has_mask
                wanted[:, 40:50] |= has_alpha
                void = raster.void(slice(5, 33))
                assert (void is None) == (not facts)
                assert void is None or np.array_equal(void, wanted[5:33]), facts
                assert raster.warnings == ()


@pytest.mark.parametrize("nodata", [np.nan, -9999.0, -3.4028234663852886e38, None])
def test_no_number_and_nodata_of_floats_are_void_and_black(nodata: float | None, rng: np.random.Generator) -> None:
    values = rng.random((40, 60, 3), dtype=np.float32)
    values[:9] = np.nan if nodata is None else nodata
    values[20, 20:23, 1] = np.nan, np.inf, -np.inf
    raster = opened(tiff(values, nodata=nodata))
    void = raster.void(slice(0, 40))
    assert void is not None and void[:9].all() and void[20, 20:23].all() and void.sum() == 9 * 60 + 3
    assert (raster[:9, :] == 0).all() and raster[20:, :].mean() > 100


def test_what_is_void_is_read_with_the_pixels_and_not_once_more(rgb: np.ndarray) -> None:
    raster = opened(tiff(rgb, nodata=0))
    before = raster.void(slice(3, 20))
    loaded = raster.load()
    again = [loaded.void(slice(3, 20)) for _ in range(2)]
    assert before is not None and again[0] is not None and np.array_equal(before, again[0])
    assert np.shares_memory(*again)


def test_a_picture_of_nothing_says_so() -> None:
    assert opened(tiff(np.zeros((9, 9), np.uint8), nodata=0)).warnings == ("no pixel of the image holds a measurement",)


def test_void_has_no_label_and_warnings_are_in_the_answer(toy_store: Path, rgb: np.ndarray) -> None:
    alpha = np.full(rgb.shape[:2], 255, np.uint8)
    alpha[:, :20] = 0
    raster = opened(tiff(np.dstack((rgb, alpha, alpha)), colours="red green blue alpha undefined"))
    with Segmenter.open(toy_store, device="cpu", threads=1, tuning=FIXED) as segmenter:
        prediction = segmenter.segment(raster, SegmentOptions(model="toy-pointwise"))
    assert np.array_equal(prediction.labels_HW == IGNORE, alpha == 0)
    assert any("not used: band 5" in warning for warning in prediction.warnings)


# -- where it lies -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_turns_picture_place_and_void_together(orientation: int, rgb: np.ndarray) -> None:
    """What a pixel shows stays where it was on the ground; the picture is the one that Pillow shows."""
    values = rgb + 1
    values[:7, :11] = 0
    flat = pillows(Image.fromarray(values), tiffinfo={274: orientation})
    shown = decode_image(flat, Limits())
    data = retagged(tiff(values, nodata=0), 274, orientation)
    raster = opened(data)
    assert measured(data) == shown.shape[:2] == raster.shape[:2]
    assert np.array_equal(raster[:, :], shown) and np.array_equal(raster.load()[:, :], shown)
    assert np.array_equal(opened(data)[3:30, 5:25], shown[3:30, 5:25])
    assert np.array_equal(raster.void(slice(2, 30)), (shown[2:30] == 0).all(-1))
    row, column = 20, 30
    colour = shown[row, column].tolist()
    stored_row, stored_column = (int(k[0]) for k in np.nonzero((values == colour).all(-1)))
    assert raster.place.transform * (column + 0.5, row + 0.5) == pytest.approx(
        PLACE["transform"] * (stored_column + 0.5, stored_row + 0.5)
    )


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_control_points_turn_with_the_picture_and_coefficients_are_named(orientation: int, rgb: np.ndarray) -> None:
    points = [GroundControlPoint(row, column, 3 + column / 100, 52 - row / 100)
              for row, column in ((0, 0), (0, 60), (40, 0), (40, 60))]  # fmt: skip
    rpc = RPC(0, 1, 52, 1, [1.0] * 20, [1.0] * 20, 0, 1, 3, 1, [1.0] * 20, [1.0] * 20, 0, 1)
    placed_by = opened(retagged(tiff(rgb, gcps=points, crs="EPSG:4326", transform=None), 274, orientation)).place
    ends = {1: (0, 0), 3: (60, 40), 6: (40, 0)}  # columns and rows, where the stored picture's first corner is shown
    assert (placed_by.gcps[0].col, placed_by.gcps[0].row) == ends[orientation] and placed_by.crs.to_epsg() == 4326
    raster = opened(retagged(tiff(rgb, rpcs=rpc, transform=None, crs=None), 274, orientation))
    assert (raster.place.rpcs is None) == (orientation != 1) == any("RPC" in text for text in raster.warnings)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_a_world_file_beside_a_local_file_is_read_and_other_side_files_are_named(
    tmp_path: Path, rgb: np.ndarray
) -> None:
    flat = tiff(rgb, crs=None, transform=None)
    for name in ("a.tfw", "b.tifw", "c.wld"):
        path = tmp_path / f"{name[0]}.tif"
        path.write_bytes(flat)
        (tmp_path / name).write_text("2\n0\n0\n-3\n500001\n5799998.5\n")
        assert opened(path).place.transform == PLACE["transform"] and opened(path).warnings == ()
    (tmp_path / "c.wld").write_text("no numbers")
    (tmp_path / "c.tif.aux.xml").write_text("<PAMDataset/>")
    assert opened(path).place.transform == Affine.identity()
    assert opened(path).warnings == ("c.tif.aux.xml beside the image is not read",)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize(
    ("picture", "world"), [("a.TIF", "a.TFW"), ("a.TIF", "a.tfw"), ("a.tif", "a.TFW"), ("a.tiff", "a.WLD")]
)
def test_a_world_file_is_found_in_capitals_too(picture: str, world: str, tmp_path: Path, rgb: np.ndarray) -> None:
    (tmp_path / picture).write_bytes(tiff(rgb, crs=None, transform=None))
    (tmp_path / world).write_text("2\n0\n0\n-3\n500001\n5799998.5\n")
    assert opened(tmp_path / picture).place.transform == PLACE["transform"]


@pytest.mark.parametrize("beside", ["a.tab", "a_RPC.TXT", "a.RPB"])
def test_what_else_places_an_image_from_beside_it_is_named(beside: str, tmp_path: Path, rgb: np.ndarray) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(rgb))
    (tmp_path / beside).write_text("anything")
    assert opened(tmp_path / "a.tif").warnings == (f"{beside} beside the image is not read",)


# -- damage --------------------------------------------------------------------------------------


def test_a_damaged_scan_of_jpeg_in_tiff_is_refused_or_warned_about(rng: np.random.Generator, tmp_path: Path) -> None:
    noise = picture(rng, 200, 300)
    data = tiff(noise, compress="jpeg", photometric="ycbcr", tiled=True, blockxsize=64, blockysize=64)
    whole, outcomes = opened(data)[:, :], []
    assert opened(data).load().warnings == ()
    for start in np.linspace(len(data) // 8, len(data) - 500, 30).astype(int):
        (tmp_path / "a.tif").write_bytes(data[:start] + rng.bytes(200) + data[start + 200 :])
        try:
            raster = opened(tmp_path / "a.tif").load()
        except BadImage as error:
            outcomes.append(str(error))
            continue
        if not np.array_equal(raster[:, :], whole):
            outcomes += raster.warnings or ["silent"]
    assert outcomes.count("silent") <= len(outcomes) // 4, "a code that fits by chance cannot be told"
    assert any("its pixels there are a guess" in text for text in outcomes)
    assert not any("a.tif" in text or str(tmp_path) in text for text in outcomes)


def test_no_name_of_ours_is_in_a_refusal(rgb: np.ndarray) -> None:
    data, inks = tiff(rgb, compress="deflate"), pillows(Image.fromarray(rgb).convert("CMYK"))
    for broken in (data[: len(data) // 2], data[:200] + bytes(300) + data[500:], data[:40], inks[: len(inks) // 2]):
        with pytest.raises(BadImage) as caught:
            opened(broken).load()
        assert "vsimem" not in str(caught.value) and ".tif" not in str(caught.value)


DAMAGED = [
    {"colours": "red green blue alpha"}, {"photometric": "cmyk"}, {"compress": "deflate"}, {"nodata": 0}, {"nbits": 4},
    {"mask": True}, {"compress": "jpeg"}, {"interleave": "band"},
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # rasterio stumbles over GDAL's words
@pytest.mark.parametrize("facts", DAMAGED)
def test_a_damaged_tiff_of_any_kind_is_read_or_refused_in_a_sentence(facts: Any, rng: np.random.Generator) -> None:
    values = rng.integers(0, 16, (40, 60, 4 if len(facts.keys() & {"colours", "photometric"}) else 3), dtype=np.uint8)
    data, sentences = tiff(values, **facts), list[str]()
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(4):
            damaged[int(rng.random() ** 2 * len(data)) - int(rng.random() < 0.5) * 200] = rng.integers(256)
        try:
            raster = open_raster(bytes(damaged))
            if raster and raster.shape[0] * raster.shape[1] < 10_000:
                assert raster[:, :].shape == raster.shape and raster.void(slice(0, 5)) is not raster.warnings
        except BadImage as error:
            sentences.append(str(error))
    assert not any("vsimem" in sentence for sentence in sentences)


def test_coefficients_that_are_not_all_there_are_a_refusal_in_words(rgb: np.ndarray) -> None:
    said = '<GDALMetadata><Item name="HEIGHT_OFF" domain="RPC">12</Item></GDALMetadata>'
    with pytest.raises(BadImage):
        open_raster(pillows(Image.fromarray(rgb), tiffinfo={42112: said}))
