"""The image at several scales, inside the network: resized as Pillow resizes uint8 images, byte for byte.

The published protocol resizes pictures before it normalises them. A network is given normalised pixels, so the
normalisation is undone to whole numbers, and done again. Sizes are arithmetic on tensors, hence stay free in a traced
graph; fixed-point sums are exact in float64, hence have the same bytes in every batch and on every device.
"""

import torch
from torch import Tensor, nn

from penumbra.models.card import InputSpec

FIXED_POINT = 2.0**22
"""Pillow's resampling weights for 8-bit images are multiples of its inverse."""


class Pyramid(nn.Module):
    """image_B3HW (RGB, normalised by `InputSpec()`) -> the same at every scale; with the scale 1 alone, the image."""

    def __init__(self, scales: tuple[float, ...]) -> None:
        super().__init__()
        self.scales = scales
        self.mean = nn.Buffer(_column(InputSpec().mean), persistent=False)
        self.std = nn.Buffer(_column(InputSpec().std), persistent=False)

    def forward(self, image_B3HW: Tensor) -> list[Tensor]:
        if self.scales == (1.0,):
            return [image_B3HW]
        pixels = ((image_B3HW.double() * self.std + self.mean) * 255).round().clamp(0, 255)
        scaled = (pixels if scale == 1 else rescale(pixels, scale) for scale in self.scales)
        return [((each / 255 - self.mean) / self.std).to(image_B3HW.dtype) for each in scaled]


def rescale(pixels_B3HW: Tensor, scale: float) -> Tensor:
    """Resize to whole pixel values at round(scale * size), halves to even; the columns first, as in Pillow."""
    across = bicubic_weights(pixels_B3HW[0, 0, 0], scale)
    down = bicubic_weights(pixels_B3HW[0, 0, :, 0], scale)
    return _whole(down @ _whole(pixels_B3HW @ across.T))


def bicubic_weights(line: Tensor, scale: float) -> Tensor:
    """Return weights [new, old length] of a resize of a line (Keys 1981, a = -0.5, widened when it shrinks)."""
    one, length = line[:1] * 0 + 1, torch.as_tensor(line.shape[0]).double()
    size = torch.round(length * scale)
    step = length / size
    centre = _middles(one, size)[:, None] * step
    t = ((_middles(one, length) - centre) / step.clamp_min(1)).abs()
    near, far = (1.5 * t - 2.5) * t * t + 1, ((2.5 - 0.5 * t) * t - 4) * t + 2
    weights = near * (t < 1) + far * ((t >= 1) & (t < 2))
    weights = weights / weights.sum(1, keepdim=True)
    return torch.trunc(weights * FIXED_POINT + 0.5 * weights.sign()) / FIXED_POINT


def _middles(one: Tensor, count: Tensor) -> Tensor:
    """Return 0.5, 1.5, ... of as many pixels, on the device of `one`; a traced `arange` would stay on the CPU."""
    return one.expand(count.long()).cumsum(0) - 0.5  # type: ignore[call-overload, no-any-return]


def _whole(values: Tensor) -> Tensor:
    """Round to the nearest pixel value, halves up."""
    return torch.floor(values + 0.5).clamp(0, 255)


def _column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None, None]
