"""The NP-SemiSeg network: a DeepLabv3+ host, whose classifier is a neural process.

Published layout (hosts U2PL and AugSeg, Wang et al. 2023): `head="published"`. Our own layout, in which the
latent enters late and cannot be normalised away: `head="film"` (see `penumbra.models.np_semiseg.heads`), and one
whose samples are linear in the latent: `head="linear"` (`penumbra.models.np_semiseg.linear`).
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from penumbra.models.blocks.backbone import BackboneConfig, build_backbone
from penumbra.models.blocks.deeplab import atrous_branches, pool_everywhere
from penumbra.models.blocks.layers import conv_norm_act, drop_channels, resize_like
from penumbra.models.blocks.resnet import ResNetConfig
from penumbra.models.card import Sampling
from penumbra.models.contract import Features, Network
from penumbra.models.errors import BadOption
from penumbra.models.np_semiseg.heads import FilmHead, PublishedHead
from penumbra.models.np_semiseg.linear import DENSITY, LinearConfig, LinearHead


@dataclass(frozen=True, slots=True)
class NpConfig:
    """Shape of host and head. `u2pl` and `augseg` give the published hosts.

    fuse_kernel: of the convolution behind the joined ASPP branches. hidden: channels of the head's
    convolutions. film_channels: channels in which the film head's latent acts. linear: of the linear head, which is a
    film head besides. dropout: share of the joined ASPP channels dropped in training; only the U2PL host has it.
    sampling: draws of the latent, or as a baseline MC dropout at that site with the latent at its mean.
    """

    num_classes: int
    backbone: BackboneConfig = field(default_factory=ResNetConfig)
    aspp_channels: int = 256
    aspp_rates: tuple[int, int, int] = (6, 12, 18)
    fuse_kernel: Literal[1, 3] = 1
    low_channels: int = 48
    head: Literal["published", "film", "linear"] = "film"
    latent_length: int = 32
    hidden: int = 256
    film_channels: int = 64
    linear: LinearConfig = field(default_factory=LinearConfig)
    dropout: float = 0.0
    sampling: Literal["latent", "dropout"] = "latent"


def u2pl(num_classes: int, depth: Literal[50, 101] = 50) -> NpConfig:
    """Configure the published net on its U2PL host: output stride 8, rates 12/24/36, 512 decoder channels."""
    backbone = ResNetConfig(depth=depth, output_stride=8, ceil_pool=True)
    return NpConfig(
        num_classes, backbone, aspp_rates=(12, 24, 36), fuse_kernel=3, low_channels=256, head="published", dropout=0.1
    )


def augseg(num_classes: int, depth: Literal[50, 101] = 50) -> NpConfig:
    """Configure the published net on its AugSeg host: output stride 16, rates 6/12/18, 304 decoder channels."""
    backbone = ResNetConfig(depth=depth, output_stride=16, ceil_pool=True)
    return NpConfig(num_classes, backbone, head="published")


class NpNetwork(Network):
    """encode runs host, aggregators and the sample-independent part of the head; decode draws from the latent.

    noise_SBL is standard normal, L = latent_length, or the linear head's rank: one draw per sample and image. With MC
    dropout it is a mask of the joined ASPP channels (Gal & Ghahramani 2016), encode ends at the host's two features and
    the latent of what is not dropped, whose mean every sample takes on its way through the head.
    """

    def __init__(self, config: NpConfig) -> None:
        super().__init__()
        self.config, self.sampling = config, sampling_of(config)
        self.encoder = build_backbone(config.backbone)
        self.aspp = Aspp(config.backbone.stage_channels[-1], config.aspp_channels, config.aspp_rates)
        joined = config.aspp_channels * (len(config.aspp_rates) + 2)
        self.fuse = conv_norm_act(joined, config.aspp_channels, config.fuse_kernel)
        self.low = conv_norm_act(config.backbone.stage_channels[0], config.low_channels, 1, bias=True)
        channels = config.low_channels + config.aspp_channels
        shape = {"length": config.latent_length, "hidden": config.hidden}
        self.head: PublishedHead | FilmHead
        if config.head == "published":
            self.head = PublishedHead(config.num_classes, channels, **shape)
        elif config.head == "film":
            self.head = FilmHead(config.num_classes, channels, film_channels=config.film_channels, **shape)
        else:
            self.head = LinearHead(
                config.num_classes, channels, config.linear, film_channels=config.film_channels, **shape
            )
            self.extra_maps = (DENSITY,)

    def host_features(self, image_B3hw: Tensor) -> tuple[Tensor, Tensor]:
        """Return the low-level and the ASPP's channels of the host's decoder feature, both at stride 4."""
        low, high = self.encoder(image_B3hw)
        low = self.low(low)
        return low, resize_like(self.fuse(self.aspp(high)), low)

    def host(self, image_B3hw: Tensor) -> Tensor:
        """Return the host's decoder feature x_BDhw at stride 4: low-level channels first, then the ASPP's."""
        return torch.cat(self.host_features(image_B3hw), dim=1)

    def encode(self, image_B3hw: Tensor) -> Features:
        if self.sampling.kind != "dropout":
            return self.head.encode(self.host(image_B3hw))
        features = self.host_features(image_B3hw)
        return (*features, *self.head.latent(torch.cat(features, dim=1).detach()))

    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        if self.sampling.kind == "dropout":
            return self.decode_dropped(features, noise_SBL)
        return self.head.decode(features, noise_SBL)

    def decode_dropped(self, features: Features, mask_SBD: Tensor) -> Tensor:
        """Return logits_SBKhw of S masks; a mask of a channel commutes with the resize before it."""
        low_BDhw, fused_BDhw, *latent = features
        num_samples, num_windows = mask_SBD.shape[0], mask_SBD.shape[1]
        x_NDhw = torch.cat((low_BDhw.repeat(num_samples, 1, 1, 1), drop_channels(fused_BDhw, mask_SBD)), dim=1)
        mean_NL, sigma_NL, context_NL = (x_BL.repeat(num_samples, 1) for x_BL in latent)
        encoded = self.head.encode(x_NDhw, (mean_NL, sigma_NL, context_NL))
        logits = self.head.decode(encoded, torch.zeros_like(mean_NL)[None])
        return logits[0].unflatten(0, (num_samples, num_windows))


def sampling_of(config: NpConfig) -> Sampling:
    """Return the sample axis of a configuration.

    Raises BadOption for dropout where the host has none, and with the linear head, which has its own samples.
    """
    if config.head == "linear":
        if config.sampling != "latent":
            raise BadOption(f"sampling is {config.sampling!r}; the linear head of np_semiseg has only 'latent'")
        return Sampling(kind="latent", noise_length=config.linear.rank, law="antithetic", default_samples=8)
    if config.sampling == "latent":
        return Sampling(kind="latent", noise_length=config.latent_length, default_samples=8)
    if not config.dropout:
        raise BadOption(
            "sampling is 'dropout', and this np_semiseg network has no dropout site (the U2PL host has one)"
        )
    return Sampling(kind="dropout", noise_length=config.aspp_channels, keep=1 - config.dropout, default_samples=8)


class Aspp(nn.Module):
    """Atrous spatial pyramid as in U2PL and AugSeg: the pooled branch first, every branch normalised alone."""

    def __init__(self, channels: int, out_channels: int, rates: tuple[int, ...]) -> None:
        super().__init__()
        self.pool = conv_norm_act(channels, out_channels, 1)
        self.branches = atrous_branches(channels, out_channels, rates)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([pool_everywhere(self.pool, x)] + [branch(x) for branch in self.branches], dim=1)
