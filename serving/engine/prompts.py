"""Prompts: what a request brings beside its picture, checked against the model and cut with its windows.

boxes   rectangles round objects, in pixels of the image (x right, y down, x1 and y1 exclusive), each with a class;
        they may overlap. A pixel is inside when its centre is; a box without any has the pixel of its middle.
tags    the classes that are in the picture.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penumbra.models.card import Card
from penumbra.models.errors import BadOption
from penumbra.serving.engine.options import Box
from penumbra.serving.engine.windows import Window, WindowPlan, clip

PromptArrays = tuple[NDArray[Any], ...]
"""One window's prompt as `penumbra.models.contract.Prompt` has it, without the window axis."""


@dataclass(frozen=True, slots=True)
class Boxes:
    """A prompt of rectangles. boxes_N5: x0, y0, x1, y1, class id.

    alpha: of the linear correction; None where the model has none.
    """

    boxes_N5: NDArray[np.float64]
    num_classes: int
    mirrored: bool
    alpha: float | None

    def cut(self, window: Window, plan: WindowPlan) -> PromptArrays:
        """Draw a window's boxes as masks [K, h, w], a channel per class; beyond the image as the picture is padded."""
        rows, columns, beyond = clip(window, plan)
        mask_Khw = np.zeros((self.num_classes, rows.stop - rows.start, columns.stop - columns.start), np.uint8)
        corner = np.array([columns.start, rows.start] * 2 + [0])
        for x0, y0, x1, y1, k in (self.pixels_within(window) - corner).clip(min=0):
            mask_Khw[k, y0:y1, x0:x1] = 1
        if any(map(any, beyond)):
            mask_Khw = np.pad(mask_Khw, ((0, 0), *beyond), mode="symmetric" if self.mirrored else "constant")
        return (mask_Khw,) if self.alpha is None else (mask_Khw, np.array(self.alpha, np.float32))

    def pixels_within(self, window: Window) -> NDArray[np.int64]:
        """Give the boxes that a window meets as whole pixels of the image: first x and y, those after the last, class.

        Pixel i is inside [a, b) when a <= i + 0.5 < b: from ceil(a - 0.5) to before ceil(b - 0.5). A box between two
        centres has the pixel of its middle, which one that has a centre has anyway.
        """
        corners_N22 = self.boxes_N5[:, :4].reshape(-1, 2, 2)
        middle = np.ceil(corners_N22.mean(1)) - 1
        first, end = np.ceil(corners_N22 - 0.5).swapaxes(0, 1)
        first, end = np.minimum(first, middle), np.maximum(end, middle + 1)
        pixels_N5 = np.column_stack((first, end, self.boxes_N5[:, 4])).astype(np.int64)
        origin, size = np.array([window.x0, window.y0]), np.array([window.width, window.height])
        met: NDArray[np.int64] = pixels_N5[((first < origin + size) & (end > origin)).all(1)]
        return met


@dataclass(frozen=True, slots=True)
class Tags:
    """A prompt of classes. tags_K: 1 for a class that is in the picture, else 0; the same in every window."""

    tags_K: NDArray[np.float32]

    def cut(self, window: Window, plan: WindowPlan) -> PromptArrays:
        return (self.tags_K,)


PromptSource = Boxes | Tags
"""A checked prompt of one request. Its arrays may be made window by window, in any lane."""


def check_prompt(
    card: Card, height: int, width: int, *, boxes: tuple[Box, ...], tags: tuple[str | int, ...], alpha: float | None
) -> PromptSource | None:
    """Check the request's prompt; None where it brings none.

    Raises BadOption: a prompt the model does not take, an unknown class, a box that is inverted or leaves the image.
    """
    takes = f"takes {card.prompt.kind}" if card.prompt.kind != "none" else "takes no prompt"
    for kind, given in (("boxes", boxes), ("tags", tags)):
        if given and card.prompt.kind != kind:
            raise BadOption(f"{kind} are given, and {card.name} {takes}")
    if alpha is not None:
        _check_alpha(card, alpha, boxes)
    if boxes:
        rows = [_check_box(card, box, height, width) for box in boxes]
        default = card.prompt.alpha
        return Boxes(
            np.array(rows), card.num_classes, card.window.padding == "mirror",
            None if default is None else default if alpha is None else alpha,
        )  # fmt: skip
    if tags:
        tags_K = np.zeros(card.num_classes, np.float32)
        tags_K[[find_class(card, tag, "tags") for tag in tags]] = 1
        return Tags(tags_K)
    return None


def _check_alpha(card: Card, alpha: float, boxes: Iterable[Box]) -> None:
    if card.prompt.alpha is None:
        raise BadOption(f"alpha is {alpha}, and {card.name} has no correction that takes one")
    if not boxes:
        raise BadOption(f"alpha is {alpha}, but there are no boxes; it weighs the network that sees them")
    if not 0 <= alpha <= 1e6:
        raise BadOption(f"alpha is {alpha}; 0 (the primary network alone) to 1e6 is possible")


def _check_box(card: Card, box: Box, height: int, width: int) -> tuple[float, float, float, float, int]:
    *corners, name = box
    x0, y0, x1, y1 = corners
    k = find_class(card, name, "boxes")
    if k == card.prompt.background:
        raise BadOption(f"boxes has one of class {card.classes[k].name!r}, which is what lies outside of every box")
    if not (x0 < x1 and y0 < y1):
        raise BadOption(f"boxes has {list(corners)}; x0 < x1 and y0 < y1 are wanted")
    if min(x0, y0) < 0 or x1 > width or y1 > height:
        raise BadOption(f"boxes has {list(corners)}, which leaves the image; x is 0 to {width} and y is 0 to {height}")
    return x0, y0, x1, y1, k


def find_class(card: Card, name: str | int, option: str) -> int:
    """Find a class by name or id. Raises BadOption naming the option and the classes there are."""
    names = [info.name for info in card.classes]
    if isinstance(name, str) and name in names:
        return names.index(name)
    text = str(name)
    if text.isascii() and text.isdigit() and len(text) < 4 and int(text) < len(names):
        return int(text)
    known = ", ".join(names[:30]) + (", ..." if len(names) > 30 else "")
    raise BadOption(f"{option} names the class {text[:40]!r}; {card.name} knows {known}, or 0 to {len(names) - 1}")
