"""TIFF of every kind that GDAL knows: what its values mean, which of them are measurements, and where they lie."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.rpc import RPC
from rasterio.transform import from_origin

from penumbra.models.card import IGNORE
from penumbra.models.errors import BadImage
from penumbra.serving.engine import raster as rasters
from penumbra.serving.engine.decode import measure_image
from penumbra.serving.engine.options import Limits, SegmentOptions
from penumbra.serving.engine.raster import Raster, open_raster
from penumbra.serving.engine.segmenter import Segmenter
from tests.conftest import FIXED, decode_image, picture

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


@pytest.fixture
def rgb(rng: np.random.Generator) -> np.ndarray:
    return picture(rng, 40, 60)


# -- what a value is -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_few_bits_are_spread_from_black_to_white(bits: int, photometric: str, rng: np.random.Generator) -> None:
    values = rng.integers(0, 2**bits, (20, 30), dtype=np.uint8)
    raster = opened(tiff(values, nbits=bits, photometric=photometric))
    grey = values * (255 // (2**bits - 1))
    assert np.array_equal(raster[:, :][:, :, 1], grey if photometric == "minisblack" else 255 - grey)
    assert placed(raster) and raster.warnings == ()


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_where_the_least_is_white_grey_is_turned_round(dtype: str, rng: np.random.Generator) -> None:
    values = rng.integers(0, np.iinfo(dtype).max, (20, 30), dtype=dtype, endpoint=True)
    raster = opened(tiff(values, photometric="miniswhite"))
    high = values if dtype == "uint8" else (values >> 8).astype(np.uint8)
    assert np.array_equal(raster[:, :][:, :, 0], 255 - high) and placed(raster) and raster.warnings == ()


@pytest.mark.parametrize("top", GREY)
def test_where_the_least_is_white_sparse_values_and_floats_are_turned_round_too(top: int) -> None:
    ramp = np.linspace(0, top, 1000).reshape(20, 50)
    for values in (ramp.astype(np.uint16), ramp.astype(np.float32)):
        pixels = opened(tiff(values, photometric="miniswhite"))[:, :]
        assert pixels[0, 0, 0] == 255 and pixels[-1, -1, 0] == 0


def test_a_palette_becomes_its_colours_and_keeps_its_place(rng: np.random.Generator) -> None:
    index = rng.integers(0, 4, (20, 30), dtype=np.uint8)
    colours = [(1, 2, 3), (40, 50, 60), (200, 100, 0), (255, 255, 255)]
    with rasterio.MemoryFile() as memory:
        with memory.open(driver="GTiff", count=1, height=20, width=30, dtype="uint8", **PLACE) as file:
            file.write(index, 1)
            file.write_colormap(1, {k: (*colour, 255) for k, colour in enumerate(colours)})
        raster = opened(bytes(memory.read()))
    assert np.array_equal(raster[:, :], np.array(colours, np.uint8)[index]) and placed(raster)
    assert raster.warnings == (), "a palette's values are no grey that could be too dark"


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_inks_become_colours_and_keep_their_place(dtype: str, rgb: np.ndarray) -> None:
    """With black left out, an ink is what its colour lacks."""
    deep = 1 if dtype == "uint8" else 257
    inks = np.dstack((255 - rgb, np.zeros(rgb.shape[:2], np.uint8))).astype(dtype) * np.array(deep, dtype)
    raster = opened(tiff(inks, photometric="cmyk"))
    assert np.abs(raster[:, :].astype(int) - rgb).max() <= 1 and placed(raster)
    assert raster.warnings == () and (raster.void(slice(None)) is None or not raster.void(slice(None)).any())


def pillows(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "TIFF", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
def test_pillows_tiffs_are_what_pillow_shows(mode: str, compression: str | None, rgb: np.ndarray) -> None:
    image = Image.fromarray(rgb).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    data = pillows(image, compression=compression)
    shown = Image.open(io.BytesIO(data))
    wanted = np.asarray(shown.convert("RGB")) if mode != "I;16" else np.asarray(shown)[:, :, None] >> 8
    assert np.abs(opened(data)[:, :].astype(int) - wanted).max() <= (2 if mode == "YCbCr" else 0)


# -- values that do not fill their type ----------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 10, 11, 12, 14])
@pytest.mark.parametrize("dtype", ["uint16", "int16", "uint32", "int32", "int64", "float32", "float64"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_range_that_sensors_have_and_values_fill_becomes_black_to_white_with_a_warning(
    bits: int, dtype: str, count: int, rng: np.random.Generator
) -> None:
    values = rng.integers(0, 2**bits, (40, 60, count)).astype(dtype)
    raster = opened(tiff(values))
    assert np.array_equal(raster[:, :], np.broadcast_to(values.astype(np.int64) >> (bits - 8), (40, 60, 3)))
    (warning,) = raster.warnings
    assert dtype in warning and f"0 (black) to {2**bits - 1} (white)" in warning and placed(raster)


def test_full_16_bits_keep_their_high_byte_and_nothing_is_said(rng: np.random.Generator) -> None:
    values = rng.integers(0, 2**16, (40, 60, 3), dtype=np.uint16)
    raster = opened(tiff(values))
    assert np.array_equal(raster[:, :], values >> 8) and raster.warnings == ()


@pytest.mark.parametrize("share", [0.01, 0.04, 0.4])
@pytest.mark.parametrize("loud", [65535, 60000])
def test_dark_values_beside_a_fill_that_nobody_declared_are_said_to_be_nearly_black(
    share: float, loud: int, rng: np.random.Generator
) -> None:
    values = rng.integers(0, 2**12, (400, 600), dtype=np.uint16)
    values[: int(400 * share)] = loud
    raster = opened(tiff(values))
    assert np.array_equal(raster[:, :][:, :, 0], values >> 8)
    is_said = loud == 65535 or share < 0.05  # 40 % of 60000 may be a bright sky
    assert [text for text in raster.warnings if "nearly black" in text and "declare them as nodata" in text] == (
        list(raster.warnings) if is_said else []
    )
    assert len(raster.warnings) == is_said


def test_bits_that_the_file_declares_need_no_warning(rng: np.random.Generator) -> None:
    values = rng.integers(0, 1000, (40, 60), dtype=np.uint16)
    raster = opened(tiff(values, nbits=12))
    assert np.array_equal(raster[:, :][:, :, 0], values >> 4) and raster.warnings == ()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("count", [1, 3])
def test_reflectances_are_black_at_0_and_white_at_1(dtype: str, count: int, rng: np.random.Generator) -> None:
    eight_bits = rng.integers(0, 256, (40, 60, count), dtype=np.uint8)
    raster = opened(tiff((eight_bits / 255).astype(dtype)))
    assert np.array_equal(raster[:, :], np.broadcast_to(eight_bits, (40, 60, 3))) and placed(raster)
    assert "0 (black) to 1 (white)" in raster.warnings[0]


def test_reflectances_of_noise_and_snow_become_black_and_white() -> None:
    values = np.linspace(-0.05, 1.4, 2400, dtype=np.float32).reshape(40, 60)
    pixels = opened(tiff(values))[:, :]
    assert pixels[0, 0, 0] == 0 and pixels[-1, -1, 0] == 255 and pixels[20, 0, 0] == round(255 * float(values[20, 0]))


def test_half_floats_are_read(rng: np.random.Generator) -> None:
    assert opened(tiff(rng.random((40, 60)).astype(np.float32), nbits=16))[:, :].mean() > 100


def test_a_dead_pixel_does_not_make_the_picture_black(rng: np.random.Generator) -> None:
    values = rng.integers(0, 4096, (40, 60), dtype=np.uint16)
    values[3, 3], values[7, 7] = 65535, 4095
    pixels = opened(tiff(values))[:, :]
    assert pixels.max() == 255 and pixels.mean() > 100 and pixels[3, 3, 0] == 255


def test_nodata_and_what_is_masked_have_no_say_in_the_range(rng: np.random.Generator) -> None:
    values = rng.integers(1, 4096, (40, 60), dtype=np.uint16)
    values[:20] = 65535
    alpha = np.where(values == 65535, 0, 65535).astype(np.uint16)
    for data in (
        tiff(values, nodata=65535),
        tiff(values, mask=values != 65535),
        tiff(np.dstack((values, alpha)), colours="gray alpha"),
    ):
        raster = opened(data)
        assert np.array_equal(raster[20:, :][:, :, 0], values[20:] >> 4) and "4095" in raster.warnings[0]


@pytest.mark.parametrize(("values", "said"), [
    (np.full((4, 4), 70_000, np.int32), "int32 values from 70000 to 70000"),
    (np.full((4, 4), -9999, np.int16), "int16 values from -9999"),
    (np.full((4, 4), 1e30, np.float32), "float32 values from 1e[+]30"),
    (np.full((4, 4), np.inf, np.float32), "float32 values from inf"),
    (np.linspace(-1, 1, 99, dtype=np.float32)[None], "float32 values from -1 to 1; 0 to one of 1, 255, 1023,"),
    (np.linspace(-2.1, 2.6, 99, dtype=np.float32)[None], "float32 values from -2.1 to 2.6"),
    (np.linspace(0, 9, 99, dtype=np.float64)[None], "float64 values from 0 to 9"),
    (np.arange(-128, 128, dtype=np.int16)[None], "int16 values from -128 to 127"),
    (np.arange(-3000, 10_000, dtype=np.int32)[None], "int32 values from -3000 to 9999"),
    (np.full((4, 4), 1 + 1j, np.complex64), "complex64 values; whole numbers and floats are read"),
])  # fmt: skip
def test_values_that_no_range_holds_are_refused_by_type_and_value(values: np.ndarray, said: str) -> None:
    with pytest.raises(BadImage, match=said):
        opened(tiff(values))[:, :]


def test_a_picture_in_4_of_8_bits_is_as_it_is_and_called_nearly_black(rng: np.random.Generator) -> None:
    values = rng.integers(0, 16, (40, 60, 3), dtype=np.uint8)
    raster = opened(tiff(values))
    assert np.array_equal(raster[:, :], values) and "nearly black" in raster.warnings[0]


def test_the_rule_is_one_for_the_file_however_it_is_read(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upper half alone would have another range."""
    monkeypatch.setattr(rasters, "PIECE_PIXELS", 256)
    values = rng.integers(0, 200, (96, 64, 3), dtype=np.uint16)
    values[48:] *= 20
    for facts in ({}, {"tiled": True, "blockxsize": 16, "blockysize": 16}, {"interleave": "band", "blockysize": 5}):
        whole, parts = opened(tiff(values, **facts)).load()[:, :], opened(tiff(values, **facts))
        assert np.array_equal(whole, values >> 4)
        for rows in (slice(50, 96), slice(0, 7), slice(7, 50)):
            assert np.array_equal(parts[rows, 3:40], whole[rows, 3:40])


