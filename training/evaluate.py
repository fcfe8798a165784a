"""Measure a network on labelled frames: accuracy, and what its samples say."""

import torch
from torch import Tensor
from torch.nn import functional as F

from penumbra.models.blocks.layers import draw_noise
from penumbra.models.card import IGNORE, Card
from penumbra.models.confusion import confusion, intersection_over_union
from penumbra.models.contract import Network
from penumbra.training.augment import normalise
from penumbra.training.frames import FrameSet

BORDER_PX = 32
"""Left out of `sample_spread`: what zero padding does at a picture's edge is no opinion of a latent."""


@torch.inference_mode()
def measure(network: Network, frames: FrameSet, *, card: Card, every: int = 1, seed: int = 0) -> dict[str, float]:
    """Measure the mean probability of the default number of samples, on whole frames (every n-th only).

    mIoU and accuracy in [0, 1]; of several samples sample_spread: standard deviation over samples of the winning
    class's probability, inside the border, and mutual_information_nats; entropy_nats: means over labelled pixels;
    nll_nats: mean of -log p(truth). One float32 draw of noise per frame, from `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    num_classes = card.num_classes
    device = next(network.parameters()).device
    confusion_KK = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    sums, num_frames = torch.zeros(4, dtype=torch.float64), 0
    for i in range(0, len(frames), every):
        image_3HW, label_HW = frames[i]
        if (label_HW == IGNORE).all():
            continue  # its mean over no pixel is NaN, and one NaN would be the mean of all frames
        image_B3hw = normalise(image_3HW[None].float() / 255, card.input).to(device)
        label_hw = label_HW.long()
        noise_SBL = draw_noise(network.sampling, network.sampling.default_samples, 1, generator)
        logits_SBKhw = network(image_B3hw, noise_SBL.to(device)).float()
        mean_Khw, expected_hw, spread = summarise(logits_SBKhw[:, 0], size=label_hw.shape)
        confusion_KK += confusion(mean_Khw.argmax(0), label_hw, num_classes=num_classes)
        sums += torch.tensor([spread, *means_in_nats(mean_Khw, expected_hw, label_hw)])
        num_frames += 1
    iou_K = intersection_over_union(confusion_KK)
    names = ("sample_spread", "mutual_information_nats", "entropy_nats", "nll_nats")
    means = dict(zip(names, (sums / num_frames).tolist(), strict=True))
    if network.sampling.default_samples == 1:  # one sample differs from no other
        del means["sample_spread"], means["mutual_information_nats"]
    return {
        "mIoU": float(iou_K.nanmean()),
        "accuracy": float(confusion_KK.diag().sum() / confusion_KK.sum()),
        **means,
        **{f"IoU/{info.name}": float(iou) for info, iou in zip(card.classes, iou_K, strict=True)},
    }


def summarise(logits_SKhw: Tensor, *, size: torch.Size) -> tuple[Tensor, Tensor, float]:
    """Return mean probability_Khw, expected entropy_hw and spread at `size`, where the softmax is taken."""
    total_Khw = squares_Khw = logits_SKhw.new_zeros(logits_SKhw.shape[1], *size)
    entropy_hw = logits_SKhw.new_zeros(size)
    for logits_Khw in logits_SKhw:
        full = F.interpolate(logits_Khw[None], size=size, mode="bilinear", align_corners=True)[0]
        log_prob = full.log_softmax(0)
        prob_Khw = log_prob.exp()
        total_Khw, squares_Khw = total_Khw + prob_Khw, squares_Khw + prob_Khw.square()
        entropy_hw = entropy_hw - (prob_Khw * log_prob).sum(0)
    num = len(logits_SKhw)
    mean_Khw = total_Khw / num
    winner = mean_Khw.argmax(0, keepdim=True)
    variance_hw = (squares_Khw / num - mean_Khw.square()).gather(0, winner)[0]
    inner = variance_hw[BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX]
    spread = float(inner.clamp(min=0).sqrt().mean()) if inner.numel() else 0.0
    return mean_Khw.cpu(), (entropy_hw / num).cpu(), spread


def means_in_nats(mean_Khw: Tensor, expected_hw: Tensor, label_hw: Tensor) -> tuple[float, float, float]:
    """Average mutual information, entropy and -log p(truth) over the pixels that have a label."""
    known_hw = label_hw != IGNORE
    entropy_hw = -torch.special.xlogy(mean_Khw, mean_Khw).sum(0)
    truth_hw = mean_Khw.gather(0, label_hw.clamp(max=len(mean_Khw) - 1)[None])[0].clamp(min=1e-7)
    maps = (entropy_hw - expected_hw, entropy_hw, -truth_hw.log())
    mutual, entropy, nll = (float(x_hw[known_hw].mean()) for x_hw in maps)
    return mutual, entropy, nll
