"""The model contract: a network is cut where its randomness begins.

    encode(image_BChw)                     -> features      deterministic, once per window
    take_prompt(image, features, prompt)   -> features      only where a request brings a prompt
    decode(features, noise_SBL)            -> logits_SBKhw  a pure function of its noise, all S samples in one call

Shape letters: B windows, S samples, K classes, D channels, C input bands, L noise length, H W image px, h w px of a
window or of its feature map; a suffix names the axes in memory order. Every feature tensor has the window axis B
first, so features can be split and joined by window. There is no random number in a network: noise is an
input, so eager, TorchScript and every other export agree sample by sample.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from penumbra.models.card import ExtraMap, PromptSpec, Sampling
from penumbra.models.layout import Upstream

Features = tuple[Tensor, ...]
Prompt = tuple[Tensor, ...]
"""`boxes`: (boxes_BKhw,), 1 inside a box of class k, and alpha_B where the network has an alpha. `tags`: (tags_BK,)."""


class Network(nn.Module):
    """What every method's network offers.

    sampling: what its sample axis is. `decode` may return logits at a feature resolution below the
    window's; resizing and softmax belong to whoever reads them out (`penumbra.serving.engine.moments`).
    prompt: what it takes beside the image. extra_maps: named maps of its own; they are the last feature,
    extras_BEhw float32, at any resolution. formats: those that it can be exported in, the usual one first, where it
    cannot in all.
    """

    sampling: Sampling
    prompt: PromptSpec = PromptSpec()
    extra_maps: tuple[ExtraMap, ...] = ()
    formats: tuple[str, ...] = ()

    def encode(self, image_BChw: Tensor) -> Features:
        """Compute everything that does not depend on the sample. image_BChw: float32, normalised as the card says."""
        raise NotImplementedError

    def take_prompt(self, image_BChw: Tensor, features: Features, prompt: Prompt) -> Features:
        """Take a prompt into account in the features; only for networks whose `prompt` has a kind.

        What comes out is for the same `decode`, whose S is then the number of `prompt.members`, if it names any.
        """
        raise NotImplementedError

    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        """Return logits_SBKhw of S samples. Members and single passes ignore the noise's values, not its S and B."""
        raise NotImplementedError

    def forward(self, image_BChw: Tensor, noise_SBL: Tensor) -> Tensor:
        """Return decode(encode(image), noise)."""
        return self.decode(self.encode(image_BChw), noise_SBL)


class Views(NamedTuple):
    """What a method's training objective is shown in one step. Pictures are normalised float32.

    image, label: labelled frames, label int64 with 255 = void. weak, strong: the same unlabelled frames, strong with
    changed colours. inside: False beyond the picture. mix: where frame i shows frame i - 1 instead (CutMix).
    Only where the recipe's `weak_labels` asks for them, else None: tags_BK, 1 for a class that is in an unlabelled
    view; boxes_BKhw and label_boxes_BKhw, inside a box of class k its number in the view, of the unlabelled and of the
    labelled views.
    """

    image_B3hw: Tensor
    label_Bhw: Tensor
    weak_B3hw: Tensor
    strong_B3hw: Tensor
    inside_Bhw: Tensor
    mix_B1hw: Tensor
    tags_BK: Tensor | None = None
    boxes_BKhw: Tensor | None = None
    label_boxes_BKhw: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Method:
    """One research method: its name, its configuration type and how to build its network. Its README names the paper.

    config: a frozen dataclass whose first field is `num_classes`; it is stored in checkpoints as JSON.
    upstream: how its published checkpoints are read; None where nothing is published.
    """

    name: str
    config: type
    build: Callable[[Any], Network]
    upstream: Upstream | None = None
