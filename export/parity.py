"""The parity gate measures how far an export is from its checkpoint, in the numbers that matter to its users."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penumbra.export.golden import noise_of
from penumbra.models.card import IGNORE, Card, Parity
from penumbra.models.confusion import confusion, intersection_over_union
from penumbra.models.contract import Network
from penumbra.models.errors import BadOption, ParityFailed
from penumbra.serving.engine.backends import Backend
from penumbra.serving.engine.canvas import Wanted, lay_out, read_band
from penumbra.serving.engine.moments import Statistics
from penumbra.serving.engine.raster import Pixels, Raster
from penumbra.serving.engine.scale import at_card_scale
from penumbra.serving.engine.uncertainty import Band
from penumbra.serving.engine.windows import clip, cover, cut

Frame = tuple[Pixels, NDArray[np.uint8] | None]
"""image_HWC and label_HW, IGNORE where nothing is labelled; None for a picture that is only to be answered alike."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Differences that no user would notice. relative: of the largest logit. variance: change of the samples'. entropy:
    change of the mean. miou_points: change of mean IoU on labelled frames."""

    relative: float
    flips_percent: float
    rank_correlation: float
    variance: float
    entropy: float
    miou_points: float


FULL = Tolerance(
    relative=1e-3, flips_percent=0.01, rank_correlation=0.9999, variance=0.01, entropy=0.01, miou_points=0.5
)
"""53-layer random nets differ by 3.5e-4 between engines in fp32."""
HALF = Tolerance(relative=0.1, flips_percent=0.5, rank_correlation=0.995, variance=0.1, entropy=0.05, miou_points=1.0)
"""A logit has 8 bits in bf16, and an outlier among millions says little: labels and ranks decide."""
TOLERANCES = {"fp32": FULL, "tf32": HALF, "bf16": HALF, "fp16": HALF, "int8": HALF}
PERFECT_AT_1 = ("entropy_rank_correlation", "variance_ratio", "entropy_ratio")
"""Figures that are 1 of an equal answer; all others are 0 then."""
ENTROPY_RESOLUTION = 1e-5
"""Nats. Entropies that agree to this are the same to every reader of a map, and their order is rounding."""
LITTLE_ENTROPY = 0.01
"""Nats added to means that are compared: of a network that is sure everywhere a change of the last digit is none."""


def measure_parity(expected_SBKhw: Tensor, exported_SBKhw: Tensor, card: Card, *, height: int, width: int) -> Parity:
    """Compare logits of the same input and noise; maps are compared at the window's height x width.

    Raises ParityFailed when the shapes differ or a value is not finite.
    """
    if expected_SBKhw.shape != exported_SBKhw.shape:
        raise ParityFailed(
            f"the export gives logits {list(exported_SBKhw.shape)}; {list(expected_SBKhw.shape)} are wanted"
        )
    for whose, logits_SBKhw in (("checkpoint", expected_SBKhw), ("export", exported_SBKhw)):
        if not torch.isfinite(logits_SBKhw).all():
            raise ParityFailed(f"the {whose} gives logits that are not finite")
    expected, exported = (
        [read_maps(x_SBKhw[:, b], card, height, width) for b in range(x_SBKhw.shape[1])]
        for x_SBKhw in (expected_SBKhw, exported_SBKhw)
    )
    flips = np.mean([np.mean(w[0] != g[0]) for w, g in zip(expected, exported, strict=True)])
    entropy, other = (np.concatenate([maps[1].ravel() for maps in side]) for side in (expected, exported))
    ratio = (other.mean(dtype=float) + LITTLE_ENTROPY) / (entropy.mean(dtype=float) + LITTLE_ENTROPY)
    other = np.where(np.abs(other - entropy) <= ENTROPY_RESOLUTION, entropy, other)
    return Parity(
        max_abs=float((expected_SBKhw - exported_SBKhw).abs().max()),
        relative=relative_error(expected_SBKhw, exported_SBKhw),
        label_flips_percent=100 * float(flips),
        entropy_rank_correlation=rank_correlation(entropy, other),
        variance_ratio=_variance_ratio(expected_SBKhw, exported_SBKhw),
        entropy_ratio=float(ratio),
    )


@torch.inference_mode()
def measure_frames(network: Network, graphs: Backend, card: Card, frames: Iterable[Frame]) -> Parity:
    """Measure the worst figure of all windows of all frames, the mean of label flips, and the change of mean IoU.

    Frames are seen at the card's scale, as the server runs them. Pixels where windows overlap count as often as they
    are covered. Raises BadOption: there is no frame, or no label on those that are to have one.
    """
    figures, num_frames, is_labelled, num_classes = [], 0, False, card.num_classes
    confusion_2KK = torch.zeros(2, num_classes, num_classes, dtype=torch.int64)
    for image_HWC, label_HW in frames:
        num_frames += 1
        raster = at_card_scale(image_HWC if isinstance(image_HWC, Raster) else Raster(image_HWC), card)
        plan = cover(*raster.shape[:2], card.window)
        label_HW = None if label_HW is None else _nearest(label_HW, raster.shape[:2])
        for window in plan:
            image = torch.from_numpy(cut(raster, window, plan, spec=card.window, norm=card.input)).permute(2, 0, 1)
            noise_SBL = noise_of(card.sampling, window=window.index)
            expected, exported = (half.decode(half.encode(image[None]), noise_SBL).cpu() for half in (network, graphs))
            figures.append(measure_parity(expected, exported, card, height=window.height, width=window.width))
            if label_HW is None:
                continue
            is_labelled = True
            rows, columns, beyond = clip(window, plan)
            truth = torch.from_numpy(np.pad(label_HW[rows, columns], beyond, constant_values=IGNORE))
            for counts_KK, logits_SBKhw in zip(confusion_2KK, (expected, exported), strict=True):
                labels = read_maps(logits_SBKhw[:, 0], card, window.height, window.width)[0]
                counts_KK += confusion(torch.from_numpy(labels), truth, num_classes=num_classes)
    if not figures or (is_labelled and not confusion_2KK[0].any()):
        raise BadOption("there is no labelled frame to measure the export on, or none of their pixels has a label")
    in_truth_K = confusion_2KK[0].sum(1) > 0  # of the others one stray pixel would decide
    before, after = (float(intersection_over_union(counts_KK)[in_truth_K].mean()) for counts_KK in confusion_2KK)
    change = 100 * (after - before) if is_labelled else None
    flips = float(np.mean([parity.label_flips_percent for parity in figures]))
    return dataclasses.replace(
        worst_parity(figures), label_flips_percent=flips, miou_change=change, num_frames=num_frames
    )


def _nearest(label_HW: NDArray[np.uint8], size: tuple[int, ...]) -> NDArray[np.uint8]:
    """Give labels at another size: of every pixel that under its centre."""
    at = [(2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, label_HW.shape, strict=True)]
    return label_HW[np.ix_(*at)]


def relative_error(expected: Tensor, exported: Tensor) -> float:
    """Return the largest difference over the largest value: infinite where the shapes differ, NaN where a value is."""
    if expected.shape != exported.shape:
        return float("inf")
    return float((expected - exported).abs().max()) / max(float(expected.abs().max()), 1e-6)


def worst_parity(figures: Sequence[Parity]) -> Parity:
    """Return the figure of each kind that is furthest from perfect, and NaN where one of them is."""

    def furthest(name: str) -> float:
        values = np.array([getattr(parity, name) for parity in figures])
        return float(values[np.abs(values - (name in PERFECT_AT_1)).argmax()])  # numpy finds a NaN first

    measured = ("max_abs", "relative", "label_flips_percent", "extras_relative", *PERFECT_AT_1)
    return Parity(**{name: furthest(name) for name in measured})  # type: ignore[arg-type]


class Held(NamedTuple):
    """A figure that the gate holds. share: of what is allowed, NaN where the figure is. limit, sentence: in words."""

    share: float
    limit: str
    sentence: str


def held(parity: Parity, card: Card) -> dict[str, Held]:
    """Hold every figure, by its name, to the tolerance of the card's precision."""
    allowed = TOLERANCES[card.export.precision if card.export else "fp32"]
    low, high = 1 - allowed.variance, 1 + allowed.variance
    return {
        "relative": Held(
            parity.relative / allowed.relative, f"<= {allowed.relative:g}",
            f"relative error {parity.relative:.1e}, {allowed.relative:.0e} allowed",
        ),
        "label_flips_percent": Held(
            parity.label_flips_percent / allowed.flips_percent, f"<= {allowed.flips_percent:g}",
            f"{parity.label_flips_percent:.3f} % of labels flip, {allowed.flips_percent} % allowed",
        ),
        "entropy_rank_correlation": Held(
            (1 - parity.entropy_rank_correlation) / (1 - allowed.rank_correlation), f">= {allowed.rank_correlation:g}",
            f"entropy rank correlation {parity.entropy_rank_correlation:.6f}, {allowed.rank_correlation} needed",
        ),
        "entropy_ratio": Held(
            abs(parity.entropy_ratio - 1) / allowed.entropy, f"1 +- {allowed.entropy:g}",
            f"mean entropy is {parity.entropy_ratio:.4f} of the checkpoint's, 1 +- {allowed.entropy:g} allowed",
        ),
        "variance_ratio": Held(
            abs(parity.variance_ratio - 1) / allowed.variance, f"1 +- {allowed.variance:g}",
            f"sample variance is {parity.variance_ratio:.3f} of the checkpoint's, {low} to {high} allowed",
        ),
        "extras_relative": Held(
            parity.extras_relative / allowed.relative, f"<= {allowed.relative:g}",
            f"relative error of its own maps {parity.extras_relative:.1e}, {allowed.relative:.0e} allowed",
        ),
        "max_abs": Held(0 * parity.max_abs, "", f"largest difference {parity.max_abs}, a number is wanted"),
        "miou_change": Held(
            abs(parity.miou_change or 0) / allowed.miou_points, f"0 +- {allowed.miou_points:g}",
            f"mean IoU changes by {parity.miou_change} points on {parity.num_frames} frames, {allowed.miou_points:g} "
            "allowed",
        ),
    }  # fmt: skip


