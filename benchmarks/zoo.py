"""Every checkpoint of the zoo on the validation frames, through the engine: the table of docs/measure/results.md.

python -m benchmarks.zoo --data DIR [NAME ...]
"""

import tempfile
from pathlib import Path
from typing import Any

import click
from rich.progress import track

from benchmarks.rounds import save
from penumbra.export.bundle import export_checkpoint
from penumbra.export.zoo import ZOO
from penumbra.training.evaluation.answers import Question
from penumbra.training.evaluation.verb import evaluate_artifact

COLUMNS = {
    "seg/mIoU": "mIoU", "seg/pixAcc": "accuracy", "seg/NLL": "NLL", "cal/ECE": "ECE", "sc/AURC": "AURC",
    "err/AUROC/entropy": "AUROC entropy", "err/AUROC/mutual_information": "AUROC MI",
    "err/FPR95/entropy": "FPR95 entropy", "pavpu/entropy/16": "PAvPU 16 px",
}  # fmt: skip
PERCENT = ("seg/mIoU", "seg/pixAcc")


def evaluate(checkpoint: Path, data: Path) -> dict[str, Any]:
    """Figures by name, with the number of samples and whether they differ."""
    with tempfile.TemporaryDirectory() as folder:
        export_checkpoint(checkpoint, Path(folder))
        measured = evaluate_artifact(Question(checkpoint.stem, data), Path(folder))
    return measured.document() | {"sampling": measured.card.sampling.kind}


def row(document: dict[str, Any]) -> str:
    """A line of the table; what a model has not is left out."""
    figures = document["figures"]
    cells = [
        "" if key not in figures else f"{100 * figures[key]:.1f} %" if key in PERCENT else f"{figures[key]:.3f}"
        for key in COLUMNS
    ]
    return f"| `{document['model']}` | {document['samples']} | {' | '.join(cells)} |"


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("names", nargs=-1)
def main(data: Path, names: tuple[str, ...]) -> None:
    """Print the table and keep every figure as JSON."""
    chosen = names or tuple(sorted(path.stem for path in ZOO.glob("*.safetensors")))
    documents = [evaluate(ZOO / f"{name}.safetensors", data) for name in track(chosen, "Evaluating")]
    for document in documents:
        del document["curves"], document["errors"]
    print("| model | S |", " | ".join(COLUMNS.values()), "|")
    print("\n".join(map(row, documents)))
    save("zoo", {document["model"]: document for document in documents}, keep=True)


if __name__ == "__main__":
    main()
