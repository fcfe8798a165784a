"""Training of ProtoSeg (Zhou et al. 2022, sec. 3.2): pixels find their prototypes, and prototypes their pixels.

    L = CE + 0.01 * PPC + 0.001 * PPD + w(t) * L_u
    CE   cross-entropy of the logits against the labels
    PPC  pixel-prototype contrast: cross-entropy over the cosines to all prototypes of all classes, divided by the
         temperature, against the one that the clustering gave the pixel
    PPD  pixel-prototype distance: mean of (1 - cosine to that one)^2
    L_u  OURS, off by default, for ProtoSeg is supervised: CE on CutMix-ed, recoloured unlabelled pictures against the
         running average's confident labels of the plain ones

Prototypes are not learned: after the losses they move towards the pixels that were given to them and are classified
correctly. Weights and temperature are those of the released code; the paper has a temperature, without a figure.
DEVIATION: a prototype moves towards the pixels with the largest share in it, as the paper's assignment says; the
released code draws that assignment anew, by a hard Gumbel-softmax.
DEVIATION: no weights on classes; the released ones are Cityscapes'. Pseudo-labelled pixels move no prototypes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penumbra.models.blocks.layers import drop_channels
from penumbra.models.blocks.losses import at_size, cross_entropy, ramp
from penumbra.models.card import IGNORE, read_strict
from penumbra.models.contract import Views
from penumbra.models.errors import BadOption
from penumbra.models.proto_seg.clustering import assign, move_prototypes
from penumbra.models.proto_seg.heads import PrototypeHead
from penumbra.models.proto_seg.net import ProtoNetwork


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
        """Embeddings e_BDhw and cosine_BKMhw to every prototype; in float32, for kappa magnifies their errors."""
        x_BDhw, head = self.network.trunk(image_B3hw), prototype_head(self.network)
        keep = 1 - self.options.dropout
        mask_BD = torch.rand(x_BDhw.shape[:2], generator=generator) < keep
        e_BDhw = head.embed(drop_channels(x_BDhw, mask_BD[None].to(x_BDhw) / keep)).float()
        with torch.autocast(e_BDhw.device.type, enabled=False):
            return e_BDhw, head.compare(e_BDhw)

    def _cluster(
        self, e_BDhw: Tensor, cosine_BKMhw: Tensor, logits_BKhw: Tensor, label_Bhw: Tensor
    ) -> tuple[Tensor, Tensor]:
        """PPC and PPD at the embeddings' resolution, with the prototypes as they were; then these move."""
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
        """CutMix-ed strong views, and the teacher's labels of the weak ones mixed alike; IGNORE if unsure."""
        head, mix_B1hw = prototype_head(self.average), batch.mix_B1hw
        logits_BKhw = head.logits(head.score(self.average.trunk(batch.weak_B3hw)))
        confidence_Bhw, label_Bhw = at_size(logits_BKhw, mix_B1hw).softmax(1).max(1)
        unsure_Bhw = (confidence_Bhw < self.options.confidence) | ~batch.inside_Bhw
        label_Bhw = label_Bhw.masked_fill(unsure_Bhw, IGNORE)
        return (
            torch.where(mix_B1hw, batch.strong_B3hw.roll(1, 0), batch.strong_B3hw),
            torch.where(mix_B1hw[:, 0], label_Bhw.roll(1, 0), label_Bhw),
        )


def build_objective(network: ProtoNetwork, average: ProtoNetwork, options: Mapping[str, Any]) -> ProtoObjective:
    """The objective from a recipe's options.

    Raises BadArtifact naming an unknown or mistyped one, BadOption: the head has no prototypes.
    """
    return ProtoObjective(network, average, read_strict(ProtoOptions, dict(options), where="recipe.objective"))


def prototype_head(network: ProtoNetwork) -> PrototypeHead:
    """The network's head. Raises BadOption if it has no prototypes."""
    if not isinstance(network.head, PrototypeHead):
        raise BadOption("recipe.config.head is 'parametric'; ProtoSeg's objective trains the head 'prototype'")
    return network.head


def prototype_losses(cosine_PQ: Tensor, place_P: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """PPC and PPD of pixels with cosines to all Q prototypes, of which `place` is theirs; 0 without pixels."""
    num = max(len(place_P), 1)
    contrast = F.cross_entropy(cosine_PQ / temperature, place_P, reduction="sum") / num
    own_P = cosine_PQ.gather(1, place_P[:, None])[:, 0]
    return contrast, (1 - own_P).square().sum() / num
