"""Closed forms. The image's three channels, normalised to x = pixel / 255, are the logits of three classes.

`pointwise`  logits = gain * x                                  S = 1
`latent`     logits = gain * x + noise_SBL, L = 3               any S
`opposed`    logits = +gain * x and -gain * x                   two members that disagree
`nan`        as pointwise, but NaN at pure white pixels: a model that breaks on some input
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.card import Sampling
from models.contract import Features, Network

SAMPLING = {
    "pointwise": Sampling(kind="single"),
    "latent": Sampling(kind="latent", noise_length=3, default_samples=4),
    "opposed": Sampling(kind="members", members=("plus", "minus"), default_samples=2),
    "nan": Sampling(kind="single"),
}


@dataclass(frozen=True, slots=True)
class ToyConfig:
    """Which closed form, and how steep it is."""

    num_classes: int = 3
    form: Literal["pointwise", "latent", "opposed", "nan"] = "pointwise"
    gain: float = 8.0


class ToyNetwork(Network):
    """logits as above, at full resolution."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.sampling = SAMPLING[config.form]

    def encode(self, image_B3hw: Tensor) -> Features:
        logits = self.config.gain * image_B3hw
        if self.config.form == "nan":
            white = (image_B3hw - 1).abs().amax(1, keepdim=True) < 1e-4
            logits = torch.where(white, torch.full_like(logits, torch.nan), logits)
        return (logits,)

    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        (logits_BKhw,) = features
        if self.config.form == "latent":
            return logits_BKhw + noise_SBL[..., None, None]
        if self.config.form == "opposed":
            return torch.stack((logits_BKhw, -logits_BKhw))
        return logits_BKhw[None]
