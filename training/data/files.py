"""Files to uint8 tensors: pictures, and masks whose ids become class indices."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from penumbra.models.card import IGNORE
from penumbra.models.errors import BadData

UNKNOWN = -1


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


def read_picture(path: Path) -> Tensor:
    """image_3HW, RGB. Raises BadData."""
    return torch.from_numpy(_read(path, "RGB")).permute(2, 0, 1).contiguous()


def read_mask(path: Path, ids: LabelIds) -> Tensor:
    """label_HW of class indices and IGNORE. Raises BadData naming the first unknown id."""
    id_HW = torch.from_numpy(_read(path, "L")).long()
    label_HW = ids.class_256[id_HW]
    strangers = id_HW[label_HW == UNKNOWN]
    if strangers.numel():
        raise BadData(f"{path} holds the label {int(strangers[0])}; {ids.known}")
    return label_HW.to(torch.uint8)


def _read(path: Path, mode: str) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            # A palette mask stores its labels as indices, which a conversion to grey would destroy.
            return np.array(picture if mode == "L" and picture.mode in ("L", "P") else picture.convert(mode))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise BadData(f"{path} cannot be read ({error})") from None
