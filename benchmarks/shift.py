"""Checkpoints on validation frames as they are, corrupted, rescaled, with objects pasted in, beside their control.

python -m benchmarks.shift --data DIR [--every N] [--split val] [NAME ...]

The tables of docs/measure/results.md come from benchmarks/results/shift-NAME.json. Seed 0.
"""

import json
import tempfile
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click

from benchmarks.rounds import RESULTS, machine
from penumbra.export.bundle import export_checkpoint
from penumbra.export.zoo import ZOO
from penumbra.models.checkpoint import read_card
from penumbra.training.evaluation.answers import Question
from penumbra.training.evaluation.shift import find_seen
from penumbra.training.evaluation.verb import evaluate_artifact

FIGURES = ("seg/mIoU", "seg/NLL", "seg/Brier", "cal/ECE", "sc/AURC", "sc/AUGRC")


def measure(checkpoint: Path, question: Question, seen: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Documents of the samples, and then of the control where there are samples. seen: by any training of the zoo."""
    with tempfile.TemporaryDirectory() as folder:
        export_checkpoint(checkpoint, Path(folder))
        ask = partial(evaluate_artifact, question, Path(folder), shift=True, seen=seen)
        yield question.name, ask().document()
        if read_card(checkpoint).sampling.is_stochastic:
            yield f"{question.name}, control", ask(control=True).document()


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
    zoo = sorted(ZOO.glob("*.safetensors"))
    chosen = [Path(name) if name.endswith(".safetensors") else ZOO / f"{name}.safetensors" for name in names]
    checkpoints = chosen or zoo
    seen = {kind for checkpoint in (*zoo, *chosen) for kind in find_seen(read_card(checkpoint))}
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
