"""How well a picture's strangeness tells shifts from validation frames, by rule, and how often it warns in vain.

python -m benchmarks.novelty --data DIR [--every N] [NAME | CHECKPOINT ...]

The reference is that of `benchmarks.calibration`: training frames whose masks the recipe did not use. A drive that it
leaves out is a set of its own. The means of every picture are kept in benchmarks/results/novelty.json, and all that are
kept are compared. Rules are one map's mean by itself, high is strange, or that of both: `ranks`, the larger of the
shares of the reference that have less of it; `two-sided ranks`, where the density counts from the nearer end; and
`both`, what calibrated cards do.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.progress import track

from benchmarks.calibration import RECIPES, unseen_masks
from benchmarks.rounds import RESULTS, machine
from penumbra.export.bundle import export_checkpoint
from penumbra.export.zoo import ZOO
from penumbra.models.card import ExtraMap
from penumbra.models.checkpoint import read_card
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.training.calibrate import Evidence, split_frames
from penumbra.training.data import load_camvid
from penumbra.training.evaluation.shift import SCALES, VARIANTS
from penumbra.training.frames import FrameSet, find_prefixed
from penumbra.training.metrics import Doubles
from penumbra.training.recipe import read_recipe
from tests.toys import toy_card

KEPT = RESULTS / "novelty.json"
LEFT_OUT = "0001TP"
HALVES = 200
Rule = Callable[[Doubles, Doubles], tuple[Doubles, Doubles]]
"""From the means of the reference's pictures and of others to how strange these and those are."""


def answer(checkpoint: Path, data: Path, every: int) -> Iterator[tuple[str, list[str], list[list[float]]]]:
    """The means of pictures, by what was done to them."""
    card = read_card(checkpoint)
    frames, _ = unseen_masks(card.name, data)
    split, val = split_frames(range(len(frames)), seed=0), load_camvid(data, "val")
    shown, train = list(range(0, len(val), every)), load_camvid(data, "train")
    prefixes = read_recipe(RECIPES / f"{card.name}.yaml").leave_out
    left_out = [row for prefix in prefixes for row in find_prefixed(train, prefix)]
    sets: dict[str, tuple[FrameSet, list[int], Any]] = {
        "reference": (frames, split.thresholds, None), "check": (frames, split.check, None), "val": (val, shown, None),
    } | {name: (val, shown, change) for name, change in VARIANTS.items()}  # fmt: skip
    if left_out:
        sets["left out"] = train, left_out, None
    with tempfile.TemporaryDirectory() as folder:
        export_checkpoint(checkpoint, Path(folder))
        with Segmenter.open(Path(folder), threads=1) as segmenter:
            for title, (source, indices, change) in sets.items():
                means = []
                for i in track(indices, f"{card.name} {title}"):
                    image_HW3, label_HW = source[i][0].permute(1, 2, 0).contiguous().numpy(), source[i][1].numpy()
                    if change:
                        image_HW3, _ = change(image_HW3, label_HW, np.random.Generator(np.random.PCG64([0, i])))
                    scale = 1.0 if title in SCALES else None  # a card's rule would undo the change
                    options = SegmentOptions(card.name, seed=i, outputs=(), scale=scale)
                    scores = segmenter.segment(image_HW3, options).scores
                    means.append([round(mean, 7) for mean in scores.means])
                yield title, [source.names[i] for i in indices], means


def by_one(map_: int) -> Rule:
    """Take one map's mean."""
    return lambda reference_NM, means_NM: (reference_NM[:, map_], means_NM[:, map_])


def by_ranks(reference_NM: Doubles, means_NM: Doubles, *, two_sided: bool = False) -> tuple[Doubles, Doubles]:
    """Take the larger of the shares of the reference that have less of a map."""
    ascending_MN = np.sort(reference_NM.T)

    def rank(x_NM: Doubles) -> Doubles:
        below_MN = np.array([np.searchsorted(*pair) for pair in zip(ascending_MN, x_NM.T, strict=True)])
        above_N = len(reference_NM) - np.searchsorted(ascending_MN[-1], x_NM[:, -1], side="right")
        return np.maximum(below_MN.max(0), above_N if two_sided else 0) / len(reference_NM)

    return rank(reference_NM), rank(means_NM)


