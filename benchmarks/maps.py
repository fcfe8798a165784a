"""Which map of which model finds the wrong pixels of one model's label map, on CamVid's validation frames.

    python -m benchmarks.maps --data DIR [--every N] --labels np_semiseg-camvid [NAME | CHECKPOINT ...]
    penumbra ensemble models/zoo/{cps,np_semiseg,self_correcting,supervised}-camvid.safetensors -o ensemble.safetensors

Errors of one's own make models that err differently incomparable; `penumbra evaluate` has those.
"""

import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
from rich.progress import track

from benchmarks.rounds import save
from penumbra.export.bundle import export_checkpoint
from penumbra.export.zoo import ZOO
from penumbra.models.card import IGNORE
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.training.data import find_data
from penumbra.training.metrics import Ranking

NAMES = ("cps-camvid", "mc_dropout-camvid", "np_semiseg-camvid", "proto_seg-camvid")


def scores(segmenter: Segmenter, image_HW3: np.ndarray, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The labels, and every map that is high where the answer is unsure."""
    (card,) = segmenter.cards()
    own = tuple(extra.name for extra in card.extra_maps)
    prediction = segmenter.segment(image_HW3, SegmentOptions(seed=seed, outputs=("default", *own)))
    maps = {"1 - confidence": 1 - prediction.maps["confidence"]}
    return prediction.labels_HW, maps | {name: x for name, x in prediction.maps.items() if name != "confidence"}


def answer(checkpoint: Path, data: Path, every: int) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]]:
    """Truth, labels and maps of the frames as they are."""
    frames = find_data("camvid").load(data, "val")
    with tempfile.TemporaryDirectory() as folder:
        export_checkpoint(checkpoint, Path(folder))
        with Segmenter.open(Path(folder)) as segmenter:
            for i in track(range(0, len(frames), every), checkpoint.stem):
                image_3HW, label_HW, *_ = frames[i]
                yield label_HW.numpy(), *scores(segmenter, image_3HW.permute(1, 2, 0).contiguous().numpy(), i)


def rank_errors(checkpoint: Path, labels: list[np.ndarray], data: Path, every: int) -> dict[str, float]:
    """AUROC and FPR95 by map: how well it finds the wrong pixels of these label maps."""
    rankings: dict[str, Ranking] = defaultdict(Ranking)
    for labels_HW, (truth_HW, _, maps) in zip(labels, answer(checkpoint, data, every), strict=True):
        known_HW = truth_HW != IGNORE
        for name, x_HW in maps.items():
            rankings[name].add(x_HW[known_HW], (labels_HW != truth_HW)[known_HW])
    figures = {f"AUROC, {name}": ranking.auroc().value for name, ranking in rankings.items()}
    return figures | {f"FPR95, {name}": ranking.fpr95() for name, ranking in rankings.items()}


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--every", default=1, show_default=True, type=click.IntRange(min=1))
@click.option("--labels", required=True, help="The model whose wrong pixels all maps are to find.")
@click.argument("names", nargs=-1)
def main(data: Path, every: int, labels: str, names: tuple[str, ...]) -> None:
    """Measure models of the zoo, and keep the figures as JSON."""
    chosen = [Path(name) if "." in name else ZOO / f"{name}.safetensors" for name in names or NAMES]
    fixed = Path(labels) if "." in labels else ZOO / f"{labels}.safetensors"
    answers = [labels_HW for _, labels_HW, _ in answer(fixed, data, every)]
    found = {path.stem: rank_errors(path, answers, data, every) for path in chosen}
    save("errors", {f"wrong pixels of {fixed.stem}": {"frames": len(answers)} | found}, keep=True)


if __name__ == "__main__":
    main()
