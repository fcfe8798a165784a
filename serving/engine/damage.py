"""Damage that decoders pass over in silence, and pictures that are whole although they refuse them."""

import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import simplejpeg  # type: ignore[import-untyped]
from numpy.typing import NDArray

from penumbra.models.errors import BadImage

TEXTS = (b"tEXt", b"zTXt", b"iTXt")
TURNING = (b"Raw profile type exif", b"XML:com.adobe.xmp")
"""Keywords of a PNG's texts that may say how it is turned."""
TEXT_BYTES = 2**20
"""Pillow opens no PNG with a packed text that is longer."""
PIECE_BYTES = 2**20
"""As much of a PNG's pixels is unpacked at a time."""
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""A PNG's type of colour -> its number of channels."""
END_OF_IMAGE = b"\xff\xd9"
MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")
"""Begins a JPEG's segment; the pixels between segments have other bytes after 0xff."""
SPARE_BYTES = 4
"""Bytes to take off the end of a WebP's pixels: three may be padding; all of 200 whole pictures needed the fourth."""
FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
SCAN, END = 0xDA, 0xD9
MOST_SCANS = 100
"""Scans of a JPEG at most, each of which is a walk over all pixels; progressive ones have about ten."""


def check_png(data: bytes) -> None:
    """Raises BadImage where the checksum of a chunk does not hold; Pillow does not look at those of the pixels."""
    for kind, start, end in _chunks(data):
        if end + 4 <= len(data) and zlib.crc32(data[start - 4 : end]) != int.from_bytes(data[end : end + 4]):
            raise BadImage(f"the PNG image is damaged (the checksum of a part {ascii(kind)[2:-1]} does not hold)")


def slim_png(data: bytes) -> bytes:
    """Take a PNG's colour profile and texts out that nobody looks at, however long they are.

    What may say how it is turned stands before the pixels, unless it is longer than can be read.
    """
    head, kept = [data[:8]], list[bytes]()
    for kind, start, end in _chunks(data):
        is_text = kind in TEXTS
        if kind == b"iCCP" or (is_text and not _may_turn(kind, data[start:end])):
            continue
        (head if is_text or kind in (b"IHDR", b"eXIf") else kept).append(data[start - 8 : end + 4])
    return b"".join([*head, *kept])


def _may_turn(kind: bytes, text: bytes) -> bool:
    """Find out whether a text can say how a picture is turned; of a packed one no more is unpacked than is read."""
    keyword, _, rest = text.partition(b"\0")
    if keyword not in TURNING or kind == b"tEXt" or (kind == b"iTXt" and rest[:1] != b"\1"):
        return keyword in TURNING
    unpacker = zlib.decompressobj()
    with suppress(zlib.error):
        unpacker.decompress(rest[1:] if kind == b"zTXt" else rest[2:].split(b"\0", 2)[-1], TEXT_BYTES)
    return not unpacker.unconsumed_tail


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield every chunk's kind, where its body starts, and where it ends, which is at the file's end at most."""
    offset = 8
    while offset + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, offset)
        yield kind, offset + 8, min(offset + 8 + length, len(data))
        if kind == b"IEND":
            return
        offset += 12 + length


def has_all_rows(png: bytes) -> bool:
    """Find out whether a PNG's data reach its last row, or Pillow makes zeros of it. An interlaced one is believed."""
    width, height, depth, colour, _, _, is_interlaced = struct.unpack_from(">IIBBBBB", png, 16)
    missing = height * (1 + (width * depth * CHANNELS[colour] + 7) // 8)
    unpacker = zlib.decompressobj()
    for packed in (png[start:end] for kind, start, end in _chunks(png) if kind == b"IDAT"):
        while packed and missing > 0:
            missing -= len(unpacker.decompress(packed, PIECE_BYTES))
            packed = unpacker.unconsumed_tail
    return bool(is_interlaced) or missing <= 0


def shorten_webp(data: bytes) -> bytes | None:
    """Take the last of a WebP's pixels' bytes off; None where that is not what the file is made of.

    The result cannot be decoded, unless a decoder goes astray before: it has no other check.
    """
    parts, offset, is_short = list[bytes](), 12, False
    while offset + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, offset)
        body = data[offset + 8 : offset + 8 + size]
        if kind in (b"VP8 ", b"VP8L") and size > SPARE_BYTES:
            body, is_short = body[:-SPARE_BYTES], True
        parts.append(struct.pack("<4sI", kind, len(body)) + body + bytes(len(body) % 2))
        offset += 8 + size + size % 2
    whole = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(whole)) + whole if is_short else None


def read_jpeg(data: bytes, colours: str) -> tuple[NDArray[np.uint8], tuple[str, ...]] | None:
    """Decode a JPEG: its pixels, and what was repaired; None where the channels' sizes are too unusual.

    colours: RGB, or CMYK as stored. A JPEG that lacks only its end marker is whole. Raises BadImage where pixels are
    missing or cannot be guessed.
    """
    scan = bytes([0xFF, SCAN])
    if data.count(scan) > MOST_SCANS and sum(marker == SCAN for marker, _ in _segments(data)) > MOST_SCANS:
        raise BadImage(f"the JPEG image has more than {MOST_SCANS} scans; write it anew, baseline")
    try:
        return simplejpeg.decode_jpeg(data, colours, strict=True), ()
    except ValueError as error:
        fault = str(error)
    if "subsampling" in fault:
        return None
    if not any(marker == END for marker, _ in _segments(data)):
        with suppress(ValueError):
            pixels = simplejpeg.decode_jpeg(data + END_OF_IMAGE, colours, strict=True)
            if _has_all_scans(data):
                return pixels, ()
        raise BadImage(f"the JPEG image is truncated ({fault})")
    try:
        pixels = simplejpeg.decode_jpeg(data, colours, strict=False)
    except ValueError as error:
        raise BadImage(f"the JPEG image is damaged ({error})") from None
    return pixels, (f"the JPEG image is damaged, and its pixels there are a guess ({fault})",)


def _has_all_scans(data: bytes) -> bool:
    """Find out by the headers whether every coefficient of every component has come to its last bit."""
    missing = set[tuple[int, int]]()
    for marker, body in _segments(data):
        if marker in FRAMES:
            missing = {(component, k) for component in body[6::3] for k in range(64)}
        if marker == SCAN and len(body) > 3 and body[-1] & 15 == 0:
            first, last = body[-3], body[-2]
            missing -= {(component, k) for component in body[1:-3:2] for k in range(first, last + 1)}
    return not missing


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield marker and body of every segment, to the end marker if there is one."""
    offset = 2
    while found := MARKER.search(data, offset):
        marker, start = found[1][0], found.end()
        offset = start + int.from_bytes(data[start : start + 2])
        yield marker, data[start + 2 : offset]
        if marker == END:
            return
