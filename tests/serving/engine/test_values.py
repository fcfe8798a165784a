"""What the values of a TIFF become: 8 bits by one rule for the file, and a word where they do not fill their type."""

import io

import numpy as np
import pytest
import rasterio
from PIL import Image

from penumbra.models.errors import BadImage
from penumbra.serving.engine import raster as rasters
from tests.serving.engine.tiffs import GREY, PLACE, opened, pillows, placed, tiff

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
