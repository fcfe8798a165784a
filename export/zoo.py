"""The demo store: the checkpoints that come with Penumbra, exported on first use."""

from pathlib import Path

from rich.console import Console
from rich.progress import track

import models
from export.bundle import export_checkpoint
from models.checkpoint import read_card
from serving.engine.store import find_artifact, open_artifact, sha256_of, versions

ZOO = Path(models.__file__).parent / "zoo"


def fill_store(store: Path) -> list[Path]:
    """Export every zoo checkpoint that a demo store lacks or has from another file; returns new directories.

    Only an empty store, or one that holds a model of the zoo already, is a demo store; others are left alone.
    """
    checkpoints = {read_card(path).name: path for path in sorted(ZOO.glob("*.safetensors"))}
    present = versions(store)
    if present and not checkpoints.keys() & present.keys():
        return []
    stale = [path for name, path in checkpoints.items() if not _is_current(store, name, path)]
    if not stale:
        return []
    console = Console(stderr=True)
    return [export_checkpoint(path, store) for path in track(stale, "Exporting the demo models", console=console)]


def _is_current(store: Path, name: str, checkpoint: Path) -> bool:
    if name not in versions(store):
        return False
    facts = open_artifact(find_artifact(store, name)).card.export
    return facts is not None and facts.checkpoint == sha256_of(checkpoint)
