"""The linear head: a low-rank Gaussian of logits round a frozen film head's answer, and a density of its features.

    logits_s = base + D + P z_s / sqrt(L),   z_s ~ N(0, I), one z of length L per image and sample

`base` is the film head's answer at its latent's mean. The correction D [K] and the matrix P [K, L] are a pointwise
network's answer to the standardised features [x, g] of the host and the film head. It is a stochastic segmentation
network's low-rank part (Monteiro et al. 2020), or an epinet that is linear in z (Osband et al. 2023). No later
normalisation can take z away.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penumbra.models.card import ExtraMap
from penumbra.models.contract import Features
from penumbra.models.errors import BadOption
from penumbra.models.np_semiseg.heads import FilmHead, LatentStatistics

SPREAD = 0.3
"""Scale of the first P: large enough that samples differ from the first step on."""
DENSITY = ExtraMap("density", "-log density of the pixel's features among the labelled training frames'", "nats")


@dataclass(frozen=True, slots=True)
class LinearConfig:
    """rank: L. hidden: channels of the pointwise network. keep_answer: D = 0: the answer at z = 0 stays the host's.

    density_stride: the density is of the mean features of cells of so many rows and columns.
    """

    rank: int = 16
    hidden: int = 96
    keep_answer: bool = False
    density_stride: int = 1


class LinearHead(FilmHead):
    """A film head, whose weights keep their names, and what says how it may be wrong.

    encode gives base + D, the pointwise network's hidden features and the density. standardise: holds the mean and
    variance of [x, g].
    """

    def __init__(
        self, num_classes: int, channels: int, config: LinearConfig, *, length: int, hidden: int, film_channels: int
    ) -> None:
        super().__init__(num_classes, channels, length=length, hidden=hidden, film_channels=film_channels)
        if (least := min(config.rank, config.hidden, config.density_stride)) < 1:
            raise BadOption(f"rank, hidden and density_stride of the linear head are at least 1, and one is {least}")
        self.config, joined = config, channels + film_channels
        self.num_corrections = 0 if config.keep_answer else num_classes
        self.standardise = nn.BatchNorm2d(joined, affine=False)
        self.pointwise = nn.Sequential(
            nn.Conv2d(joined, config.hidden, 1), nn.ReLU(), nn.Conv2d(config.hidden, config.hidden, 1), nn.ReLU()
        )
        self.last = nn.Conv2d(config.hidden, self.num_corrections + num_classes * config.rank, 1)
        self.density = ClassGaussians(num_classes, film_channels, stride=config.density_stride)
        with torch.no_grad():
            weight, bias = self.last.parameters()
            weight[: self.num_corrections] = bias[: self.num_corrections] = 0
            weight[self.num_corrections :] *= SPREAD
            bias[self.num_corrections :].normal_(0, SPREAD)

    def encode(self, x_BDhw: Tensor, latent: LatentStatistics | None = None) -> Features:
        base_BKhw, g_BMhw = self.answer(x_BDhw, latent)
        return (*self.spread(x_BDhw, g_BMhw, base_BKhw), self.density(g_BMhw))

    def answer(self, x_BDhw: Tensor, latent: LatentStatistics | None = None) -> tuple[Tensor, Tensor]:
        """Return the film head's logits base_BKhw at its latent's mean, and its features g_BMhw."""
        film = super().encode(x_BDhw, latent)
        return super().decode(film, torch.zeros_like(film[1])[None])[0], film[0]

    def spread(self, x_BDhw: Tensor, g_BMhw: Tensor, base_BKhw: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean base + D, and the hidden features [B, Q, h, w] of which D and P are the last layer."""
        hidden_BQhw = self.pointwise(self.standardise(torch.cat((x_BDhw, g_BMhw), dim=1)))
        if self.config.keep_answer:
            return base_BKhw, hidden_BQhw
        weight, bias = (parameter[: self.num_corrections] for parameter in self.last.parameters())
        return base_BKhw + F.conv2d(hidden_BQhw, weight, bias), hidden_BQhw

    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        """Return logits_SBKhw. A sample's P z is one layer of its own, a sum of the last one's: P is never made."""
        mean_BKhw, hidden_BQhw = features[:2]
        weight, bias = (parameter[self.num_corrections :] for parameter in self.last.parameters())
        z_BSL = noise_SBL.transpose(0, 1) / math.sqrt(self.config.rank)
        weight_BNQ = (z_BSL @ weight.view(self.config.rank, -1)).unflatten(2, (-1, self.config.hidden)).flatten(1, 2)
        bias_BN1 = (z_BSL @ bias.view(self.config.rank, -1)).flatten(1)[..., None]
        shift_BNP = weight_BNQ @ hidden_BQhw.flatten(2) + bias_BN1
        shift_SBKP = shift_BNP.unflatten(1, (noise_SBL.shape[0], -1)).transpose(0, 1)
        return mean_BKhw + shift_SBKP.unflatten(3, mean_BKhw.shape[2:])


