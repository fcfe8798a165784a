"""What scores the trunk's feature map x_BDhw: distances to prototypes, or the baseline's 1x1 convolution.

The prototype head (Zhou et al. 2022, sec. 3.2), with K classes and M prototypes each:

    v = project(x), scaled to unit length;   e = LN(v) / |LN(v)|          embedding, per pixel
    c_k = max over m of <e, p_km>,  |p_km| = 1                            cosine to the class
    logits = LN over the classes of c

The last LN gives every pixel's K scores mean 0 and variance 1: how far a pixel is from all prototypes is lost in
the logits. So the extra maps are taken before it.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penumbra.models.card import ExtraMap

AXES = {"width": 3, "channel": 1}
"""Axes of BDhw. DEVIATION (published code and weights, not ours): the released projection is scaled over the image's
width, so each channel of each row has unit length, and a pixel's embedding depends on its whole row and on the row's
length. The paper has unit embeddings, `channel`."""

MAPS = (
    ExtraMap("distance", "1 - cosine of the pixel's embedding to the nearest prototype of any class", "0..2"),
    ExtraMap("cosine_margin", "cosine to the nearest class minus cosine to the second nearest", "0..2"),
)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of every pixel of x_BDhw; the result is channels-last."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PrototypeHead(nn.Module):
    """score: cosine_BKhw to the nearest prototype of every class. Prototypes are data: no pass changes them."""

    extra_maps = MAPS

    def __init__(
        self, num_classes: int, num_prototypes: int, channels: int, *, normalise: Literal["width", "channel"]
    ) -> None:
        super().__init__()
        self.axis = AXES[normalise]
        self.project = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ReLU(), nn.Conv2d(channels, channels, 1))
        self.feat_norm = ChannelNorm(channels)
        self.mask_norm = ChannelNorm(num_classes)
        self.prototypes_KMD = nn.Parameter(torch.empty(num_classes, num_prototypes, channels))
        nn.init.trunc_normal_(self.prototypes_KMD, std=0.02)

    def embed(self, x_BDhw: Tensor) -> Tensor:
        """Return unit embeddings e_BDhw."""
        v_BDhw = F.normalize(self.project(x_BDhw), dim=self.axis)
        return F.normalize(self.feat_norm(v_BDhw), dim=1)

    def compare(self, e_BDhw: Tensor) -> Tensor:
        """Return cosine_BKMhw to every prototype, as a 1x1 convolution.

        The released code normalises its parameter in place at every pass. A normalised copy is the same, and folded
        into a constant by an export, whether a file holds unit vectors, half floats of them, or an average of several.
        """
        weight_KMD = F.normalize(self.prototypes_KMD, dim=2)
        cosine = F.conv2d(e_BDhw, weight_KMD.flatten(0, 1)[:, :, None, None])
        return cosine.unflatten(1, weight_KMD.shape[:2])

    def score(self, x_BDhw: Tensor) -> Tensor:
        return self.compare(self.embed(x_BDhw)).amax(2)

    def logits(self, cosine_BKhw: Tensor) -> Tensor:
        return self.mask_norm(cosine_BKhw)

    def extras(self, cosine_BKhw: Tensor) -> tuple[Tensor]:
        """Return extras_BEhw of MAPS."""
        best_B2hw = cosine_BKhw.float().topk(2, dim=1).values
        nearest, second = best_B2hw[:, :1], best_B2hw[:, 1:]
        return (torch.cat((1 - nearest, nearest - second), dim=1),)


class ParametricHead(nn.Module):
    """score: the logits themselves; no extra maps."""

    extra_maps: tuple[ExtraMap, ...] = ()

    def __init__(self, num_classes: int, channels: int, *, bias: bool) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(channels, num_classes, 1, bias=bias)

    def score(self, x_BDhw: Tensor) -> Tensor:
        return self.classifier(x_BDhw)

    def logits(self, score_BKhw: Tensor) -> Tensor:
        return score_BKhw

    def extras(self, score_BKhw: Tensor) -> tuple[()]:
        return ()
