"""Penumbra serves trained segmentation checkpoints and says, per pixel, how sure it is.

This folder is the import name. `models`, `serving`, `export` and `training` inside it are links to the folders of those
names at the root of the repository, so that a wheel installs `penumbra` and nothing else, and editors, type checkers
and tests see the same modules. `penumbra.__main__` is the command.

For a program or a notebook, `from penumbra import Segmenter, SegmentOptions, export_module` and the other names of
`__all__` are all that is needed. They are loaded when they are asked for, because the command must start fast.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penumbra.export.bundle import export_checkpoint, export_network, verify_artifact
    from penumbra.export.modules import export_module
    from penumbra.models.card import Card
    from penumbra.models.errors import PenumbraError
    from penumbra.serving.engine.answer import Prediction
    from penumbra.serving.engine.options import SegmentOptions
    from penumbra.serving.engine.segmenter import Segmenter

__all__ = [
    "Card", "PenumbraError", "Prediction", "SegmentOptions", "Segmenter", "export_checkpoint", "export_module",
    "export_network", "verify_artifact",
]  # fmt: skip

_FOLDER = Path(__file__).parent
if not (_FOLDER / "models").exists():  # a Bento, and a checkout without symbolic links, have the folders beside it only
    __path__.append(str(_FOLDER.parent))

_HOMES = {
    "penumbra.export.bundle": ("export_checkpoint", "export_network", "verify_artifact"),
    "penumbra.export.modules": ("export_module",),
    "penumbra.models.card": ("Card",),
    "penumbra.models.errors": ("PenumbraError",),
    "penumbra.serving.engine.answer": ("Prediction",),
    "penumbra.serving.engine.options": ("SegmentOptions",),
    "penumbra.serving.engine.segmenter": ("Segmenter",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'penumbra' has no attribute {name!r}")
