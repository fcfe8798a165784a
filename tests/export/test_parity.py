"""The parity gate: equal logits measure as equal, and what users would notice is refused by figure."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from penumbra.export.parity import FULL, check_parity, measure_parity, rank_correlation, read_maps, worst_parity
from penumbra.models.card import Card, ExportFacts, Parity, Readout
from penumbra.models.errors import ParityFailed
from tests.conftest import toy_card

CARD = toy_card("latent")[0]
SINGLE = toy_card("pointwise")[0]
EQUAL = Parity(max_abs=0, relative=0, label_flips_percent=0, entropy_rank_correlation=1, variance_ratio=1)


def logits(num_samples: int = 3) -> Tensor:
    return 4 * torch.randn(num_samples, 2, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def measure(wanted: Tensor, got: Tensor) -> Parity:
    return measure_parity(wanted, got, CARD, height=32, width=48)


def test_identical_logits_differ_in_nothing() -> None:
    assert measure(logits(), logits()) == EQUAL
    check_parity(EQUAL, CARD)


def test_a_small_error_is_measured_and_passes() -> None:
    got = logits()
    got[0, 0, 0, 0, 0] += 1e-4
    parity = measure(logits(), got)
    assert parity.max_abs == pytest.approx(1e-4, rel=1e-2)
    assert parity.relative == pytest.approx(1e-4 / float(logits().abs().max()), rel=1e-2)
    check_parity(parity, CARD)


def test_swapped_classes_flip_labels() -> None:
    parity = measure(logits(), logits().flip(2))
    assert parity.label_flips_percent > 50
    with pytest.raises(ParityFailed, match="toy-latent does not reproduce its checkpoint"):
        check_parity(parity, CARD)


def test_a_collapsed_latent_is_refused() -> None:
    collapsed = logits().mean(0, keepdim=True).expand(3, -1, -1, -1, -1)
    parity = measure(logits(), collapsed)
    assert parity.variance_ratio < 1e-6
    small = dataclasses.replace(EQUAL, variance_ratio=parity.variance_ratio)
    with pytest.raises(ParityFailed, match=r"sample variance is 0\.000 of the checkpoint's"):
        check_parity(small, CARD)


def test_a_checkpoint_whose_latent_does_nothing_is_refused() -> None:
    collapsed = logits()[:1].expand(3, -1, -1, -1, -1)
    with pytest.raises(ParityFailed, match="no effect on the logits"):
        measure(collapsed, collapsed)


def test_one_sample_has_no_variance_to_compare() -> None:
    assert measure_parity(logits(1), logits(1), SINGLE, height=32, width=48) == EQUAL


@pytest.mark.parametrize("shape", [(3, 2, 3, 16, 23), (2, 2, 3, 16, 24), (3, 2, 2, 16, 24)])
def test_other_shapes_are_refused_with_both(shape: tuple[int, ...]) -> None:
    with pytest.raises(ParityFailed) as refusal:
        measure(logits(), torch.zeros(shape))
    assert str(list(shape)) in str(refusal.value) and "[3, 2, 3, 16, 24]" in str(refusal.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    got = logits()
    got[1, 1, 1, 1, 1] = value
    with pytest.raises(ParityFailed, match="the export gives logits that are not finite"):
        measure(logits(), got)
    with pytest.raises(ParityFailed, match="the checkpoint gives logits that are not finite"):
        measure(got, logits())


@pytest.mark.parametrize(
    ("figure", "value", "sentence"),
    [
        ("relative", 2e-3, "relative error 2.0e-03, 1e-03 allowed"),
        ("relative", float("nan"), "relative error nan"),
        ("label_flips_percent", 0.02, "0.020 % of labels flip"),
        ("entropy_rank_correlation", 0.99, "entropy rank correlation 0.990000"),
        ("entropy_rank_correlation", float("nan"), "entropy rank correlation nan"),
        ("variance_ratio", 0.5, "sample variance is 0.500"),
        ("variance_ratio", 2.0, "sample variance is 2.000"),
        ("variance_ratio", float("nan"), "sample variance is nan"),
        ("label_flips_percent", float("nan"), "nan % of labels flip"),
        ("extras_relative", float("nan"), "relative error of its own maps nan"),
        ("max_abs", float("nan"), "largest difference nan"),
        ("entropy_ratio", 1.02, "mean entropy is 1.0200 of the checkpoint's, 1 +- 0.01 allowed"),
        ("miou_change", float("nan"), "mean IoU changes by nan points"),
        ("miou_change", -33.6, "mean IoU changes by -33.6 points on 0 frames, 0.5 allowed"),
    ],
)
def test_each_figure_outside_its_tolerance_is_named(figure: str, value: float, sentence: str) -> None:
    with pytest.raises(ParityFailed) as refusal:
        check_parity(dataclasses.replace(EQUAL, **{figure: value}), CARD)
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    "name", [name for name in dataclasses.asdict(EQUAL) if name not in ("miou_change", "num_frames")]
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_figure_that_is_nan_is_the_worst_wherever_it_stands(name: str, place: int) -> None:
    figures = [EQUAL] * 3
    figures[place] = dataclasses.replace(EQUAL, **{name: float("nan")})
    worst = worst_parity(figures)
    assert np.isnan(getattr(worst, name))
    with pytest.raises(ParityFailed, match="nan"):
        check_parity(worst, CARD)


def test_a_change_of_scale_keeps_labels_and_ranks_and_moves_the_entropy() -> None:
    """What thresholds of risk stand on: with them, another share of the pixels is withheld."""
    wanted, got = logits(1), 1.09 * logits(1)
    parity = measure_parity(wanted, got, SINGLE, height=32, width=48)
    nats = [read_maps(side[:, b], SINGLE, 32, 48)[1].mean() for side in (wanted, got) for b in (0, 1)]
    assert parity.label_flips_percent == 0 and parity.entropy_rank_correlation > 0.99
    assert parity.entropy_ratio == pytest.approx((sum(nats[2:]) / 2 + 0.01) / (sum(nats[:2]) / 2 + 0.01), abs=1e-5)
    assert parity.entropy_ratio < 1 - FULL.entropy


def test_the_worst_of_several_is_the_worst_of_each_kind() -> None:
    other = Parity(2, 3, 4, 0.5, 0.9, 6)
    assert worst_parity([EQUAL, other, dataclasses.replace(EQUAL, variance_ratio=1.05)]) == other


def test_where_logits_are_averaged_the_gate_reads_what_is_served() -> None:
    """Logits that are taken for probabilities have a rank correlation that has nothing to do with the answers'."""
    card = dataclasses.replace(CARD, readout=Readout(average="logits"))
    wanted = logits()
    got = wanted + 0.5 * torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    served = []
    for side in (wanted, got):
        mean_BKhw = side.mean(0)
        served.append(entropy(mean_BKhw[None])[0])
        labels, nats = read_maps(side[:, 0], card, 16, 24)
        assert np.array_equal(labels, mean_BKhw[0].argmax(0)) and nats == pytest.approx(served[-1][0], abs=1e-5)
    rank = measure_parity(wanted, got, card, height=16, width=24).entropy_rank_correlation
    assert rank == pytest.approx(spearmanr(served[0].ravel(), served[1].ravel()).statistic, abs=1e-4)
    assert rank < FULL.rank_correlation


