"""What the latent network's objective and its MC-dropout baseline share: pictures of one step and their loss.

Labelled pictures come first, then CutMix-ed, recoloured unlabelled ones with the averaged network's confident labels.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from penumbra.models.card import IGNORE
from penumbra.models.contract import Views
from penumbra.models.np_semiseg.net import NpNetwork


class Pictures(NamedTuple):
    """Pictures with the labels that they have, and area_B: the number of pixels over which a loss is averaged."""

    image_B3hw: Tensor
    label_Bhw: Tensor
    area_B: Tensor

    def join(self, others: "Pictures") -> "Pictures":
        """These, then the others."""
        return Pictures(*(torch.cat(pair) for pair in zip(self, others, strict=True)))


def labelled(batch: Views) -> Pictures:
    """The labelled pictures; void pixels do not count."""
    return Pictures(batch.image_B3hw, batch.label_Bhw, (batch.label_Bhw != IGNORE).sum((1, 2)))


@torch.no_grad()
def pseudo_labelled(batch: Views, teacher: NpNetwork, noise_SBL: Tensor, *, confidence: float) -> Pictures:
    """CutMix-ed strong views, and the teacher's labels of the weak ones mixed alike; IGNORE if unsure.

    confidence: least mean probability over the samples. Rejected pixels count in the area, so that few confident
    pixels weigh little.
    """
    logits_SBKhw = teacher(batch.weak_B3hw, noise_SBL).float()
    prob_BKhw = logits_SBKhw.softmax(2).mean(0)
    prob_BKhw = F.interpolate(prob_BKhw, batch.label_Bhw.shape[-2:], mode="bilinear", align_corners=True)
    confidence_Bhw, label_Bhw = prob_BKhw.max(1)
    unsure_Bhw = (confidence_Bhw < confidence) | ~batch.inside_Bhw
    label_Bhw = label_Bhw.masked_fill(unsure_Bhw, IGNORE)
    mix = batch.mix_B1hw
    return Pictures(
        torch.where(mix, batch.strong_B3hw.roll(1, 0), batch.strong_B3hw),
        torch.where(mix[:, 0], label_Bhw.roll(1, 0), label_Bhw),
        batch.inside_Bhw.sum((1, 2)),
    )


def picture_loss(logits_SBKhw: Tensor, pictures: Pictures, *, sharpness: float) -> Tensor:
    """`multi_sample_loss` per picture, on a grid of every other pixel: the map is four times coarser anyway."""
    num_samples, height, width = len(logits_SBKhw), *(2 * n for n in logits_SBKhw.shape[-2:])
    logits_NKhw = F.interpolate(logits_SBKhw.flatten(0, 1), size=(height, width), mode="bilinear", align_corners=True)
    coarse_Bhw = at_grid(pictures.label_Bhw, height, width)
    share = height * width / pictures.label_Bhw[0].numel()
    loss_NHw = F.cross_entropy(logits_NKhw, coarse_Bhw.repeat(num_samples, 1, 1), ignore_index=IGNORE, reduction="none")
    sum_SB = loss_NHw.sum((1, 2)).view(num_samples, -1)
    return multi_sample_loss(-sum_SB / (share * pictures.area_B).clamp(min=1), sharpness)


def multi_sample_loss(log_prob_SB: Tensor, sharpness: float) -> Tensor:
    """-(1/b) log mean_s exp(b * mean log-likelihood of sample s), per picture: loss_B.

    b = number of pixels is the likelihood of the whole picture (Burda et al. 2016, eq. 8); b -> 0 is the mean
    over samples. In between, samples may specialise where the picture is ambiguous, and all still learn.
    With one sample it is the mean cross-entropy for every b.
    """
    num_samples = torch.tensor(float(len(log_prob_SB)))
    return -(torch.logsumexp(sharpness * log_prob_SB, dim=0) - num_samples.log()) / sharpness


def at_grid(label_Bhw: Tensor, height: int, width: int) -> Tensor:
    """Labels at the pixels nearest to the points of an align_corners=True grid of height x width."""
    rows = torch.linspace(0, label_Bhw.shape[1] - 1, height, device=label_Bhw.device).round().long()
    columns = torch.linspace(0, label_Bhw.shape[2] - 1, width, device=label_Bhw.device).round().long()
    return label_Bhw[:, rows[:, None], columns]
