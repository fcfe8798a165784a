"""Training of NP-SemiSeg (Wang et al. 2023, sec. 3.3) with the film head, and of its MC-dropout baseline.

    L = L_s + w(t) * L_u + beta * KL(q_target || q_context)
    L_s  multi-sample likelihood bound on labelled pictures
    L_u  the same on CutMix-ed, recoloured unlabelled pictures against the averaged network's confident labels
    q_target, q_context  the latent's Gaussian from the target and the context bank

The target bank holds labelled and confident pseudo-labelled pixels, the context bank labelled pixels. The baseline has
no KL, no bank, and one sample, with which the bound is the cross-entropy.
DEVIATION: the paper takes the cross-entropy of the mean of T logits, whose best answer is a latent without
variance. We maximise the multi-sample bound of importance-weighted autoencoders (Burda et al. 2016), the
"NPML" objective of neural processes (Foong et al. 2020), tempered by b: see `multi_sample_loss`.
DEVIATION: banks keep per-pixel vectors; the released `masked_select` and reshape mixes pixels of one channel.
DEVIATION: KL with variances; the released code puts sigma where sigma^2 belongs.
DEVIATION: banks and class attention see every other row and column of the feature map, for speed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penumbra.models.blocks.layers import draw_noise
from penumbra.models.blocks.losses import at_grid, confident_labels, mixed, ramp
from penumbra.models.card import IGNORE
from penumbra.models.contract import Views
from penumbra.models.errors import BadOption
from penumbra.models.np_semiseg.distilled import DistilledObjective, DistilledOptions
from penumbra.models.np_semiseg.heads import attend
from penumbra.models.np_semiseg.net import NpNetwork
from penumbra.models.strict import read_strict

CONTEXT, TARGET = 0, 1


@dataclass(frozen=True, slots=True)
class DropoutOptions:
    """samples: T, of the averaged network for a pseudo label. confidence: least teacher probability of one.

    start, full: shares of the schedule at which L_u begins to count and counts fully.
    """

    samples: int = 4
    unlabelled_weight: float = 1.0
    confidence: float = 0.9
    start: float = 0.1
    full: float = 0.25


@dataclass(frozen=True, slots=True)
class NpOptions(DropoutOptions):
    """samples: T, of both networks. sharpness: b. kl_weight: beta.

    bank_rows: Q of the paper. pixels_per_class: new rows per step, class and bank.
    """

    sharpness: float = 30.0
    kl_weight: float = 0.005
    bank_rows: int = 2560
    pixels_per_class: int = 64


class Pictures(NamedTuple):
    """Pictures of one step with the labels that they have: the labelled ones, then unlabelled ones where they count.

    area_B: the number of pixels over which a loss is averaged.
    """

    image_B3hw: Tensor
    label_Bhw: Tensor
    area_B: Tensor


class DropoutObjective(nn.Module):
    """MC dropout (Gal & Ghahramani 2016) of the latent network's host: L_s + w(t) * L_u under one mask per picture.

    The class centres stay 0, so that the latent is one and the same vector for every picture. It holds the network and
    its running average (the teacher, and what is served). For the loop only, once per step.
    """

    def __init__(self, network: NpNetwork, average: NpNetwork, options: DropoutOptions) -> None:
        super().__init__()
        self.network, self.average, self.options = network, average, options

    def forward(self, batch: Views, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        o, num = self.options, len(batch.image_B3hw)
        weight = o.unlabelled_weight * ramp(progress, o.start, o.full)
        pictures = Pictures(batch.image_B3hw, batch.label_Bhw, (batch.label_Bhw != IGNORE).sum((1, 2)))
        if weight > 0:
            noise_SBL = self._noise(o.samples, batch.weak_B3hw, generator)
            unlabelled = pseudo_labelled(batch, self.average, noise_SBL, confidence=o.confidence)
            pictures = Pictures(*(torch.cat(pair) for pair in zip(pictures, unlabelled, strict=True)))
        loss_B, penalty, parts = self._learn(pictures, num, generator)
        parts = {"supervised": loss_B[:num].mean(), **parts}
        total = parts["supervised"] + penalty
        if weight > 0:
            parts["unlabelled"] = loss_B[num:].mean()
            parts["kept"] = (pictures.label_Bhw[num:] != IGNORE).float().mean()
            total = total + weight * parts["unlabelled"]
        return {"total": total, **parts}

    def _learn(
        self, pictures: Pictures, num_labelled: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | float, dict[str, Tensor]]:
        """Return loss_B of every picture, what is added to their means, and figures to report."""
        logits_1BKhw = self.network(pictures.image_B3hw, self._noise(1, pictures.image_B3hw, generator))
        return picture_loss(logits_1BKhw.float(), pictures, sharpness=1.0), 0.0, {}

    def _noise(self, num_samples: int, image_B3hw: Tensor, generator: torch.Generator) -> Tensor:
        return draw_noise(self.network.sampling, num_samples, len(image_B3hw), generator).to(image_B3hw.device)


class NpObjective(DropoutObjective):
    """The latent network's objective, with its banks; every call adds to these and moves the class centres."""

    options: NpOptions

    def __init__(self, network: NpNetwork, average: NpNetwork, options: NpOptions) -> None:
        super().__init__(network, average, options)
        num_classes, length = network.head.latent.latent_centres.shape
        self.bank_2KQL = nn.Buffer(torch.zeros(2, num_classes, options.bank_rows, length))
        self.count_2K = nn.Buffer(torch.zeros(2, num_classes, dtype=torch.int64))

    def _learn(
        self, pictures: Pictures, num_labelled: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        x_BDhw = self.network.host(pictures.image_B3hw)
        query_BLhw = self.network.head.latent.reduce(x_BDhw.detach()[:, :, ::2, ::2]).float()
        self._remember(query_BLhw.detach(), pictures.label_Bhw, num_labelled=num_labelled, generator=generator)
        logits_SBKhw, kl_B = self._predict(x_BDhw, query_BLhw, generator)
        kl = kl_B.mean()
        loss_B = picture_loss(logits_SBKhw, pictures, sharpness=self.options.sharpness)
        spread = (
            logits_SBKhw.detach()[..., ::4, ::4].softmax(2).std(0, correction=0).mean()
        )  # whether the latent matters
        return loss_B, self.options.kl_weight * kl, {"kl": kl, "spread": spread}

    def _predict(self, x_BDhw: Tensor, query_BLhw: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return logits_SBKhw with z ~ q_target, and KL(q_target || q_context) per picture."""
        head, latent = self.network.head, self.network.head.latent
        mean_BL, sigma_BL = (x.float() for x in latent.distribution(attend(query_BLhw, latent.latent_centres)))
        context_BL = attend(query_BLhw, latent.context_centres)
        noise_SBL = self._noise(self.options.samples, x_BDhw, generator)
        logits_SBKhw = head.decode((head.shared(x_BDhw), mean_BL, sigma_BL, context_BL), noise_SBL)
        q_context = tuple(x.float() for x in latent.distribution(context_BL))
        return logits_SBKhw.float(), gaussian_kl((mean_BL, sigma_BL), q_context)

    @torch.no_grad()
    def _remember(
        self, query_BLhw: Tensor, label_Bhw: Tensor, *, num_labelled: int, generator: torch.Generator
    ) -> None:
        """Push pixels of every class into the banks and set the network's centres to the banks' means."""
        label_Bhw = at_grid(label_Bhw, *query_BLhw.shape[-2:])
        for bank, num in ((CONTEXT, num_labelled), (TARGET, len(label_Bhw))):
            query_PL, label_P = query_BLhw[:num].movedim(1, -1).flatten(0, 2), label_Bhw[:num].flatten()
            for k in range(self.bank_2KQL.shape[1]):
                rows = (label_P == k).nonzero()[:, 0]
                order = torch.randperm(len(rows), generator=generator)[: self.options.pixels_per_class]
                push(self.bank_2KQL[bank, k], self.count_2K[bank, k], query_PL[rows[order.to(rows.device)]])
        filled_2K1 = self.count_2K.clamp(1, self.options.bank_rows)[..., None]
        centres_2KL = self.bank_2KQL.sum(2) / filled_2K1
        self.network.head.latent.context_centres.copy_(centres_2KL[CONTEXT])
        self.network.head.latent.latent_centres.copy_(centres_2KL[TARGET])


KINDS: dict[str, tuple[Callable[..., nn.Module], type, str]] = {
    "np": (NpObjective, NpOptions, "latent"),
    "dropout": (DropoutObjective, DropoutOptions, "dropout"),
    "distilled": (DistilledObjective, DistilledOptions, "latent"),
}
"""By name: an objective, its options, and what the network that it trains samples."""


def build_objective(network: NpNetwork, average: NpNetwork, options: Mapping[str, Any]) -> nn.Module:
    """Build the objective that `kind` names: `np` (if none is named) for a latent, `dropout` for the baseline,
    `distilled` for the linear head.

    Raises BadOption: an unknown kind, or one that does not train such a network; BadArtifact naming an unknown or
    mistyped option.
    """
    rest, sampling, head = dict(options), network.sampling.kind, network.config.head
    name = str(rest.pop("kind", "np"))
    if name not in KINDS:
        raise BadOption(f"recipe.objective.kind is {name!r}; one of {', '.join(KINDS)} is wanted")
    objective, kind, trained = KINDS[name]
    if sampling != trained:
        raise BadOption(f"recipe.config.sampling is {sampling!r}; the objective {name!r} trains {trained!r}")
    if (head == "linear") != (name == "distilled"):
        raise BadOption(
            f"recipe.config.head is {head!r}; 'linear' is trained by the objective 'distilled', others are not"
        )
    return objective(network, average, read_strict(kind, rest, where="recipe.objective"))


@torch.no_grad()
def pseudo_labelled(batch: Views, teacher: NpNetwork, noise_SBL: Tensor, *, confidence: float) -> Pictures:
    """Mix strong views (CutMix), and the teacher's labels of the weak ones alike; IGNORE if unsure.

    confidence: least mean probability over the samples. Rejected pixels count in the area, so that few confident
    pixels weigh little.
    """
    prob_BKhw = teacher(batch.weak_B3hw, noise_SBL).float().softmax(2).mean(0)
    prob_BKhw = F.interpolate(prob_BKhw, batch.label_Bhw.shape[-2:], mode="bilinear", align_corners=True)
    label_Bhw = confident_labels(prob_BKhw, batch, confidence=confidence)
    return Pictures(mixed(batch.strong_B3hw, batch.mix_B1hw), label_Bhw, batch.inside_Bhw.sum((1, 2)))


def picture_loss(logits_SBKhw: Tensor, pictures: Pictures, *, sharpness: float) -> Tensor:
    """Compute `multi_sample_loss` per picture, on a grid of every other pixel: the map is four times coarser anyway."""
    num_samples, height, width = len(logits_SBKhw), *(2 * n for n in logits_SBKhw.shape[-2:])
    logits_NKhw = F.interpolate(logits_SBKhw.flatten(0, 1), size=(height, width), mode="bilinear", align_corners=True)
    coarse_Bhw = at_grid(pictures.label_Bhw, height, width)
    share = height * width / pictures.label_Bhw[0].numel()
    loss_NHw = F.cross_entropy(logits_NKhw, coarse_Bhw.repeat(num_samples, 1, 1), ignore_index=IGNORE, reduction="none")
    sum_SB = loss_NHw.sum((1, 2)).view(num_samples, -1)
    return multi_sample_loss(-sum_SB / (share * pictures.area_B).clamp(min=1), sharpness)


def multi_sample_loss(log_prob_SB: Tensor, sharpness: float) -> Tensor:
    """Return -(1/b) log mean_s exp(b * mean log-likelihood of sample s), per picture: loss_B.

    b = number of pixels is the likelihood of the whole picture (Burda et al. 2016, eq. 8); b -> 0 is the mean
    over samples. In between, samples may specialise where the picture is ambiguous, and all still learn.
    With one sample it is the mean cross-entropy for every b.
    """
    num_samples = torch.tensor(float(len(log_prob_SB)))
    return -(torch.logsumexp(sharpness * log_prob_SB, dim=0) - num_samples.log()) / sharpness


def gaussian_kl(q: tuple[Tensor, ...], p: tuple[Tensor, ...]) -> Tensor:
    """Return KL(q || p) of diagonal Gaussians given as (mean_BL, sigma_BL), summed over L: kl_B."""
    (mean_q, sigma_q), (mean_p, sigma_p) = q, p
    ratio = (sigma_q / sigma_p).square()
    return 0.5 * (ratio - 1 - ratio.log() + ((mean_q - mean_p) / sigma_p).square()).sum(-1)


def push(bank_QL: Tensor, count: Tensor, rows_PL: Tensor) -> None:
    """Write rows into the ring `bank_QL` in place, oldest first out; `count` ever written grows."""
    size = len(bank_QL)
    places = (int(count) + torch.arange(len(rows_PL), device=bank_QL.device)) % size
    bank_QL[places] = rows_PL.to(bank_QL.dtype)
    count += len(rows_PL)
