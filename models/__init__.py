"""What a network is: the contract, the card, and one folder per method.

No method's folder imports another's. Torch, safetensors, pydantic, which reads cards, and the standard library are all
that is imported here, but for onnxruntime where an ONNX program is run.
"""

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

from penumbra.models.errors import BadOption

if TYPE_CHECKING:  # the card and the errors are read without torch
    from penumbra.models.contract import Method


@cache
def methods() -> dict[str, "Method"]:
    """Find every method in this package, by name: a folder with a METHOD is a method."""
    folders = [m.name for m in pkgutil.iter_modules(__path__) if m.ispkg]
    found = [getattr(importlib.import_module(f"penumbra.models.{name}"), "METHOD", None) for name in folders]
    return {method.name: method for method in found if method is not None}


def find_method(name: str) -> "Method":
    """Find the method called `name`. Raises BadOption naming the known ones."""
    if name not in methods():
        raise BadOption(f"there is no method {name!r}; known are {', '.join(sorted(methods()))}")
    return methods()[name]