def by_both(reference_NM: Doubles, means_NM: Doubles) -> tuple[Doubles, Doubles]:
    """Take the strangeness of `Novelty`, as `penumbra calibrate` makes one."""
    card, _ = toy_card("pointwise")
    evidence = Evidence(replace(card, extra_maps=(ExtraMap("density", "of pixels", "nats"),)))
    evidence.means = [*map(tuple, reference_NM.tolist())]
    novelty = evidence.novelty(1, "")
    assert novelty
    return np.array(novelty.means), np.array([*map(novelty.strangeness, means_NM.tolist())])


def auroc(usual_N: Doubles, strange_N: Doubles) -> float:
    """How often one of these is stranger than one of those; a tie counts half."""
    apart_NN = strange_N[None] - usual_N[:, None]
    return float((apart_NN > 0).mean() + (apart_NN == 0).mean() / 2)


def above(rule: Rule, reference_NM: Doubles, means_NM: Doubles, novelty: float) -> float:
    """The share of pictures with more than this novelty."""
    usual_N, strange_N = rule(reference_NM, means_NM)
    return float((np.searchsorted(np.sort(usual_N), strange_N) / len(usual_N) > novelty).mean())


def compare(kept: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By rule, AUROC of every set of pictures against the unchanged ones, and shares of these that would alarm."""
    means = {title: np.array(each["means"]) for title, each in kept.items()}
    num_maps, val_NM, reference_NM = means["val"].shape[1], means["val"], means["reference"]
    rules: dict[str, Rule] = {"entropy": by_one(0)}
    if num_maps > 1:
        two_sided = partial(by_ranks, two_sided=True)
        rules |= {"density": by_one(1), "ranks": by_ranks, "two-sided ranks": two_sided, "both": by_both}
    is_out = np.array([name.startswith(LEFT_OUT) for name in kept["reference"]["names"]])
    table = {}
    for name, rule in rules.items():
        usual_N = rule(reference_NM, val_NM)[1]
        row = {
            title: auroc(usual_N, rule(reference_NM, strange_NM)[1])
            for title, strange_NM in means.items() if title not in ("reference", "check", "val")
        }  # fmt: skip
        others_NM = reference_NM[~is_out]
        if is_out.any():
            row[LEFT_OUT] = auroc(*(rule(others_NM, x_NM)[1] for x_NM in (val_NM, reference_NM[is_out])))
        row |= {f"above 0.99, {title}": above(rule, reference_NM, means[title], 0.99) for title in ("check", "val")}
        rng, halves = np.random.Generator(np.random.PCG64(0)), []
        for _ in range(HALVES):
            order = rng.permutation(len(val_NM))
            halves.append(above(rule, *np.array_split(val_NM[order], 2), 0.95))
        table[name] = row | {"above 0.95, halves of val": float(np.mean(halves))}
    return table


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--every", default=1, show_default=True)
@click.argument("names", nargs=-1)
def main(data: Path, every: int, names: tuple[str, ...]) -> None:
    """Answer the pictures with the named models, and compare the rules for all that are kept."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for name in names:
        checkpoint = Path(name) if name.endswith(".safetensors") else ZOO / f"{name}.safetensors"
        sets = {title: {"names": own, "means": means} for title, own, means in answer(checkpoint, data, every)}
        kept[checkpoint.stem] = {"pictures": sets, "every": every, "on": machine()}
        KEPT.write_text(json.dumps(kept) + "\n")
    for name, one in kept.items():
        for rule, row in compare(one["pictures"]).items():
            print(f"{name}, {rule}: " + ", ".join(f"{title} {value:.3f}" for title, value in row.items()))


if __name__ == "__main__":
    main()
