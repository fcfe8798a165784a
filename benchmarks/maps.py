"""Which map finds what: wrong pixels, pasted objects, spoilt pictures; the zoo on CamVid's validation frames.

    python -m benchmarks.maps --data DIR [--every N] [NAME | CHECKPOINT ...]
    python -m benchmarks.maps --data DIR --labels np_semiseg-camvid [NAME | CHECKPOINT ...]
    penumbra ensemble models/zoo/{cps,np_semiseg,self_correcting,supervised}-camvid.safetensors -o ensemble.safetensors

Each figure is an AUROC: the probability that a wrong pixel scores above a right one (the answer's own), that a pixel of
a pasted object of no class scores above one of the scene, and that the mean over a spoilt picture is above that over a
clean one. Names are those of `penumbra.training.corruptions`, at severity 2. Errors of one's own make models that err
differently incomparable, so with `--labels` all maps rank the wrong pixels of one model's label map.
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
from penumbra.training.corruptions import CORRUPTIONS, paste_object
from penumbra.training.data import find_data
from penumbra.training.metrics import Ranking

SPOILT = ("fog", "darken", "gaussian_noise")
NAMES = ("cps-camvid", "mc_dropout-camvid", "np_semiseg-camvid", "proto_seg-camvid")
SEVERITY = 2


def scores(segmenter: Segmenter, image_HW3: np.ndarray, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The labels, and every map that is high where the answer is unsure."""
    (card,) = segmenter.cards()
    own = tuple(extra.name for extra in card.extra_maps)
    prediction = segmenter.segment(image_HW3, SegmentOptions(seed=seed, outputs=("default", *own)))
    maps = {"1 - confidence": 1 - prediction.maps["confidence"]}
    return prediction.labels_HW, maps | {name: x for name, x in prediction.maps.items() if name != "confidence"}


def evaluate(checkpoint: Path, data: Path, every: int) -> dict[str, float]:
    """AUROC by task and map."""
    frames = find_data("camvid").load(data, "val")
    rankings: dict[str, Ranking] = defaultdict(Ranking)
    indices = range(0, len(frames), every)
    with tempfile.TemporaryDirectory() as folder:
        export_checkpoint(checkpoint, Path(folder))
        with Segmenter.open(Path(folder)) as segmenter:
            for i in track(indices, checkpoint.stem):
                rng = np.random.Generator(np.random.PCG64(i))
                image_HW3, label_HW = frames[i][0].permute(1, 2, 0).contiguous().numpy(), frames[i][1].numpy()
                labels_HW, maps = scores(segmenter, image_HW3, i)
                known_HW = label_HW != IGNORE
                for key, x_HW in maps.items():
                    rankings[f"wrong pixels by {key}"].add(x_HW[known_HW], (labels_HW != label_HW)[known_HW])
                    mean = x_HW.mean(keepdims=True).ravel()
                    for kind in SPOILT:
                        rankings[f"{kind} by mean {key}"].add(mean, np.array([False]))
                pasted_HW3, _, object_HW = paste_object(image_HW3, label_HW, rng)
                for key, x_HW in scores(segmenter, pasted_HW3, i)[1].items():
                    judged_HW = known_HW | object_HW
                    rankings[f"pasted objects by {key}"].add(x_HW[judged_HW], object_HW[judged_HW])
                for kind in SPOILT:
                    spoilt_HW3 = CORRUPTIONS[kind](image_HW3, SEVERITY, rng)
                    for key, x_HW in scores(segmenter, spoilt_HW3, i)[1].items():
                        rankings[f"{kind} by mean {key}"].add(x_HW.mean(keepdims=True).ravel(), np.array([True]))
    return {"frames": len(indices)} | {task: ranking.auroc().value for task, ranking in sorted(rankings.items())}


def answer(checkpoint: Path, data: Path, every: int) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]]:
    """Truth, labels and maps of the frames as they are."""
    frames = find_data("camvid").load(data, "val")
    with tempfile.TemporaryDirectory() as folder:
        export_checkpoint(checkpoint, Path(folder))
        with Segmenter.open(Path(folder)) as segmenter:
            for i in track(range(0, len(frames), every), checkpoint.stem):
                image_3HW, label_HW = frames[i]
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
@click.option("--labels", help="The model whose wrong pixels all maps are to find.")
@click.argument("names", nargs=-1)
def main(data: Path, every: int, labels: str | None, names: tuple[str, ...]) -> None:
    """Measure models of the zoo, and keep the figures as JSON."""
    chosen = [Path(name) if "." in name else ZOO / f"{name}.safetensors" for name in names or NAMES]
    if labels is None:
        save("maps", {path.stem: evaluate(path, data, every) for path in chosen}, keep=True)
        return
    fixed = Path(labels) if "." in labels else ZOO / f"{labels}.safetensors"
    answers = [labels_HW for _, labels_HW, _ in answer(fixed, data, every)]
    found = {path.stem: rank_errors(path, answers, data, every) for path in chosen}
    save("errors", {f"wrong pixels of {fixed.stem}": {"frames": len(answers)} | found}, keep=True)


if __name__ == "__main__":
    main()
