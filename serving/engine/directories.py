"""Which directory of a TIFF file is its picture, and how that lies: what GDAL does not look at.

A file may begin with a thumbnail, and GDAL knows no orientation. Nor does it know an end: what it would read for
minutes or gigabytes, or fall over, is refused before it is asked.
"""

import re
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from penumbra.models.errors import BadImage

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of TIFF and BigTIFF, in either byte order."""
NUM_DIRECTORIES = 64
"""As many are looked at; real files that begin with a thumbnail have a handful."""
NEW_SUBFILE, SUBFILE, WIDTH, HEIGHT, PHOTOMETRIC, ORIENTATION, SUB_IFDS = 254, 255, 256, 257, 262, 274, 330
TAGS = (NEW_SUBFILE, SUBFILE, WIDTH, HEIGHT, PHOTOMETRIC, ORIENTATION)
REDUCED, MASK = 1, 4
READ = {0: "grey", 1: "grey", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr"}
NOT_READ = {4: "a mask", 8: "CIELab", 9: "ICCLab", 10: "ITULab", 32803: "the raw mosaic of a camera's sensor",
            32844: "LogL", 32845: "LogLuv", 34892: "linear raw values of a camera's sensor"}  # fmt: skip
"""CIELab is among them because libtiff turns it into colours that are off by up to 90 of 255."""
MOST_DIRECTORIES, MOST_ENTRIES, MOST_COMPARED = 2**16, 256, 2**26
"""What a file may have, one directory, and all together in pairs of tags of one directory: libtiff reads them all at
once, in a second then, and compares unknown tags with all others."""
SHARED_BYTES = 2**20
"""By so much what entries point to may be larger together than the file: pages share a resolution or a name."""
METADATA, MOST_METADATA = 42112, 2**20
"""The tag of GDAL's own metadata, whose items it compares with all others, and the most bytes of it."""
GEO_TEXT = 34737
HOSTILE = re.compile(rb"extension[\[(].?proj4.?,(?!.?\+proj=(?:merc|geos)\+)")
"""In the text of a GeoTIFF, small and without blanks: a projection in PROJ's own words, which may end the process. GDAL
writes those of web maps and of geostationary satellites so."""
SIZE_TAGS = (WIDTH, HEIGHT, 322, 323)
"""The tags of a picture's width and height, and of its tiles'."""
BLOCK_PIXELS = 2**26
"""Most pixels of one block of a file, which is read whole: a tile, or a strip of a long scan."""
ROOM = 4
"""Times as many pixels as the picture has that its tiles may hold, beside one block."""
SIZES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Bytes of a value by its type, where they are more than one."""


@dataclass(frozen=True, slots=True)
class Directory:
    """One image of a TIFF file. offset: 0 of the first. orientation: 1 is upright (EXIF)."""

    offset: int
    width: int = 0
    height: int = 0
    photometric: int = 1
    orientation: int = 1
    is_reduced: bool = False
    is_mask: bool = False


def find_directory(file: BinaryIO) -> tuple[Directory, tuple[str, ...]] | None:
    """Find the picture of a TIFF, and what the caller should know of the choice; None where the file is no TIFF.

    It is the first directory, unless that says of itself that it is a reduced version of another one. Raises BadImage
    where its colours are of a kind that is not read.
    """
    file.seek(0)
    head = file.read(16)
    if not head.startswith(MAGIC):
        return None
    tables = Tables(file, head)
    _check(tables)
    found = list(_walk(tables))
    if not found:
        return Directory(0), ()
    first, whole = found[0], [one for one in found if not one.is_reduced and not one.is_mask]
    largest = max(whole, key=lambda one: one.width * one.height, default=first)
    chosen = largest if first.is_reduced else first
    if chosen.photometric not in READ:
        kind = NOT_READ.get(chosen.photometric, f"photometric interpretation {chosen.photometric}")
        raise BadImage(f"the TIFF image is {kind}, which is not read; {', '.join(dict.fromkeys(READ.values()))} are")
    warnings = []
    if chosen.offset and any(one.is_mask and one.width == chosen.width for one in found):
        warnings.append("the mask of the image is not read, for the image is not the file's first")
    if sum((one.width, one.height) == (chosen.width, chosen.height) for one in whole) > 1:
        warnings.append(f"the file has several images of {chosen.width}x{chosen.height}; the first was read")
    if largest.width * largest.height > chosen.width * chosen.height:
        warnings.append(f"the file has several images; the first ({first.width}x{first.height}) was read, and the "
                        f"largest is {largest.width}x{largest.height}")  # fmt: skip
    return chosen, tuple(warnings)


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a directory. raw: its values, or else where in the file they are."""

    tag: int
    num_bytes_each: int
    num_bytes: int
    raw: bytes


