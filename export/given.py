"""What is said of a network's pictures: by whoever imports it, or by a file of the library that it comes from."""

import ast
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from penumbra.models.card import ClassInfo
from penumbra.models.classes import TABLES, color_of, read_classes
from penumbra.models.errors import BadOption
from penumbra.models.inputs import RGB, InputSpec
from penumbra.models.strict import read_strict

Facts = dict[str, Any]
"""`size`, `classes`, and fields of InputSpec, each where it is said."""

PER_BAND = ("bands", "mean", "std", "low", "high")
NAMES = {name: (name,) for name in (*PER_BAND, "order", "scale", "dtype", "clip", "resolution", "size")} | {
    "bands": ("bands", "band_names"),
    "mean": ("mean", "image_mean"),
    "std": ("std", "image_std"),
    "order": ("order", "input_space", "color_space"),
    "size": ("size", "input_size", "image_size", "imgsz", "crop_size"),
    "classes": ("classes", "id2label", "names", "class_names"),
}
"""Our name of a fact, and what transformers, timm, smp and ultralytics call it."""
NESTED = ("pretrained_cfg", "default_cfg")
"""Where timm and smp say how an encoder was pretrained; at which size is of no matter here."""
NEIGHBOURS = ("config.json", "preprocessor_config.json")
"""Files beside a network's that say how it is to be used: as transformers saves them."""
IMAGENET = {"mean": InputSpec().mean, "std": InputSpec().std}
SCALES = {"uint8": 255.0, "float32": 1.0}
"""What values are divided by, by their type, where nothing says otherwise."""
OF_BYTES = 2.0
"""A mean or a deviation above it is of values 0 to 255, which are then not divided."""
DEFAULT_SIZE = (512, 512)


def read_facts(text: str) -> Facts:
    """Read `--input`: a JSON file, or fields as `size=256x256 bands=blue,green mean=0.2,0.3`. Raises BadOption."""
    if text.endswith(".json"):
        return _facts_in(Path(text))
    pairs = [word.partition("=")[::2] for word in text.split()]
    for name, value in pairs:
        if name not in NAMES or name == "classes" or not value:
            known = ", ".join(name for name in NAMES if name != "classes")
            raise BadOption(f"--input has {name!r}; a file.json or NAME=VALUE of {known} is wanted")
    return {name: parse_value(value) for name, value in pairs}


def facts_beside(path: Path) -> tuple[Facts, tuple[str, ...]]:
    """Read what transformers saved beside a file, if anything, and say what was read where. Its dtype is that of the
    weights. Raises BadOption."""
    files = [path.with_name(name) for name in NEIGHBOURS if path.is_file()]
    read = {file: _facts_in(file) for file in files if file.is_file()}
    facts = {fact: value for found in read.values() for fact, value in found.items() if fact != "dtype"}
    told = {file: ", ".join(fact for fact in found if fact in facts) for file, found in read.items()}
    return facts, tuple(f"{file} says {names}" for file, names in told.items() if names)


