"""Decoding: any common picture becomes RGB as a viewer shows it, and anything else one sentence."""

import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from penumbra.models.errors import BadImage, TooLarge
from penumbra.serving.engine.decode import check_array, read_header
from penumbra.serving.engine.options import Limits
from tests.conftest import decode_image, picture

LIMITS = Limits(pixels=100_000)
ORIENTATION = 0x0112
pytestmark = pytest.mark.filterwarnings(
    # Pillow says by warnings what it repairs or how large a header is; the answer is ours to give.
    "ignore::UserWarning:PIL",
    "ignore::PIL.Image.DecompressionBombWarning",
)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def decode(data: bytes, limits: Limits = LIMITS) -> np.ndarray:
    image = decode_image(data, limits)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    return image


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (41, 17), (1, 64)])
def test_lossless_pictures_come_back_pixel_by_pixel(kind: str, size: tuple[int, int], rng: np.random.Generator) -> None:
    pixels = picture(rng, *size)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert np.array_equal(decode(encode(Image.fromarray(pixels), kind, **options)), pixels)


def test_a_jpeg_comes_back_as_pillow_shows_it(rng: np.random.Generator) -> None:
    data = encode(Image.fromarray(picture(rng, 31, 45)), "JPEG", quality=95)
    assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_grey_is_repeated(rng: np.random.Generator) -> None:
    grey = picture(rng, 9, 11)[:, :, 0]
    assert np.array_equal(decode(encode(Image.fromarray(grey), "PNG")), np.repeat(grey[:, :, None], 3, 2))


def test_one_bit_becomes_black_and_white() -> None:
    bits = np.array([[True, False, True]])
    assert decode(encode(Image.fromarray(bits), "PNG"))[0, :, 0].tolist() == [255, 0, 255]


def test_palettes_become_their_colours_also_with_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    wanted = [[[10, 20, 30], [40, 50, 60]]]
    assert decode(encode(image, "PNG")).tolist() == wanted
    assert decode(encode(image, "PNG", transparency=0)).tolist() == wanted
    assert decode(encode(image, "PNG", transparency=b"\x00\x80")).tolist() == wanted


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_alpha_is_dropped(alpha: int, rng: np.random.Generator) -> None:
    pixels = picture(rng, 7, 5)
    rgba = np.dstack((pixels, np.full(pixels.shape[:2], alpha, np.uint8)))
    assert np.array_equal(decode(encode(Image.fromarray(rgba), "PNG")), pixels)
    decoded = decode(encode(Image.fromarray(rgba[:, :, 2:]), "PNG"))
    assert np.array_equal(decoded, np.repeat(pixels[:, :, 2:], 3, 2))


def test_cmyk_is_converted() -> None:
    decoded = decode(encode(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=100))
    assert np.abs(decoded.astype(int) - (0, 255, 255)).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_high_byte(kind: str) -> None:
    values = np.array([[0, 255, 256, 0x1234, 0xFFFF]], np.uint16)
    assert decode(encode(Image.fromarray(values), kind))[0, :, 1].tolist() == [0, 0, 1, 0x12, 0xFF]


def test_16_bit_colour_keeps_its_high_byte() -> None:
    row = b"\x00" + struct.pack(">3H", 0x1234, 0xFFFF, 0x00FF)
    assert decode(png(1, 1, 16, 2, zlib.compress(row))).tolist() == [[[0x12, 0xFF, 0x00]]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_so_the_answer_has_the_size_a_viewer_shows(kind: str, orientation: int) -> None:
    """The stored picture is turned so that undoing the tag gives a picture with one bright corner, top left."""
    shown = np.zeros((16, 32, 3), np.uint8)
    shown[:8, :16] = 255
    undo = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }  # fmt: skip
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](shown)))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    decoded = decode(encode(stored, kind, exif=exif))
    assert decoded.shape == shown.shape
    assert np.abs(decoded.astype(int) - shown).max() <= 8


def test_of_several_frames_the_first_is_taken() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ((255, 0, 0), (0, 255, 0))]
    for kind, options in (("WEBP", {"lossless": True}), ("TIFF", {}), ("PNG", {})):
        decoded = decode(encode(frames[0], kind, save_all=True, append_images=frames[1:], **options))
        assert decoded[0, 0].tolist() == [255, 0, 0]


# -- refusals ------------------------------------------------------------------------------------


