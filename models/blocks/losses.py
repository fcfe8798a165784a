"""What several methods' objectives are made of: losses, which take logits of any resolution, and pseudo labels."""

import torch
from torch import Tensor
from torch.nn import functional as F

from penumbra.models.card import IGNORE
from penumbra.models.contract import Views


def at_size(logits_BKhw: Tensor, target: Tensor) -> Tensor:
    """Resize logits to the height and width of `target`, in float32."""
    return F.interpolate(logits_BKhw.float(), size=target.shape[-2:], mode="bilinear", align_corners=True)


def cross_entropy(logits_BKhw: Tensor, label_Bhw: Tensor) -> Tensor:
    """Return mean over the pixels that have a label, at the label's resolution; 0 if none has."""
    loss = F.cross_entropy(at_size(logits_BKhw, label_Bhw), label_Bhw, ignore_index=IGNORE, reduction="sum")
    return loss / (label_Bhw != IGNORE).sum().clamp(min=1)


def soft_cross_entropy(logits_BKhw: Tensor, target_BKhw: Tensor, inside_Bhw: Tensor) -> Tensor:
    """Return mean over the pixels inside of -sum_k q_k log p_k, at the resolution of the target q; 0 if none is."""
    log_prob_BKhw = at_size(logits_BKhw, target_BKhw).log_softmax(1)
    loss_Bhw = -(target_BKhw * log_prob_BKhw).sum(1)
    return (loss_Bhw * inside_Bhw).sum() / inside_Bhw.sum().clamp(min=1)


def ramp(progress: float, start: float, full: float) -> float:
    """Return 0 until `start`, then a linear rise to 1 at `full`."""
    return min(max((progress - start) / max(full - start, 1e-9), 0.0), 1.0)


def mixed(x: Tensor, mix: Tensor) -> Tensor:
    """Mix pictures, labels or probabilities of B frames; frame i shows frame i - 1 where `mix` says so (CutMix)."""
    return torch.where(mix, x.roll(1, 0), x)


def confident_labels(prob_BKhw: Tensor, batch: Views, *, confidence: float) -> Tensor:
    """Take a teacher's label_Bhw, mixed as the strong views are; IGNORE if unsure or beyond the picture.

    confidence: least probability of a label.
    """
    confidence_Bhw, label_Bhw = prob_BKhw.max(1)
    unsure_Bhw = (confidence_Bhw < confidence) | ~batch.inside_Bhw
    return mixed(label_Bhw.masked_fill(unsure_Bhw, IGNORE), batch.mix_B1hw[:, 0])


def at_grid(label_Bhw: Tensor, height: int, width: int) -> Tensor:
    """Take labels at the pixels nearest to the points of an align_corners=True grid of height x width."""
    rows = torch.linspace(0, label_Bhw.shape[1] - 1, height, device=label_Bhw.device).round().long()
    columns = torch.linspace(0, label_Bhw.shape[2] - 1, width, device=label_Bhw.device).round().long()
    return label_Bhw[:, rows[:, None], columns]
