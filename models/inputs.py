"""What a picture is to a network: its bands and their type, how values become network input, and the scale."""

import re
from dataclasses import dataclass
from typing import Literal

BAND = re.compile(r"[a-z][a-z0-9_]{0,39}")
"""A band's name: red, green, blue, nir, swir1, grey, or whatever a network's users call it."""
MOST_BANDS = 255
RGB = ("red", "green", "blue")


@dataclass(frozen=True, slots=True)
class ScaleRule:
    """At which size the network is to see things.

    kind `none`: a pixel of the picture is one of the network's. `frame`: the short side of a picture has `value` px.
    `gsd`: a pixel is `value` metres on the ground (ground sample distance).
    """

    kind: Literal["none", "frame", "gsd"] = "none"
    value: float = 0.0


@dataclass(frozen=True, slots=True)
class InputSpec:
    """How a picture's values become network input: (x - mean) / std per band, where x is the value / scale.

    Where low and high are given, x is 0 at a band's low and 1 at its high instead. clip: x is held within 0 and 1.
    bands: their names, in the order of arrays [H, W, C] and of the network. order: BGR is for networks that take red,
    green and blue the other way round; mean, std, low and high are then in that order. dtype: of the values.
    resolution: the scale rule.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    scale: float = 255.0
    order: Literal["RGB", "BGR"] = "RGB"
    bands: tuple[str, ...] = RGB
    dtype: Literal["uint8", "uint16", "int16", "float32"] = "uint8"
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    clip: bool = False
    resolution: ScaleRule = ScaleRule()

    @property
    def num_bands(self) -> int:
        return len(self.bands)

    @property
    def factor_offset(self) -> tuple[list[float], list[float]]:
        """The same as one multiply-add: input = values * factor + offset, per band in `order`."""
        low, high = self.low or (0.0,) * self.num_bands, self.high or (self.scale,) * self.num_bands
        rows = list(zip(low, high, self.mean, self.std, strict=True))
        factor = [1 / ((high - low) * std) for low, high, _, std in rows]
        return factor, [(low / (low - high) - mean) / std for low, high, mean, std in rows]

    @property
    def extent(self) -> tuple[list[float], list[float]]:
        """The least and the largest network input that pictures are likely to have, per band in `order`.

        Where a band has a deviation it is 1.5 of these around the mean. Else values are from low to high, those of 8
        bits, from 0 to the scale, or from 0 to twice the mean, whichever of these is the first that is given.
        """
        ends = [self._likely(mean, std) for mean, std in zip(self.mean, self.std, strict=True)]
        return [least for least, _ in ends], [most for _, most in ends]

    def _likely(self, mean: float, std: float) -> tuple[float, float]:
        if std != 1:
            return -1.5, 1.5
        if self.low or (self.dtype != "uint8" and self.scale != 1):
            return -mean, 1 - mean
        if self.dtype == "uint8":
            return -mean, 255 / self.scale - mean
        return -max(1.5, abs(mean)), max(1.5, abs(mean))

    @property
    def bounds(self) -> tuple[list[float], list[float]] | None:
        """The least and the largest network input of every band, in `order`, where values are clipped."""
        if not self.clip:
            return None
        ends = [sorted(((0 - mean) / std, (1 - mean) / std)) for mean, std in zip(self.mean, self.std, strict=True)]
        return [least for least, _ in ends], [most for _, most in ends]


def failures_of_input(spec: InputSpec) -> dict[str, bool]:
    """Tell which sentences hold of how pictures are read."""
    num, lengths = spec.num_bands, {len(spec.mean), len(spec.std)}
    ranges, rule = list(zip(spec.low, spec.high, strict=False)), spec.resolution
    return {
        f"input.bands are {', '.join(spec.bands)[:200]}; 1 to {MOST_BANDS} plain names are wanted, each once":
            not 1 <= num <= MOST_BANDS or len({*spec.bands}) < num or not all(map(BAND.fullmatch, spec.bands)),
        f"input.mean has {len(spec.mean)} values and input.std {len(spec.std)}; there are {num} input.bands":
            lengths != {num},
        f"has input.std {spec.std} and input.scale {spec.scale}; values are divided by both":
            0 in (*spec.std, spec.scale),
        f"input.low is {spec.low} and input.high {spec.high}; both are empty, or have a lower and a higher value for "
        f"each of {num} bands": {len(spec.low), len(spec.high)} not in ({0}, {num}) or any(a >= b for a, b in ranges),
        f"input.order is BGR and input.bands are {', '.join(spec.bands)[:200]}; it is for {', '.join(RGB)} alone":
            spec.order == "BGR" and spec.bands != RGB,
        f"input.resolution is {rule.kind} with the value {rule.value:g}; frame has pixels of the short side, gsd "
        "metres of a pixel, and none has 0": rule.value < 0 or (rule.kind == "none") != (rule.value == 0),
    }  # fmt: skip
