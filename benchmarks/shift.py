"""Checkpoints on validation frames as they are, corrupted, rescaled, with objects pasted in, beside their control.

python -m benchmarks.shift --data DIR [--every N] [--split val] [NAME ...]

The tables of docs/measure/results.md come from benchmarks/results/shift-NAME.json. One thread, seed 0.
"""

import dataclasses
import json
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import click

from benchmarks.rounds import RESULTS, machine
from penumbra.export.bundle import export_checkpoint
from penumbra.export.zoo import ZOO
from penumbra.models.checkpoint import read_card
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.training.evaluation.answers import LIMITS, Question
from penumbra.training.evaluation.run import evaluate, load_frames
from penumbra.training.evaluation.shift import find_seen, measure_shift
from penumbra.training.evaluation.temperature import control_cards

FIGURES = ("seg/mIoU", "seg/NLL", "seg/Brier", "cal/ECE", "sc/AURC", "sc/AUGRC")


def measure(checkpoint: Path, question: Question, seen: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Documents of the samples, and then of the control where there are samples. seen: by any training in the table."""
    with tempfile.TemporaryDirectory() as folder, Segmenter(limits=LIMITS, threads=1) as segmenter:
        card = segmenter.load(export_checkpoint(checkpoint, Path(folder)))
        frames = load_frames(question, card)
        indices = list(range(0, len(frames), question.every))
        own = evaluate(segmenter, question, frames)
        own = dataclasses.replace(own, beyond={"shift": measure_shift(segmenter, own, frames, seen=seen)})
        yield card.name, own.document()
        if card.sampling.is_stochastic:
            cards = control_cards(segmenter, question, frames, indices)
            control = evaluate(segmenter, question, frames, cards=cards)
            control = dataclasses.replace(
                control, beyond={"shift": measure_shift(segmenter, control, frames, seen=seen)}
            )
            yield f"{card.name}, control", control.document()


def row(name: str, figures: dict[str, float], intervals: dict[str, list[float]]) -> str:
    """A line of a table: figures, each with its interval where it has one."""
    cells = []
    for key in FIGURES:
        interval = " [{:.4f}, {:.4f}]".format(*intervals[key]) if key in intervals else ""
        cells.append(f"{figures[key]:.4f}{interval}")
    return f"| {name} | {' | '.join(cells)} |"


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--every", default=1, show_default=True)
@click.option("--split", default="val", show_default=True)
@click.argument("names", nargs=-1)
def main(data: Path, every: int, split: str, names: tuple[str, ...]) -> None:
    """Print the tables and keep every figure as JSON. NAME: of the zoo, or a checkpoint's file."""
    chosen = names or tuple(sorted(path.stem for path in ZOO.glob("*.safetensors")))
    checkpoints = [Path(name) if name.endswith(".safetensors") else ZOO / f"{name}.safetensors" for name in chosen]
    seen = {kind for checkpoint in checkpoints for kind in find_seen(read_card(checkpoint))}
    for checkpoint in checkpoints:
        question = Question(read_card(checkpoint).name, data, split=split, every=every)
        documents: dict[str, Any] = {}
        for title, document in measure(checkpoint, question, seen):
            del document["curves"], document["errors"], document["against_samples"]
            variants = document["shift"]["variants"]
            for variant in ("clean", "corruptions", "corruptions-unseen", "scale-2", "scale-0.5"):
                print(row(f"{title}, {variant}", variants[variant]["figures"], variants[variant]["intervals"]))
            print(document["shift"]["objects"], flush=True)
            documents[title] = document
        path = RESULTS / f"shift-{question.name}.json"
        path.write_text(json.dumps(documents | {"on": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
