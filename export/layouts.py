"""Rename the tensors of a published file to our names, by the layouts that the method states as data."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penumbra.export.pickles import is_whole
from penumbra.models import methods
from penumbra.models.checkpoint import COUNTER, few
from penumbra.models.contract import Method
from penumbra.models.errors import BadCheckpoint
from penumbra.models.layout import Layout

PREFIX = "module."
"""What DataParallel puts before every name; taken off where all names have it, as often as they have it."""

State = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """One file's tensors under our names.

    beside: those that stood outside the state dict. train_only: names in the file. entries: what else was at the top
    level.
    """

    layout: Layout
    tensors: dict[str, Tensor]
    beside: dict[str, Tensor]
    train_only: tuple[str, ...]
    entries: tuple[str, ...]


def read_published(content: Any, method: Method, *, where: str) -> PublishedFile:
    """Recognise the layout of a file's content, and rename strictly.

    Raises BadCheckpoint: no layout or several, a name that has no place in it, copies that differ, or an entry that is
    no plain tensor.
    """
    layout = _recognise(content, method, where=where)
    container, state = _state(content, layout)
    actions = {name: _look_up(name, layout) for name in state if not name.endswith(COUNTER)}
    if strangers := [name for name, (action, _) in actions.items() if action == "unknown"]:
        raise BadCheckpoint(f"{where}: {layout.name} has no place for {few(strangers)}")
    plain = {name: _plain(state[name], name, where=where) for name, (action, _) in actions.items() if action != "drop"}
    for name, (action, target) in actions.items():
        if action == "copy" and target not in plain:
            raise BadCheckpoint(f"{where} holds {name}, but not {target}, of which it is a copy in this layout")
        if action == "copy" and not torch.equal(plain[name], plain[target]):
            raise BadCheckpoint(f"{where}: {name} and {target} are one tensor in this layout, but differ")
    outside = {} if container is None else content
    return PublishedFile(
        layout=layout,
        tensors={target: plain[name] for name, (action, target) in actions.items() if action == "rename"},
        beside={
            target: _plain(outside[name], name, where=where)
            for name, target in layout.beside.items() if name in outside
        },
        train_only=tuple(name for name, (action, _) in actions.items() if action == "drop"),
        entries=tuple(str(name) for name in outside if name != container and name not in layout.beside),
    )  # fmt: skip


def published_name(ours: str, layouts: Sequence[Layout]) -> str:
    """Find what the layouts call a tensor of ours; its own name is returned where they do not name it."""
    renames = {
        here: there for layout in layouts for names in (layout.renames, layout.beside) for there, here in names.items()
    }
    prefix = max(filter(ours.startswith, renames), key=len, default="")
    return renames.get(prefix, "") + ours[len(prefix) :]


def _recognise(content: Any, method: Method, *, where: str) -> Layout:
    layouts = _layouts(method)
    known = [layout for layout in layouts if _fits(content, layout)]
    if len(known) == 1:
        return known[0]
    if known:
        raise BadCheckpoint(f"{where} fits several layouts of {method.name}: {few([x.name for x in known])}")
    refusal = f"{where} is no checkpoint of {method.name}, which knows {'; '.join(layout.name for layout in layouts)}"
    for other, layout in fitting(content):
        raise BadCheckpoint(f"{refusal}: it looks like {other.name}, {layout.name}")
    refusal += " (penumbra import --help says how any network is brought)"
    if not isinstance(content, Mapping):
        raise BadCheckpoint(f"{refusal}: it holds one object instead of tensors by name; its state_dict is wanted")
    largest = max([content, *(value for value in content.values() if isinstance(value, Mapping))], key=len)
    raise BadCheckpoint(f"{refusal}: it holds {few([str(name) for name in largest]) or 'nothing'}")


def fitting(content: Any) -> Iterator[tuple[Method, Layout]]:
    """Yield the methods whose layouts a file's content has."""
    for method in methods().values():
        yield from ((method, layout) for layout in _layouts(method) if _fits(content, layout))


def _layouts(method: Method) -> tuple[Layout, ...]:
    return method.upstream.layouts if method.upstream else ()


def _fits(content: Any, layout: Layout) -> bool:
    _, state = _state(content, layout)
    return all(name in state for name in layout.markers) and not any(name in state for name in layout.absent)


def _state(content: Any, layout: Layout) -> tuple[str | None, State]:
    """Find the layout's tensors by name: in the best container that is there, or in the content itself, if flat."""
    if not isinstance(content, Mapping):
        return None, {}
    inner = {name: value for name, value in content.items() if isinstance(value, Mapping)}
    container = next((name for name in layout.containers if inner.get(name)), None)
    state = inner[container] if container else {} if inner else content
    state = {str(name): value for name, value in state.items()}
    while state and all(name.startswith(PREFIX) for name in state):
        state = {name.removeprefix(PREFIX): value for name, value in state.items()}
    return container, state


def _look_up(name: str, layout: Layout) -> tuple[str, str]:
    """Find what becomes of a name, and its target: the longest prefix that the layout states for it counts."""
    table = dict.fromkeys(layout.train_only, ("drop", ""))
    table |= {there: ("copy", original) for there, original in layout.aliases.items()}
    table |= {there: ("rename", ours) for there, ours in layout.renames.items()}
    prefix = max(filter(name.startswith, table), key=len, default=None)
    if prefix is None:
        return "unknown", ""
    action, target = table[prefix]
    return action, target + name[len(prefix) :]


def _plain(value: Any, name: str, *, where: str) -> Tensor:
    """Return a tensor, in float32 if it has floats. One whose numbers are not all in the file could be of any size."""
    plain = (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.is_quantized or value.is_complex())
        and is_whole(value)
    )
    if not plain:
        raise BadCheckpoint(f"{where}: {name} is no plain tensor of numbers")
    tensor: Tensor = value.float() if value.is_floating_point() else value
    return tensor
