"""Class tables of well-known data sets with their usual colours, and how a file names the classes of another."""

import json
from pathlib import Path
from typing import Any

from penumbra.models.card import ClassInfo, read_strict
from penumbra.models.errors import BadArtifact, BadOption


def _table(text: str) -> tuple[ClassInfo, ...]:
    """From lines of `name red green blue`."""
    rows = [line.split() for line in text.strip().splitlines()]
    return tuple(ClassInfo(" ".join(name), (int(r), int(g), int(b))) for *name, r, g, b in rows)


VOC = _table("""
    background 0 0 0
    aeroplane 128 0 0
    bicycle 0 128 0
    bird 128 128 0
    boat 0 0 128
    bottle 128 0 128
    bus 0 128 128
    car 128 128 128
    cat 64 0 0
    chair 192 0 0
    cow 64 128 0
    dining table 192 128 0
    dog 64 0 128
    horse 192 0 128
    motorbike 64 128 128
    person 192 128 128
    potted plant 0 64 0
    sheep 128 64 0
    sofa 0 192 0
    train 128 192 0
    tv monitor 0 64 128
""")

CITYSCAPES = _table("""
    road 128 64 128
    sidewalk 244 35 232
    building 70 70 70
    wall 102 102 156
    fence 190 153 153
    pole 153 153 153
    traffic light 250 170 30
    traffic sign 220 220 0
    vegetation 107 142 35
    terrain 152 251 152
    sky 70 130 180
    person 220 20 60
    rider 255 0 0
    car 0 0 142
    truck 0 0 70
    bus 0 60 100
    train 0 80 100
    motorcycle 0 0 230
    bicycle 119 11 32
""")

CAMVID = _table("""
    Sky 128 128 128
    Building 128 0 0
    Pole 192 192 128
    Road 128 64 128
    Pavement 60 40 222
    Tree 128 128 0
    SignSymbol 192 128 128
    Fence 64 64 128
    Car 64 0 128
    Pedestrian 64 64 0
    Bicyclist 0 128 192
""")

TABLES = {"voc": VOC, "cityscapes": CITYSCAPES, "camvid": CAMVID}
"""By the name that `penumbra import --classes` takes. CamVid is the SegNet tutorial's 11 classes."""


def read_classes(wanted: str) -> tuple[ClassInfo, ...]:
    """The table of that name, or the classes of a file: a name per line, or a JSON list of names or of objects
    {"name", "color"}. Names without a colour get one of `color_of`.

    Raises BadOption: neither a table nor a file, fewer than 2 classes, or an entry that is neither name nor class.
    """
    if wanted in TABLES:
        return TABLES[wanted]
    try:
        text = Path(wanted).read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise BadOption(f"classes are {wanted!r}; {', '.join(TABLES)} or a text file is wanted ({reason})") from None
    entries = _parse_json(text, wanted) if text.startswith("[") else [line.strip() for line in text.splitlines()]
    if not entries or "" in entries:
        raise BadOption(f"{wanted} has an empty line or no classes; one name per line is wanted")
    if len(entries) == 1:
        raise BadOption(f"{wanted} names 1 class, which every pixel would have; name the background too")
    return tuple(_read_class(entry, k, wanted) for k, entry in enumerate(entries))


def color_of(k: int) -> tuple[int, int, int]:
    """Class k's colour in the palette of PASCAL VOC: bits 0, 3, 6, ... of k are red's bits from the highest down."""
    red, green, blue = (sum((k >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for channel in range(3))
    return red, green, blue


def _parse_json(text: str, wanted: str) -> list[Any]:
    try:
        entries: list[Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadOption(f"{wanted} starts as a JSON list, but is none ({error})") from None
    return entries


def _read_class(entry: Any, k: int, wanted: str) -> ClassInfo:
    if isinstance(entry, str):
        return ClassInfo(entry, color_of(k))
    try:
        return read_strict(ClassInfo, entry, where=f"{wanted}, class {k}")
    except BadArtifact as error:
        raise BadOption(str(error)) from None