class ClassGaussians(nn.Module):
    """-log sum_k share_k N(g; mean_k, covariance_k): how unlike all classes' training pixels the features g are.

    whiten_KMM: inverses of the covariances' Cholesky factors, so that |whiten (g - mean)|^2 is Mahalanobis' distance.
    Until `fit`, every class is a standard normal. stride: g is the mean over cells of so many rows and columns.
    """

    def __init__(self, num_classes: int, channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.share_K = nn.Buffer(torch.full((num_classes,), 1 / num_classes))
        self.mean_KM = nn.Buffer(torch.zeros(num_classes, channels))
        self.whiten_KMM = nn.Buffer(torch.eye(channels).repeat(num_classes, 1, 1))

    def forward(self, g_BMhw: Tensor) -> Tensor:
        """Return the map [B, 1, h, w] in nats. It is computed in float32 whatever the network's precision."""
        whiten_KMM, mean_KM, share_K = self.whiten_KMM.float(), self.mean_KM.float(), self.share_K.float()
        shift_KM = -(whiten_KMM * mean_KM[:, None]).sum(2)
        white = F.conv2d(self.cells(g_BMhw).float(), whiten_KMM.flatten(0, 1)[:, :, None, None], shift_KM.flatten())
        distance_BKhw = white.unflatten(1, shift_KM.shape).square().sum(2)
        scale_K = whiten_KMM.diagonal(dim1=1, dim2=2).log().sum(1) - shift_KM.shape[1] / 2 * math.log(2 * math.pi)
        log_p_BKhw = (share_K.log() + scale_K)[:, None, None] - distance_BKhw / 2
        highest = log_p_BKhw.amax(1, keepdim=True)  # taken out, or far from every class exp underflows
        density_B1hw = -(highest + (log_p_BKhw - highest).exp().sum(1, keepdim=True).log())
        return density_B1hw if self.stride == 1 else F.interpolate(density_B1hw, g_BMhw.shape[-2:], mode="bilinear")

    def cells(self, g_BMhw: Tensor) -> Tensor:
        """Return the mean features of cells, which are what the density is fitted to and computed of."""
        return g_BMhw if self.stride == 1 else F.avg_pool2d(g_BMhw, self.stride, ceil_mode=True)

    @torch.no_grad()
    def fit(self, products_KNN: Tensor, *, shrinkage: float) -> None:
        """Fit to `class_products` of all pixels, N = M + 1; covariances are shrunk towards all classes' one.

        A class with fewer pixels than channels has the covariance of all.
        """
        count_K11, sum_KM = products_KNN[:, -1:, -1:], products_KNN[:, -1, :-1]
        mean_KM = sum_KM / count_K11[:, 0].clamp(min=1)
        scatter_KMM = products_KNN[:, :-1, :-1] - mean_KM[:, :, None] * sum_KM[:, None]
        identity_MM = torch.eye(mean_KM.shape[1]).to(scatter_KMM)
        pooled_MM = scatter_KMM.sum(0) / count_K11.sum()
        pooled_MM = pooled_MM + shrinkage * pooled_MM.diagonal().mean() * identity_MM
        share_K11 = torch.where(count_K11 > len(pooled_MM), shrinkage, 1.0)
        covariance_KMM = (1 - share_K11) * scatter_KMM / count_K11.clamp(min=1) + share_K11 * pooled_MM
        factor_KMM = torch.linalg.cholesky(covariance_KMM)
        self.whiten_KMM.copy_(torch.linalg.solve_triangular(factor_KMM, identity_MM, upper=False))
        self.mean_KM.copy_(mean_KM)
        self.share_K.copy_(count_K11.flatten() / count_K11.sum())  # one without a pixel makes nothing familiar


def class_products(g_BMhw: Tensor, label_Bhw: Tensor, num_classes: int) -> Tensor:
    """Sum the products of [g, 1] with itself over every class's pixels, [K, M + 1, M + 1] in float64: second moments,
    sums and, last, counts. Pixels of no class are left out."""
    g_PN = F.pad(g_BMhw.movedim(1, -1).flatten(0, 2).double(), (0, 1), value=1.0)
    classes = (g_PN[label_Bhw.flatten() == k] for k in range(num_classes))
    return torch.stack([rows_PN.T @ rows_PN for rows_PN in classes])
