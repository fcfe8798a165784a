"""Closed forms. The image's bands, normalised to x (pixel / 255), are the logits of as many classes, by default three.

Of one band there are two classes, whose logits are those of x and of 1 - x. L is the number of classes.

`pointwise`  logits = gain * x                                  S = 1
`latent`     logits = gain * x + noise_SBL                      any S
`dropout`    logits = gain * x * noise_SBL, keep 0.8            any S
`opposed`    logits = +gain * x and -gain * x                   two members that disagree
`boxed`      as pointwise; with boxes three members: plain, boxed = plain + gain inside a box of the class,
             and mixed = (plain + alpha * boxed) / (1 + alpha)
`tagged`     as pointwise; with tags, minus gain for the classes that are not tagged
`bright`     as pointwise, with the extra map `brightness`, the mean of x
`nan`        as pointwise, but NaN at pure white pixels: a model that breaks on some input
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from penumbra.models.card import ExtraMap, PromptSpec, Sampling
from penumbra.models.contract import Features, Network, Prompt

SAMPLING = {
    "latent": Sampling(kind="latent", noise_length=3, default_samples=4),
    "dropout": Sampling(kind="dropout", noise_length=3, keep=0.8, default_samples=4),
    "opposed": Sampling(kind="members", members=("plus", "minus"), default_samples=2),
}
PROMPTS = {
    "boxed": PromptSpec(kind="boxes", members=("plain", "boxed", "mixed"), alpha=1.0, partial=True),
    "tagged": PromptSpec(kind="tags"),
}


@dataclass(frozen=True, slots=True)
class ToyConfig:
    """Which closed form, and how steep it is."""

    num_classes: int = 3
    form: Literal["pointwise", "latent", "dropout", "opposed", "boxed", "tagged", "bright", "nan"] = "pointwise"
    gain: float = 8.0


class ToyNetwork(Network):
    """logits as above, at full resolution. The feature is members_BMKhw, of one member or several."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        sampling = SAMPLING.get(config.form, Sampling(kind="single"))
        self.sampling = replace(sampling, noise_length=config.num_classes if sampling.noise_length else 0)
        self.prompt = PROMPTS.get(config.form, PromptSpec())
        if config.form == "bright":
            self.extra_maps = (ExtraMap("brightness", "mean of the channels", "0 to 1"),)

    def encode(self, image_BChw: Tensor) -> Features:
        bands_BKhw = torch.cat((image_BChw, 1 - image_BChw), 1) if image_BChw.shape[1] == 1 else image_BChw
        logits_BKhw = self.config.gain * bands_BKhw
        if self.config.form == "nan":
            white = (image_BChw - 1).abs().amax(1, keepdim=True) < 1e-4
            logits_BKhw = torch.where(white, torch.full_like(logits_BKhw, torch.nan), logits_BKhw)
        if self.config.form == "opposed":
            return (torch.stack((logits_BKhw, -logits_BKhw), dim=1),)
        if self.config.form == "bright":
            return logits_BKhw[:, None], image_BChw.mean(1, keepdim=True)
        return (logits_BKhw[:, None],)

    def take_prompt(self, image_B3hw: Tensor, features: Features, prompt: Prompt) -> Features:
        plain_BKhw = features[0][:, 0]
        if self.config.form == "tagged":
            (tags_BK,) = prompt
            return ((plain_BKhw - self.config.gain * (1 - tags_BK)[:, :, None, None])[:, None],)
        boxes_BKhw, alpha_B = prompt
        boxed_BKhw = plain_BKhw + self.config.gain * boxes_BKhw
        alpha_B111 = alpha_B[:, None, None, None]
        mixed_BKhw = (plain_BKhw + alpha_B111 * boxed_BKhw) / (1 + alpha_B111)
        return (torch.stack((plain_BKhw, boxed_BKhw, mixed_BKhw), dim=1),)

    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        members_MBKhw = features[0].transpose(0, 1)
        if self.config.form == "latent":
            return members_MBKhw + noise_SBL[..., None, None]
        if self.config.form == "dropout":
            return members_MBKhw * noise_SBL[..., None, None]
        return members_MBKhw
