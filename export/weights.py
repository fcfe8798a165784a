"""Find a network's weights in a file: whatever stands before their names, and however training wrapped them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from penumbra.export.pickles import is_whole, read_torch_file
from penumbra.models.checkpoint import COUNTER, SUFFIX, few, fill_network
from penumbra.models.errors import BadCheckpoint

COMPILED = "_orig_mod."
"""What torch.compile puts into the names of a module's tensors."""
SMOOTHED = ("ema", "shadow", "averaged", "swa", "teacher")
"""Words in the places of a running average of the weights, which is what such training is evaluated with."""
NESTING = 4
"""Levels of dictionaries and lists that are looked into."""


def read_content(path: Path) -> Any:
    """Read a file of safetensors or torch.save, nothing of which is run. Raises BadCheckpoint."""
    if path.suffix != SUFFIX:
        return read_torch_file(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadCheckpoint(f"{path} is not a safetensors file ({error})") from None


def find_tensors(content: Any, *, where: str) -> dict[str, Tensor]:
    """List all tensors of a file's content by their places in it. Raises BadCheckpoint where there are none."""
    tensors = {place.replace(COMPILED, ""): tensor for place, tensor in _walk(content) if not place.endswith(COUNTER)}
    if not tensors:
        raise BadCheckpoint(f"{where} holds no tensors by name; save the network's state_dict() and name that file")
    return tensors


def fill_from(network: nn.Module, path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Give a network the weights of a file; returns names of what was left out, and sentences on what was chosen.

    Its names are looked for behind any prefix (`module.`, `model.`, `state_dict.net.`); of a wrapper that the file does
    not know, those of the network in it. Where several sets are whole, the running average is taken. Raises
    BadCheckpoint: a tensor is missing, extra, of another shape, or not finite.
    """
    tensors = find_tensors(read_content(path), where=str(path))
    expected = [name for name in network.state_dict() if not name.endswith(COUNTER)]
    prefixes = {
        key.removesuffix(name) for name in expected for key in tensors if key == name or key.endswith(f".{name}")
    }
    inner = [*network.children()]
    if not prefixes and len(inner) == 1 and not [*network.parameters(recurse=False)]:
        return fill_from(inner[0], path)
    if not prefixes:
        raise BadCheckpoint(f"{path} has none of the network's tensors ({few(expected)}); it holds {few([*tensors])}")
    counts = {prefix: sum(prefix + name in tensors for name in expected) for prefix in sorted(prefixes)}
    whole = [prefix for prefix, count in counts.items() if count == len(expected)]
    smoothed = [prefix for prefix in whole if any(word in prefix.lower() for word in SMOOTHED)]
    chosen = min(smoothed or whole or [max(counts, key=counts.__getitem__)], key=len)
    others = tuple(prefix for prefix in whole if prefix != chosen and prefix.startswith(chosen))
    taken = [key for key in tensors if key.startswith(chosen) and not key.startswith(others)]
    fill_network(network, {key.removeprefix(chosen): tensors[key] for key in taken}, where=str(path))
    several = f"{path.name} has the weights {len(whole)} times; those of {chosen or 'no prefix'!r} are taken"
    return tuple(key for key in tensors if key not in taken), (several,) if len(whole) > 1 else ()


def _walk(content: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested dictionaries and lists with their places, floats as float32. Raises BadCheckpoint."""
    if isinstance(content, Tensor):
        if not is_whole(content):
            raise BadCheckpoint(f"{place[:-1]} has more numbers than the file holds; save a copy of it (.contiguous())")
        yield place[:-1], content.float() if content.is_floating_point() else content
    elif isinstance(content, Mapping | list | tuple) and depth < NESTING:
        for name, value in content.items() if isinstance(content, Mapping) else enumerate(content):
            yield from _walk(value, f"{place}{name}.", depth + 1)
