"""Which of an image's values is white: the one rule by which numbers of any type become 8 bits, for cards of uint8.

Cards of other types have values as they are, and a warning where those cannot be what the network learned from.

Eight bits are what they are. 16 bits keep their high byte. Everything else, and 16 bits that are not filled, has the
smallest of the usual ranges that holds nearly all values of the whole file, and a warning that names it.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penumbra.models.card import InputSpec
from penumbra.models.errors import BadImage

OUTSIDE = 0.001
"""Share of the values that a range need not hold: dead pixels and glints, which become black or white."""
HELD = "999 of 1000"
"""The others, in words."""
BELOW = 1 / 16
"""Share of a range by which values may be below 0: the noise of reflectances, which becomes black."""
USUAL = (255, 1023, 2047, 4095, 16383, 65535)
"""White of the 8, 10, 11, 12, 14 and 16 bits that sensors have."""
NEARLY_BLACK = 15
"""The largest value of 4 bits. Floats that it holds and 1 does not are of no usual kind, and are not read."""

BRIGHTNESS = np.array((0.299, 0.587, 0.114), np.float32)
"""Shares of red, green and blue in it, by ITU-R 601."""
PIECE_VALUES = 2**22
"""As many become grey together."""
NEARLY_NOTHING = 3
"""Values below a share of one in so many of the mean are dark; nearly all of them are in a file of fewer bits."""
FAR = 20
"""Standard deviations beyond the mean that no picture has; another unit has them."""

DARK = 4095
"""The largest value of 12 bits, which of 65535 is nearly black."""
DARK_PER_BRIGHT = 20
"""More dark values for every bright one leave a picture nearly black."""
NEARLY_BLACK_16 = (
    f"the image is nearly black: nearly all of its uint16 values are at most {DARK} of {USUAL[-1]}; if the largest "
    "stand for no measurement, declare them as nodata"
)


def examine(
    blocks: Iterable[NDArray[Any]], dtype: np.dtype[Any], spec: InputSpec, *, num_values: int
) -> tuple[int, tuple[str, ...]]:
    """Find the value that becomes white, of which only cards of uint8 know, and what to know of an image's values.

    blocks: all measured values, of which no more are taken than the answer needs. num_values: in the whole image.
    Raises BadImage where no range holds them.
    """
    if spec.dtype == "uint8":
        return _find_white(blocks, dtype, num_values=num_values)
    return 0, _judge(blocks, spec, num_values=num_values)


def _find_white(
    blocks: Iterable[NDArray[np.generic]], dtype: np.dtype[np.generic], *, num_values: int
) -> tuple[int, tuple[str, ...]]:
    """Find the value that becomes white, and what the caller should know of it; see `examine`."""
    ranges = _ranges(dtype)
    read = [white for white in ranges if white != NEARLY_BLACK or dtype == np.uint8]
    is_filled = dtype in (np.uint8, np.uint16)  # the last range is the type's own and holds whatever comes
    above, below = np.zeros((2, len(ranges)), np.int64)
    measured, lowest, highest, darkness = 0, np.inf, -np.inf, 0
    for values in blocks:
        if not values.size:
            continue
        least, most = values.min(), values.max()
        lowest, highest, measured = min(lowest, least), max(highest, most), measured + values.size
        for k, white in enumerate(ranges):
            if above[k] <= OUTSIDE * num_values and most > _top(white):
                above[k] += np.count_nonzero(values > _top(white))  # type: ignore[operator]
            if least < -BELOW * white:
                below[k] += np.count_nonzero(values < -BELOW * white)  # type: ignore[operator]
        darkness += _darkness(values)
        if (above[: -1 if is_filled else None] > OUTSIDE * num_values).all() and darkness <= 0:
            break
    if not measured:
        return ranges[-1], ("no pixel of the image holds a measurement",)
    least_held = int((above <= OUTSIDE * measured).argmax())  # a wider one would hold more below 0, and make all black
    is_held = max(above[least_held], below[least_held]) <= OUTSIDE * measured and ranges[least_held] in read
    if not is_held and not is_filled:
        raise BadImage(
            f"the image has {dtype} values from {lowest:.6g} to {highest:.6g}; 0 to one of "
            f"{', '.join(map(str, read))} is read, so scale it, or declare what is no measurement as nodata"
        )
    white = ranges[least_held] if is_held else ranges[-1]
    return (255 if dtype == np.uint8 else white), _warnings(dtype, white, read, darkness)


def _darkness(values: NDArray[np.generic]) -> int:
    """Count by how many dark values of 16 bits exceed what the bright ones bear; 0 for other types.

    The largest of all is not counted, since it often stands for no measurement.
    """
    if values.dtype != np.uint16:
        return 0
    num_over = int(np.count_nonzero(values > DARK))  # type: ignore[operator]
    num_bright = num_over - int(np.count_nonzero(values == USUAL[-1]))
    return values.size - num_over - DARK_PER_BRIGHT * num_bright


def _ranges(dtype: np.dtype[np.generic]) -> tuple[int, ...]:
    if dtype.kind == "f":
        return (1, NEARLY_BLACK, *USUAL)
    largest = min(int(np.iinfo(dtype).max), USUAL[-1])  # type: ignore[type-var]
    return (*(white for white in (NEARLY_BLACK, *USUAL)[dtype != np.uint8 :] if white < largest), largest)


def _top(white: int) -> int:
    """Give the largest value that a range holds: reflectances of snow and metal are above 1."""
    return 2 if white == 1 else white


def _warnings(dtype: np.dtype[np.generic], white: int, ranges: Sequence[int], darkness: int) -> tuple[str, ...]:
    if white == ranges[-1] and dtype in (np.uint8, np.uint16):
        return (NEARLY_BLACK_16,) if darkness > 0 else ()
    if dtype == np.uint8:
        return (f"the image is nearly black: {HELD} of its values are at most {NEARLY_BLACK} of 255",)
    return (
        f"the image's {dtype} values are read as 0 (black) to {white} (white), the least of "
        f"{', '.join(map(str, ranges))} that holds {HELD} of them; other values become black or white",
    )


def to_8_bits(values: NDArray[np.generic], white: int) -> NDArray[np.uint8]:
    """Make 8 bits of values: what is outside of black and white becomes the nearest of them, no number (NaN) black.

    Values of more than 8 bits keep their high bits, those of fewer are spread.
    """
    if values.dtype == np.uint8 and white == 255:
        return values  # type: ignore[return-value]
    if values.dtype == np.uint16 and white == USUAL[-1]:
        return (values >> 8).astype(np.uint8)  # type: ignore[operator, no-any-return]
    held = np.clip(values, 0, white)
    if values.dtype.kind == "f":
        held, white = np.rint(np.nan_to_num(held) * (255 if white == 1 else 1)), max(white, 255)
    whole: NDArray[np.uint16] = held.astype(np.uint16)
    if white < 255:
        return (whole * np.uint16(255) // np.uint16(white)).astype(np.uint8)
    return (whole >> (white.bit_length() - 8)).astype(np.uint8)


def mean_of(spec: InputSpec) -> NDArray[np.float64]:
    """Give for each band the value that a network saw on average, which stands where there is none; by the card."""
    factor_C, offset_C = map(np.array, spec.factor_offset)
    mean_C: NDArray[np.float64] = -offset_C / factor_C
    return mean_C[::-1] if spec.order == "BGR" else mean_C


def to_type(values_Chw: NDArray[Any], spec: InputSpec, nodata: float | None) -> NDArray[Any]:
    """Make values those of a card's type, with the mean of their band where nothing was measured.

    Raises BadImage for a type that is another measure, and for a value that the card's type cannot hold.
    """
    dtype, found = np.dtype(spec.dtype), values_Chw.dtype
    is_void = (values_Chw == nodata) | (~np.isfinite(values_Chw) if found.kind == "f" else False)
    if found == dtype and not is_void.any():
        return values_Chw
    filled = np.where(is_void, mean_of(spec)[:, None, None], values_Chw)
    if dtype.kind != "f":
        ends, filled = np.iinfo(dtype), np.rint(filled)
        if filled.size and (filled.min() < ends.min or filled.max() > ends.max):
            raise BadImage(
                f"the image has {found} values from {filled.min():.6g} to {filled.max():.6g}, and the model reads "
                f"{dtype}, {ends.min} to {ends.max}; declare what is no measurement as nodata, or scale it"
            )
    return filled.astype(dtype)


def check_type(found: np.dtype[Any], spec: InputSpec, *, what: str = "image") -> None:
    """Raise BadImage where values of one type cannot be meant as those of the card's.

    Eight bits are made of any; of the others whole numbers of 16 and 32 bits are the same measure, and so are floats.
    All else is a change of scale, which nobody has stated.
    """
    dtype = np.dtype(spec.dtype)
    alike = "f" if dtype.kind == "f" else "iu"
    if dtype == np.uint8 or found == dtype:
        return
    if found.kind not in alike or found.itemsize == 1:
        raise BadImage(
            f"the {what} has {found} values and the model reads {dtype}, in units of its own; convert them to these"
        )


def brightness(pixels_hw3: NDArray[Any]) -> NDArray[Any]:
    """Make grey [h, w, 1] of red, green and blue, of the same type."""
    parts = np.array_split(pixels_hw3, max(1, pixels_hw3.size // PIECE_VALUES))
    grey_hw = np.concatenate([part @ BRIGHTNESS for part in parts])
    return (np.rint(grey_hw) if pixels_hw3.dtype.kind in "iu" else grey_hw).astype(pixels_hw3.dtype)[:, :, None]


def _judge(blocks: Iterable[NDArray[Any]], spec: InputSpec, *, num_values: int) -> tuple[str, ...]:
    """Say what the caller should know of values that a network cannot have learned from: another bit depth or unit."""
    factor_C, mean_C = np.abs(spec.factor_offset[0]), mean_of(spec)
    if (factor_C == 1).all() and not mean_C.any():  # the network itself makes of them what it wants
        return ()
    usual, most, top = (float(x_C.mean()) for x_C in (mean_C, mean_C + FAR / factor_C, 1 / factor_C))
    least = usual / NEARLY_NOTHING if usual > 0 else top / 16
    num_bright, num_far, measured = 0, 0, 0
    for values in blocks:
        measured += values.size
        num_bright += int(np.count_nonzero(values > least))
        num_far += int(np.count_nonzero(values > most))
        if num_bright > OUTSIDE * num_values and num_far < measured / 4:
            return ()
    if not measured:
        return ("no pixel of the image holds a measurement",)
    seen = f"the model's are {usual:.6g} on average" if usual > 0 else f"the model's go to {top:.6g}"
    if num_bright <= OUTSIDE * measured:
        return (f"{HELD} of the image's values are at most {least:.6g}, and {seen}: it may be of another bit depth",)
    if num_far > measured / 2:
        return (f"most of the image's values are above {most:.6g}, and {seen}: it may be of another bit depth or unit",)
    return ()
