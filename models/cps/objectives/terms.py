"""What several objectives share: losses over branches, and what is made of the views of one step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from penumbra.models.blocks.losses import at_size, cross_entropy
from penumbra.models.card import IGNORE
from penumbra.models.contract import Views
from penumbra.models.cps.net import CpsNetwork


def supervision(logits: Sequence[Tensor], label_Bhw: Tensor) -> Tensor:
    """Sum over the branches of the cross-entropy against ground truth."""
    return torch.stack([cross_entropy(x, label_Bhw) for x in logits]).sum()


def cross_supervision(logits: Sequence[Tensor], pseudo: Sequence[Tensor]) -> Tensor:
    """Sum over two branches of the cross-entropy against the other branch's labels."""
    return torch.stack([cross_entropy(x, y) for x, y in zip(logits, reversed(pseudo), strict=True)]).sum()


def mean_where(value_Bhw: Tensor, chosen_Bhw: Tensor) -> Tensor:
    """Mean over the chosen pixels; 0 if none is."""
    return (value_Bhw * chosen_Bhw).sum() / chosen_Bhw.sum().clamp(min=1)


def mixed(x: Tensor, mix: Tensor) -> Tensor:
    """Pictures, labels or probabilities of B frames; frame i shows frame i - 1 where `mix` says so (CutMix)."""
    return torch.where(mix, x.roll(1, 0), x)


def two_views(batch: Views) -> tuple[Tensor, Tensor]:
    """The labelled and the unlabelled pictures together, and which of their pixels are to be compared.

    DEVIATION: void pixels of labelled pictures are left out, for they cannot be told from those beyond the picture.
    """
    known_Bhw = torch.cat((batch.label_Bhw != IGNORE, batch.inside_Bhw))
    return torch.cat((batch.image_B3hw, batch.weak_B3hw)), known_Bhw


@torch.no_grad()
def predict_weak(network: CpsNetwork, batch: Views) -> list[Tensor]:
    """Per branch logits_BKhw of the weak views at their own size, without gradient (train-mode BatchNorm)."""
    logits = [at_size(x, batch.inside_Bhw) for x in network.encode(batch.weak_B3hw)]
    # Autocast has kept weights that were cast without gradient; the training pass must cast them anew.
    torch.clear_autocast_cache()
    return logits


def pseudo_labels(network: CpsNetwork, batch: Views) -> list[Tensor]:
    """Per branch: argmax on the weak pictures, mixed as the strong pictures are; IGNORE beyond the picture."""
    labels = [x.argmax(1).masked_fill(~batch.inside_Bhw, IGNORE) for x in predict_weak(network, batch)]
    return [mixed(label_Bhw, batch.mix_B1hw[:, 0]) for label_Bhw in labels]


def encode_pair(network: CpsNetwork, first_B3hw: Tensor, second_B3hw: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Per branch logits of two sets of pictures, that share one pass (and so BatchNorm statistics)."""
    logits, num = network.encode(torch.cat((first_B3hw, second_B3hw))), len(first_B3hw)
    return [x[:num] for x in logits], [x[num:] for x in logits]
