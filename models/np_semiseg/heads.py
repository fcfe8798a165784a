"""Neural-process heads: from the host's feature x to logits that depend on a latent z ~ N(mean, sigma^2).

`LatentPath` (Wang et al. 2023, sec. 3) is common: it attends from pixels to class centres and pools to one
latent per image. `PublishedHead` is the released decoder. `FilmHead` is ours.

In the published decoder z enters as spatially constant channels before an InstanceNorm, which subtracts any
per-channel constant: what is left of z leaks in from the zero padding at the border. DEVIATION: `FilmHead`
lets z scale and shift channels (FiLM, Perez et al. 2018) after the last normalisation, so that it acts on
every pixel alike, and a sample costs one pointwise layer instead of a 3x3 convolution.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penumbra.models.blocks.layers import VectorLinear, conv_norm_act
from penumbra.models.contract import Features

LatentStatistics = tuple[Tensor, Tensor, Tensor]
"""mean_BL and sigma_BL of the latent, and the deterministic context_BL."""
NORM_EPS = 1e-5
"""InstanceNorm's epsilon in the released code; affine off, statistics of the instance also at inference."""


class LatentPath(nn.Module):
    """x_BDhw -> the latent's mean_BL and sigma_BL and the deterministic context_BL.

    Class centres [K, L] are the means of the memory banks: `latent_centres` feeds z, `context_centres` the
    deterministic path. (Published files name them the other way round; importing swaps them.)
    """

    def __init__(self, num_classes: int, channels: int, length: int) -> None:
        super().__init__()
        norm = nn.InstanceNorm2d(length, eps=NORM_EPS)
        self.reduce = nn.Sequential(
            nn.Conv2d(channels, length, 1), norm, nn.ReLU(),
            nn.Conv2d(length, length, 1), norm, nn.ReLU(),
            nn.Conv2d(length, length, 1),
        )  # fmt: skip
        self.statistics = nn.Sequential(VectorLinear(length, length), nn.ReLU(), VectorLinear(length, 2 * length))
        self.latent_centres = nn.Buffer(torch.zeros(num_classes, length))
        self.context_centres = nn.Buffer(torch.zeros(num_classes, length))

    def forward(self, x_BDhw: Tensor) -> LatentStatistics:
        query_BLhw = self.reduce(x_BDhw)
        mean_BL, sigma_BL = self.distribution(attend(query_BLhw, self.latent_centres))
        return mean_BL, sigma_BL, attend(query_BLhw, self.context_centres)

    def distribution(self, aggregate_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and sigma = 0.1 + 0.9 softplus(s) of the latent, from an aggregated vector."""
        mean_BL, s_BL = self.statistics(aggregate_BL).chunk(2, dim=-1)
        return mean_BL, 0.1 + 0.9 * F.softplus(s_BL)


def attend(query_BLhw: Tensor, centres_KL: Tensor) -> Tensor:
    """Aggregate by attention to the class centres, averaged over pixels: [B, L].

    Per pixel and per channel d: weights over classes = softmax_k(-(q_d - c_kd)^2), value = sum_k w_k c_kd.
    q_d^2 cancels in the softmax. Class by class in the query's memory format, this takes a seventh of the time
    and a K-th of the memory of a softmax over a [B, K, L, h, w] tensor.
    """
    centres = [centre_L[:, None, None] for centre_L in centres_KL]

    def score(centre_L11: Tensor) -> Tensor:
        return torch.addcmul(-(centre_L11**2), query_BLhw, 2 * centre_L11)

    highest = score(centres[0])
    for centre_L11 in centres[1:]:
        highest = torch.maximum(highest, score(centre_L11))
    weight_sum = torch.zeros_like(query_BLhw)
    value_sum = torch.zeros_like(query_BLhw)
    for centre_L11 in centres:
        weight = torch.exp(score(centre_L11) - highest)
        weight_sum = weight_sum + weight
        value_sum = torch.addcmul(value_sum, weight, centre_L11)
    return (value_sum / weight_sum).mean((2, 3))


class FilmHead(nn.Module):
    """Shared convolutions to g_BMhw in encode; per sample relu(g * (1 + scale(z, c)) + shift(z, c)) and a 1x1."""

    def __init__(self, num_classes: int, channels: int, *, length: int, hidden: int, film_channels: int) -> None:
        super().__init__()
        self.latent = LatentPath(num_classes, channels, length)
        self.shared = nn.Sequential(
            *conv_norm_act(channels, hidden, 3),
            *conv_norm_act(hidden, hidden, 3),
            *conv_norm_act(hidden, film_channels, 1)[:2],
        )
        self.film = VectorLinear(2 * length, 2 * film_channels)
        self.classifier = nn.Conv2d(film_channels, num_classes, 1)

    def encode(self, x_BDhw: Tensor, latent: LatentStatistics | None = None) -> Features:
        """Compute what no sample repeats. latent: where it is known already; by default of x."""
        # As upstream, the aggregators see x detached: their gradients stay out of the host.
        return (self.shared(x_BDhw), *(latent or self.latent(x_BDhw.detach())))

    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        g_BMhw, mean_BL, sigma_BL, context_BL = features
        z_SBL = mean_BL + sigma_BL * noise_SBL
        joint = torch.cat((z_SBL, context_BL.expand_as(z_SBL)), dim=-1)
        scale_SBM, shift_SBM = self.film(joint).chunk(2, dim=-1)
        h_SBMhw = torch.relu(torch.addcmul(shift_SBM[..., None, None], g_BMhw, 1 + scale_SBM[..., None, None]))
        logits = self.classifier(h_SBMhw.flatten(0, 1))
        return logits.unflatten(0, (noise_SBL.shape[0], noise_SBL.shape[1]))


class PublishedHead(nn.Module):
    """The released decoder: [z, x, c] -> conv3x3 IN ReLU -> conv3x3 IN ReLU -> 1x1, split so that nothing
    that does not depend on the sample is repeated.

    A zero-padded 3x3 convolution of a spatially constant map has 9 values (corners, edges, interior). So the
    first convolution is conv(x, c) once, plus 9 constants per sample and channel, and even its InstanceNorm
    statistics follow from sums over the 9 regions. Equal to the plain form up to rounding.
    """

    def __init__(self, num_classes: int, channels: int, *, length: int, hidden: int) -> None:
        super().__init__()
        self.length, self.channels = length, channels
        self.latent = LatentPath(num_classes, channels, length)
        self.conv1 = nn.Conv2d(2 * length + channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.classifier = nn.Conv2d(hidden, num_classes, 1)

    def encode(self, x_BDhw: Tensor, latent: LatentStatistics | None = None) -> Features:
        """Compute what no sample repeats. latent: where it is known already; by default of x."""
        mean_BL, sigma_BL, context_BL = latent or self.latent(x_BDhw.detach())
        _, weight_x, weight_c = self.conv1.weight.split((self.length, self.channels, self.length), dim=1)
        shared_BDhw = F.conv2d(x_BDhw, weight_x, self.conv1.bias, padding=1)
        shared_BDhw = add_regions(shared_BDhw, region_constants(context_BL, weight_c))
        centre_BD = shared_BDhw.mean((2, 3))
        shared_BDhw = shared_BDhw - centre_BD[:, :, None, None]
        return shared_BDhw, shared_BDhw.square().mean((2, 3)), region_sums(shared_BDhw), mean_BL, sigma_BL

    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        shared_BDhw, variance_BD, sums_BD33, mean_BL, sigma_BL = features
        num_samples, num_windows = noise_SBL.shape[0], noise_SBL.shape[1]
        z_NL = (mean_BL + sigma_BL * noise_SBL).flatten(0, 1)
        constants_ND33 = region_constants(z_NL, self.conv1.weight[:, : self.length])
        area_33 = region_sums(torch.ones_like(shared_BDhw[:1, :1]))[0, 0]  # pixels of each region
        num_pixels = area_33.sum()
        # InstanceNorm of shared + constants: mean of the shared part is 0, so the rest is small algebra.
        constants_ND33 = constants_ND33 - (constants_ND33 * area_33).sum((2, 3), keepdim=True) / num_pixels
        cross = 2 * constants_ND33 * sums_BD33.repeat(num_samples, 1, 1, 1) + constants_ND33.square() * area_33
        variance_ND = variance_BD.repeat(num_samples, 1) + cross.sum((2, 3)) / num_pixels
        scale_ND11 = torch.rsqrt(variance_ND + NORM_EPS)[:, :, None, None]
        constants_ND33 = constants_ND33 * scale_ND11
        inner_ND11 = constants_ND33[:, :, 1:2, 1:2]
        inner_SBD11, scale_SBD11 = (x.unflatten(0, (num_samples, num_windows)) for x in (inner_ND11, scale_ND11))
        y = torch.addcmul(inner_SBD11, shared_BDhw, scale_SBD11).flatten(0, 1)
        y = add_regions(y, constants_ND33 - inner_ND11, edges_only=True)
        y = torch.relu_(instance_norm(self.conv2(torch.relu_(y))))
        return self.classifier(y).unflatten(0, (num_samples, num_windows))


def instance_norm(x_NDhw: Tensor) -> Tensor:
    """Normalise instances without affine, as one multiply-add that keeps the memory format (channels-last is fast)."""
    variance, mean = torch.var_mean(x_NDhw, (2, 3), correction=0, keepdim=True)
    scale = torch.rsqrt(variance + NORM_EPS)
    return torch.addcmul(-mean * scale, x_NDhw, scale)


def region_constants(vector_NL: Tensor, weight_DL33: Tensor) -> Tensor:
    """Convolve a spatially constant map, zero-padded, by 3x3 at its 9 regions: [N, D, 3, 3].

    Rows: first, inner, last row of the map; columns alike. Maps of at least 2x2 px.
    """
    rows = torch.stack((weight_DL33[:, :, 1:].sum(2), weight_DL33.sum(2), weight_DL33[:, :, :2].sum(2)), dim=2)
    taps_DL33 = torch.stack((rows[..., 1:].sum(-1), rows.sum(-1), rows[..., :2].sum(-1)), dim=-1)
    return torch.einsum("nl,dlij->ndij", vector_NL, taps_DL33)


def region_sums(x_NDhw: Tensor) -> Tensor:
    """Sum x over each of the 9 regions: [N, D, 3, 3]."""
    rows = torch.stack((x_NDhw[:, :, 0], x_NDhw[:, :, 1:-1].sum(2), x_NDhw[:, :, -1]), dim=2)
    return torch.stack((rows[..., 0], rows[..., 1:-1].sum(-1), rows[..., -1]), dim=-1)


def add_regions(x_NDhw: Tensor, constants_ND33: Tensor, *, edges_only: bool = False) -> Tensor:
    """Add a constant per region to x. With `edges_only` the inner constant is 0 and x is changed in place."""
    if not edges_only:
        x_NDhw = x_NDhw + constants_ND33[:, :, 1:2, 1:2]
        constants_ND33 = constants_ND33 - constants_ND33[:, :, 1:2, 1:2]
    for i, j in ((0, 0), (0, 2), (2, 0), (2, 2)):
        x_NDhw[:, :, -(i // 2), -(j // 2)] += constants_ND33[:, :, i, j]
    for edge in (0, 2):
        x_NDhw[:, :, -(edge // 2), 1:-1] += constants_ND33[:, :, edge, 1:2]
        x_NDhw[:, :, 1:-1, -(edge // 2)] += constants_ND33[:, :, 1:2, edge]
    return x_NDhw
