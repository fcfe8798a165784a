"""Pictures that are damaged in their pixels are refused or warned about, and whole ones are read."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from penumbra.models.errors import BadImage
from penumbra.serving.engine.decode import open_image
from penumbra.serving.engine.options import Limits
from tests.conftest import decode_image, measured, picture

LIMITS = Limits()


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def scene(height: int = 180, width: int = 240) -> Image.Image:
    """Smooth, with grain, as photographs are."""
    y, x = np.mgrid[:height, :width]
    grain = np.random.Generator(np.random.PCG64(3)).normal(0, 9, (height, width))
    channels = [128 + 90 * np.sin(x / (9 + 4 * k) + y / 17) + grain for k in range(3)]
    return Image.fromarray(np.dstack(channels).clip(0, 255).astype(np.uint8))


def warnings_of(data: bytes) -> tuple[str, ...]:
    return open_image(data, LIMITS).warnings


def outcomes(data: bytes, num_bytes: int, *, first: float) -> dict[str, int]:
    """What became of pictures of which so many bytes are zero or random, from that share of the file on."""
    whole, rng = decode_image(data, LIMITS), np.random.Generator(np.random.PCG64(5))
    counts = {"refused": 0, "warned": 0, "silent": 0}
    for start in np.linspace(first * len(data), len(data) - num_bytes - 40, 40).astype(int):
        for junk in (bytes(num_bytes), rng.bytes(num_bytes)):
            damaged = data[:start] + junk + data[start + num_bytes :]
            try:
                image = open_image(damaged, LIMITS)
            except BadImage:
                counts["refused"] += 1
                continue
            if image.warnings:
                counts["warned"] += 1
            elif not np.array_equal(image[:, :], whole):
                counts["silent"] += 1
    return counts


# -- PNG -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "I;16"])
def test_a_png_with_any_damaged_byte_in_its_pixels_is_refused(mode: str) -> None:
    image = scene(30, 40)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image)[:, :, 0].astype(np.uint16) * 257)
    data = encode(image if mode == "I;16" else image.convert(mode), "PNG")
    start = data.index(b"IDAT") + 4
    for place in range(start, len(data) - 16, 37):
        damaged = bytearray(data)
        damaged[place] ^= 0x20
        with pytest.raises(BadImage, match=r"the PNG image is damaged .*IDAT"):
            decode_image(bytes(damaged), LIMITS)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.mark.parametrize("level", [0, 6])
@pytest.mark.parametrize("lost", [slice(3000, 9000), slice(15_000, None), slice(-3000, None)])
def test_a_png_that_has_lost_one_of_its_parts_is_refused_although_all_checksums_hold(level: int, lost: slice) -> None:
    data = encode(scene(), "PNG")
    start = data.index(b"IDAT") - 4
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in np.asarray(scene())), level)
    rest = pixels[: lost.start] + (pixels[lost.stop :] if lost.stop else b"")
    with pytest.raises(BadImage, match="the PNG image is damaged or truncated"):
        decode_image(data[:start] + chunk(b"IDAT", rest) + chunk(b"IEND", b""), LIMITS)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("place", [None, 1, 30])
def test_a_png_whose_data_are_sound_but_of_fewer_rows_is_refused_and_a_black_one_is_read(
    mode: str, place: int | None
) -> None:
    image = scene(40, 51).convert(mode)
    image.paste(0, (0, 30, 51, 40))
    data = encode(image, "PNG")
    start = data.index(b"IDAT") - 4
    length = int.from_bytes(data[start : start + 4])
    rows = zlib.decompress(data[start + 8 : start + 8 + length])
    kept = rows[: len(rows) * place // 40] if place else rows
    made = data[:start] + chunk(b"IDAT", zlib.compress(kept)) + chunk(b"IEND", b"")
    if place:
        with pytest.raises(BadImage, match="its data end before its last row"):
            decode_image(made, LIMITS)
    else:
        assert np.array_equal(decode_image(made, LIMITS), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("place", [b"IDAT", b"IEND"])
def test_a_png_is_turned_wherever_it_says_so(place: bytes) -> None:
    exif = Image.Exif()
    exif[274] = 6
    data = encode(scene(30, 40), "PNG")
    at = data.index(place) - 4
    turned = data[:at] + chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + data[at:]
    assert measured(turned) == (40, 30) == decode_image(turned, LIMITS).shape[:2]


def test_a_png_with_long_texts_and_a_large_profile_is_read(rng: np.random.Generator) -> None:
    pixels, about = picture(rng, 30, 40), PngInfo()
    about.add_text("plain", "x" * 2_000_000)
    about.add_text("packed", "x" * 3_000_000, zip=True)
    about.add_itxt("international", "x" * 3_000_000, zip=True)
    for info, profile in ((about, b""), (None, rng.bytes(1_500_000)), (about, bytes(3_000_000))):
        data = encode(Image.fromarray(pixels), "PNG", pnginfo=info, icc_profile=profile)
        assert np.array_equal(decode_image(data, LIMITS), pixels)


@pytest.mark.parametrize("name", ["XML:com.adobe.xmp", "Raw profile type exif"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_png_with_a_long_text_that_might_say_how_it_is_turned_is_read(
    name: str, is_packed: bool, rng: np.random.Generator
) -> None:  # fmt: skip
    pixels, about = picture(rng, 30, 40), PngInfo()
    about.add_itxt(name, "x" * 3_000_000, zip=is_packed)
    about.add_text(name, "x" * 3_000_000, zip=is_packed)
    assert np.array_equal(decode_image(encode(Image.fromarray(pixels), "PNG", pnginfo=about), LIMITS), pixels)


def test_a_png_keeps_its_orientation_beside_a_large_profile(rng: np.random.Generator) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray(picture(rng, 30, 40)), "PNG", icc_profile=rng.bytes(2_000_000), exif=exif)
    assert decode_image(data, LIMITS).shape == (40, 30, 3)


@pytest.mark.parametrize(("colour", "count"), [(0, 1), (2, 3), (4, 2), (6, 4)])
@pytest.mark.parametrize("bits", [12, 16])
def test_deep_png_of_every_colour_has_the_rule_of_deep_files(
    colour: int, count: int, bits: int, rng: np.random.Generator
) -> None:
    values = rng.integers(0, 2**bits, (30, 40, count), dtype=np.uint16)
    if count in (2, 4):
        values[:, :9, -1], values[:, 9:, -1] = 0, 7
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    image = open_image(png(30, 40, 16, colour, rows), LIMITS)
    wanted = (values[:, :, :1] if count < 3 else values[:, :, :3]) >> (bits - 8)
    assert np.array_equal(image[:, :], np.broadcast_to(wanted, (30, 40, 3)))
    assert bool(image.warnings) == (bits == 12)
    void = image.void(slice(2, 9))
    assert (void is None) == (count in (1, 3))
    assert void is None or (void[:, :9].all() and not void[:, 9:].any())


def png(height: int, width: int, depth: int, colour: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# -- JPEG ----------------------------------------------------------------------------------------

JPEGS: list[tuple[str, dict[str, Any]]] = [
    ("RGB", {}), ("RGB", {"progressive": True}), ("RGB", {"subsampling": 0}), ("L", {}), ("CMYK", {}),
    ("RGB", {"restart_marker_blocks": 4}), ("L", {"progressive": True}),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "options"), JPEGS)
def test_whole_jpegs_are_what_pillow_shows_with_and_without_their_end_marker(mode: str, options: Any) -> None:
    data = encode(scene().convert(mode), "JPEG", quality=90, **options)
    wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for end in (b"\xff\xd9", b"\xff", b"", b"\xff\xd9 and what comes after it"):
        assert data.endswith(b"\xff\xd9")
        image = open_image(data[:-2] + end, LIMITS)
        assert image.warnings == () and image.void(slice(None)) is None
        assert np.array_equal(image[:, :], wanted)


@pytest.mark.parametrize(("mode", "options"), JPEGS)
def test_a_jpeg_that_ends_before_its_pixels_do_is_refused(mode: str, options: Any) -> None:
    data = encode(scene().convert(mode), "JPEG", quality=90, **options)
    for end in np.linspace(700, len(data) - 8, 25).astype(int):
        with pytest.raises(BadImage, match="the JPEG image is truncated"):
            decode_image(data[:end], LIMITS)


def test_a_progressive_jpeg_that_ends_between_two_scans_is_refused() -> None:
    """Its every pixel is there, but not in full."""
    data = encode(scene(), "JPEG", progressive=True)
    ends = [k for k in range(len(data)) if data[k : k + 2] in (b"\xff\xda", b"\xff\xc4")]
    for end in ends[4:]:
        with pytest.raises(BadImage, match="truncated"):
            decode_image(data[:end], LIMITS)


def test_a_jpeg_of_scans_without_end_is_refused_and_one_of_many_thumbnails_is_not() -> None:
    data = encode(scene(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    with pytest.raises(BadImage, match="more than 100 scans"):
        decode_image(data[:-2] + data[last:-2] * 100 + data[-2:], LIMITS)
    decode_image(data + data * 20, LIMITS)


@pytest.mark.parametrize(("mode", "options"), JPEGS)
def test_most_damage_in_the_scan_of_a_jpeg_is_refused_or_warned_about(mode: str, options: Any) -> None:
    """JPEG has no checksum: what fits by chance cannot be told; Pillow alone tells next to nothing."""
    counts = outcomes(encode(scene().convert(mode), "JPEG", quality=95, **options), 200, first=0.3)
    assert counts["refused"] + counts["warned"] > 1.5 * counts["silent"]


def test_a_warning_of_damage_says_what_was_repaired_and_is_in_the_answer() -> None:
    data = encode(scene(), "JPEG", quality=95, subsampling=0)
    middle = len(data) // 2
    (warning,) = warnings_of(data[:middle] + bytes(300) + data[middle + 300 :])
    assert warning.startswith("the JPEG image is damaged, and its pixels there are a guess (Corrupt JPEG data: ")


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_damaged_jpeg_is_turned_like_a_whole_one(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(scene(), "JPEG", quality=95, exif=exif)
    damaged = data[:-600] + bytes(300) + data[-300:]
    whole, guessed = decode_image(data, LIMITS), decode_image(damaged, LIMITS)
    assert whole.shape == guessed.shape and (whole == guessed).mean() > 0.5


def test_a_jpeg_of_unusual_sampling_is_read_as_pillow_does() -> None:
    """One colour in a quarter of the columns and half of the rows, its channels in scans of their own (4:1:0)."""
    channels = [encode(scene(*size).convert("L"), "JPEG") for size in ((64, 64), (32, 16), (32, 16))]
    scans = [data[data.index(b"\xff\xda") : -2] for data in channels]
    for number, scan in enumerate(scans):
        scans[number] = scan[:5] + bytes([number + 1]) + scan[6:]
    first = channels[0]
    start, scan = first.index(b"\xff\xc0"), first.index(b"\xff\xda")
    frame = struct.pack(">HHBHHB", 0xFFC0, 17, 8, 64, 64, 3) + bytes([1, 0x42, 0, 2, 0x11, 0, 3, 0x11, 0])
    data = first[:start] + frame + first[start + 13 : scan] + b"".join(scans) + b"\xff\xd9"
    assert np.array_equal(decode_image(data, LIMITS), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


# -- WebP ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"quality": 80}, {"quality": 30, "method": 6}, {"lossless": True}])
@pytest.mark.parametrize("size", [(1, 1), (17, 5), (180, 240)])
def test_whole_webps_have_nothing_to_warn_of(options: Any, size: tuple[int, int]) -> None:
    flat = Image.new("RGB", size, (9, 99, 199))
    for image in (scene(*size), flat, scene(*size).convert("RGBA")):
        shown = open_image(encode(image, "WEBP", **options), LIMITS)
        assert shown.warnings == () and shown.void(slice(None)) is None


def test_damage_in_the_scan_of_a_webp_is_refused_or_warned_about() -> None:
    for num_bytes in (16, 200):
        counts = outcomes(encode(scene(), "WEBP", quality=80), num_bytes, first=0.1)
        assert counts["silent"] <= 2 and counts["warned"] > 5 and counts["refused"] > 5


def test_long_damage_in_a_lossless_webp_is_mostly_refused_or_warned_about() -> None:
    counts = outcomes(encode(scene(), "WEBP", lossless=True), 2000, first=0.1)
    assert counts["refused"] + counts["warned"] > 2 * counts["silent"]


# -- alpha ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_where_a_picture_is_transparent_nothing_was_measured(kind: str, rng: np.random.Generator) -> None:
    rgba = np.dstack((picture(rng, 30, 40), rng.integers(0, 3, (30, 40), dtype=np.uint8)))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    image = open_image(encode(Image.fromarray(rgba), kind, **options), LIMITS)
    assert np.array_equal(image[:, :], rgba[:, :, :3]) and image.warnings == ()
    assert np.array_equal(image.void(slice(3, 20)), rgba[3:20, :, 3] == 0)


def test_a_transparent_colour_of_a_palette_is_void() -> None:
    image = Image.fromarray(np.array([[0, 1, 2, 1]], np.uint8), "L").convert("P")
    image.putpalette([9, 9, 9, 99, 99, 99, 199, 199, 199])
    shown = open_image(encode(image, "PNG", transparency=1), LIMITS)
    void = shown.void(slice(0, 1))
    assert void is not None and void.tolist() == [[False, True, False, True]]


def test_a_picture_that_is_all_transparent_says_so_and_a_dark_one_too(rng: np.random.Generator) -> None:
    clear = np.dstack((picture(rng, 30, 40), np.zeros((30, 40), np.uint8)))
    assert warnings_of(encode(Image.fromarray(clear), "PNG")) == ("no pixel of the image holds a measurement",)
    dark = rng.integers(0, 16, (30, 40, 3), dtype=np.uint8)
    (warning,) = warnings_of(encode(Image.fromarray(dark), "BMP"))
    assert "nearly black" in warning
