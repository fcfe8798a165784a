"""Accuracy of the supervised CamVid network on resized frames, with the scale rule `frame` on its card and without.

    python -m benchmarks.scale --data DIR [--every 20]

Frames of val are resized by a factor (bicubic), and their labels with them (nearest); the answer has the frame's size.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

from benchmarks.rounds import save
from penumbra.export.bundle import export_network
from penumbra.models.card import IGNORE, ScaleRule
from penumbra.models.checkpoint import load_checkpoint
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.training.data import find_data

CHECKPOINT = Path("models/zoo/supervised-camvid.safetensors")
FACTORS = (0.5, 0.8, 1.0, 1.25, 2.0, 4.0)
RULES = {"none": ScaleRule(), "frame": ScaleRule("frame", 360)}


def resized(values: np.ndarray, factor: float, kind: Image.Resampling) -> np.ndarray:
    size = round(factor * values.shape[1]), round(factor * values.shape[0])
    return np.array(Image.fromarray(values).resize(size, kind))


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--every", default=20, show_default=True)
def main(data: Path, every: int) -> None:
    frames = find_data("camvid").load(data, "val")
    card, network = load_checkpoint(CHECKPOINT)
    right = {(name, factor): [0, 0] for factor in FACTORS for name in RULES}
    with tempfile.TemporaryDirectory() as store:
        for name, rule in RULES.items():
            own = replace(card, name=name, input=replace(card.input, resolution=rule))
            export_network(network, own, Path(store))
        with Segmenter.open(Path(store), device="cpu") as segmenter:
            for i in range(0, len(frames), every):
                image_HW3, label_HW = frames[i][0].permute(1, 2, 0).numpy(), frames[i][1].numpy()
                for (name, factor), counts in right.items():
                    picture = resized(image_HW3, factor, Image.Resampling.BICUBIC)
                    truth_HW = resized(label_HW, factor, Image.Resampling.NEAREST)
                    labels_HW = segmenter.segment(picture, SegmentOptions(model=name)).labels_HW
                    counts[0] += int((labels_HW == truth_HW)[truth_HW != IGNORE].sum())
                    counts[1] += int((truth_HW != IGNORE).sum())
    rows = [{"rule": name, "factor": factor, "accuracy": a / b} for (name, factor), (a, b) in right.items()]
    for row in rows:
        click.echo(f"{row['rule']:6} x{row['factor']:<5} {row['accuracy']:.4f}")
    save("scale", {"data": f"CamVid val, every {every}", "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
