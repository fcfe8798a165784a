"""Streamed figures equal their closed forms, and torchmetrics' where it has them, within the error they state."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_auroc, multiclass_calibration_error

from penumbra.training.metrics import NUM_BINS, Ranking, Reliability, bins_of, patch_curve, patches, top_of

NUM = 200_000
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def ranked(score: np.ndarray, wrong: np.ndarray) -> Ranking:
    ranking = Ranking()
    ranking.add(score.astype(np.float32), wrong)
    return ranking


def counted(confidence: np.ndarray, right: np.ndarray) -> Reliability:
    """With the confidence as the truth's probability where right, and no figure that needs the other classes."""
    reliability = Reliability()
    confidence = confidence.astype(np.float32)
    reliability.add(confidence, np.where(right, confidence, 0.1).astype(np.float32), confidence**2, right)
    return reliability


@given(st.lists(FLOATS, min_size=2, max_size=50))
def test_bins_keep_the_order_of_floats(values: list[float]) -> None:
    ordered = np.sort(np.array(values, np.float32))
    places = bins_of(ordered)
    assert (np.diff(places) >= 0).all() and places[0] >= 0 and places[-1] < NUM_BINS


@given(FLOATS)
def test_the_top_of_a_bin_is_its_largest_float(value: float) -> None:
    place = int(bins_of(np.array([value], np.float32))[0])
    top = np.float32(top_of(place))
    assert value <= top
    with np.errstate(over="ignore"):
        above = np.nextafter(top, np.float32(np.inf))
    assert bins_of(np.array([top]))[0] == place
    assert not np.isfinite(above) or bins_of(np.array([above]))[0] == place + 1
    if abs(value) > 1e-37:
        assert abs(float(top) - value) <= 2**-9 * abs(value)


def test_the_top_of_the_bin_below_zero_is_in_it_and_not_minus_zero() -> None:
    below = int(bins_of(np.zeros(1, np.float32))[0]) - 1
    assert top_of(below) < 0 and bins_of(np.array([top_of(below)]))[0] == below


def test_a_perfect_detector_has_auroc_1_a_reversed_one_0_and_a_constant_one_a_half(rng: np.random.Generator) -> None:
    wrong = rng.random(1000) < 0.2
    assert ranked(wrong * 1.0, wrong).auroc() == (1.0, 0.0)
    assert ranked(wrong * -1.0, wrong).auroc() == (0.0, 0.0)
    assert ranked(np.ones(1000), wrong).auroc() == (0.5, 0.5)


def test_a_random_detector_has_auroc_a_half(rng: np.random.Generator) -> None:
    assert ranked(rng.random(NUM), rng.random(NUM) < 0.1).auroc().value == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("spread", [1.0, 1e-4])
def test_auroc_is_torchmetrics_within_the_stated_error(rng: np.random.Generator, spread: float) -> None:
    wrong = rng.random(NUM) < 0.1
    score = (0.5 + spread * (rng.random(NUM) + 0.3 * wrong)).astype(np.float32)
    auroc = ranked(score, wrong).auroc()
    exact = float(binary_auroc(torch.from_numpy(score), torch.from_numpy(wrong).long()))
    assert abs(auroc.value - exact) <= auroc.error + 1e-6
    assert auroc.error < 0.002 or spread < 1, "and the error is small where scores are spread"


def test_without_errors_detection_is_undefined_and_risk_is_0() -> None:
    ranking = ranked(np.linspace(0, 1, 100), np.zeros(100, bool))
    assert math.isnan(ranking.auroc().value) and math.isnan(ranking.fpr95())
    assert ranking.aurc().value == ranking.excess_aurc() == 0 and ranking.coverage_at(0) == 1


def test_fpr95_of_shifted_uniforms_is_their_overlap(rng: np.random.Generator) -> None:
    wrong = rng.random(NUM) < 0.5
    ranking = ranked(rng.random(NUM) + 0.5 * wrong, wrong)  # 95 % of the wrong are above 0.55, and so 45 % of the right
    assert ranking.fpr95() == pytest.approx(0.45, abs=0.01)


