"""Views of a window: it is flipped, turned or shrunk, and what the network says of it is brought back.

Every view is a member of every sample. A square window keeps its size in all views, so that views run in whatever
format, batch and CUDA graph the window does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SCALES = (1.0, 0.75, 0.5)
"""What `scales` shrinks a window to; beyond it lies its mirror image."""


@dataclass(frozen=True, slots=True)
class View:
    """A view shrinks, then transposes, then flips. flipped: axes of the turned window, from the end."""

    flipped: tuple[int, ...] = ()
    transposed: bool = False
    scale: float = 1.0

    def turn(self, x: Tensor, *, aligned: bool) -> Tensor:
        """Show what belongs to a window, as the network sees it [..., h, w].

        aligned: whether the network's logits begin at the window's first pixel (`Readout.align_corners`), or as far
        from the border as any two are apart, halved.
        """
        x = _resample(x, 1 / self.scale, aligned=aligned)
        return _flip(x.transpose(-1, -2) if self.transposed else x, self.flipped)

    def turn_mask(self, mask_BKhw: Tensor, *, aligned: bool) -> Tensor:
        """Show masks of 0 and 1 as the network sees them; what is too thin for a pixel of the view has one still."""
        mask_BKhw = mask_BKhw.float()
        seen_BKhw = self.turn(mask_BKhw, aligned=aligned).round()
        if self.scale == 1:
            return seen_BKhw
        near_BKhw = self.turn_back(F.max_pool2d(seen_BKhw, 3, 1, 1), aligned=aligned)
        lost_BKhw = F.max_pool2d(mask_BKhw * (near_BKhw == 0), 3, 1, 1)
        return torch.maximum(seen_BKhw, self.turn(lost_BKhw, aligned=aligned).round())

    def turn_back(self, x: Tensor, *, aligned: bool) -> Tensor:
        """Bring back what the network says of the view, at the size that it has."""
        x = _flip(x, self.flipped)
        return _resample(x.transpose(-1, -2) if self.transposed else x, self.scale, aligned=aligned)


AS_IS = View()
VIEWS: dict[str, tuple[View, ...]] = {
    "none": (AS_IS,),
    "flip": (AS_IS, View((-1,))),
    "d4": tuple(View(flipped, turned) for turned in (False, True) for flipped in ((), (-1,), (-2,), (-2, -1))),
    "scales": tuple(View(scale=scale) for scale in SCALES),
}
"""Views by the option's value; the first of them is the window as it is."""


def _flip(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return x.flip(axes) if axes else x


def _resample(x: Tensor, step: float, *, aligned: bool) -> Tensor:
    """Sample bilinearly every `step` pixels, as many as there are; beyond them lies their mirror image."""
    if step == 1:
        return x
    for axis in (-2, -1):
        length = x.shape[axis]
        at = torch.arange(length, dtype=torch.float64, device=x.device) * step + (0 if aligned else (step - 1) / 2)
        at = torch.where(at < length - 0.5, at, 2 * length - 1 - at).clamp(0, length - 1)
        first = at.long()
        near, far = (x.index_select(axis, place) for place in (first, (first + 1).clamp(max=length - 1)))
        share = (at - first).to(x.dtype)
        x = torch.lerp(near, far, share[:, None] if axis == -2 else share)
    return x
