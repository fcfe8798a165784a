"""How often `max_risk` and `max_class_risk` keep what they promise, resplit by frame, by stretch of time, by drive.

python -m benchmarks.guarantee --data DIR [NAME ...]

Each model answers every frame once, at its card's temperature. What is resplit are the frames whose masks trained
nothing: half of them calibrate and half are tested, where the halves are drawn frame by frame (exchangeable, as the
theorem wants it), or as whole stretches of ten consecutive frames (as a camera sees them; ten seconds or more). Then
one drive calibrates and another is tested, and all of them calibrate and the validation frames are tested: a shift,
which voids the promise.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.progress import track

from benchmarks.calibration import unseen_masks
from benchmarks.rounds import save
from penumbra.export.bundle import export_checkpoint
from penumbra.export.zoo import ZOO
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.training.calibrate import CLASS_RISKS, RISKS
from penumbra.training.conformal import AbstentionLoss, ClassLoss, find_thresholds
from penumbra.training.data import load_camvid
from penumbra.training.evaluation.answers import LIMITS, Answer, segment_frame
from penumbra.training.evaluation.intervals import find_blocks
from penumbra.training.evaluation.run import Question
from penumbra.training.frames import Frames
from penumbra.training.metrics import bins_of

NAMES = ("supervised-camvid", "cps-camvid", "mc_dropout-camvid", "np_semiseg-camvid")
RESPLITS = 200
STEPS = 2000
"""Entropies at which the loss of `max_risk` is kept; between them it counts as at the next, which is safe."""

Doubles = np.ndarray


@dataclass(frozen=True, slots=True)
class Losses:
    """What the frames lose. wrong_NS, kept_NS: share of labelled pixels answered and wrong, and answered, up to a step.
    pixels_N2KT: as of `ClassLoss`, in each frame alone."""

    names: tuple[str, ...]
    wrong_NS: Doubles
    kept_NS: Doubles
    pixels_N2KT: Doubles
    steps_S: Doubles

    @property
    def num_classes(self) -> int:
        return self.pixels_N2KT.shape[2]

    @property
    def share_NKT(self) -> Doubles:
        return self.pixels_N2KT[:, 1] / np.maximum(self.pixels_N2KT[:, 0], 1)

    @property
    def called_NK(self) -> Doubles:
        return self.pixels_N2KT[:, 0, :, -1] > 0


def lose(answer: Answer, steps_S: Doubles, num_classes: int) -> tuple[Doubles, ...]:
    """Count one frame's losses."""
    known_HW, loss = answer.known_HW, ClassLoss(num_classes)
    entropy, wrong, labels = (x[known_HW] for x in (answer.maps["entropy"], answer.wrong_HW, answer.labels_HW))
    at = np.searchsorted(steps_S, entropy)
    loss.add(entropy, labels.astype(np.int64), wrong)
    return *(np.bincount(some, minlength=STEPS).cumsum() / len(at) for some in (at[wrong], at)), loss.pixels_2KT


def answer_all(segmenter: Segmenter, question: Question, frames: Frames) -> Losses:
    """Answer every frame once."""
    num_classes = segmenter.find(question.name, None).card.num_classes
    steps_S = (1.01 * np.log(num_classes) / STEPS * np.arange(1, STEPS + 1)).astype(np.float32)
    rows = [
        lose(segment_frame(segmenter, frames[i], question.options(i)), steps_S, num_classes)
        for i in track(range(len(frames)), question.name)
    ]
    return Losses(frames.names, *(np.stack(column) for column in zip(*rows, strict=True)), steps_S)