def test_aurc_of_known_orders_is_their_integral() -> None:
    wrong = np.arange(NUM) < NUM // 4
    last, first, tied = (ranked(score, wrong) for score in (wrong + 1.0, 2.0 - wrong, np.ones(NUM)))
    assert last.aurc().value == pytest.approx(0.25 + 0.75 * math.log(0.75), abs=1e-6)
    assert last.excess_aurc() == pytest.approx(0, abs=1e-6)
    assert first.aurc().value == pytest.approx(0.25 + 0.25 * math.log(4), abs=1e-6)
    assert tied.aurc().value == pytest.approx(0.25)
    assert tied.aurc().error >= first.aurc().value - 0.25, "the stated error covers the worst order of the ties"


@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_aurc_is_that_of_ranking_every_pixel_within_the_stated_error(rng: np.random.Generator, spread: float) -> None:
    wrong = rng.random(NUM) < 0.1
    score = (0.5 + spread * (rng.random(NUM) + 0.5 * wrong)).astype(np.float32)
    errors = wrong[np.argsort(score, kind="stable")].cumsum()
    exact = (errors / np.arange(1, NUM + 1)).mean()
    aurc = ranked(score, wrong).aurc()
    assert abs(aurc.value - exact) <= aurc.error + 1e-4
    assert aurc.error < 1e-3 or spread < 1


def test_coverage_and_risk_are_read_off_the_curve() -> None:
    wrong = np.arange(1000) >= 900
    ranking = ranked(np.arange(1000) / 1000 + 1, wrong)
    assert ranking.coverage_at(0.0) == pytest.approx(0.9, abs=0.01)
    assert ranking.coverage_at(0.05) == pytest.approx(0.9 / 0.95, abs=0.01)
    assert ranking.risk_at(1.0) == pytest.approx(0.1) and ranking.risk_at(0.5) == 0


def test_counts_add_up_over_pictures(rng: np.random.Generator) -> None:
    score, wrong = rng.random(1000).astype(np.float32), rng.random(1000) < 0.3
    whole, parts = ranked(score, wrong), Ranking()
    for part in np.array_split(np.arange(1000), 7):
        parts.add(score[part], wrong[part])
    assert np.array_equal(whole.counts_2N, parts.counts_2N) and whole.mean == pytest.approx(parts.mean)


def test_ece_of_a_constructed_miscalibration_is_its_gap() -> None:
    right = np.arange(1000) % 10 < 6
    reliability = counted(np.full(1000, 0.9), right)
    assert reliability.ece() == pytest.approx(0.3, abs=1e-6)
    assert reliability.adaptive_ece() == pytest.approx(0.3, abs=1e-6)


def test_a_calibrated_model_has_no_ece(rng: np.random.Generator) -> None:
    confidence = rng.random(NUM)
    reliability = counted(confidence, rng.random(NUM) < confidence)
    assert reliability.ece() < 0.01 and reliability.adaptive_ece() < 0.01


def test_ece_is_torchmetrics(rng: np.random.Generator) -> None:
    prob = rng.dirichlet([0.5] * 4, 5000).astype(np.float32)
    truth = rng.integers(0, 4, 5000)
    reliability = counted(prob.max(1), prob.argmax(1) == truth)
    theirs = multiclass_calibration_error(torch.from_numpy(prob), torch.from_numpy(truth), 4, n_bins=15, norm="l1")
    assert reliability.ece() == pytest.approx(float(theirs), abs=1e-5)


def test_adaptive_ece_is_that_of_fifteen_equal_groups_in_order(rng: np.random.Generator) -> None:
    confidence = np.linspace(0.3, 0.7, 15 * 400)
    right = rng.random(len(confidence)) < confidence**2
    groups = [abs(c.mean() - r.mean()) for c, r in zip(np.split(confidence, 15), np.split(right, 15), strict=True)]
    assert counted(confidence, right).adaptive_ece() == pytest.approx(np.mean(groups), abs=1e-3)