# -- bands ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"colours": "blue green red undefined"}, {"names": "Blue Green Red NIR"}])
def test_bands_are_read_by_their_colours_or_names_and_the_one_left_out_is_named(
    how: dict[str, str], rgb: np.ndarray
) -> None:
    values = np.dstack((rgb[:, :, ::-1], np.full(rgb.shape[:2], 99, np.uint8)))
    raster = opened(tiff(values, photometric="minisblack", **how))
    assert np.array_equal(raster[:, :], rgb) and placed(raster)
    assert raster.warnings == (
        "the image is read as red, green and blue from band 3, 2, 1; not used: band 4 "
        f"({'nir' if 'names' in how else 'undefined'})",
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
    assert said == f"band 1, 2, 3 are read as red, green and blue; their names are {', '.join(names.lower().split())}"


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
    values[20, 20, 1] = np.nan
    raster = opened(tiff(values, nodata=nodata))
    void = raster.void(slice(0, 40))
    assert void is not None and void[:9].all() and void[20, 20] and void.sum() == 9 * 60 + 1
    assert (raster[:9, :] == 0).all() and raster[20:, :].mean() > 100


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
    assert measure_image(data, Limits()) == shown.shape[:2] == raster.shape[:2]
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


# -- which directory -----------------------------------------------------------------------------


def pages(*images: np.ndarray, kinds: tuple[int, ...], beneath: bool = False) -> bytes:
    """A TIFF of 8-bit grey or colour images with their NewSubfileType; the later ones beneath the first, if so."""
    data = bytearray(b"II*\0\0\0\0\0")
    links = [4]
    for number, (image, kind) in enumerate(zip(images, kinds, strict=True)):
        strip, samples = len(data), 1 if image.ndim == 2 else 3
        data += image.tobytes()
        entries = {254: kind, 256: image.shape[1], 257: image.shape[0], 258: 8, 259: 1, 262: 1 if samples == 1 else 2,
                   273: strip, 277: samples, 278: image.shape[0], 279: image.size, 330: 0}  # fmt: skip
        if not (beneath and number == 0):
            del entries[330]
        struct.pack_into("<I", data, links[-1], len(data))
        data += struct.pack("<H", len(entries))
        for tag, value in entries.items():
            if tag == 330:
                below = len(data) + 8
            data += struct.pack("<HHII", tag, 4, 1, value)
        links.append(below if beneath and number == 0 else len(data))
        data += b"\0\0\0\0"
    return bytes(data)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("beneath", [False, True])
def test_a_thumbnail_that_says_so_gives_way_to_the_picture(beneath: bool, rgb: np.ndarray, tmp_path: Path) -> None:
    data = pages(rgb[::4, ::4].copy(), rgb, kinds=(1, 0), beneath=beneath)
    (tmp_path / "a b.tif").write_bytes(data)
    for source in (data, tmp_path / "a b.tif"):
        assert np.array_equal(opened(source)[:, :], rgb) and opened(source).warnings == ()
        assert measure_image(source, Limits()) == (40, 60)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_of_several_pages_the_first_is_read_and_one_as_large_is_named(rgb: np.ndarray) -> None:
    small = rgb[:9, :9].copy()
    assert opened(pages(rgb, small, kinds=(0, 0))).warnings == () == opened(pages(rgb, small, kinds=(0, 1))).warnings
    stack = opened(pages(rgb, rgb[::-1].copy(), rgb, kinds=(0, 0, 0)))
    assert np.array_equal(stack[:, :], rgb)
    assert stack.warnings == ("the file has several images of 60x40; the first was read",)
    raster = opened(pages(small, rgb, kinds=(0, 0)))
    assert raster.shape == small.shape and "the largest is 60x40" in raster.warnings[0]


@pytest.mark.parametrize(("photometric", "said"), [(32803, "raw mosaic"), (8, "CIELab"), (777, "interpretation 777")])
def test_colours_of_a_kind_that_is_not_read_are_refused_by_name(photometric: int, said: str, rgb: np.ndarray) -> None:
    with pytest.raises(BadImage, match=f"TIFF image .*{said}.* is not read; grey, RGB, palette"):
        opened(retagged(tiff(rgb), 262, photometric))


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_a_mask_that_cannot_be_found_behind_a_thumbnail_is_named(rgb: np.ndarray) -> None:
    data = pages(rgb[::4, ::4].copy(), rgb, np.zeros((40, 60), np.uint8), kinds=(1, 0, 4))
    assert opened(data).warnings == ("the mask of the image is not read, for the image is not the file's first",)


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
