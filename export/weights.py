"""Find a network's weights in a file: whatever stands before their names, and however training wrapped them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from penumbra.export.pickles import read_torch_file
from penumbra.models.checkpoint import COUNTER, SUFFIX, few, fill_network
from penumbra.models.errors import BadCheckpoint

COMPILED = "_orig_mod."
"""What torch.compile puts into the names of a module's tensors."""
SMOOTHED = ("ema", "shadow", "averaged", "swa", "teacher")
"""Words in the places of a running average of the weights, which is what such training is evaluated with."""
NESTING = 4
"""Levels of dictionaries that are looked into."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file of safetensors or torch.save, nothing of which is run, by their places in it."""
    if path.suffix == SUFFIX:
        try:
            return {name.replace(COMPILED, ""): tensor for name, tensor in load_file(path).items()}
        except (SafetensorError, OSError) as error:
            raise BadCheckpoint(f"{path} is not a safetensors file ({error})") from None
    tensors = {name.replace(COMPILED, ""): tensor for name, tensor in _walk(read_torch_file(path))}
    if not tensors:
        raise BadCheckpoint(f"{path} holds no tensors by name; save the network's state_dict() and name that file")
    return tensors


def fill_from(network: nn.Module, path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Give a network the weights of a file; returns names of what was left out, and sentences on what was chosen.

    Its names are looked for behind any prefix (`module.`, `model.`, `state_dict.net.`). Where several sets are whole,
    the running average is taken. Raises BadCheckpoint: a tensor is missing, extra, of another shape, or not finite.
    """
    tensors = read_tensors(path)
    expected = [name for name in network.state_dict() if not name.endswith(COUNTER)]
    prefixes = sorted({key.removesuffix(name) for name in expected for key in tensors if _ends(key, name)})
    if not prefixes:
        raise BadCheckpoint(f"{path} has none of the network's tensors ({few(expected)}); it holds {few([*tensors])}")
    counts = {prefix: sum(prefix + name in tensors for name in expected) for prefix in prefixes}
    whole = [prefix for prefix in prefixes if counts[prefix] == len(expected)]
    smoothed = [prefix for prefix in whole if any(word in prefix.lower() for word in SMOOTHED)]
    chosen = min(smoothed or whole or [max(prefixes, key=lambda prefix: counts[prefix])], key=len)
    own = {key.removeprefix(chosen): tensor for key, tensor in tensors.items() if key.startswith(chosen)}
    others = tuple(prefix.removeprefix(chosen) for prefix in whole if prefix != chosen and prefix.startswith(chosen))
    weights = {
        name: own[name] for name in own if not name.endswith(COUNTER) and not (others and name.startswith(others))
    }
    fill_network(network, weights, where=str(path))
    left_out = tuple(key for key in tensors if not key.startswith(chosen) and not key.endswith(COUNTER))
    several = f"{path.name} has the weights {len(whole)} times; those of {chosen or 'no prefix'!r} are taken"
    return left_out, (several,) if len(whole) > 1 else ()


def _ends(key: str, name: str) -> bool:
    return key == name or key.endswith(f".{name}")


def _walk(content: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested dictionaries with their places; floats become float32."""
    if isinstance(content, Tensor):
        yield place[:-1], content.float() if content.is_floating_point() else content
    elif isinstance(content, Mapping) and depth < NESTING:
        for name, value in content.items():
            yield from _walk(value, f"{place}{name}.", depth + 1)
