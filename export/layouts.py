"""From what a published file holds to tensors under our names, by the layouts that the method states as data."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models import methods
from models.contract import Method
from models.errors import BadCheckpoint
from models.layout import Layout

COUNTER = "num_batches_tracked"
"""Of BatchNorm: not needed, sometimes missing, sometimes a float."""
PREFIX = "module."
"""What DataParallel puts before every name."""
SHOWN = 4

State = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """One file's tensors under our names. theirs: our name -> the name in the file. train_only: names in the file."""

    layout: Layout
    tensors: dict[str, Tensor]
    theirs: dict[str, str]
    train_only: tuple[str, ...]


def read_part(content: Any, method: Method, *, where: str) -> Part:
    """Recognise the layout of a file's content and rename its tensors strictly.

    Raises BadCheckpoint: no layout or several, a name that the layout lacks, copies that differ, or an entry that is no
    tensor.
    """
    assert method.upstream
    layout = _recognise(content, method, where=where)
    state = _state(content, layout)
    tensors: dict[str, Tensor] = {}
    theirs: dict[str, str] = {}
    train_only: list[str] = []
    unknown: list[str] = []
    for name, value in state.items():
        if name.endswith(COUNTER):
            continue
        kind, target = _look_up(name, layout)
        if kind == "rename":
            tensors[target], theirs[target] = _tensor(value, name, where=where), name
        elif kind == "alias":
            _check_copy(state, name, target, where=where)
        else:
            (train_only if kind == "train_only" else unknown).append(name)
    if unknown:
        raise BadCheckpoint(f"{where}: {layout.name} has no place for {few(unknown)}")
    for name, target in layout.beside.items():
        if name in content:
            tensors[target], theirs[target] = _tensor(content[name], name, where=where), name
    return Part(layout, tensors, theirs, tuple(train_only))


def few(names: Sequence[str]) -> str:
    """The first of the names, and how many they are."""
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown}, ... ({len(names)} in all)"


def _recognise(content: Any, method: Method, *, where: str) -> Layout:
    assert method.upstream
    fitting = [layout for layout in method.upstream.layouts if _fits(content, layout)]
    if len(fitting) == 1:
        return fitting[0]
    known = ", ".join(layout.name for layout in method.upstream.layouts)
    if fitting:
        raise BadCheckpoint(f"{where} fits several layouts of {method.name}: {few([x.name for x in fitting])}")
    others = [(other.name, layout.name) for other, layout in _all_layouts() if _fits(content, layout)]
    if others:
        name, layout_name = others[0]
        raise BadCheckpoint(f"{where} is no checkpoint of {method.name} ({known}); it looks like {name}: {layout_name}")
    keys = few(_keys(content)) or "nothing"
    raise BadCheckpoint(f"{where} is no checkpoint of {method.name}: it holds {keys}; layouts known are {known}")


def _all_layouts() -> Iterable[tuple[Method, Layout]]:
    return [(method, layout) for method in methods().values() if method.upstream for layout in method.upstream.layouts]


def _fits(content: Any, layout: Layout) -> bool:
    state = _state(content, layout)
    return all(name in state for name in layout.markers) and not any(name in state for name in layout.absent)


def _state(content: Any, layout: Layout) -> State:
    """The layout's tensors by their names: the best container that is there, or else the content if it is flat."""
    if not isinstance(content, Mapping):
        return {}
    inner = {name: value for name, value in content.items() if isinstance(value, Mapping)}
    held = [inner[name] for name in layout.containers if name in inner]
    state: State = held[0] if held else {} if inner else content
    while state and all(isinstance(name, str) and name.startswith(PREFIX) for name in state):
        state = {name.removeprefix(PREFIX): value for name, value in state.items()}
    return {name: value for name, value in state.items() if isinstance(name, str)}


def _keys(content: Any) -> list[str]:
    """What to show of a file that no layout fits: the names in its largest mapping."""
    if not isinstance(content, Mapping):
        return []
    inner = [value for value in content.values() if isinstance(value, Mapping)]
    return [str(key) for key in max([content, *inner], key=len)]


def _look_up(name: str, layout: Layout) -> tuple[str, str]:
    """What becomes of a name, by the longest prefix that the layout states for it."""
    table = dict.fromkeys(layout.train_only, ("train_only", ""))
    table |= {prefix: ("alias", target) for prefix, target in layout.aliases.items()}
    table |= {prefix: ("rename", target) for prefix, target in layout.renames.items()}
    fitting = [prefix for prefix in table if name.startswith(prefix)]
    if not fitting:
        return "unknown", ""
    prefix = max(fitting, key=len)
    kind, target = table[prefix]
    return kind, target + name[len(prefix) :]


def _tensor(value: Any, name: str, *, where: str) -> Tensor:
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        raise BadCheckpoint(f"{where}: {name} is no plain tensor")
    return value.float() if value.is_floating_point() else value


def _check_copy(state: State, name: str, original: str, *, where: str) -> None:
    """Raises BadCheckpoint when what should be a second copy is not one."""
    copy = _tensor(state[name], name, where=where)
    if original not in state or not torch.equal(copy, _tensor(state[original], original, where=where)):
        raise BadCheckpoint(f"{where}: {name} and {original} are one tensor in this layout, but differ")