def check_parity(parity: Parity, card: Card) -> None:
    """Raise ParityFailed, naming the first figure that is outside the tolerance of the card's precision, if any is."""
    for figure in held(parity, card).values():
        if not figure.share <= 1:  # nor is NaN
            raise ParityFailed(f"{card.name} does not reproduce its checkpoint: {figure.sentence}")


def strain(parity: Parity, card: Card) -> float:
    """Return the largest share of its tolerance that a figure takes up: 1 is all that the gate allows, NaN is more."""
    shares = [figure.share for figure in held(parity, card).values()]
    return max(share if math.isfinite(share) else math.inf for share in shares)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation: equal values share the mean of their ranks. 1 for equal arrays, also constant ones;
    NaN where a value is NaN, and where one array is constant and the other is not."""
    if np.isnan(a).any() or np.isnan(b).any():
        return float("nan")
    if np.array_equal(a, b):
        return 1.0
    ranks_a, ranks_b = (_ranks(values) for values in (a, b))
    spread = float(np.sqrt((ranks_a**2).mean() * (ranks_b**2).mean()))
    return float((ranks_a * ranks_b).mean()) / spread if spread else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of every value, less the mean rank; ties have the mean of theirs."""
    _, index, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (np.cumsum(count) - (count + len(values)) / 2)[index]
    return ranks


