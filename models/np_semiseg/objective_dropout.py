"""Training of the MC-dropout baseline (Gal & Ghahramani 2016): the latent network's host and head, dropped channels.

    L = L_s + w(t) * L_u
    L_s  cross-entropy on labelled pictures
    L_u  the same on CutMix-ed, recoloured unlabelled pictures against the averaged network's confident labels
    mask 0 with probability p, else 1 / (1 - p), per picture and channel of the joined ASPP

The pseudo labels are the latent network's (`objective_terms`), with masks where that one has latents. There is no
KL, no bank and no bound: the class centres stay 0, so that the latent is one and the same vector for every picture.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from penumbra.models.blocks.losses import ramp
from penumbra.models.card import IGNORE
from penumbra.models.contract import Views
from penumbra.models.np_semiseg.net import NpNetwork
from penumbra.models.np_semiseg.objective_terms import labelled, picture_loss, pseudo_labelled


@dataclass(frozen=True, slots=True)
class DropoutOptions:
    """samples: masks under which the averaged network is asked for a pseudo label; the network learns under one.

    confidence: least teacher probability of a pseudo label. start, full: shares of the schedule at which L_u begins
    to count and counts fully.
    """

    samples: int = 4
    unlabelled_weight: float = 1.0
    confidence: float = 0.9
    start: float = 0.1
    full: float = 0.25


class DropoutObjective(nn.Module):
    """Holds the network and its running average (the teacher, and what is served). For the loop only."""

    def __init__(self, network: NpNetwork, average: NpNetwork, options: DropoutOptions) -> None:
        super().__init__()
        self.network, self.average, self.options = network, average, options

    def forward(self, batch: Views, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        o, num = self.options, len(batch.image_B3hw)
        weight = o.unlabelled_weight * ramp(progress, o.start, o.full)
        pictures = labelled(batch)
        if weight > 0:
            noise_SBL = self._masks(o.samples, len(batch.weak_B3hw), generator).to(batch.weak_B3hw.device)
            pictures = pictures.join(pseudo_labelled(batch, self.average, noise_SBL, confidence=o.confidence))
        noise_1BL = self._masks(1, len(pictures.image_B3hw), generator).to(batch.image_B3hw.device)
        loss_B = picture_loss(self.network(pictures.image_B3hw, noise_1BL).float(), pictures, sharpness=1.0)
        supervised = loss_B[:num].mean()
        if weight == 0:
            return {"total": supervised, "supervised": supervised}
        unlabelled, kept = loss_B[num:].mean(), (pictures.label_Bhw[num:] != IGNORE).float().mean()
        total = supervised + weight * unlabelled
        return {"total": total, "supervised": supervised, "unlabelled": unlabelled, "kept": kept}

    def _masks(self, num_samples: int, num_pictures: int, generator: torch.Generator) -> Tensor:
        sampling = self.network.sampling
        return draw_masks((num_samples, num_pictures, sampling.noise_length), sampling.keep, generator)


def draw_masks(shape: tuple[int, int, int], keep: float, generator: torch.Generator) -> Tensor:
    """mask_SBL: 1 / keep with probability `keep`, else 0, each entry by itself; its mean is 1."""
    return (torch.rand(shape, generator=generator) < keep).float() / keep