def in_precision(precision: str) -> Card:
    return dataclasses.replace(CARD, export=ExportFacts("torchscript", precision, "2.13", {}, EQUAL))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_may_flip_half_a_percent_of_labels_and_reorder_little(precision: str) -> None:
    rough = Parity(
        max_abs=1, relative=0.09, label_flips_percent=0.49, entropy_rank_correlation=0.9951, variance_ratio=0.91
    )
    check_parity(rough, in_precision(precision))
    with pytest.raises(ParityFailed):
        check_parity(rough, in_precision("fp32"))
    for figure, value, sentence in (
        ("label_flips_percent", 0.51, "0.510 % of labels flip, 0.5 % allowed"),
        ("entropy_rank_correlation", 0.9949, "entropy rank correlation 0.994900, 0.995 needed"),
        ("variance_ratio", 0.0, "sample variance is 0.000"),
        ("relative", 0.2, "relative error 2.0e-01, 1e-01 allowed"),
        ("extras_relative", 0.2, "relative error of its own maps"),
    ):
        with pytest.raises(ParityFailed, match=re.escape(sentence)):
            check_parity(dataclasses.replace(rough, **{figure: value}), in_precision(precision))


def test_entropies_that_no_reader_can_tell_apart_have_no_order() -> None:
    """Nearly all pixels are certain, and a few have 4.6e-6 nats here and 5.3e-6 there."""
    wanted = torch.zeros(1, 1, 3, 32, 48)
    wanted[:, :, 0] = 60
    got = wanted.clone()
    wanted[:, :, 1:, ::20], got[:, :, 1:, ::20] = 44.2, 44.35
    wanted_nats, got_nats = (entropy(x) for x in (wanted, got))
    assert 0 < np.abs(wanted_nats - got_nats).max() < 1e-5 and (wanted_nats > 1e-7).mean() < 0.1
    parity = measure_parity(wanted, got, SINGLE, height=32, width=48)
    assert parity.entropy_rank_correlation == 1


def entropy(logits_SBKhw: Tensor) -> np.ndarray:
    log_p = torch.log_softmax(logits_SBKhw, 2)
    return -(log_p.exp() * log_p).sum(2).numpy()


def test_rank_correlation_of_orders() -> None:
    values = np.random.Generator(np.random.PCG64(0)).normal(size=1000)
    assert rank_correlation(values, values) == 1
    assert rank_correlation(values, np.exp(values)) == pytest.approx(1)
    assert rank_correlation(values, -values) == pytest.approx(-1)
    assert abs(rank_correlation(values, np.roll(values, 1))) < 0.1
    assert rank_correlation(np.zeros(5), np.zeros(5)) == 1


def test_equal_values_share_a_rank_so_maps_that_have_nothing_in_common_have_no_correlation() -> None:
    """0.996 where ties are broken by position: most pixels of either map are 0."""
    one, other = np.zeros(10_000, np.float32), np.zeros(10_000, np.float32)
    one[:10], other[5000:5010] = 0.5, 0.5
    assert rank_correlation(one, other) == pytest.approx(spearmanr(one, other).statistic, abs=1e-9)
    assert abs(rank_correlation(one, other)) < 0.01


def test_rank_correlation_is_spearmans(rng: np.random.Generator) -> None:
    for num_values in (2, 5, 1000):
        one = rng.integers(0, num_values, 500).astype(np.float32)
        other = one + rng.integers(0, num_values, 500)
        assert rank_correlation(one, other) == pytest.approx(spearmanr(one, other).statistic)


def test_rank_correlation_of_nan_or_of_one_flat_map_is_nan() -> None:
    values = np.arange(5, dtype=np.float32)
    assert np.isnan(rank_correlation(values, np.where(values == 2, np.nan, values)))
    assert np.isnan(rank_correlation(np.full(5, np.nan), np.full(5, np.nan)))
    assert np.isnan(rank_correlation(values, np.zeros(5, np.float32)))
