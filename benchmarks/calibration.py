"""Calibrate checkpoints of the zoo in place, and measure what they promise on frames that had no part in it.

python -m benchmarks.calibration --data DIR [NAME ...]

Each is calibrated on the training frames whose masks its recipe did not use: methods that learn from unlabelled
pictures saw these pictures, never their masks. It is judged on the validation frames, which calibrate nothing.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from safetensors import safe_open
from safetensors.torch import save as save_tensors

from benchmarks.rounds import save
from penumbra.export.bundle import export_checkpoint
from penumbra.export.zoo import ZOO
from penumbra.models.card import Card, dump_card
from penumbra.models.checkpoint import read_card
from penumbra.models.files import write_whole
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.training.batches import choose_split
from penumbra.training.calibrate import Calibrated, calibrate
from penumbra.training.data import load_camvid
from penumbra.training.evaluation.answers import LIMITS
from penumbra.training.evaluation.run import Question, defined, evaluate
from penumbra.training.evaluation.temperature import set_temperature
from penumbra.training.frames import Frames
from penumbra.training.recipe import read_recipe

RECIPES = Path(__file__).parent.parent / "training" / "recipes"
MEASURED = ("seg/mIoU", "seg/NLL", "seg/Brier", "cal/ECE", "cal/aECE", "sc/AURC")


def replace_card(path: Path, card: Card) -> None:
    """Write a checkpoint again with the same weights under another card. Raises BadCheckpoint."""
    read_card(path)
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    write_whole(path, save_tensors(tensors, metadata={"card": dump_card(card)}))
    path.chmod(0o644)


def unseen_masks(name: str, data: Path) -> tuple[Frames, str]:
    """Load the training frames whose masks the recipe of this name did not use, and describe them."""
    frames, recipe = load_camvid(data, "train"), read_recipe(RECIPES / f"{name}.yaml")
    _, chosen = choose_split(frames, recipe)
    names = tuple(frames.names[i] for i in chosen)
    saw = "trained nothing" if recipe.weak_labels == "none" else f"trained nothing but {recipe.weak_labels}"
    text = f"CamVid train, {len(names)} frames of {', '.join(sorted({n[:6] for n in names}))} whose masks {saw}"
    return Frames(names, frames.image_N3HW[chosen], frames.label_NHW[chosen]), text


def describe(calibrated: Calibrated, frames: str) -> Card:
    """Say in the card which frames they were."""
    card, split = calibrated.card, calibrated.split
    text = (
        f"{frames}: {len(split.thresholds)} for thresholds and novelty, {len(split.temperature)} others for the "
        "temperature (seed 0); neighbours of frames that were trained on, so another drive may be worse"
    )
    calibration, novelty = (part and replace(part, data=text) for part in (card.calibration, card.novelty))
    return replace(card, calibration=calibration, novelty=novelty)


def renew(checkpoint: Path, data: Path) -> dict[str, Any]:
    """Calibrate one checkpoint in place; returns figures on the validation frames, before: at temperature 1."""
    name, held_out = checkpoint.stem, load_camvid(data, "val")
    (frames, text), question = unseen_masks(name, data), Question(name, data, split="train")
    with tempfile.TemporaryDirectory() as folder, Segmenter(limits=LIMITS) as segmenter:
        segmenter.load(export_checkpoint(checkpoint, Path(folder)))
        runtime = segmenter.find(name)
        runtime.card = set_temperature(runtime.card, 1.0)
        before = evaluate(segmenter, question, held_out).evaluation.figures()
        calibrated = calibrate(segmenter, question, frames)
        runtime.card = describe(calibrated, text)
        figures = evaluate(segmenter, question, held_out).evaluation.figures()
        card = runtime.card
    parts = {"calibration": card.calibration, "novelty": card.novelty}
    replace_card(checkpoint, replace(read_card(checkpoint), readout=card.readout, **parts))
    return {
        "temperature": card.readout.temperature, "frames": len(frames), "refused": calibrated.refused,
        "before": defined({key: before[key] for key in MEASURED}),
        "val": defined({key: figures[key] for key in MEASURED}),
        "promises": defined({key: value for key, value in figures.items() if key.startswith("abstain/")}),
        "withheld": {
            f"{risk:g}": [info.name for info, nats in zip(card.classes, row, strict=True) if nats is None]
            for risk, row in zip(card.calibration.class_risks, card.calibration.class_entropy_nats, strict=True)
        } if card.calibration else {},
    }  # fmt: skip


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("names", nargs=-1)
def main(data: Path, names: tuple[str, ...]) -> None:
    """Calibrate the named checkpoints, or all, and keep every figure as JSON."""
    torch.manual_seed(0)
    for name in names or sorted(path.stem for path in ZOO.glob("*.safetensors")):
        save("calibration", {name: renew(ZOO / f"{name}.safetensors", data)}, keep=True)


if __name__ == "__main__":
    main()
