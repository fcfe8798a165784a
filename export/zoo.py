"""Fill the demo store: the checkpoints that come with Penumbra, exported on first use."""

from pathlib import Path

from rich.console import Console
from rich.progress import track

from penumbra import models
from penumbra.serving.engine.store import artifact_card, find_artifact, sha256_of, versions

ZOO = Path(models.__file__).parent / "zoo"
"""One `<name>.safetensors` per method, its own and the baselines'."""

DEMO = ("cps-camvid", "np_semiseg-camvid")
"""What a demo store begins with: members and a latent. More would only make the first start longer."""


def fill_store(store: Path) -> list[Path]:
    """Export the demo checkpoints that a demo store lacks or has from another file; returns new directories.

    Only an empty store, or one that holds one of these models already, is a demo store; others are left alone.
    """
    checkpoints = {name: ZOO / f"{name}.safetensors" for name in DEMO}
    present = versions(store)
    if present and not checkpoints.keys() & present.keys():
        return []
    stale = [path for name, path in checkpoints.items() if name not in present or not _is_current(store, path)]
    if not stale:
        return []
    from penumbra.export.bundle import export_checkpoint  # imports torch, which a full store does not need

    console = Console(stderr=True)
    return [export_checkpoint(path, store) for path in track(stale, "Exporting the demo models", console=console)]


def _is_current(store: Path, checkpoint: Path) -> bool:
    facts = artifact_card(find_artifact(store, checkpoint.stem)).export
    return facts is not None and facts.checkpoint == sha256_of(checkpoint)
