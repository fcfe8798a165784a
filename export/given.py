"""What is said of a network's pictures: by whoever imports it, or by a file of the library that it comes from."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from penumbra.models.card import ClassInfo
from penumbra.models.classes import color_of, read_classes
from penumbra.models.errors import BadArtifact, BadOption
from penumbra.models.inputs import RGB, InputSpec
from penumbra.models.strict import read_strict

Facts = dict[str, Any]
"""`size`, `classes`, and fields of InputSpec, each where it is said."""

SAME = {
    "size": ("size", "input_size", "image_size", "imgsz", "crop_size"),
    "mean": ("mean", "image_mean"),
    "std": ("std", "image_std"),
    "bands": ("bands", "band_names"),
    "order": ("order", "input_space", "color_space"),
    "classes": ("classes", "id2label", "names", "class_names"),
    "scale": ("scale",), "dtype": ("dtype",), "low": ("low",), "high": ("high",), "clip": ("clip",),
    "resolution": ("resolution",),
}  # fmt: skip
"""Our name of a fact, and what transformers, timm, smp and ultralytics call it."""
NESTED = ("pretrained_cfg", "default_cfg")
"""Where timm and smp say how an encoder was pretrained; at which size is of no matter here."""
NEIGHBOURS = ("config.json", "preprocessor_config.json")
"""Files beside a network's that say how it is to be used: as transformers saves them."""
IMAGENET = {"mean": InputSpec().mean, "std": InputSpec().std}
SCALES = {"uint8": 255.0, "float32": 1.0}
"""What values are divided by, by their type, where nothing says otherwise."""
BYTE_MEANS = 2.0
"""A mean above it is of values 0 to 255, which are then not divided."""
DEFAULT_SIZE = (512, 512)


def read_facts(text: str) -> Facts:
    """Read `--input`: a JSON file, or fields as `size=256x256 bands=blue,green mean=0.2,0.3`. Raises BadOption."""
    path = Path(text)
    if text.endswith(".json"):
        try:
            content = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise BadOption(f"--input {text} cannot be read as JSON ({error})") from None
        return find_facts(content)
    pairs = [word.partition("=")[::2] for word in text.split()]
    for name, value in pairs:
        if name not in SAME or name == "classes" or not value:
            known = ", ".join(name for name in SAME if name != "classes")
            raise BadOption(f"--input has {name!r}; a file.json or NAME=VALUE of {known} is wanted")
    return find_facts({name: _parse(value) for name, value in pairs})


def facts_beside(path: Path) -> Facts:
    """Read what transformers saved beside a network; nothing where there is no such file."""
    found: Facts = {}
    for name in NEIGHBOURS:
        if (path.parent / name).is_file():
            found |= read_facts(str(path.parent / name))
    return {fact: value for fact, value in found.items() if fact != "dtype"}  # that is the weights'


def find_facts(content: Any) -> Facts:
    """Pick the facts out of another library's dictionary, under our names."""
    if not isinstance(content, Mapping):
        return {}
    found: Facts = {}
    for name in NESTED:
        found |= {fact: value for fact, value in find_facts(content.get(name)).items() if fact != "size"}
    for ours, theirs in SAME.items():
        value = next((content[name] for name in theirs if content.get(name) is not None), None)
        found |= {} if value is None else {ours: value}
    if content.get("do_rescale") is False or content.get("input_range") == [0, 255]:
        found["scale"] = 1.0
    elif factor := content.get("rescale_factor"):
        found["scale"] = round(1 / factor, 6)
    if content.get("do_normalize") is False:
        found |= {"mean": 0.0, "std": 1.0}
    return found


def size_of(facts: Facts, height: int | None, width: int | None) -> tuple[int, int]:
    """Find the window's size: the program's own where it has one. Raises BadOption where another one is wanted."""
    size = facts.get("size")
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge", size.get("edge"))
        size = [size.get("height", edge), size.get("width", edge)]
    sides = [size] * 2 if isinstance(size, int) else list(size or ())[-2:]
    if sides and not (len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides)):
        raise BadOption(f"size is {size!r}; HEIGHTxWIDTH in pixels is wanted")
    wanted = tuple(sides) or DEFAULT_SIZE
    own = (height or wanted[0], width or wanted[1])
    if sides and own != wanted:
        raise BadOption(f"size is {wanted[0]}x{wanted[1]}, and the network takes {own[0]}x{own[1]} alone; leave it out")
    return own