def judge(losses: Losses, calibrating: Doubles, tested: Losses, testing: Doubles) -> dict[str, list[float]]:
    """Calibrate on some frames and test on others: by risk, what is risked, what is answered and, of classes, the wrong
    share of all pixels together. NaN where a risk is not guaranteed or a class is not called; of what is withheld
    nothing is wrong."""
    marginal, by_class = AbstentionLoss(), ClassLoss(losses.num_classes)
    np.add.at(marginal.losses_N, bins_of(losses.steps_S), np.diff(losses.wrong_NS[calibrating].sum(0), prepend=0))
    marginal.num_frames = len(calibrating)
    thresholds, _ = find_thresholds(marginal, RISKS, num_classes=losses.num_classes)
    found: dict[str, list[float]] = {}
    for risk in RISKS:
        if risk not in thresholds:
            found[f"{risk:g}"] = [np.nan, np.nan]
            continue
        at = np.searchsorted(losses.steps_S, thresholds[risk], side="right") - 1  # below the first, nothing is answered
        rows = (tested.wrong_NS, tested.kept_NS)
        found[f"{risk:g}"] = [float(x[testing, at].mean()) if at >= 0 else 0.0 for x in rows]
    by_class.losses_KT = np.maximum.accumulate(losses.share_NKT[calibrating], axis=2).sum(0)
    by_class.num_frames_K = losses.called_NK[calibrating].sum(0)
    by_class.pixels_2KT = losses.pixels_N2KT[calibrating].sum(0)
    called_K = tested.called_NK[testing].sum(0)
    for risk in CLASS_RISKS:
        for k, nats in enumerate(by_class.thresholds(risk)):
            t = -1 if nats is None else int(np.searchsorted(by_class.candidates_T, nats))
            columns = (tested.share_NKT, *tested.pixels_N2KT.swapaxes(0, 1))
            share, answered, wrong = (0.0 if nats is None else float(x[testing, k, t].sum()) for x in columns)
            found[f"class {risk:g} {k}"] = [
                share / called_K[k] if called_K[k] else np.nan,
                answered / max(tested.pixels_N2KT[testing, 0, k, -1].sum(), 1),
                wrong / answered if answered else np.nan,
            ]  # fmt: skip
    return found


def resplit(losses: Losses, groups: list[list[int]], classes: Sequence[str]) -> dict[str, Any]:
    """Draw halves of the groups 200 times; by risk the mean of what is risked, and in how many draws it is too much."""
    rng, runs = np.random.Generator(np.random.PCG64(0)), []
    for _ in range(RESPLITS):
        order = rng.permutation(len(groups))
        half = len(groups) // 2
        calibrating, testing = (np.concatenate([groups[i] for i in part]) for part in (order[:half], order[half:]))
        runs.append(judge(losses, calibrating, losses, testing))
    return summarise(runs, classes)


def summarise(runs: list[dict[str, list[float]]], classes: Sequence[str]) -> dict[str, Any]:
    """Average the draws in which a risk was guaranteed. violations: the share of them in which it was exceeded."""
    summary: dict[str, Any] = {}
    for key in runs[0]:
        rows = np.array([run[key] for run in runs])
        kept = rows[~np.isnan(rows[:, 0])]
        risk = float(key.split()[1] if key.startswith("class") else key)
        name = key if not key.startswith("class") else f"class {risk:g} {classes[int(key.split()[2])]}"
        if not len(kept):
            summary[name] = None
            continue
        summary[name] = {
            "risk": round(float(kept[:, 0].mean()), 4), "answered": round(float(kept[:, 1].mean()), 4),
            "violations": round(float((kept[:, 0] > risk).mean()), 3), "guaranteed": round(len(kept) / len(rows), 3),
        }  # fmt: skip
        if rows.shape[1] > 2 and not np.isnan(kept[:, 2]).all():
            summary[name]["pooled"] = round(float(np.nanmean(kept[:, 2])), 4)
    return summary


def check(name: str, data: Path) -> dict[str, Any]:
    """Check one model."""
    frames, _ = unseen_masks(name, data)
    question = Question(name, data, split="train")
    with tempfile.TemporaryDirectory() as folder, Segmenter(limits=LIMITS) as segmenter:
        card = segmenter.load(export_checkpoint(ZOO / f"{name}.safetensors", Path(folder)))
        losses = answer_all(segmenter, question, frames)
        held_out = answer_all(segmenter, question, load_camvid(data, "val"))
    classes, everything = [info.name for info in card.classes], np.arange(len(losses.names))
    drives = {
        drive: np.array([i for i, other in enumerate(losses.names) if other.startswith(drive)])
        for drive in sorted({each.split("_")[0] for each in losses.names})
    }
    found = {
        "by frames": resplit(losses, [[i] for i in everything], classes),
        "by stretches": resplit(losses, find_blocks(losses.names, everything), classes),
        "val by stretches": resplit(held_out, find_blocks(held_out.names, range(len(held_out.names))), classes),
        "train to val": summarise([judge(losses, everything, held_out, np.arange(len(held_out.names)))], classes),
    }
    for here, there in permutations(drives, 2):
        found[f"{here} to {there}"] = summarise([judge(losses, drives[here], losses, drives[there])], classes)
    return {"temperature": card.readout.temperature, "frames": {d: len(i) for d, i in drives.items()}} | found


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("names", nargs=-1)
def main(data: Path, names: tuple[str, ...]) -> None:
    """Check models and keep every figure as JSON."""
    for name in names or NAMES:
        save("guarantee", {name: check(name, data)}, keep=True)


if __name__ == "__main__":
    main()
