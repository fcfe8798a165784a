"""Which directory of a TIFF file is its picture, and how that lies: what GDAL does not look at.

A file may begin with a thumbnail, and GDAL knows no orientation.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

from PIL.TiffImagePlugin import ImageFileDirectory_v2

from penumbra.models.errors import BadImage

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of TIFF and BigTIFF, in either byte order."""
NUM_DIRECTORIES = 64
"""As many are looked at; real files that begin with a thumbnail have a handful."""
NEW_SUBFILE, SUBFILE, WIDTH, HEIGHT, PHOTOMETRIC, ORIENTATION, SUB_IFDS = 254, 255, 256, 257, 262, 274, 330
REDUCED, MASK = 1, 4
READ = {0: "grey", 1: "grey", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr"}
NOT_READ = {4: "a mask", 8: "CIELab", 9: "ICCLab", 10: "ITULab", 32803: "the raw mosaic of a camera's sensor",
            32844: "LogL", 32845: "LogLuv", 34892: "linear raw values of a camera's sensor"}  # fmt: skip
"""CIELab is among them because libtiff turns it into colours that are off by up to 90 of 255."""


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
    found: list[Directory] = []
    with suppress(Exception):  # a hostile directory may raise anything here, and then GDAL says what is wrong
        found.extend(_walk(file, head if 43 in (head[2], head[3]) else head[:8]))  # keeps those before a broken one
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


def _walk(file: BinaryIO, header: bytes) -> Iterator[Directory]:
    """Read the first directory, those beneath it, the second, ...: each once."""
    offsets, seen, orientation = [ImageFileDirectory_v2(header).next], set[int](), 1
    while offsets and len(seen) < NUM_DIRECTORIES:
        offset = offsets.pop(0)
        if not offset or offset in seen:
            continue
        tags = ImageFileDirectory_v2(header)
        tags.next = offset
        file.seek(offset)
        tags.load(file)
        orientation = tags.get(ORIENTATION, orientation)  # the first one's is that of all
        kind = tags.get(NEW_SUBFILE, 0)
        yield Directory(
            offset if seen else 0, int(tags[WIDTH]), int(tags[HEIGHT]), tags.get(PHOTOMETRIC, 1),
            orientation if orientation in range(1, 9) else 1,
            bool(kind & REDUCED) or tags.get(SUBFILE) == 2, bool(kind & MASK),
        )  # fmt: skip
        seen.add(offset)
        beneath = tags.get(SUB_IFDS, ())
        offsets = [*(beneath if isinstance(beneath, tuple) else (beneath,))[:NUM_DIRECTORIES], *offsets, tags.next]
