"""Files to uint8 tensors: pictures as the server reads them, and masks whose ids become class indices."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from penumbra.models.card import IGNORE
from penumbra.models.errors import BadData, BadImage, TooLarge
from penumbra.serving.engine.decode import open_image
from penumbra.serving.engine.options import PILLOW_PIXELS, Limits
from penumbra.serving.engine.raster import Raster

log = logging.getLogger("penumbra")
UNKNOWN = -1
LIMITS = Limits(pixels=PILLOW_PIXELS)
"""A picture of a data set may have as many pixels as Pillow opens."""
INDEX_MODES = ("L", "P", "1", "I", "I;16", "I;16B", "I;16L")
"""Pillow's modes whose values are numbers and no colours; a palette mask stores its labels as indices."""
SPREAD = {"L;2": 85, "L;4": 17}
"""How far apart Pillow puts the numbers of a grey PNG of 2 or 4 bits."""


@dataclass(frozen=True, slots=True)
class LabelIds:
    """What the ids in a mask file mean: class_256 (int16) is a class, IGNORE or UNKNOWN. known: in words."""

    class_256: Tensor
    known: str


def name_ids(class_of: Mapping[int, int], known: str) -> LabelIds:
    """Ids by the class they stand for. IGNORE is void in every data set; all others are unknown."""
    class_256 = torch.full((256,), UNKNOWN, dtype=torch.int16)
    for label_id, label in {**class_of, IGNORE: IGNORE}.items():
        class_256[label_id] = label
    return LabelIds(class_256, known)


def count_ids(num_classes: int, *, void: int = IGNORE) -> LabelIds:
    """Ids that are class indices already, and one for void pixels."""
    classes = {k: k for k in range(num_classes)}
    return name_ids({**classes, void: IGNORE}, f"0 to {num_classes - 1} and {void} (void) are known")


def read_picture(path: Path) -> tuple[Tensor, Tensor | None]:
    """image_3HW, RGB, by the reader that answers requests, and void_HW where the file has pixels without a measurement.

    Raises BadData.
    """
    try:
        image = open_image(path, LIMITS)
        void_HW = image.void(slice(None)) if isinstance(image, Raster) else None
        image_3HW = torch.from_numpy(image[:, :].transpose(2, 0, 1).copy())
    except (BadImage, TooLarge, OSError) as error:
        raise BadData(f"{path} cannot be read: {error}") from None
    for sentence in image.warnings if isinstance(image, Raster) else ():
        _warn(path, sentence)
    return image_3HW, None if void_HW is None else torch.from_numpy(void_HW)


@cache
def _warn(path: Path, sentence: str) -> None:
    """Say it once, however often the picture is read."""
    log.warning("%s: %s", path, sentence)


def read_mask(path: Path, ids: LabelIds) -> Tensor:
    """label_HW of class indices and IGNORE. Raises BadData naming the first unknown id."""
    id_HW = torch.from_numpy(_read_ids(path))
    label_HW = ids.class_256[id_HW.clamp(0, len(ids.class_256) - 1)]
    strangers = id_HW[(label_HW == UNKNOWN) | (id_HW >= len(ids.class_256)) | (id_HW < 0)]
    if strangers.numel():
        raise BadData(f"{path} holds the label {int(strangers[0])}; {ids.known}")
    return label_HW.to(torch.uint8)


def _read_ids(path: Path) -> np.ndarray:
    """Whole numbers [H, W], int64, turned as their picture is."""
    try:
        with Image.open(path) as picture:
            if picture.mode in INDEX_MODES:
                step = SPREAD.get(str(picture.tile[0][3]), 1) if picture.tile else 1
                return np.asarray(ImageOps.exif_transpose(picture)).astype(np.int64) // step
            mode = picture.mode
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadData(f"{path} cannot be read ({error})") from None
    raise BadData(f"{path} holds colours (Pillow's mode {mode}); a mask of class indices, grey or palette, is wanted")
