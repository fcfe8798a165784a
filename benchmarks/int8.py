"""int8 of every zoo checkpoint: what the gate lets pass, what labelled frames say, and speed, as a table.

    python -m benchmarks.int8 --data DIR [--every N] [--rounds N] [--threads N] [NAME ...]

Ranges and the gate's windows come from the training pictures; the change of mIoU, AURC and ECE is of OpenVINO's int8
against its fp32, asked through the engine about every N-th validation frame. Milliseconds are of encode and decode of
one window and of four with the usual number of samples, fp32, bf16 and int8 in turns in one process. The fp32 graphs
are made once and handed to both exports. Every network is kept at once, beside those of earlier runs.
"""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch

from benchmarks.engines import one_call
from benchmarks.rounds import RESULTS, measure, save
from penumbra.export.bundle import export_checkpoint
from penumbra.export.zoo import ZOO
from penumbra.models.checkpoint import load_checkpoint
from penumbra.models.errors import PenumbraError
from penumbra.serving.engine.backends import load_backend
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.store import open_artifact
from penumbra.training.evaluation.run import Question, evaluate, load_frames

CPU = torch.device("cpu")
FIGURES = ("seg/mIoU", "sc/AURC", "cal/ECE")
TUNING = Tuning(windows_per_batch=1, samples_per_call=8)
"""Batches need no choice here."""


def accuracy(directory: Path, question: Question) -> dict[str, float]:
    """Figures of an artifact on labelled frames, through the engine."""
    card = open_artifact(directory).card
    with Segmenter.open(directory.parents[1], device="cpu", threads=torch.get_num_threads(), tuning=TUNING) as engine:
        figures = evaluate(engine, question, load_frames(question, card))
    return {name.rpartition("/")[2]: figures.evaluation.figures()[name] for name in FIGURES}


def milliseconds(exact: Path, int8: Path | None, rounds: int) -> dict[str, float]:
    """Measure one window and four at a time, in every precision."""
    card, _ = load_checkpoint(ZOO / f"{open_artifact(exact).card.name}.safetensors")
    graphs = {}
    for precision, directory in (("fp32", exact), ("bf16", exact), ("int8", int8)):
        if directory:
            exported = open_artifact(directory).card
            assert exported.export
            facts = dataclasses.replace(exported.export, precision=precision)
            graphs[precision] = load_backend(dataclasses.replace(exported, export=facts), directory, CPU)
    found = {}
    for count in (1, 4):
        calls = {precision: one_call(each, card, count) for precision, each in graphs.items()}
        seconds = measure(calls, rounds=rounds)
        found |= {f"{precision}, {count}: ms": 1e3 * took for precision, took in seconds.items()}
    return found


def examine(name: str, question: Question, pictures: list[Path], *, rounds: int) -> dict[str, Any]:
    """Export a checkpoint in fp32 and in int8, and compare."""
    checkpoint = ZOO / f"{name}.safetensors"
    with tempfile.TemporaryDirectory() as folder:
        exact = export_checkpoint(checkpoint, Path(folder) / "fp32", backend="openvino")

        def reuse(*arguments: Any, **_: Any) -> None:
            for path in exact.glob("*.onnx"):
                shutil.copy(path, arguments[3])

        try:
            with patch("penumbra.export.openvino.write", reuse):
                int8 = export_checkpoint(
                    checkpoint, Path(folder) / "int8", backend="openvino", precision="int8", pictures=pictures
                )
        except PenumbraError as error:
            return {"failed": str(error)} | milliseconds(exact, None, rounds)
        facts = open_artifact(int8).card.export
        assert facts
        found = dataclasses.asdict(facts.parity) | {"int8 layers": facts.num_int8, "kept": facts.kept}
        found |= milliseconds(exact, int8, rounds)
        before, after = (accuracy(directory, question) for directory in (exact, int8))
        return found | {f"{figure} before": before[figure] for figure in before} | after


def row(name: str, found: dict[str, Any]) -> str:
    speed = [f"{found[f'fp32, {n}: ms']:.0f} / {found[f'bf16, {n}: ms']:.0f}" for n in (1, 4)]
    if "failed" in found:
        return f"| {name} | {found['failed']} | | | | | | | | {speed[0]} / - | {speed[1]} / - |"
    changes = [f"{100 * (found[each] - found[f'{each} before']):+.2f}" for each in ("mIoU", "AURC", "ECE")]
    gate = (
        f"{found['int8 layers']} of {found['int8 layers'] + len(found['kept'])}", f"{found['relative']:.3f}",
        f"{found['label_flips_percent']:.3f}", f"{found['variance_ratio']:.4f}",
        f"{found['entropy_rank_correlation']:.5f}",
    )  # fmt: skip
    times = [f"{speed[i]} / {found[f'int8, {n}: ms']:.0f}" for i, n in enumerate((1, 4))]
    return f"| {name} | " + " | ".join((*gate, *changes, *times)) + " |"


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--every", default=5, show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.argument("names", nargs=-1)
def main(data: Path, every: int, rounds: int, threads: int, names: tuple[str, ...]) -> None:
    """Examine, keep, and print the table of all that is kept."""
    torch.set_num_threads(threads)
    pictures = sorted((data / "train" / "images").iterdir())
    for name in names or sorted(path.stem for path in ZOO.glob("*.safetensors")):
        save("int8", {name: examine(name, Question(name, data, every=every), pictures, rounds=rounds)}, keep=True)
    kept = json.loads((RESULTS / "int8.json").read_text())
    heads = ("model", "layers in int8", "largest difference", "flips, %", "variance", "entropy rank", "mIoU change",
             "AURC change", "ECE change", "1 window: fp32 / bf16 / int8, ms", "4 windows")  # fmt: skip
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    print("\n".join(row(name, found) for name, found in sorted(kept.items()) if name != "on"))


if __name__ == "__main__":
    main()
