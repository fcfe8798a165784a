"""Draw random views of pictures, by pure functions of tensors and an explicit generator.

Pictures are float32 in [0, 1] here; normalisation comes last (`normalise`).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from penumbra.models.card import IGNORE, InputSpec

NUM_BOXES = 3
"""CutMix boxes per picture, as in CPS."""


def random_view(
    image_3HW: Tensor, label_HW: Tensor, *, size: tuple[int, int], scale: tuple[float, float],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Draw a scaled, cropped, perhaps mirrored view: image_3hw float in [0, 1] and label_hw int64 of `size`.

    What lies beyond the picture is mean grey and IGNORE. Both uint8 inputs are cut and resized alike. A label may
    have several planes, label_PHW to label_Phw.
    """
    factor = _uniform(*scale, generator)
    height, width = (max(1, round(s / factor)) for s in size)
    top, left = (_offset(n, box, generator) for n, box in zip(image_3HW.shape[1:], (height, width), strict=True))
    image = _cut(image_3HW, top, left, height, width, fill=128).float() / 255
    label = _cut(label_HW, top, left, height, width, fill=IGNORE).float()
    image_3hw = F.interpolate(image[None], size=size, mode="bilinear")[0]
    planes_1Phw = F.interpolate(label.view(1, -1, height, width), size=size, mode="nearest-exact")
    label_hw = planes_1Phw.view(*label_HW.shape[:-2], *size).long()
    if _uniform(0, 1, generator) < 0.5:
        image_3hw, label_hw = image_3hw.flip(-1), label_hw.flip(-1)
    return image_3hw, label_hw


def jitter_color(image_B3hw: Tensor, *, strength: float, generator: torch.Generator) -> Tensor:
    """Multiply brightness, contrast and saturation of every picture by 1 +- strength, clipped to [0, 1]."""
    factor_3B = 1 + strength * (2 * torch.rand(3, len(image_B3hw), generator=generator) - 1)
    brightness, contrast, saturation = factor_3B[:, :, None, None, None]
    image = image_B3hw * brightness
    centre = image.mean((1, 2, 3), keepdim=True)
    image = centre + (image - centre) * contrast
    grey = image.mean(1, keepdim=True)
    colored: Tensor = grey + (image - grey) * saturation
    return colored.clamp(0, 1)


def cutmix_masks(num: int, size: tuple[int, int], *, generator: torch.Generator) -> Tensor:
    """Draw masks mix_B1hw (bool, True = take the other picture), 3 boxes of 25 to 50 % of the area together.

    French et al. 2020 as used by CPS: random aspect, inside the picture, overlapping boxes toggle.
    """
    height, width = size
    mask_B1hw = torch.zeros(num, 1, height, width, dtype=torch.bool)
    for mask_hw in mask_B1hw[:, 0]:
        area = _uniform(0.25, 0.5, generator) / NUM_BOXES
        for _ in range(NUM_BOXES):
            tall = math.exp(_uniform(0, 1, generator) * math.log(area))
            box_h, box_w = round(tall * height), round(area / tall * width)
            top, left = _offset(height, box_h, generator), _offset(width, box_w, generator)
            mask_hw[top : top + box_h, left : left + box_w].logical_not_()
    return mask_B1hw


def normalise(image_B3hw: Tensor, spec: InputSpec) -> Tensor:
    """Make what a network sees of RGB pictures in [0, 1], channels-last because CPU convolutions want it so."""
    mean, std = torch.tensor(spec.mean)[:, None, None], torch.tensor(spec.std)[:, None, None]
    ordered_B3hw = image_B3hw.flip(1) if spec.order == "BGR" else image_B3hw
    normal_B3hw: Tensor = (ordered_B3hw * (255 / spec.scale) - mean) / std
    return normal_B3hw.contiguous(memory_format=torch.channels_last)


def _cut(x: Tensor, top: int, left: int, height: int, width: int, *, fill: int) -> Tensor:
    """Cut a box of the last two axes; parts beyond the picture are `fill`."""
    inner = x[..., max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
    before_y, before_x = max(-top, 0), max(-left, 0)
    pad = (before_x, width - before_x - inner.shape[-1], before_y, height - before_y - inner.shape[-2])
    return F.pad(inner, pad, value=fill)


def _offset(length: int, box: int, generator: torch.Generator) -> int:
    """Draw where a box starts: anywhere inside, or anywhere around the picture if the box is the larger one."""
    low, high = sorted((0, length - box))
    return int(torch.randint(low, high + 1, (), generator=generator))


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))
