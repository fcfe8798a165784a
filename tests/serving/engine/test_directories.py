"""Which directory of a TIFF is read, and what of them would keep GDAL for minutes or end the process."""

import io
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from penumbra.models.errors import BadImage
from penumbra.serving.engine.directories import find_directory
from penumbra.serving.engine.raster import open_raster
from tests.conftest import measured
from tests.serving.engine.tiffs import opened, retagged, tiff


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
        assert measured(source) == (40, 60)


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


def directory(*entries: tuple[int, int, int, bytes]) -> bytes:
    """A TIFF of one directory: tag, type, count and four bytes of each entry."""
    rows = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + rows + struct.pack("<I", 0)


@pytest.mark.parametrize("height", [(257, 4, 1, struct.pack("<I", 2**32 - 1)), (257, 2, 2, b"a\0\0\0")])
def test_a_width_that_is_a_text_takes_no_memory(height: tuple[int, int, int, bytes]) -> None:
    with pytest.raises(BadImage):
        open_raster(directory((256, 2, 2, b"a\0\0\0"), height))


def test_a_directory_with_very_many_beneath_it_takes_no_time() -> None:
    entries = (
        (256, 4, 1, struct.pack("<I", 5)),
        (257, 4, 1, struct.pack("<I", 5)),
        (330, 4, 400_000, struct.pack("<I", 50)),
    )
    started = time.perf_counter()
    assert find_directory(io.BytesIO(directory(*entries).ljust(50, b"\0") + bytes(4 * 400_000)))
    assert time.perf_counter() - started < 4, "8 s where each is taken from the front of all"


def number(tag: int, value: int) -> tuple[int, int, int, bytes]:
    return (tag, 4, 1, struct.pack("<I", value))


def geographic(text: bytes, *, link: bytes = b"\0\0\0\0") -> bytes:
    """A directory at the file's end, whose text for GeoTIFF's keys stands before it."""
    entries = (number(256, 5), number(257, 5), (34737, 2, len(text), struct.pack("<I", 8)))
    rows = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return struct.pack("<2sHI", b"II", 42, 8 + len(text)) + text + struct.pack("<H", len(entries)) + rows + link


def beneath(source: bytes) -> bytes:
    """A thumbnail, and a file's directory beneath it."""
    first = struct.unpack_from("<I", source, 4)[0]
    rows = b"".join(struct.pack("<HHI4s", *entry) for entry in (number(254, 1), number(330, first)))
    return source[:4] + struct.pack("<I", len(source)) + source[8:] + struct.pack("<H", 2) + rows + bytes(4)


def broken(source: bytes) -> bytes:
    """A file whose last bytes name a directory that begins in them."""
    return source[:-4] + struct.pack("<I", len(source) - 1)


def chain(num: int) -> bytes:
    """As many directories without a tag, each of which names the next."""
    links = (struct.pack("<HI", 0, 8 + 6 * (k + 1) if k < num - 1 else 0) for k in range(num))
    return struct.pack("<2sHI", b"II", 42, 8) + b"".join(links)


ALBERS = b'PROJCS["a",EXTENSION["PROJ4","+proj=aea +lat_1=90 +lat_2=89.99999999 +ellps=WGS84"]]'
HOSTILE: dict[str, tuple[bytes, str]] = {
    "tags that nobody knows": (directory(*(number(50_000 + k, k) for k in range(300))), "256 tags in one of them"),
    "many directories": (chain(2**16 + 1), "more than 65,536 directories"),
    "tags that share": (
        directory(*((50_000 + k, 1, 2**20, b"\0\0\0\0") for k in range(9))) + bytes(2**20), "hold 9,437,184",
    ),
    "metadata": (directory((42112, 2, 2**20 + 1, b"\0\0\0\0")) + bytes(2**20), "1,048,577 bytes of GDAL's metadata"),
    **{
        f"a projection in words, {kind}": (source, r"in PROJ's own words \(EXTENSION\)")
        for kind, source in {
            "plain": geographic(ALBERS),
            "small": geographic(ALBERS.replace(b"EXTENSION[", b"Extension [")),
            "round": geographic(ALBERS.replace(b"EXTENSION[", b"EXTENSION\n(")),
            "bare": geographic(ALBERS.replace(b'"PROJ4",', b"PROJ4\t,")),
            "without an end": geographic(ALBERS, link=b""),
            "beneath a thumbnail": beneath(geographic(ALBERS)),
            "behind one that breaks off": broken(beneath(geographic(ALBERS))),
        }.items()
    },
    "a tile that is said twice": (
        directory(number(256, 2**20), number(257, 1), number(322, 16), number(323, 2**22), number(323, 16)),
        "tiles of 16x4194304",
    ),
    "a mask's tile": (
        directory(number(256, 9), number(257, 9), number(322, 2**14), number(323, 2**14)), "16384x16384 pixels",
    ),
    "tiles beyond the picture": (
        directory(number(256, 2**20), number(257, 1), number(322, 16), number(323, 2**22)), "tiles of 16x4194304",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_gdal_would_read_for_minutes_or_fall_over_is_refused_before(kind: str) -> None:
    source, sentence = HOSTILE[kind]
    with pytest.raises(BadImage, match=sentence):
        open_raster(source)


@pytest.mark.parametrize("offset", [2**62, 2**63, 2**64 - 1])
def test_an_offset_beyond_any_file_is_a_refusal(offset: int, tmp_path: Path) -> None:
    far = struct.pack("<2sHHHQ", b"II", 43, 8, 0, offset)
    text = struct.pack("<2sHHHQQHHQQQ", b"II", 43, 8, 0, 16, 1, 34737, 2, 99, offset, 0)
    for source in (far, text):
        (tmp_path / "a.tif").write_bytes(source)
        for given in (source, tmp_path / "a.tif"):
            with pytest.raises(BadImage):
                open_raster(given)


def test_the_projections_of_web_maps_and_satellites_may_be_in_words() -> None:
    for name in (b"merc", b"geos"):
        assert find_directory(io.BytesIO(geographic(ALBERS.replace(b"aea", name))))
    assert find_directory(io.BytesIO(geographic(b'ESRI PE String = PROJCS["a",PARAMETER["b",1]]')))