def read_window(logits_SKhw: Tensor, card: Card, height: int, width: int, outputs: tuple[str, ...]) -> Band:
    """Read out one window as the card says: labels, and these maps."""
    statistics, num_samples = Statistics(card, 1, (height, width), torch.device("cpu")), len(logits_SKhw)
    statistics.add(logits_SKhw[:, None])
    statistics.finish()
    segment, num_bytes = lay_out(Wanted(outputs), range(height), width, card, num_samples)
    return read_band(statistics.stats_BhCw[0] / num_samples, segment, num_bytes, card)


def read_maps(logits_SKhw: Tensor, card: Card, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Read out labels and entropy of one window as the card says."""
    band = read_window(logits_SKhw, card, height, width, ("entropy",))
    return band.labels, band.maps["entropy"]


def _variance_ratio(expected_SBKhw: Tensor, exported_SBKhw: Tensor) -> float:
    """Divide the export's mean variance over samples by the checkpoint's; 1 where a sample axis of 1 has none."""
    if len(expected_SBKhw) == 1:
        return 1.0
    expected, exported = (float(x.double().var(0).mean()) for x in (expected_SBKhw, exported_SBKhw))
    if expected == 0:
        raise ParityFailed("the checkpoint's own samples do not differ: its latent has no effect on the logits")
    return exported / expected
