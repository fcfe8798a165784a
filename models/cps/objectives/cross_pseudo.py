"""Cross Pseudo Supervision (Chen et al. 2021, sec. 3 and 4.2): two branches supervise each other.

    L = L_s + lambda * L_cps
    L_s    CE(branch1(labelled), Y*) + CE(branch2(labelled), Y*), Y* the ground truth
    L_cps  CE(branch1(x), Y2) + CE(branch2(x), Y1), Y_i the hard labels of branch i, without a gradient

With CutMix (`cps`), x are mixed unlabelled pictures, and Y_i is the argmax on the two unmixed pictures, mixed with the
same mask. Without (`cps_plain`), x are labelled and unlabelled pictures, and Y_i the argmax of the same pass.
DEVIATION: the second picture of a mix is the batch rolled by one instead of a second batch, and labelled and
mixed pictures share one forward pass (and so BatchNorm statistics): half the cost on two cores.
DEVIATION: mixed pictures have changed colours, which the paper's have not.
"""

from dataclasses import dataclass

from torch import Tensor

from penumbra.models.blocks.losses import at_size
from penumbra.models.card import IGNORE
from penumbra.models.contract import Views
from penumbra.models.cps.objectives.semi_supervised import SemiSupervised
from penumbra.models.cps.objectives.terms import (
    cross_supervision,
    encode_pair,
    mixed,
    pseudo_labels,
    supervision,
    two_views,
)


@dataclass(frozen=True, slots=True)
class CpsOptions:
    """cps_weight: lambda. start, full: shares of the schedule where it begins to grow and is reached."""

    cps_weight: float = 1.5
    start: float = 0.1
    full: float = 0.3

    @property
    def weight(self) -> float:
        return self.cps_weight


class CpsObjective(SemiSupervised):
    """Cross pseudo supervision with CutMix."""

    def losses(self, batch: Views) -> tuple[Tensor, Tensor]:
        pseudo = pseudo_labels(self.network, batch)
        labelled, strong = encode_pair(self.network, batch.image_B3hw, mixed(batch.strong_B3hw, batch.mix_B1hw))
        return supervision(labelled, batch.label_Bhw), cross_supervision(strong, pseudo)


class PlainCpsObjective(SemiSupervised):
    """Without CutMix: one pass."""

    def losses(self, batch: Views) -> tuple[Tensor, Tensor]:
        image_B3hw, known_Bhw = two_views(batch)
        logits = self.network.encode(image_B3hw)
        pseudo = [at_size(x.detach(), known_Bhw).argmax(1).masked_fill(~known_Bhw, IGNORE) for x in logits]
        supervised = supervision([x[: len(batch.image_B3hw)] for x in logits], batch.label_Bhw)
        return supervised, cross_supervision(logits, pseudo)
