"""Fill the demo store: the checkpoints that come with Penumbra, exported on first use."""

from pathlib import Path

from rich.console import Console
from rich.progress import track

from penumbra import models
from penumbra.models.errors import BadArtifact
from penumbra.serving.engine.store import artifact_card, find_artifact, sha256_of, versions

ZOO = Path(models.__file__).parent / "zoo"
"""One `<name>.safetensors` per method, its own and the baselines'."""

DEMO = ("cps-camvid", "np_semiseg-camvid")
"""What a demo store begins with: members and a latent. More would only make the first start longer."""


def fill_store(store: Path) -> list[Path]:
    """Export the demo checkpoints that a demo store lacks or has from another file; returns new directories.

    Only a store without other models is a demo store; others are left alone, and so is a model of somebody's own that
    has the name of a demo.
    """
    present = versions(store)
    if present.keys() - {*DEMO}:
        return []
    checkpoints = [ZOO / f"{name}.safetensors" for name in DEMO]
    stale = [path for path in checkpoints if path.stem not in present or _is_older(store, path)]
    if not stale:
        return []
    from penumbra.export.bundle import export_checkpoint  # imports torch, which a full store does not need

    console = Console(stderr=True)
    return [export_checkpoint(path, store) for path in track(stale, "Exporting the demo models", console=console)]


def _is_older(store: Path, checkpoint: Path) -> bool:
    """Tell whether the newest version is of the same training as a checkpoint, and of another file."""
    try:
        card = artifact_card(find_artifact(store, checkpoint.stem))
    except BadArtifact:  # whoever opens the store says why it is refused
        return False
    if card.export and card.export.checkpoint == sha256_of(checkpoint):
        return False
    from penumbra.models.checkpoint import read_card  # imports torch

    return card.provenance == read_card(checkpoint).provenance
