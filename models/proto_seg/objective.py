"""Training of ProtoSeg (Zhou et al. 2022, sec. 3.2): pixels find their prototypes, and prototypes their pixels.

    L = CE + 0.01 * PPC + 0.001 * PPD + w(t) * L_u
    CE   cross-entropy of the logits against the labels
    PPC  pixel-prototype contrast: cross-entropy over the cosines to all prototypes of all classes, divided by the
         temperature, against the one that the clustering gave the pixel
    PPD  pixel-prototype distance: mean of (1 - cosine to that one)^2
    L_u  OURS, off by default, for ProtoSeg is supervised: CE on CutMix-ed, recoloured unlabelled pictures against the
         running average's confident labels of the plain ones

Prototypes are not learned: after the losses they move towards the pixels that were given to them and are classified
correctly ("within-class online clustering"). K classes, M prototypes each, P pixels with a label, N of them of one
class, unit embeddings e_PD. Weights and temperature are those of the released code; the paper has a temperature,
without a figure.
DEVIATION: a prototype moves towards the pixels with the largest share in it, as the paper's assignment says; the
released code draws that assignment anew, by a hard Gumbel-softmax.
DEVIATION: no weights on classes; the released ones are Cityscapes'. Pseudo-labelled pixels move no prototypes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from penumbra.models.blocks.layers import draw_masks, drop_channels
from penumbra.models.blocks.losses import at_size, confident_labels, cross_entropy, mixed, ramp
from penumbra.models.card import IGNORE
from penumbra.models.contract import Views
from penumbra.models.errors import BadOption
from penumbra.models.proto_seg.heads import PrototypeHead
from penumbra.models.proto_seg.net import ProtoNetwork
from penumbra.models.strict import read_strict


@dataclass(frozen=True, slots=True)
class ProtoOptions:
    """kappa, iterations: of the Sinkhorn clustering. momentum: share of a prototype that a step keeps.

    dropout: of channels in front of the head, as published for the HRNet; the DeepLab is trained without.
    pseudo: weight of L_u; confidence: least probability of a pseudo label; start, full: shares of the schedule at
    which L_u begins to count and counts fully.
    """

    ppc_weight: float = 0.01
    ppd_weight: float = 0.001
    temperature: float = 1.0
    kappa: float = 0.05
    iterations: int = 3
    momentum: float = 0.999
    dropout: float = 0.1
    pseudo: float = 0.0
    confidence: float = 0.9
    start: float = 0.1
    full: float = 0.3


class ProtoObjective(nn.Module):
    """Holds the network and its running average (the teacher of L_u, and what is served). For the loop only.

    A call moves the network's prototypes. They have no gradient, so no optimiser moves or decays them; the running
    average averages them like weights, and the head scales what it compares with to unit length.
    """

    def __init__(self, network: ProtoNetwork, average: ProtoNetwork, options: ProtoOptions) -> None:
        super().__init__()
        self.network, self.average, self.options = network, average, options
        prototypes_KMD = prototype_head(network).prototypes_KMD.requires_grad_(False)
        prototypes_KMD.copy_(F.normalize(prototypes_KMD, dim=2))

    def forward(self, batch: Views, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        o, num = self.options, len(batch.image_B3hw)
        weight = o.pseudo * ramp(progress, o.start, o.full)
        image_B3hw = batch.image_B3hw
        if weight > 0:
            mixed_B3hw, pseudo_Bhw = self._mixed(batch)
            image_B3hw = torch.cat((image_B3hw, mixed_B3hw))
        e_BDhw, cosine_BKMhw = self._compare(image_B3hw, generator)
        logits_BKhw = prototype_head(self.network).logits(cosine_BKMhw.amax(2))
        supervised = cross_entropy(logits_BKhw[:num], batch.label_Bhw)
        contrast, distance = self._cluster(e_BDhw[:num], cosine_BKMhw[:num], logits_BKhw[:num], batch.label_Bhw)
        total = supervised + o.ppc_weight * contrast + o.ppd_weight * distance
        parts = {"supervised": supervised, "contrast": contrast, "distance": distance}
        if weight > 0:
            parts["kept"] = (pseudo_Bhw != IGNORE).float().mean()
            # Rejected pixels count in the denominator, so that few confident pixels weigh little.
            parts["pseudo"] = parts["kept"] * cross_entropy(logits_BKhw[num:], pseudo_Bhw)
            total = total + weight * parts["pseudo"]
        return {"total": total, **parts}

    def _compare(self, image_B3hw: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return embeddings e_BDhw and cosine_BKMhw to every prototype, in float32: kappa magnifies their errors."""
        x_BDhw, head = self.network.trunk(image_B3hw), prototype_head(self.network)
        keep = 1 - self.options.dropout
        mask_BD = draw_masks(x_BDhw.shape[:2], keep, generator)
        e_BDhw = head.embed(drop_channels(x_BDhw, mask_BD[None].to(x_BDhw))).float()
        with torch.autocast(e_BDhw.device.type, enabled=False):
            return e_BDhw, head.compare(e_BDhw)

    def _cluster(
        self, e_BDhw: Tensor, cosine_BKMhw: Tensor, logits_BKhw: Tensor, label_Bhw: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return PPC and PPD at the embeddings' resolution, with the prototypes as they were; then these move."""
        o, prototypes_KMD = self.options, prototype_head(self.network).prototypes_KMD
        label_Bhw = F.interpolate(label_Bhw[:, None].float(), size=e_BDhw.shape[-2:])[:, 0].long()
        known_Bhw = label_Bhw != IGNORE
        label_P = label_Bhw[known_Bhw]
        cosine_PKM = cosine_BKMhw.permute(0, 3, 4, 1, 2)[known_Bhw]
        place_P = assign(cosine_PKM.detach(), label_P, kappa=o.kappa, iterations=o.iterations)
        contrast, distance = prototype_losses(cosine_PKM.flatten(1), place_P, temperature=o.temperature)
        correct_P = (logits_BKhw.argmax(1) == label_Bhw)[known_Bhw]
        e_PD = e_BDhw.detach().movedim(1, -1)[known_Bhw]
        move_prototypes(prototypes_KMD, e_PD[correct_P], place_P[correct_P], momentum=o.momentum)
        return contrast, distance

    @torch.no_grad()
    def _mixed(self, batch: Views) -> tuple[Tensor, Tensor]:
        """Mix strong views (CutMix), and the teacher's labels of the weak ones alike; IGNORE if unsure."""
        head = prototype_head(self.average)
        logits_BKhw = head.logits(head.score(self.average.trunk(batch.weak_B3hw)))
        prob_BKhw = at_size(logits_BKhw, batch.inside_Bhw).softmax(1)
        label_Bhw = confident_labels(prob_BKhw, batch, confidence=self.options.confidence)
        return mixed(batch.strong_B3hw, batch.mix_B1hw), label_Bhw


def build_objective(network: ProtoNetwork, average: ProtoNetwork, options: Mapping[str, Any]) -> ProtoObjective:
    """Build the objective from a recipe's options.

    Raises BadArtifact naming an unknown or mistyped one, BadOption: the head has no prototypes.
    """
    return ProtoObjective(network, average, read_strict(ProtoOptions, dict(options), where="recipe.objective"))


def prototype_head(network: ProtoNetwork) -> PrototypeHead:
    """Return the network's head. Raises BadOption if it has no prototypes."""
    if not isinstance(network.head, PrototypeHead):
        raise BadOption("recipe.config.head is 'parametric'; ProtoSeg's objective trains the head 'prototype'")
    return network.head


def prototype_losses(cosine_PQ: Tensor, place_P: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Return PPC and PPD of pixels with cosines to all Q prototypes, of which `place` is theirs; 0 without pixels."""
    num = max(len(place_P), 1)
    contrast = F.cross_entropy(cosine_PQ / temperature, place_P, reduction="sum") / num
    own_P = cosine_PQ.gather(1, place_P[:, None])[:, 0]
    return contrast, (1 - own_P).square().sum() / num


def sinkhorn(cosine_NM: Tensor, *, kappa: float, iterations: int) -> Tensor:
    """Share one class's pixels out, share_NM: the solution, for many iterations, of the optimal transport

        max over Q of <Q, cosine> + kappa * H(Q),   every pixel hands out 1,   every prototype gets N / M

    (Cuturi 2013): exp(cosine / kappa) with its columns and rows normalised in turn; pixels come last, and sum to 1
    exactly. In logarithms, so that no kappa underflows.
    """
    log_share_NM = cosine_NM / kappa
    for _ in range(iterations):
        log_share_NM = log_share_NM.log_softmax(0).log_softmax(1)
    return log_share_NM.exp()


@torch.no_grad()
def assign(cosine_PKM: Tensor, label_P: Tensor, *, kappa: float, iterations: int) -> Tensor:
    """Return place_P = label * M + the prototype of the pixel's own class that it has the largest share in."""
    place_P = torch.zeros_like(label_P)
    for k in range(cosine_PKM.shape[1]):
        mine_P = label_P == k
        share_NM = sinkhorn(cosine_PKM[mine_P, k], kappa=kappa, iterations=iterations)
        place_P[mine_P] = k * cosine_PKM.shape[2] + share_NM.argmax(1)
    return place_P


@torch.no_grad()
def move_prototypes(prototypes_KMD: Tensor, e_PD: Tensor, place_P: Tensor, *, momentum: float) -> None:
    """Set in place p = unit(momentum * p + (1 - momentum) * unit(sum of its pixels)), where a prototype has pixels.

    In a process group the sums go over the pixels of all processes, whose prototypes so stay equal.
    """
    flat_QD = prototypes_KMD.flatten(0, 1)
    sum_QD = torch.zeros_like(flat_QD).index_add_(0, place_P, e_PD.to(flat_QD.dtype))
    count_Q = torch.bincount(place_P, minlength=len(flat_QD))
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(sum_QD)
        distributed.all_reduce(count_Q)
    moved_QD = F.normalize(momentum * flat_QD + (1 - momentum) * F.normalize(sum_QD, dim=1), dim=1)
    prototypes_KMD.copy_(torch.where(count_Q[:, None] > 0, moved_QD, flat_QD).view_as(prototypes_KMD))
