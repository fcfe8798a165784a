"""Training of CPS with CutMix (Chen et al. 2021, sec. 3 and 4.2): two branches supervise each other.

    L = L_s + lambda * L_cps
    L_s    CE(branch1(labelled), Y*) + CE(branch2(labelled), Y*), Y* the ground truth
    L_cps  CE(branch1(mixed), Y2) + CE(branch2(mixed), Y1)
    Y_i    argmax of branch i on the two unmixed pictures, mixed with the same mask; it carries no gradient

DEVIATION: the second picture of a mix is the batch rolled by one instead of a second batch, and labelled and
mixed pictures share one forward pass (and so BatchNorm statistics): half the cost on two cores.
DEVIATION: lambda ramps up, since we train from scratch and the paper from ImageNet weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.card import IGNORE, read_strict
from models.contract import Network, Views


@dataclass(frozen=True, slots=True)
class CpsOptions:
    """cps_weight: lambda. start, full: shares of the schedule where it begins to grow and is reached."""

    cps_weight: float = 1.5
    start: float = 0.1
    full: float = 0.3


class CpsObjective(nn.Module):
    """Holds the network and its running average, which is served but teaches nobody. For the loop only."""

    def __init__(self, network: Network, average: Network, options: CpsOptions) -> None:
        super().__init__()
        self.network, self.average, self.options = network, average, options

    def forward(self, batch: Views, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        weight = ramp(progress, self.options.start, self.options.full) * self.options.cps_weight
        if weight == 0:
            supervised = supervision(self.network.encode(batch.image_B3hw), batch.label_Bhw)
            return {"total": supervised, "supervised": supervised}
        pseudo_Bhw = pseudo_labels(self.network, batch)
        mixed_B3hw = torch.where(batch.mix_B1hw, batch.strong_B3hw.roll(1, 0), batch.strong_B3hw)
        logits = self.network.encode(torch.cat((batch.image_B3hw, mixed_B3hw)))
        num = len(batch.image_B3hw)
        supervised = supervision([x[:num] for x in logits], batch.label_Bhw)
        cross = cross_supervision([x[num:] for x in logits], pseudo_Bhw)
        return {"total": supervised + weight * cross, "supervised": supervised, "cross": cross}


def build_objective(network: Network, average: Network, options: Mapping[str, Any]) -> CpsObjective:
    """The objective from a recipe's options. Raises BadArtifact naming an unknown or mistyped one."""
    return CpsObjective(network, average, read_strict(CpsOptions, dict(options), where="recipe.objective"))


def supervision(logits: Sequence[Tensor], label_Bhw: Tensor) -> Tensor:
    """Sum over the branches of the cross-entropy against ground truth."""
    return torch.stack([cross_entropy(x, label_Bhw) for x in logits]).sum()


def cross_supervision(logits: Sequence[Tensor], pseudo: list[Tensor]) -> Tensor:
    """Sum over the branches of the cross-entropy against the other branch's labels."""
    return torch.stack([cross_entropy(x, y) for x, y in zip(logits, reversed(pseudo), strict=True)]).sum()


@torch.no_grad()
def pseudo_labels(network: Network, batch: Views) -> list[Tensor]:
    """Per branch: argmax on the unmixed pictures (train-mode BatchNorm), mixed as the pictures are."""
    labels = []
    for logits_BKhw in network.encode(batch.weak_B3hw):
        label_Bhw = at_size(logits_BKhw, batch.mix_B1hw).argmax(1).masked_fill(~batch.inside_Bhw, IGNORE)
        labels.append(torch.where(batch.mix_B1hw[:, 0], label_Bhw.roll(1, 0), label_Bhw))
    # Autocast has kept weights that were cast without gradient; the training pass must cast them anew.
    torch.clear_autocast_cache()
    return labels


def cross_entropy(logits_BKhw: Tensor, label_Bhw: Tensor) -> Tensor:
    """Mean over the pixels that have a label, at the label's resolution; 0 if none has."""
    loss = F.cross_entropy(at_size(logits_BKhw, label_Bhw), label_Bhw, ignore_index=IGNORE, reduction="sum")
    return loss / (label_Bhw != IGNORE).sum().clamp(min=1)


def at_size(logits_BKhw: Tensor, target: Tensor) -> Tensor:
    """Logits in float32 at the height and width of `target`."""
    return F.interpolate(logits_BKhw.float(), size=target.shape[-2:], mode="bilinear", align_corners=True)


def ramp(progress: float, start: float, full: float) -> float:
    """0 until `start`, then linear to 1 at `full`."""
    return min(max((progress - start) / max(full - start, 1e-9), 0.0), 1.0)
