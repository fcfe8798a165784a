"""Pictures with their masks: held in memory or read when asked for, and which of them count as labelled."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from penumbra.models.card import IGNORE
from penumbra.models.errors import BadData, BadOption
from penumbra.training.data.files import LabelIds, read_mask, read_picture


class FrameSet(Protocol):
    """What training and evaluation ask of a data set's split: names, and frames by index."""

    @property
    def names(self) -> tuple[str, ...]:
        """The frames' names, each once."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """image_3HW and label_HW (IGNORE = void), both uint8, of one frame; frames may differ in size."""


@dataclass(frozen=True, slots=True)
class Frames:
    """Frames in memory: image_N3HW and label_NHW (IGNORE = void), uint8, all of one size; names in the same order."""

    names: tuple[str, ...]
    image_N3HW: Tensor
    label_NHW: Tensor

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.image_N3HW[index], self.label_NHW[index]


@dataclass(frozen=True, slots=True)
class FrameFiles:
    """Frames on disk: one is read, and its mask checked, whenever it is asked for. Safe in many threads."""

    names: tuple[str, ...]
    pictures: tuple[Path, ...]
    masks: tuple[Path, ...]
    ids: LabelIds

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Raises BadData: a file is unreadable, the mask is of another size or holds an unknown label."""
        (image_3HW, void_HW), label_HW = read_picture(self.pictures[index]), read_mask(self.masks[index], self.ids)
        if image_3HW.shape[1:] != label_HW.shape:
            raise BadData(f"{self.masks[index]} is {_size(label_HW)}; its picture is {_size(image_3HW)}")
        if void_HW is not None:
            label_HW[void_HW] = IGNORE  # the server answers no class there either
        return image_3HW, label_HW


def pair_files(names: Sequence[str], pictures: Sequence[Path], masks: Sequence[Path], ids: LabelIds) -> FrameFiles:
    """Frames whose files are all there; nothing is read yet. Raises BadData naming the first that is not."""
    for picture, mask in zip(pictures, masks, strict=True):
        if not picture.is_file():
            raise BadData(f"there is no picture {picture}, which its data set lists")
        if not mask.is_file():
            raise BadData(f"{picture} has no mask; {mask} is wanted")
    return FrameFiles(tuple(names), tuple(pictures), tuple(masks), ids)


def hold(files: FrameFiles) -> Frames:
    """All frames read into memory. Raises BadData, also where a picture's size is not that of those before it."""
    frames: list[tuple[Tensor, Tensor]] = []
    for i, path in enumerate(files.pictures):
        frames.append(files[i])
        here, first = frames[-1][0], frames[0][0]
        if here.shape != first.shape:
            raise BadData(f"{path} is {_size(here)}; the pictures before it are {_size(first)}")
    images, labels = zip(*frames, strict=True)
    return Frames(files.names, torch.stack(images), torch.stack(labels))


def split_labelled(frames: FrameSet, *, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the labelled and of the unlabelled frames (all frames, if every one is labelled).

    A fraction of exactly 0 leaves no labels, for methods that live on weak ones.
    """
    count = round(fraction * len(frames))
    if not (1 <= count <= len(frames) or fraction == 0):
        raise BadOption(f"labelled_fraction {fraction} leaves {count} of {len(frames)} frames; at least 1 is needed")
    return _divide(torch.randperm(len(frames), generator=torch.Generator().manual_seed(seed)), count)


def read_split(path: Path, frames: FrameSet) -> tuple[Tensor, Tensor]:
    """As `split_labelled`, the labelled ones being those that a file names, one per line, as `write_split` does.

    Raises BadData: the list cannot be read, is empty, or names a frame twice or one that is not there.
    """
    chosen = find_listed(path, frames.names)
    rest = sorted(set(range(len(frames))) - set(chosen))
    return _divide(torch.tensor(chosen + rest), len(chosen))


def find_listed(path: Path, names: Sequence[str]) -> list[int]:
    """Where the names of a list are among `names`. Raises BadData."""
    listed, index = read_list(path), {name: i for i, name in enumerate(names)}
    for name in listed:
        if name not in index:
            raise BadData(f"{path} lists {name!r}, which is none of the {len(index)} frames")
    return [index[name] for name in listed]


def read_list(path: Path) -> list[str]:
    """Names, one per line. Raises BadData: no such text file, no name in it, or a name twice."""
    try:
        names = path.read_text("utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(f"the list {path} cannot be read ({error})") from None
    if not names:
        raise BadData(f"the list {path} is empty; one name per line is wanted")
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise BadData(f"the list {path} holds {twice!r} twice")
    return names


def write_split(path: Path, frames: FrameSet, labelled: Tensor, *, replace: bool = True) -> None:
    """Write the names of the labelled frames, one per line.

    replace: whether a file that is there may be another list. Raises BadOption where it may not, and is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(f"{frames.names[i]}\n" for i in labelled.tolist()).encode()
    if not replace and path.exists() and path.read_bytes() != data:
        raise BadOption(f"{path} is in the way, and lists other frames than this training has; move it away")
    path.write_bytes(data)


def _divide(order: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` and the rest, both sorted; all are the rest where nothing else is left."""
    rest = order[count:] if count < len(order) else order
    return order[:count].sort().values, rest.sort().values


def _size(array: Tensor) -> str:
    return f"{array.shape[-1]}x{array.shape[-2]} px"
