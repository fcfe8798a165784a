"""Training of NP-SemiSeg (Wang et al. 2023, sec. 3.3) with the film head, so that the latent keeps a meaning.

    L = L_s + w(t) * L_u + beta * KL(q_target || q_context)
    L_s  multi-sample likelihood bound on labelled pictures
    L_u  the same on CutMix-ed, recoloured unlabelled pictures against the averaged network's confident labels
    q_target, q_context  the latent's Gaussian from the target and the context bank

The target bank holds labelled and confident pseudo-labelled pixels, the context bank labelled pixels.
DEVIATION: the paper takes the cross-entropy of the mean of T logits, whose best answer is a latent without
variance. We maximise the multi-sample bound of importance-weighted autoencoders (Burda et al. 2016), the
"NPML" objective of neural processes (Foong et al. 2020), tempered by b: see `multi_sample_loss`.
DEVIATION: banks keep per-pixel vectors; the released `masked_select` and reshape mixes pixels of one channel.
DEVIATION: KL with variances; the released code puts sigma where sigma^2 belongs.
DEVIATION: banks and class attention see every other row and column of the feature map, for speed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from penumbra.models.blocks.losses import ramp
from penumbra.models.card import IGNORE, read_strict
from penumbra.models.contract import Views
from penumbra.models.errors import BadOption
from penumbra.models.np_semiseg.heads import LatentPath, attend
from penumbra.models.np_semiseg.net import NpNetwork
from penumbra.models.np_semiseg.objective_dropout import DropoutObjective, DropoutOptions
from penumbra.models.np_semiseg.objective_terms import at_grid, labelled, picture_loss, pseudo_labelled

CONTEXT, TARGET = 0, 1
SAMPLED = {"np": "latent", "dropout": "dropout"}
"""What a network samples, by the kind of objective that trains it."""


@dataclass(frozen=True, slots=True)
class NpOptions:
    """samples: T. sharpness: b. confidence: least teacher probability of a pseudo label.

    start, full: shares of the schedule at which L_u begins to count and counts fully.
    bank_rows: Q of the paper. pixels_per_class: new rows per step, class and bank.
    """

    samples: int = 4
    sharpness: float = 30.0
    unlabelled_weight: float = 1.0
    confidence: float = 0.9
    kl_weight: float = 0.005
    start: float = 0.1
    full: float = 0.25
    bank_rows: int = 2560
    pixels_per_class: int = 64


class NpObjective(nn.Module):
    """Holds the network, its running average (the teacher, and what is served) and the banks.

    Called by the loop only, once per step; every call adds to the banks and moves the class centres.
    """

    def __init__(self, network: NpNetwork, average: NpNetwork, options: NpOptions) -> None:
        super().__init__()
        self.network, self.average, self.options = network, average, options
        num_classes, length = network.head.latent.latent_centres.shape
        self.bank_2KQL = nn.Buffer(torch.zeros(2, num_classes, options.bank_rows, length))
        self.count_2K = nn.Buffer(torch.zeros(2, num_classes, dtype=torch.int64))

    def forward(self, batch: Views, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        o, num = self.options, len(batch.image_B3hw)
        weight = o.unlabelled_weight * ramp(progress, o.start, o.full)
        pictures = labelled(batch)
        if weight > 0:
            noise_SBL = self._noise(len(batch.weak_B3hw), generator, like=batch.weak_B3hw)
            pictures = pictures.join(pseudo_labelled(batch, self.average, noise_SBL, confidence=o.confidence))
        x_BDhw = self.network.host(pictures.image_B3hw)
        query_BLhw = self.network.head.latent.reduce(x_BDhw.detach()[:, :, ::2, ::2]).float()
        self._remember(query_BLhw.detach(), pictures.label_Bhw, num_labelled=num, generator=generator)
        logits_SBKhw, kl_B = self._predict(x_BDhw, query_BLhw, generator)
        loss_B = picture_loss(logits_SBKhw, pictures, sharpness=o.sharpness)
        kl, supervised = kl_B.mean(), loss_B[:num].mean()
        parts = {"supervised": supervised, "kl": kl, "spread": sample_spread(logits_SBKhw.detach())}
        total = supervised + o.kl_weight * kl
        if weight > 0:
            parts["unlabelled"] = loss_B[num:].mean()
            parts["kept"] = (pictures.label_Bhw[num:] != IGNORE).float().mean()
            total = total + weight * parts["unlabelled"]
        return {"total": total, **parts}

    def _predict(self, x_BDhw: Tensor, query_BLhw: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """logits_SBKhw with z ~ q_target, and KL(q_target || q_context) per picture."""
        head, latent = self.network.head, self.network.head.latent
        mean_BL, sigma_BL = _gaussian(latent, attend(query_BLhw, latent.latent_centres))
        context_BL = attend(query_BLhw, latent.context_centres)
        noise_SBL = self._noise(len(x_BDhw), generator, like=mean_BL)
        logits_SBKhw = head.decode((head.shared(x_BDhw), mean_BL, sigma_BL, context_BL), noise_SBL)
        kl_B = gaussian_kl((mean_BL, sigma_BL), _gaussian(latent, context_BL))
        return logits_SBKhw.float(), kl_B

    def _noise(self, num: int, generator: torch.Generator, *, like: Tensor) -> Tensor:
        shape = (self.options.samples, num, self.network.sampling.noise_length)
        return torch.randn(shape, generator=generator).to(like.device)

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


def build_objective(network: NpNetwork, average: NpNetwork, options: Mapping[str, Any]) -> nn.Module:
    """The objective that `kind` names: `np` (if none is named) for a latent, `dropout` for the baseline.

    Raises BadOption: an unknown kind, or one that the network does not sample for; BadArtifact naming an unknown or
    mistyped option.
    """
    rest, sampling = dict(options), network.sampling.kind
    kind = str(rest.pop("kind", "np"))
    if kind not in SAMPLED:
        raise BadOption(f"recipe.objective.kind is {kind!r}; one of {', '.join(SAMPLED)} is wanted")
    if sampling != SAMPLED[kind]:
        raise BadOption(f"recipe.config.sampling is {sampling!r}; the objective {kind!r} trains {SAMPLED[kind]!r}")
    if kind == "dropout":
        return DropoutObjective(network, average, read_strict(DropoutOptions, rest, where="recipe.objective"))
    return NpObjective(network, average, read_strict(NpOptions, rest, where="recipe.objective"))


def gaussian_kl(q: tuple[Tensor, Tensor], p: tuple[Tensor, Tensor]) -> Tensor:
    """KL(q || p) of diagonal Gaussians given as (mean_BL, sigma_BL), summed over L: kl_B."""
    (mean_q, sigma_q), (mean_p, sigma_p) = q, p
    ratio = (sigma_q / sigma_p).square()
    return 0.5 * (ratio - 1 - ratio.log() + ((mean_q - mean_p) / sigma_p).square()).sum(-1)


def sample_spread(logits_SBKhw: Tensor) -> Tensor:
    """How much the latent matters: standard deviation of p over samples, mean of classes and some pixels."""
    return logits_SBKhw[..., ::4, ::4].softmax(2).std(0, correction=0).mean()


def push(bank_QL: Tensor, count: Tensor, rows_PL: Tensor) -> None:
    """Write rows into the ring `bank_QL` in place, oldest first out; `count` ever written grows."""
    size = len(bank_QL)
    places = (int(count) + torch.arange(len(rows_PL), device=bank_QL.device)) % size
    bank_QL[places] = rows_PL.to(bank_QL.dtype)
    count += len(rows_PL)


def _gaussian(latent: LatentPath, aggregate_BL: Tensor) -> tuple[Tensor, Tensor]:
    mean_BL, sigma_BL = latent.distribution(aggregate_BL)
    return mean_BL.float(), sigma_BL.float()
