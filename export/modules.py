"""From a module in memory to a served artifact: `penumbra import module` for programs and notebooks."""

import copy
import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from penumbra.export.bring import Given
from penumbra.export.bundle import export_checkpoint
from penumbra.export.networks import import_network
from penumbra.models.card import Views
from penumbra.models.checkpoint import SUFFIX


def export_module(
    module: nn.Module, name: str, store: Path, *, input: Mapping[str, Any], classes: Sequence[str] = (),
    sampling: str | None = None, views: Views | None = None, pictures: Sequence[Path] = (),
) -> Path:  # fmt: skip
    """Write the next version of a module, which gives logits [B, K, h, w], into a store; returns its directory.

    input: what pictures are to it, as `penumbra import --input` names it: {"size": [512, 512], "mean": [...], "std":
    [...]}. classes: names, in the channels' order. sampling: dropout, views or none; by default dropout where there is
    some. views: those of an answer by default. pictures: what the gate's golden windows are cut from.
    The module is left as it is. Warns of what is not said. Raises BadOption, BadCheckpoint, and ParityFailed.
    """
    with tempfile.TemporaryDirectory() as folder:
        facts, checkpoint = Path(folder) / "input.json", Path(folder) / f"{name}{SUFFIX}"
        facts.write_text(json.dumps({**input, **({"classes": list(classes)} if classes else {})}), "utf-8")
        given = Given(input=str(facts), sampling=sampling, views=views, module=copy.deepcopy(module))
        imported = import_network("module", type(module).__name__, checkpoint, given)
        if imported.warnings:
            warnings.warn(". ".join(imported.warnings), stacklevel=2)
        return export_checkpoint(checkpoint, store, pictures=pictures)
