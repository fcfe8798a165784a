"""Measure a network on labelled frames while it is trained; `penumbra evaluate` measures what is served."""

import torch
from torch.nn import functional as F

from penumbra.models.blocks.layers import draw_noise
from penumbra.models.card import IGNORE, Card
from penumbra.models.confusion import confusion, intersection_over_union
from penumbra.models.contract import Network
from penumbra.training.augment import normalise
from penumbra.training.frames import FrameSet
from penumbra.training.metrics import LEAST_PROBABILITY


@torch.inference_mode()
def measure(network: Network, frames: FrameSet, *, card: Card, every: int = 1, seed: int = 0) -> dict[str, float]:
    """Measure the mean probability of the default number of samples, on whole frames (every n-th only).

    mIoU and accuracy in [0, 1]; nll_nats: mean over frames of that of -log p(truth) over labelled pixels. One float32
    draw of noise per frame, from `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(network.parameters()).device
    confusion_KK, nll_nats = torch.zeros(card.num_classes, card.num_classes, dtype=torch.int64), list[float]()
    for i in range(0, len(frames), every):
        image_3HW, label_HW, *_ = frames[i]
        if (label_HW == IGNORE).all():
            continue  # its mean over no pixel is NaN, and one NaN would be the mean of all frames
        image_B3hw = normalise(image_3HW[None].float() / 255, card.input).to(device)
        noise_SBL = draw_noise(network.sampling, network.sampling.default_samples, 1, generator)
        logits_SBKhw = network(image_B3hw, noise_SBL.to(device)).float()
        prob_BKHW = torch.zeros(1, card.num_classes, *label_HW.shape, device=device)
        for logits_BKhw in logits_SBKhw:
            logits_BKHW = F.interpolate(logits_BKhw, size=label_HW.shape, mode="bilinear", align_corners=True)
            prob_BKHW += logits_BKHW.softmax(1) / len(logits_SBKhw)
        prob_BKHW = prob_BKHW.cpu()
        confusion_KK += confusion(prob_BKHW[0].argmax(0), label_HW.long(), num_classes=card.num_classes)
        log_BKHW = prob_BKHW.clamp(min=LEAST_PROBABILITY).log()
        nll_nats.append(float(F.nll_loss(log_BKHW, label_HW.long()[None], ignore_index=IGNORE)))
    iou_K = intersection_over_union(confusion_KK)
    return {
        "mIoU": float(iou_K.nanmean()),
        "accuracy": float(confusion_KK.diag().sum() / confusion_KK.sum()),
        "nll_nats": float(torch.tensor(nll_nats, dtype=torch.float64).mean()),
        **{f"IoU/{info.name}": float(iou) for info, iou in zip(card.classes, iou_K, strict=True)},
    }