def _facts_in(path: Path) -> Facts:
    try:
        return find_facts(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise BadOption(f"what {path} says of pictures cannot be read as JSON ({error})") from None


def find_facts(content: Any) -> Facts:
    """Pick the facts out of another library's dictionary, under our names."""
    if not isinstance(content, Mapping):
        return {}
    found: Facts = {}
    for name in NESTED:
        found |= {fact: value for fact, value in find_facts(content.get(name)).items() if fact != "size"}
    for ours, theirs in NAMES.items():
        values = [content[name] for name in theirs if content.get(name) is not None]
        found |= {ours: values[0]} if values else {}
    if content.get("do_rescale") is False or content.get("input_range") == [0, 255]:
        found["scale"] = 1.0
    elif factor := content.get("rescale_factor"):
        found["scale"] = round(1 / factor, 6)
    if content.get("do_normalize") is False:
        found |= {"mean": 0.0, "std": 1.0}
    if content.get("do_flip_channel_order"):  # transformers' MobileViT, which knows no mean
        found = {"mean": 0.0, "std": 1.0} | found | {"order": "BGR"}
    return found


def size_of(facts: Facts, height: int | None, width: int | None) -> tuple[int, int]:
    """Find the window's size: the program's own where it has one, and (0, 0) of pictures that are seen whole.

    Raises BadOption where the program takes another one.
    """
    size = facts.get("size")
    if size == "whole" and not height and not width:
        return 0, 0
    if isinstance(size, Mapping):
        size = [size.get(side, size.get("shortest_edge")) for side in ("height", "width")]
    sides = [size] * 2 if isinstance(size, int) else list(size or DEFAULT_SIZE)[-2:]
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise BadOption(f"size is {size!r}; HEIGHTxWIDTH in pixels is wanted, or whole of a network of any size")
    own = (height or sides[0], width or sides[1])
    if size and own != tuple(sides):
        raise BadOption(f"size is {sides[0]}x{sides[1]}, and the network takes {own[0]}x{own[1]} alone; leave it out")
    return own


def input_of(facts: Facts, channels: int | None) -> tuple[InputSpec, tuple[str, ...]]:
    """Make the card's input of what is said, and sentences of what is not. channels: the network's, where it has so
    many alone. Raises BadOption: too little is said; BadArtifact: a value is of another type."""
    num = channels or next((len(facts[name]) for name in PER_BAND if _is_list(facts.get(name))), len(RGB))
    how = f"add --input 'bands=NAME,... mean=... std=... scale=...', with {num} of each but the last"
    bands = _each(facts.get("bands", {1: ("grey",), 3: RGB}.get(num, ())), num)
    if len(bands) != num:
        raise BadOption(f"{len(bands) or 'no'} bands are named, and the network takes {num}; {how}")
    bands, notes = [str(name).lower() for name in bands], tuple[str, ...]()
    order = str(facts.get("order", "RGB")).upper()
    given = [name for name in ("mean", "std", "low", "high") if name in facts]
    if given in (["mean"], ["std"]):
        (other,) = {"mean", "std"} - {*given}
        raise BadOption(f"{given[0]} is {facts[given[0]]}, and nothing says {other}; add --input '{other}=...', which "
                        f"is {int(other == 'std')} where it changes nothing")  # fmt: skip
    if not given:
        if num != len(RGB):
            raise BadOption(f"nothing says how values of {', '.join(bands)} become the network's input; {how}")
        notes = ("nothing says how pixels become the network's input: ImageNet's mean and deviation are taken; --input "
                 "says others",)  # fmt: skip
        facts = facts | {name: of[:: -1 if order == "BGR" else 1] for name, of in IMAGENET.items()}
    facts = {"mean": 0.0, "std": 1.0, "low": (), "high": ()} | facts | {"bands": bands}
    data: Facts = {name: _each(facts[name], num) for name in PER_BAND}
    data |= {"scale": 1.0} | {name: facts[name] for name in ("scale", "dtype", "clip") if name in facts}
    data["order"] = order
    if "resolution" in facts:  # frame:512 or gsd:0.25
        kind, _, value = str(facts["resolution"]).partition(":")
        data["resolution"] = {"kind": kind, "value": parse_value(value)}
    spec = read_strict(InputSpec, data, where="--input")
    if "scale" in facts or max(map(abs, (*spec.mean, *spec.std))) > OF_BYTES:
        return spec, notes
    if spec.dtype not in SCALES and not spec.low:
        raise BadOption(f"dtype is {spec.dtype}, and nothing says what its values are divided by; add scale=10000, say")
    return dataclasses.replace(spec, scale=SCALES.get(spec.dtype, 1.0)), notes


def classes_of(source: str | None, facts: Facts, count: int) -> tuple[tuple[ClassInfo, ...], tuple[str, ...]]:
    """Name the classes: as the importer says, or the file. Raises BadOption: there are not as many as outputs."""
    names, notes = facts.get("classes"), tuple[str, ...]()
    if isinstance(names, Mapping):  # {0: "road"}, or as many write it {"road": 0}
        by_id = names if all(str(key).isdecimal() for key in names) else {str(k): name for name, k in names.items()}
        names = [by_id[key] for key in sorted(by_id, key=int)] if all(str(key).isdecimal() for key in by_id) else None
    if source is None and not _is_list(names):
        names, notes = [f"class {k}" for k in range(count)], (
            f"nothing names the network's {count} classes; --classes does, with {', '.join(TABLES)} or a file of one "
            "name per line",)  # fmt: skip
    named = read_classes(source) if source else tuple(
        ClassInfo(str(name), color_of(k)) for k, name in enumerate(names or ())
    )  # fmt: skip
    if len(named) != count:
        raise BadOption(
            f"{len(named)} classes are named, and the network gives {count}; name as many, in its channels' order"
        )
    return named, notes


def parse_value(text: str) -> Any:
    """Read HEIGHTxWIDTH, JSON, one of Python's literals, a list after commas, or else a word."""
    if re.fullmatch(r"\d+x\d+", text):
        return [int(side) for side in text.split("x")]
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError):
            return read(text)
    return text.split(",") if "," in text else text


def _each(value: Any, num: int) -> list[Any]:
    """Repeat what is said once for all bands."""
    return list(value) if _is_list(value) else [value] * num


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