def png(width: int, height: int, depth: int = 8, color: int = 2, pixels: bytes = b"") -> bytes:
    """A PNG of any header."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


GOOD = {
    kind: encode(Image.fromarray(picture(np.random.Generator(np.random.PCG64(1)), 24, 32)), kind)
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP")
}


@pytest.mark.parametrize(
    "data", [b"x", b"not an image", b"\x00" * 1000, b"<svg/>", b"\x89PNG", b"%PDF-1.7", b"\xff\xd8", b"RIFF1234WAVE"]
)
def test_what_is_no_image_is_refused_with_its_size_and_what_is_read(data: bytes) -> None:
    with pytest.raises(BadImage, match=rf"cannot be read: {len(data)} bytes .* none of PNG, JPEG, WEBP, TIFF, BMP"):
        decode(data)


def test_an_empty_body_is_refused() -> None:
    with pytest.raises(BadImage, match="empty"):
        decode(b"")


def test_formats_that_are_not_read_are_refused() -> None:
    for kind in ("GIF", "PPM", "ICO", "PCX"):
        with pytest.raises(BadImage, match="none of PNG"):
            decode(encode(Image.new("RGB", (8, 8)), kind))


@pytest.mark.parametrize(("kind", "start"), [("PNG", b"\x89PNG\r\n\x1a\n"), ("JPEG", b"\xff\xd8\xff"), ("BMP", b"BM"),
                                             ("WEBP", b"RIFF\0\0\0\0WEBP")])  # fmt: skip
@pytest.mark.parametrize("rest", [b"", b"\0", b"\0" * 500])
def test_a_file_that_begins_as_a_format_and_is_none_of_it_is_called_damaged(
    kind: str, start: bytes, rest: bytes
) -> None:
    with pytest.raises(BadImage, match=f"the {kind} image is damaged, or of a kind that is not read") as caught:
        decode(start + rest)
    assert "none of" not in str(caught.value) and "unpack" not in str(caught.value)


def test_kinds_of_a_format_that_are_not_read_are_refused_by_that_format() -> None:
    jpeg, bmp, deep = bytearray(GOOD["JPEG"]), bytearray(GOOD["BMP"]), png(4, 4, depth=3)
    jpeg[jpeg.index(b"\xff\xc0") + 4] = 12  # bits
    bmp[30] = 77  # compression
    for kind, data in (("JPEG", bytes(jpeg)), ("BMP", bytes(bmp)), ("PNG", deep)):
        with pytest.raises(BadImage, match=f"the {kind} image is damaged, or of a kind that is not read"):
            decode(data)


def test_floating_point_pixels_are_read_from_0_to_1() -> None:
    assert decode(encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")).min() == 255


def test_32_bit_pixels_beyond_16_bits_are_refused() -> None:
    with pytest.raises(BadImage, match="65535"):
        decode(encode(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"))


@pytest.mark.parametrize("kind", GOOD)
def test_a_picture_cut_off_anywhere_is_refused_unless_all_its_pixels_are_there(kind: str) -> None:
    data, whole = GOOD[kind], decode(GOOD[kind])
    refused = 0
    for end in [*range(1, 40), *np.linspace(40, len(data) - 1, 40).astype(int)]:
        try:
            assert np.array_equal(decode(data[:end]), whole)
        except BadImage:
            refused += 1
    assert refused >= 75


@pytest.mark.parametrize("side", [400, 20_000, 2**31 - 1])
def test_a_header_that_promises_too_many_pixels_is_refused_before_they_are_decoded(side: int) -> None:
    with pytest.raises(TooLarge, match=r"the limit is 100,000; send a smaller image"):
        decode(png(side, side))


def test_the_limit_itself_is_allowed() -> None:
    limits = Limits(pixels=24 * 32)
    assert decode(GOOD["PNG"], limits).shape == (24, 32, 3)
    with pytest.raises(TooLarge, match="32x24 = 768 pixels and the limit is 767"):
        decode(GOOD["PNG"], Limits(pixels=24 * 32 - 1))


@given(st.binary(max_size=300))
def test_random_bytes_never_raise_anything_but_a_refusal(data: bytes) -> None:
    with suppress(BadImage, TooLarge):
        decode(data)


@given(st.sampled_from(sorted(GOOD)), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=12))
@settings(max_examples=300)
def test_damaged_pictures_never_raise_anything_but_a_refusal(kind: str, changes: list[tuple[float, int]]) -> None:
    data = bytearray(GOOD[kind])
    for place, value in changes:
        # Squared: headers are where the decoders' corners are.
        data[int(place**2 * (len(data) - 1))] = value
    with suppress(BadImage, TooLarge):
        decode(bytes(data))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((1, 4, 4, 3), np.uint8),
    ],
)
def test_an_array_that_is_no_image_is_refused_with_its_dtype_and_shape(array: np.ndarray) -> None:
    with pytest.raises(BadImage, match=rf"the image is {array.dtype} .*uint8 \[height, width, 3\] is wanted"):
        check_array(array, LIMITS)


def test_an_array_over_the_limit_is_refused() -> None:
    with pytest.raises(TooLarge, match="1000x1000"):
        check_array(np.broadcast_to(np.uint8(0), (1000, 1000, 3)), LIMITS)


def test_a_request_is_refused_by_its_header_before_pixels_are_decoded() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, "PNG")
    cut_short = buffer.getvalue()[:60]

    with read_header(cut_short, Limits()) as header:
        assert header.size == (30, 40)
        with pytest.raises(BadImage):
            header.read()
