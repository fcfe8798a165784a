"""Class tables of well-known data sets with their usual colours, and how a file names the classes of another."""

import json
import re
from pathlib import Path
from typing import Any

from penumbra.models.card import ClassInfo
from penumbra.models.errors import BadOption
from penumbra.models.strict import read_strict


def color_of(k: int) -> tuple[int, int, int]:
    """Return class k's colour in PASCAL VOC's palette: bits 0, 3, 6, ... of k are red's bits from the highest down."""
    red, green, blue = (sum((k >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for channel in range(3))
    return red, green, blue


def _table(text: str) -> tuple[ClassInfo, ...]:
    """Read entries of `name red green blue`, or of a name alone, which gets its colour of `color_of`."""
    classes = []
    for k, entry in enumerate(text.split(",")):
        name, *digits = re.split(r" (?=\d)", " ".join(entry.split()))
        red, green, blue = map(int, digits) if digits else color_of(k)
        classes.append(ClassInfo(name, (red, green, blue)))
    return tuple(classes)


VOC = _table("""
    background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dining table, dog, horse,
    motorbike, person, potted plant, sheep, sofa, train, tv monitor
""")
CITYSCAPES = _table("""
    road 128 64 128, sidewalk 244 35 232, building 70 70 70, wall 102 102 156, fence 190 153 153, pole 153 153 153,
    traffic light 250 170 30, traffic sign 220 220 0, vegetation 107 142 35, terrain 152 251 152, sky 70 130 180,
    person 220 20 60, rider 255 0 0, car 0 0 142, truck 0 0 70, bus 0 60 100, train 0 80 100, motorcycle 0 0 230,
    bicycle 119 11 32
""")
CAMVID = _table("""
    Sky 128 128 128, Building 128 0 0, Pole 192 192 128, Road 128 64 128, Pavement 60 40 222, Tree 128 128 0,
    SignSymbol 192 128 128, Fence 64 64 128, Car 64 0 128, Pedestrian 64 64 0, Bicyclist 0 128 192
""")
TABLES = {"voc": VOC, "cityscapes": CITYSCAPES, "camvid": CAMVID}
"""By the name that `penumbra import --classes` takes. CamVid is the SegNet tutorial's 11 classes."""


def read_classes(source: str) -> tuple[ClassInfo, ...]:
    """Read the table of that name, or the classes of a file: a name per line, or a JSON list of names or of objects
    {"name", "color"}. Names without a colour get one of `color_of`.

    Raises BadOption: neither a table nor a file, fewer than 2 classes, or an entry that is neither name nor class.
    """
    if source in TABLES:
        return TABLES[source]
    try:
        text = Path(source).read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise BadOption(f"classes are {source!r}; {', '.join(TABLES)} or a text file is wanted ({reason})") from None
    entries = _parse_json(text, source) if text.startswith("[") else [line.strip() for line in text.splitlines()]
    if not entries or "" in entries:
        raise BadOption(f"{source} has an empty line or no classes; one name per line is wanted")
    if len(entries) == 1:
        raise BadOption(f"{source} names 1 class, which every pixel would have; name the background before it")
    return tuple(_read_class(entry, k, source) for k, entry in enumerate(entries))


def _parse_json(text: str, source: str) -> list[Any]:
    try:
        entries: list[Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadOption(f"{source} starts as a JSON list, but is none ({error})") from None
    return entries


def _read_class(entry: Any, k: int, source: str) -> ClassInfo:
    if isinstance(entry, str):
        return ClassInfo(entry, color_of(k))
    return read_strict(ClassInfo, entry, where=f"{source}, class {k}", refusal=BadOption)
