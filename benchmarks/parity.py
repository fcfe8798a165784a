"""What every export format keeps of every zoo checkpoint: the gate's figures, as the table of docs/extend/export.md.

python -m benchmarks.parity --data DIR [--every N] [--only BACKEND] [NAME ...]

Every figure is what `penumbra export --data DIR` measures and stores in the card. What the gate refuses stays in the
table with the reason. Every export is kept at once, beside those of earlier runs.
"""

import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from rich.progress import track

from benchmarks.engines import FORMATS
from benchmarks.rounds import RESULTS, save
from penumbra.export.bundle import export_checkpoint
from penumbra.export.parity import Frame
from penumbra.export.zoo import ZOO
from penumbra.models.checkpoint import read_card
from penumbra.models.errors import PenumbraError
from penumbra.serving.engine.store import open_artifact
from penumbra.training.evaluation.run import Question, as_rasters, load_frames

COLUMNS = {
    "max_abs": ("largest difference", "{:.1e}"), "label_flips_percent": ("flips, %", "{:.4f}"),
    "entropy_rank_correlation": ("entropy rank", "{:.6f}"), "variance_ratio": ("variance", "{:.4f}"),
    "extras_relative": ("own maps, relative", "{:.1e}"), "miou_change": ("mIoU change", "{:+.3f}"),
}  # fmt: skip


def figures_of(checkpoint: Path, backend: str, precision: str, frames: list[Frame]) -> dict[str, Any]:
    """What the card of the export says, or why there is none; and the seconds that it took."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            directory = export_checkpoint(checkpoint, Path(folder), backend=backend, precision=precision, frames=frames)
            facts = open_artifact(directory).card.export
            assert facts
            figures = dataclasses.asdict(facts.parity)
        except PenumbraError as error:
            figures = {"failed": str(error)}
    return figures | {"seconds": time.perf_counter() - started}


def row(case: str, figures: dict[str, Any]) -> str:
    if "failed" in figures:
        return f"| {case} | {figures['failed']} |" + " |" * (len(COLUMNS) - 1)
    return f"| {case} | " + " | ".join(form.format(figures[key]) for key, (_, form) in COLUMNS.items()) + " |"


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--every", default=12, show_default=True, help="Every n-th validation frame only.")
@click.option("--only", multiple=True, help="These backends.")
@click.argument("names", nargs=-1)
def main(data: Path, every: int, only: tuple[str, ...], names: tuple[str, ...]) -> None:
    """Export, measure, keep, and print the table of all that is kept."""
    chosen = names or tuple(sorted(path.stem for path in ZOO.glob("*.safetensors")))
    formats = [each for each in FORMATS if not only or each[0] in only]
    for name, (backend, precision) in track([(name, each) for each in formats for name in chosen], "Exporting"):
        checkpoint = ZOO / f"{name}.safetensors"
        card = read_card(checkpoint)
        frames = as_rasters(load_frames(Question(name, data), card), card.input, every=every)
        figures = figures_of(checkpoint, backend, precision, frames)
        save("parity", {f"{name} | {backend} {precision}": figures}, keep=True)
    kept = json.loads((RESULTS / "parity.json").read_text())
    print("| model | format |", " | ".join(title for title, _ in COLUMNS.values()), "|")
    print("\n".join(row(case, figures) for case, figures in sorted(kept.items()) if case != "on"))


if __name__ == "__main__":
    main()
