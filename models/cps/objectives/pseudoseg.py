"""PseudoSeg (Zou et al., ICLR 2021): calibrated soft labels of the weak view supervise the strong view.

    L = CE(net(labelled), Y*) + w * CE(net(strong), Y)
    Y = g * p + (1 - g) * sharpen(p, T), p = softmax(net(weak)) without a gradient
    sharpen(p, T)_k = p_k^(1/T) / sum_j p_j^(1/T)

DEVIATION: the paper's Y is sharpen(g * softmax(p' / n) + (1 - g) * softmax(m' / n), T) of the decoder's logits p', a
self-attention Grad-CAM m' and their common norm n. m' needs an image classifier that is trained along; without it
there is nothing to bring to a common scale, and we fuse p with its own sharpened form.
DEVIATION: strong views are mixed (CutMix), and Y alike; the paper's have boxes cut out.
"""

from dataclasses import dataclass

from torch import Tensor

from penumbra.models.blocks.losses import cross_entropy, soft_cross_entropy
from penumbra.models.contract import Views
from penumbra.models.cps.net import CpsNetwork
from penumbra.models.cps.objectives.semi_supervised import Ramped, SemiSupervised
from penumbra.models.cps.objectives.terms import encode_pair, mixed, predict_weak


@dataclass(frozen=True, slots=True)
class PseudoSegOptions(Ramped):
    """weight: w. share: g, of the plain prediction in the label. temperature: T. The paper's g and T are 0.5."""

    weight: float = 1.0
    share: float = 0.5
    temperature: float = 0.5


class PseudoSegObjective(SemiSupervised):
    """One branch."""

    def __init__(self, network: CpsNetwork, average: CpsNetwork, options: PseudoSegOptions) -> None:
        super().__init__(network, average, options)
        self.share, self.temperature = options.share, options.temperature

    def losses(self, batch: Views) -> tuple[Tensor, Tensor]:
        (weak_BKhw,) = predict_weak(self.network, batch)
        target_BKhw = mixed(soft_labels(weak_BKhw, share=self.share, temperature=self.temperature), batch.mix_B1hw)
        inside_Bhw = mixed(batch.inside_Bhw, batch.mix_B1hw[:, 0])
        strong_B3hw = mixed(batch.strong_B3hw, batch.mix_B1hw)
        (labelled_BKhw,), (strong_BKhw,) = encode_pair(self.network, batch.image_B3hw, strong_B3hw)
        unsupervised = soft_cross_entropy(strong_BKhw, target_BKhw, inside_Bhw)
        return cross_entropy(labelled_BKhw, batch.label_Bhw), unsupervised


def soft_labels(logits_BKhw: Tensor, *, share: float, temperature: float) -> Tensor:
    """g * p + (1 - g) * sharpen(p, T); sharpening probabilities is dividing their logits by T."""
    return share * logits_BKhw.softmax(1) + (1 - share) * (logits_BKhw / temperature).softmax(1)