def test_nll_and_brier_are_their_formulas(rng: np.random.Generator) -> None:
    prob = rng.dirichlet([1.0] * 3, 500).astype(np.float32)
    label = rng.integers(0, 3, 500)
    truth = prob[np.arange(500), label]
    reliability = Reliability()
    reliability.add(prob.max(1), truth, (prob**2).sum(1), prob.argmax(1) == label)
    assert reliability.nll() == pytest.approx(-np.log(truth).mean(), rel=1e-5)
    assert reliability.brier() == pytest.approx(((prob - np.eye(3)[label]) ** 2).sum(1).mean(), rel=1e-5)


def test_a_truth_without_probability_costs_a_bounded_number_of_nats() -> None:
    reliability = Reliability()
    reliability.add(*(np.array([x], np.float32) for x in (1.0, 0.0, 1.0)), np.array([False]))
    assert reliability.nll() == pytest.approx(math.log(1e7), rel=1e-4)


def test_patches_are_means_over_labelled_pixels_and_accurate_from_half() -> None:
    score = np.arange(36, dtype=np.float32).reshape(4, 9)
    wrong, known = np.zeros((4, 9), bool), np.ones((4, 9), bool)
    wrong[0, :4], wrong[1, 0] = True, True  # patch 0: 3 of 4 wrong; patch 1: 2 of 4, still accurate
    known[2:, 4:6] = False  # a patch without labels
    known[2, 0:2] = known[2, 6] = False  # half labelled; three quarters labelled
    means, inaccurate = patches(score, wrong, known, size=2)
    assert means.tolist() == pytest.approx([5, 7, 9, 11, 27.5, 25, 92 / 3])
    assert inaccurate.tolist() == [True] + [False] * 6


def test_pavpu_counts_accurate_certain_and_inaccurate_uncertain_patches() -> None:
    ranking = ranked(np.array([0.1, 0.2, 0.4, 0.8, 0.9]), np.array([False, True, False, True, True]))
    curve = patch_curve(ranking, np.array([0.01, 0.3, 2.0]))
    assert curve.pavpu.tolist() == [3 / 5, 3 / 5, 2 / 5]
    assert curve.accurate_if_certain.tolist()[1:] == [1 / 2, 2 / 5] and math.isnan(curve.accurate_if_certain[0])
    assert curve.uncertain_if_inaccurate.tolist() == [1, 2 / 3, 0]


def test_augrc_is_its_closed_form_and_its_definition(rng: np.random.Generator) -> None:
    """Traub et al. 2024: the integral over coverages of the share that is kept and wrong, or by AUROC and risk."""
    score = rng.random(5000).astype(np.float32)
    wrong = rng.random(5000) < score**2
    ranking = Ranking()
    ranking.add(score, wrong)
    value, error = ranking.augrc()
    kept_wrong = np.append(0, wrong[np.argsort(score)].cumsum()) / 5000
    assert abs(value - np.trapezoid(kept_wrong, dx=1 / 5000)) <= error + 1e-12 and error < 1e-3
    risk, auroc = wrong.mean(), ranking.auroc().value
    assert value == pytest.approx((1 - auroc) * risk * (1 - risk) + risk**2 / 2)


def test_augrc_of_equal_scores_is_half_the_risk() -> None:
    ranking = Ranking()
    ranking.add(np.zeros(10, np.float32), np.arange(10) < 3)
    assert ranking.augrc().value == pytest.approx(0.15)


def test_average_precision_of_a_worked_example() -> None:
    """From the highest score: wrong, right, wrong, right: precision 1 and 2/3 at the two wrong ones."""
    ranking = Ranking()
    ranking.add(np.array([4, 3, 2, 1], np.float32), np.array([True, False, True, False]))
    assert ranking.aupr() == pytest.approx((1 + 2 / 3) / 2)
    never = Ranking()
    never.add(np.ones(3, np.float32), np.zeros(3, bool))
    assert np.isnan(never.aupr())
