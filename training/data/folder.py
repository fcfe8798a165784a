"""A plain folder: images/ in the formats that the server reads, masks/ of the same names, and classes.txt.

A mask is a PNG of class indices, 255 where there is no label. The two splits are train/ and
val/ with an images/ and a masks/ each, or the lists train.txt and val.txt of names. A folder without either is all
validation.
"""

from itertools import pairwise
from pathlib import Path

from penumbra.models.card import ClassInfo
from penumbra.models.classes import read_classes
from penumbra.models.errors import BadData
from penumbra.serving.engine.decode import SUFFIXES
from penumbra.training.data.files import LabelIds, count_ids
from penumbra.training.data.frames import FrameFiles, find_listed, pair_files


def read_folder_classes(folder: Path) -> tuple[ClassInfo, ...]:
    """The classes that `classes.txt` names, one per line. Raises BadData, BadOption."""
    path = folder / "classes.txt"
    if not path.is_file():
        raise BadData(f"there is no {path}; a plain folder names its classes in it, one per line")
    return read_classes(str(path))


def load_folder(folder: Path, split: str) -> FrameFiles:
    """The frames of `train` or `val`, read when asked for. Raises BadData."""
    ids = count_ids(len(read_folder_classes(folder)))
    if (folder / split).is_dir():
        return find_pairs(folder / split, ids)
    frames, listed = find_pairs(folder, ids), folder / f"{split}.txt"
    if listed.is_file():
        return _keep(frames, listed)
    if split == "train":
        raise BadData(f"{folder} has neither train/ nor train.txt; its training frames are wanted")
    return frames


def find_pairs(folder: Path, ids: LabelIds) -> FrameFiles:
    """All pictures of `folder/images` with their masks of `folder/masks`. Raises BadData."""
    pictures = sorted(p for p in (folder / "images").glob("*") if p.suffix.lower() in SUFFIXES)
    if not pictures:
        raise BadData(
            f"{folder / 'images'} holds no pictures ({', '.join(SUFFIXES)}); a folder with images/ and masks/ is wanted"
        )
    names = [path.stem for path in pictures]
    for name, after in pairwise(sorted(names)):
        if name == after:
            raise BadData(f"{folder / 'images'} holds several pictures called {name}, which would share one mask")
    return pair_files(names, pictures, [folder / "masks" / f"{name}.png" for name in names], ids)


def _keep(frames: FrameFiles, listed: Path) -> FrameFiles:
    """The frames that a list names, in its order."""
    rows = find_listed(listed, frames.names)
    names = tuple(frames.names[i] for i in rows)
    pictures, masks = tuple(frames.pictures[i] for i in rows), tuple(frames.masks[i] for i in rows)
    return FrameFiles(names, pictures, masks, frames.ids)
