"""Intervals come from whole blocks of a drive's frames, and hold the figures that all frames give."""

import numpy as np
import pytest
import torch

from penumbra.models.confusion import confusion
from penumbra.training.evaluation.intervals import figures_of, find_blocks, find_intervals, flatten_sums
from penumbra.training.metrics import Doubles, Ranking, Reliability

NUM_CLASSES = 4


def sums_of(rng: np.random.Generator, *, skill: float, num: int = 4000) -> tuple[Doubles, dict[str, float]]:
    """Sums of made-up pixels, and the figures by the unbinned classes that evaluations use."""
    prob = rng.dirichlet(np.full(NUM_CLASSES, 0.3), num).astype(np.float32)
    answer = prob.argmax(1)
    truth = np.where(rng.random(num) < skill, answer, rng.integers(0, NUM_CLASSES, num))
    wrong, confidence = answer != truth, prob.max(1)
    table, reliability, ranking = np.zeros((NUM_CLASSES,) * 2), Reliability(), Ranking()
    np.add.at(table, (truth, answer), 1)
    reliability.add(confidence, prob[np.arange(num), truth], (prob**2).sum(1), ~wrong)
    ranking.add(1 - confidence, wrong)
    confusion_KK = confusion(torch.from_numpy(answer), torch.from_numpy(truth), num_classes=NUM_CLASSES)
    assert (confusion_KK.numpy() == table).all()
    figures = {
        "seg/NLL": reliability.nll(),
        "seg/Brier": reliability.brier(),
        "cal/ECE": reliability.ece(),
        "sc/AURC": ranking.aurc().value,
        "sc/AUGRC": ranking.augrc().value,
    }
    return flatten_sums(confusion_KK, reliability, ranking), figures


def ends(names: list[str], indices: range) -> list[int]:
    return sorted(block[-1] for block in find_blocks(names, indices))


def draws() -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(7))


def test_a_block_ends_after_ten_frames_and_where_a_drive_ends() -> None:
    names = [f"0001TP_{i:03}" for i in range(13)] + ["0006R0_f1"] + [f"plain{i}" for i in range(11)]
    assert ends(names, range(25)) == [9, 12, 13, 23, 24]
    assert ends(names, range(0, 25, 4)) == [8, 12, 20, 24], "a block's time does not grow with the step"


def test_a_city_is_a_drive_though_each_of_its_sequences_has_one_labelled_frame() -> None:
    names = [f"aachen/aachen_{i:06}_000019" for i in range(23)] + [f"bochum/bochum_000000_{i:06}" for i in range(4)]
    assert ends(names, range(27)) == [9, 19, 22, 26]


def test_the_order_of_a_list_does_not_matter() -> None:
    names = [f"{drive}_{i}" for drive in ("b", "a") for i in range(15)]
    shuffled = draws().permutation(names).tolist()
    blocks = [[shuffled[i] for i in block] for block in find_blocks(shuffled, range(30))]
    starts = (("a", 0), ("a", 10), ("b", 0), ("b", 10))
    assert blocks == [[f"{drive}_{i}" for i in range(at, min(at + 10, 15))] for drive, at in starts]


def test_figures_of_sums_are_those_of_the_pixels() -> None:
    sums, expected = sums_of(draws(), skill=0.8)
    figures = figures_of(sums, NUM_CLASSES)
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=2e-3)
    assert 0 < figures["seg/mIoU"] < 1


def test_blocks_that_are_alike_leave_no_interval_and_unlike_ones_a_wide_one() -> None:
    good, bad = (sums_of(draws(), skill=skill)[0] for skill in (0.95, 0.4))
    for low, high in find_intervals([good] * 6, NUM_CLASSES, seed=0).values():
        assert high - low == pytest.approx(0, abs=1e-12)
    whole = figures_of(3 * good + 3 * bad, NUM_CLASSES)
    for name, (low, high) in find_intervals([good, bad] * 3, NUM_CLASSES, seed=0).items():
        assert low < whole[name] < high
    assert find_intervals([good, bad], NUM_CLASSES, seed=1) == find_intervals([good, bad], NUM_CLASSES, seed=1)


def test_one_block_has_no_intervals() -> None:
    assert find_intervals([sums_of(draws(), skill=0.9)[0]], NUM_CLASSES, seed=0) == {}


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """Of many sets of 30 blocks of known expectation; a percentile bootstrap of so few is a little narrow."""
    rng, inside = draws(), 0
    blocks = [sums_of(rng, skill=skill, num=400)[0] for skill in rng.uniform(0.5, 1, 240)]
    expected = figures_of(np.sum(blocks, axis=0), NUM_CLASSES)["seg/NLL"]
    for seed in range(20):
        chosen = [blocks[i] for i in rng.integers(0, 240, 30)]
        low, high = find_intervals(chosen, NUM_CLASSES, seed=seed)["seg/NLL"]
        inside += low <= expected <= high
    assert 16 <= inside <= 20