class Tables:
    """The entries of a TIFF's directories as they are written, before anybody makes anything of them."""

    def __init__(self, file: BinaryIO, head: bytes) -> None:
        """head: the file's first 16 bytes. What breaks off is read as far as it goes, and GDAL says where."""
        self._file, self.size = file, file.seek(0, 2)
        self._order, is_big = "<" if head[:1] == b"I" else ">", 43 in (head[2], head[3])
        self._count, self._entry, self._link = ("Q", "HHQ8s", "Q") if is_big else ("H", "HHI4s", "I")
        self.inline = struct.calcsize(self._link)
        self.first = self._number(head[8:16] if is_big else head[4:8])

    def read(self, offset: int) -> tuple[list[Entry], int]:
        """Read the entries of a directory, one more than it may have at most, and where the next directory is."""
        self._file.seek(offset)
        num = self._number(self._file.read(struct.calcsize("=" + self._count)))
        each = struct.calcsize("=" + self._entry)
        table = self._file.read(min(num, MOST_ENTRIES + 1) * each)
        following = self._file.read(self.inline)
        rows = struct.iter_unpack(self._order + self._entry, table[: len(table) // each * each])
        entries = [Entry(tag, size := SIZES.get(kind, 1), num * size, raw) for tag, kind, num, raw in rows]
        return entries, self._number(following)

    def bytes_of(self, entry: Entry, most: int) -> bytes:
        """Read an entry's values."""
        if entry.num_bytes <= self.inline:
            return entry.raw[: entry.num_bytes]
        if (offset := self._number(entry.raw)) >= self.size:
            return b""
        self._file.seek(offset)
        return self._file.read(min(entry.num_bytes, most))

    def numbers_of(self, entries: Sequence[Entry], tag: int) -> list[int]:
        """Read the first whole numbers of a tag, where the directory has it; of two alike libtiff takes the first."""
        for entry in entries:
            if entry.tag == tag:
                data, each = self.bytes_of(entry, NUM_DIRECTORIES * entry.num_bytes_each), entry.num_bytes_each
                return [self._number(data[k : k + each]) for k in range(0, len(data), each)]
        return []

    def _number(self, data: bytes) -> int:
        return int.from_bytes(data, "little" if self._order == "<" else "big")


def _check(tables: Tables) -> None:
    """Check that GDAL can read all directories in a moment. Raises BadImage."""
    offsets, seen, taken, compared = deque([tables.first]), set[int](), 0, 0
    while offsets:
        offset = offsets.popleft()
        if not 0 < offset < tables.size or offset in seen:
            continue
        seen.add(offset)
        entries, following = tables.read(offset)
        compared += len(entries) ** 2
        if len(entries) > MOST_ENTRIES or len(seen) > MOST_DIRECTORIES or compared > MOST_COMPARED:
            raise BadImage(f"the TIFF image has more than {MOST_DIRECTORIES:,} directories, {MOST_ENTRIES} tags in one "
                           "of them, or many in most; write it anew, with its pixels alone")  # fmt: skip
        taken += sum(entry.num_bytes for entry in entries if entry.num_bytes > tables.inline)
        if taken > tables.size + SHARED_BYTES:
            raise BadImage(
                f"the tags of the TIFF image hold {taken:,} bytes, and the file has {tables.size:,}; write it anew"
            )
        _check_texts(tables, entries)
        _check_tiles(*(next(iter(tables.numbers_of(entries, tag)), 0) for tag in SIZE_TAGS))
        offsets.extend((following, *tables.numbers_of(entries, SUB_IFDS)))


def _check_texts(tables: Tables, entries: Sequence[Entry]) -> None:
    for entry in entries:
        if entry.tag == METADATA and entry.num_bytes > MOST_METADATA:
            raise BadImage(
                f"the TIFF image has {entry.num_bytes:,} bytes of GDAL's metadata; {MOST_METADATA:,} are read"
            )
        text = tables.bytes_of(entry, MOST_METADATA) if entry.tag == GEO_TEXT else b""
        if HOSTILE.search(b"".join(text.split()).lower()):
            raise BadImage("the TIFF image has a projection in PROJ's own words (EXTENSION), which is not followed; "
                           "give it a code of EPSG")  # fmt: skip


def _check_tiles(width: int, height: int, tile_width: int, tile_height: int) -> None:
    if not tile_width or not tile_height:
        return
    if tile_width * tile_height > BLOCK_PIXELS:
        raise BadImage(f"the TIFF image has tiles of {tile_width}x{tile_height} pixels, which are read whole; 512x512 "
                       "are good")  # fmt: skip
    tiled = -(-width // tile_width) * -(-height // tile_height) * tile_width * tile_height
    if tiled > ROOM * width * height + BLOCK_PIXELS:
        raise BadImage(f"the TIFF image of {width}x{height} pixels has tiles of {tile_width}x{tile_height}, which hold "
                       f"{tiled:,}; 512x512 are good")  # fmt: skip


def _walk(tables: Tables) -> Iterator[Directory]:
    """Read the first directory, those beneath it, the second, ...: each once, to the first without a size."""
    offsets, seen, orientation = [tables.first], set[int](), 1
    while offsets and len(seen) < NUM_DIRECTORIES:
        offset = offsets.pop(0)
        if not 0 < offset < tables.size or offset in seen:
            continue
        entries, following = tables.read(offset)
        beneath, *values = (tables.numbers_of(entries, tag) for tag in (SUB_IFDS, *TAGS))
        kind, subfile, width, height, photometric, turned = (next(iter(numbers), None) for numbers in values)
        if not width or not height:
            return
        orientation = turned or orientation  # the first one's is that of all
        yield Directory(
            offset if seen else 0, width, height, 1 if photometric is None else photometric,
            orientation if orientation in range(1, 9) else 1,
            bool((kind or 0) & REDUCED) or subfile == 2, bool((kind or 0) & MASK),
        )  # fmt: skip
        seen.add(offset)
        offsets = [*beneath, *offsets, following]
