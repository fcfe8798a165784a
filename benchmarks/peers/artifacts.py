"""What is served: an artifact of a zoo's model, and the one that `penumbra tune` makes of it on this machine."""

import dataclasses
import shutil
import time
from pathlib import Path

import click
from PIL import Image

from benchmarks.peers.raster import picture
from penumbra.export.bundle import export_checkpoint
from penumbra.export.load import Load
from penumbra.export.tune import TuneOptions, tune_artifact
from penumbra.export.zoo import ZOO
from penumbra.models.card import ScaleRule, WindowSpec
from penumbra.models.checkpoint import load_checkpoint, save_checkpoint
from penumbra.models.errors import BadOption

ENLARGED = (1024, 768)
"""Size of photographs from which windows of 512x512 are cut."""
MOST = 48
"""About as many photographs are enlarged: int8 takes its ranges from 32 windows of three quarters of them."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tuning:
    """How long tuning an artifact may take, 0 for none, and photographs to hold it on, if there are any."""

    minutes: float
    photographs: list[Path]

    def enlarged(self, folder: Path) -> list[Path]:
        """Make photographs that are larger than the raster's windows, or without any a piece of the raster itself."""
        few = self.photographs[:: max(1, len(self.photographs) // MOST)]
        shown = [Image.open(path).convert("RGB") for path in few] or [Image.fromarray(picture(ENLARGED[0]))]
        paths = [folder / f"{i}.png" for i in range(len(shown))]
        for path, image in zip(paths, shown, strict=True):
            image.resize(ENLARGED, Image.Resampling.BICUBIC).save(path)
        return paths


def export(model: str, window: WindowSpec | None, folder: Path) -> tuple[Path, Path]:
    """Export a model under a name of no demo model, whose store would be filled with the others: artifact, checkpoint.

    It runs pictures at their own scale, as the other servers do. window: in place of the model's own.
    """
    card, network = load_checkpoint(ZOO / f"{model}.safetensors")
    seen = dataclasses.replace(card.input, resolution=ScaleRule())
    card = dataclasses.replace(card, name="peers", input=seen, window=window or card.window)
    folder.mkdir(parents=True)
    checkpoint = folder / "peers.safetensors"
    save_checkpoint(checkpoint, card, network)
    return export_checkpoint(checkpoint, folder / "store"), checkpoint


def tune(artifact: Path, checkpoint: Path, pictures: list[Path], minutes: float, load: Load = Load()) -> Path:  # noqa: B008 (frozen)
    """Tune an artifact in a store of its own; returns the fastest, or the same where nothing is, or can be measured."""
    store = artifact.parents[2] / "tuned"
    shutil.copytree(artifact.parents[1], store)
    options = TuneOptions(time.perf_counter() + 60 * minutes, load, pictures, checkpoint=checkpoint)
    try:
        outcome = tune_artifact(artifact.parent.name, store, options, lambda line: click.echo(line, err=True))
    except BadOption as error:  # the servers can still be measured
        click.echo(f"not tuned: {error}", err=True)
        return artifact
    click.echo(f"tuned: {outcome.chosen.name}, {outcome.chosen} (as it is: {outcome.rows[0]})")
    return outcome.directory
