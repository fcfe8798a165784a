"""What `--classes` names: a table of `models.classes`, or a file of class names with or without colours."""

import json
from pathlib import Path
from typing import Any

from models.card import ClassInfo, read_strict
from models.classes import TABLES
from models.errors import BadArtifact, BadOption


def read_classes(wanted: str) -> tuple[ClassInfo, ...]:
    """The table of that name, or the classes of a file: a name per line, or a JSON list of names or of objects
    {"name", "color"}. Names without a colour get one of `color_of`.

    Raises BadOption: neither a table nor a file, no classes, or an entry that is neither a name nor a class.
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
