"""What boxes do to an answer: none, one object boxed, half of them, all; self_correcting on CamVid's validation frames.

    python -m benchmarks.boxes --data DIR [--every N] [CHECKPOINT ...]

Boxes are drawn round the connected parts of the masks, as in training. The one object is drawn from those of OBJECTS,
with the frame's number as seed; `elsewhere` are the labelled pixels outside of its box, by which no box and one box are
compared. Figures are means over frames of the share right and of the entropy in nats.
"""

import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.progress import track
from scipy import ndimage

from benchmarks.rounds import save
from penumbra.export.bundle import export_checkpoint
from penumbra.export.zoo import ZOO
from penumbra.models.card import IGNORE
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.training.batches import MIN_BOX_SHARE, TOUCHING
from penumbra.training.data import find_data

OBJECTS = ("Car", "Pedestrian", "Bicyclist", "SignSymbol", "Pole")
HALF_SEEDS = 3


def boxes_of(label_HW: np.ndarray, names: list[str]) -> list[tuple[float, float, float, float, str]]:
    """Box every connected part of every class that is no crumb."""
    boxes = []
    for k, name in enumerate(names):
        part_HW, _ = ndimage.label(label_HW == k, structure=TOUCHING)
        for i, (rows, columns) in enumerate(ndimage.find_objects(part_HW), 1):
            if (part_HW[rows, columns] == i).sum() >= MIN_BOX_SHARE * label_HW.size:
                boxes.append((columns.start, rows.start, columns.stop, rows.stop, name))
    return boxes


def measure(segmenter: Segmenter, image_HW3: np.ndarray, label_HW: np.ndarray, *, seed: int) -> dict[str, float]:
    """Figures of one frame by name."""
    (card,) = segmenter.cards()
    boxes = boxes_of(label_HW, [info.name for info in card.classes])
    generator = np.random.Generator(np.random.PCG64(seed))
    objects = [box for box in boxes if box[4] in OBJECTS]
    one = objects[generator.integers(len(objects))] if objects else boxes[0]
    halves = [tuple(boxes[i] for i in generator.permutation(len(boxes))[: len(boxes) // 2]) for _ in range(HALF_SEEDS)]
    known_HW = label_HW != IGNORE
    elsewhere_HW = known_HW.copy()
    x0, y0, x1, y1 = map(int, one[:4])
    elsewhere_HW[y0:y1, x0:x1] = False
    asked = {"none": [()], "one": [(one,)], "half": halves, "all": [tuple(boxes)]}
    figures: dict[str, float] = {}
    for name, prompts in asked.items():
        answers = [segmenter.segment(image_HW3, SegmentOptions(boxes=prompt)) for prompt in prompts]
        for where, mask_HW in (("", known_HW), (" elsewhere", elsewhere_HW), (" in its box", known_HW & ~elsewhere_HW)):
            right = [(answer.labels_HW == label_HW)[mask_HW].mean() for answer in answers]
            entropy = [answer.maps["entropy"][mask_HW].mean() for answer in answers]
            figures[f"{name}{where}/accuracy"] = float(np.mean(right))
            figures[f"{name}{where}/entropy"] = float(np.mean(entropy))
    return figures


def evaluate(checkpoint: Path, data: Path, every: int) -> dict[str, Any]:
    """Means over the frames."""
    frames = find_data("camvid").load(data, "val")
    sums: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        export_checkpoint(checkpoint, Path(folder))
        with Segmenter.open(Path(folder)) as segmenter:
            for i in track(range(0, len(frames), every), checkpoint.stem):
                image_3HW, label_HW, *_ = frames[i]
                image_HW3 = image_3HW.permute(1, 2, 0).contiguous().numpy()
                for name, value in measure(segmenter, image_HW3, label_HW.numpy(), seed=i).items():
                    sums[name].append(value)
    return {"frames": len(sums["none/accuracy"])} | {name: float(np.mean(values)) for name, values in sums.items()}


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--every", default=1, show_default=True, type=click.IntRange(min=1))
@click.argument("checkpoints", nargs=-1, type=click.Path(exists=True, path_type=Path))
def main(data: Path, every: int, checkpoints: tuple[Path, ...]) -> None:
    """Measure checkpoints, by default the zoo's, and keep the figures as JSON."""
    chosen = checkpoints or (ZOO / "self_correcting-camvid.safetensors",)
    save("boxes", {path.stem: evaluate(path, data, every) for path in chosen}, keep=True)


if __name__ == "__main__":
    main()
