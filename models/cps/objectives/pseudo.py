"""Single-network pseudo supervision, which CPS is compared with (Chen et al. 2021, sec. 4): one branch teaches itself.

    L = CE(net(labelled), Y*) + lambda * CE(net(strong), Y)
    Y  argmax of the same net on the weak view, without a gradient

The strong view has changed colours and is mixed (CutMix), and Y is mixed alike: with the same picture on both sides
the net's own hard label would teach it nothing but confidence.
"""

from torch import Tensor

from penumbra.models.blocks.losses import cross_entropy
from penumbra.models.contract import Views
from penumbra.models.cps.objectives.semi_supervised import SemiSupervised
from penumbra.models.cps.objectives.terms import encode_pair, mixed, pseudo_labels


class PseudoObjective(SemiSupervised):
    """One branch."""

    def losses(self, batch: Views) -> tuple[Tensor, Tensor]:
        (pseudo_Bhw,) = pseudo_labels(self.network, batch)
        strong_B3hw = mixed(batch.strong_B3hw, batch.mix_B1hw)
        (labelled_BKhw,), (strong_BKhw,) = encode_pair(self.network, batch.image_B3hw, strong_B3hw)
        return cross_entropy(labelled_BKhw, batch.label_Bhw), cross_entropy(strong_BKhw, pseudo_Bhw)
