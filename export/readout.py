"""What lies round a network's own graphs, as the engine does it: for graphs of others, from values to moments."""

import logging

import torch
from torch import Tensor, nn

from penumbra.models.card import Card, InputSpec, Readout
from penumbra.models.errors import BadOption
from penumbra.serving.engine.moments import resize

log = logging.getLogger("penumbra")


class Normalise(nn.Module):
    """Turns pixels image_BHWC into image_BCHW, channels-last, as `penumbra.serving.engine.windows.normalise` does."""

    factor_C: Tensor
    offset_C: Tensor
    bounds_2C: Tensor | None

    def __init__(self, spec: InputSpec) -> None:
        super().__init__()
        self.bgr = spec.order == "BGR"
        for name, values in zip(("factor_C", "offset_C"), spec.factor_offset, strict=True):
            self.register_buffer(name, torch.tensor(values))
        self.register_buffer("bounds_2C", torch.tensor(spec.bounds) if spec.bounds else None)

    def forward(self, image_BHWC: Tensor) -> Tensor:
        pixels_BHWC = image_BHWC.flip(3) if self.bgr else image_BHWC
        values_BHWC = pixels_BHWC.float() * self.factor_C + self.offset_C
        if self.bounds_2C is not None:
            values_BHWC = values_BHWC.clamp(self.bounds_2C[0], self.bounds_2C[1])
        return values_BHWC.permute(0, 3, 1, 2)


def moments(logits_BSKhw: Tensor, size: tuple[int, ...], readout: Readout) -> tuple[Tensor, Tensor]:
    """Return mean probabilities, and the samples' mean entropy, as `penumbra.serving.engine.moments` sums them."""
    logits_BSKhw = logits_BSKhw / readout.temperature
    if readout.softmax_at == "feature" and readout.average == "probabilities":
        prob_BKhw, expected_Bhw = _means(logits_BSKhw)
        full = resize(torch.cat((prob_BKhw, expected_Bhw[:, None]), 1), size, readout)
        return full[:, :-1], full[:, -1]
    num_samples, num_classes = logits_BSKhw.shape[1:3]
    full = resize(logits_BSKhw.flatten(1, 2), size, readout)
    wide_BSKHW = full.reshape(-1, num_samples, num_classes, *size)
    prob_BKHW, expected_BHW = _means(wide_BSKHW)
    return (wide_BSKHW.mean(1).softmax(1) if readout.average == "logits" else prob_BKHW), expected_BHW


def _means(logits_BSKhw: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits_BSKhw.log_softmax(2)
    p_BSKhw = log_p.exp()
    return p_BSKhw.mean(1), -(p_BSKhw * log_p).sum(2).mean(1)


def check_read_out(card: Card, target: str) -> None:
    """Warn of a scale rule, which a target does not follow. Raises BadOption for a card with views."""
    if card.views != "none":
        raise BadOption(
            f"{card.name} is answered in the views {card.views}, and {target} runs windows as they are only"
        )
    if (rule := card.input.resolution).kind != "none":
        how = f"{target} does not resize, so do before you cut windows"
        log.warning("%s sees pictures by the scale rule %s:%g; %s", card.name, rule.kind, rule.value, how)
