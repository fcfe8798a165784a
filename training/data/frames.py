"""Pictures with their masks as uint8 tensors in memory, and which of them count as labelled."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.card import IGNORE
from models.errors import BadData, BadOption


@dataclass(frozen=True, slots=True)
class Frames:
    """image_N3HW and label_NHW (IGNORE = void), both uint8, all of one size; names in the same order."""

    names: tuple[str, ...]
    image_N3HW: Tensor
    label_NHW: Tensor

    def __len__(self) -> int:
        return len(self.names)


def load_frames(folder: Path, *, num_classes: int, void: int) -> Frames:
    """Read `folder/images/*.jpg` with `folder/masks/*.png`; label `void` becomes IGNORE.

    Raises BadData naming the first file that is missing, unreadable, of another size or of unknown labels.
    """
    pictures = sorted((folder / "images").glob("*.jpg"))
    if not pictures:
        raise BadData(f"{folder / 'images'} holds no .jpg pictures; a folder with images/ and masks/ is wanted")
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for path in pictures:
        mask_path = folder / "masks" / f"{path.stem}.png"
        if not mask_path.is_file():
            raise BadData(f"{path} has no mask; {mask_path} is wanted")
        image_3HW, label_HW = _read_image(path), _read_mask(mask_path, num_classes=num_classes, void=void)
        if image_3HW.shape[1:] != label_HW.shape:
            raise BadData(f"{mask_path} is {_size(label_HW)}; its picture is {_size(image_3HW)}")
        if images and image_3HW.shape != images[0].shape:
            raise BadData(f"{path} is {_size(image_3HW)}; the pictures before it are {_size(images[0])}")
        images.append(image_3HW)
        labels.append(label_HW)
    return Frames(tuple(p.stem for p in pictures), torch.stack(images), torch.stack(labels))


def split_labelled(frames: Frames, *, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the labelled and of the unlabelled frames (all frames, if every one is labelled)."""
    count = round(fraction * len(frames))
    if not 1 <= count <= len(frames):
        raise BadOption(f"labelled_fraction {fraction} leaves {count} of {len(frames)} frames; at least 1 is needed")
    order = torch.randperm(len(frames), generator=torch.Generator().manual_seed(seed))
    rest = order[count:] if count < len(frames) else order
    return order[:count].sort().values, rest.sort().values


def write_split(path: Path, frames: Frames, labelled: Tensor) -> None:
    """Write the names of the labelled frames, one per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{frames.names[i]}\n" for i in labelled.tolist()))


def _read_image(path: Path) -> Tensor:
    return torch.from_numpy(_read(path, "RGB")).permute(2, 0, 1).contiguous()


def _read_mask(path: Path, *, num_classes: int, void: int) -> Tensor:
    label_HW = torch.from_numpy(_read(path, "L"))
    label_HW[label_HW == void] = IGNORE
    unknown = label_HW[(label_HW >= num_classes) & (label_HW != IGNORE)]
    if unknown.numel():
        raise BadData(f"{path} holds the label {int(unknown[0])}; 0 to {num_classes - 1} and {void} (void) are known")
    return label_HW


def _read(path: Path, mode: str) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            # A palette mask stores its labels as indices, which a conversion to grey would destroy.
            return np.array(picture if mode == "L" and picture.mode in ("L", "P") else picture.convert(mode))
    except OSError as error:
        raise BadData(f"{path} cannot be read ({error})") from None


def _size(array: Tensor) -> str:
    return f"{array.shape[-1]}x{array.shape[-2]} px"