def input_of(facts: Facts, channels: int | None) -> tuple[InputSpec, tuple[str, ...]]:
    """Make the card's input of what is said, and sentences of what is not. channels: the network's, where it has so
    many alone. Raises BadOption: too little is said, or it contradicts itself."""
    lists = {name: facts[name] for name in ("bands", "mean", "std", "low", "high") if _is_list(facts.get(name))}
    num = channels or next((len(values) for values in lists.values()), len(RGB))
    short = {1: ("grey",), 3: RGB}.get(num, ())
    how = f"add --input 'bands=NAME,... mean=... std=... scale=...', with {num} of each but the last"
    bands = tuple(str(name).lower() for name in _each(facts.get("bands", short), num))
    if len(bands) != num:
        raise BadOption(f"{len(bands) or 'no'} bands are named, and the network takes {num}; {how}")
    notes: tuple[str, ...] = ()
    if not {"mean", "low"} & facts.keys():
        if num != len(RGB):
            raise BadOption(f"nothing says how values of {', '.join(bands)} become the network's input; {how}")
        facts, notes = facts | IMAGENET, ("nothing says how pixels become the network's input: ImageNet's mean and "
                                          "deviation are taken; --input says others",)  # fmt: skip
    dtype, means = facts.get("dtype", "uint8"), [float(value) for value in _each(facts.get("mean", 0.0), num)]
    scale = facts.get("scale", 1.0 if max(map(abs, means)) > BYTE_MEANS else SCALES.get(dtype))
    if scale is None and "low" not in facts:
        raise BadOption(f"dtype is {dtype}, and nothing says what its values are divided by; add scale=10000, say")
    data = {
        "mean": means, "std": _each(facts.get("std", 1.0), num), "scale": scale or 1.0, "bands": bands, "dtype": dtype,
        "order": str(facts.get("order", "RGB")).upper(), "clip": str(facts.get("clip")).lower() in ("true", "1"),
        "low": _each(facts.get("low", ()), num), "high": _each(facts.get("high", ()), num),
    }  # fmt: skip
    try:
        return read_strict(InputSpec, data | _resolution(facts.get("resolution")), where="--input"), notes
    except BadArtifact as error:
        raise BadOption(str(error)) from None


def classes_of(source: str | None, facts: Facts, count: int) -> tuple[tuple[ClassInfo, ...], tuple[str, ...]]:
    """Name the classes: as the importer says, or the file. Raises BadOption: there are not as many as outputs."""
    names = facts.get("classes")
    if isinstance(names, Mapping):
        names = [names[key] for key in sorted(names, key=lambda key: int(key))]
    notes: tuple[str, ...] = ()
    if source is None and not _is_list(names):
        names, notes = [f"class {k}" for k in range(count)], (
            f"nothing names the network's {count} classes; --classes does, with {', '.join(('voc', 'cityscapes'))}, "
            "camvid or a file of one name per line",)  # fmt: skip
    chosen = (
        read_classes(source) if source else tuple(ClassInfo(str(n), color_of(k)) for k, n in enumerate(names or ()))
    )
    if len(chosen) == 1 and count == 2:
        chosen = (ClassInfo("background", color_of(0)), ClassInfo(chosen[0].name, color_of(1)))
    if len(chosen) != count:
        raise BadOption(
            f"{len(chosen)} classes are named, and the network gives {count}; name as many, in its channels' order"
        )
    return chosen, notes


def _resolution(text: Any) -> dict[str, Any]:
    """Read `frame:512` or `gsd:0.25`."""
    if text is None:
        return {}
    kind, _, value = str(text).partition(":")
    return {"resolution": {"kind": kind, "value": float(value) if re.fullmatch(r"[\d.]+", value) else math.nan}}


def _parse(value: str) -> Any:
    """Read a number, a list after commas, HEIGHTxWIDTH, or else a word."""
    if re.fullmatch(r"\d+x\d+", value):
        return [int(side) for side in value.split("x")]
    if "," in value:
        return [_parse(part) for part in value.split(",")]
    for kind in (int, float):
        with suppress(ValueError):
            return kind(value)
    return value


def _each(value: Any, num: int) -> list[Any]:
    """Repeat what is said once for all bands."""
    return list(value) if _is_list(value) else [value] * num


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
