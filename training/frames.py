"""Read pictures with their masks, into memory or when asked for, and lists of their names."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from penumbra.models.card import IGNORE
from penumbra.models.errors import BadData, BadImage, BadOption, TooLarge
from penumbra.serving.engine.decode import open_image
from penumbra.serving.engine.layout import Place
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
    """The meaning of the ids in a mask file: class_256 (int16) is a class, IGNORE or UNKNOWN. known: in words."""

    class_256: Tensor
    known: str


def name_ids(class_of: Mapping[int, int], known: str) -> LabelIds:
    """Name ids by the class they stand for. IGNORE is void in every data set; all others are unknown."""
    class_256 = torch.full((256,), UNKNOWN, dtype=torch.int16)
    for label_id, label in {**class_of, IGNORE: IGNORE}.items():
        class_256[label_id] = label
    return LabelIds(class_256, known)


def count_ids(num_classes: int, *, void: int = IGNORE) -> LabelIds:
    """Take ids that are class indices already, and one for void pixels."""
    classes = {k: k for k in range(num_classes)}
    return name_ids({**classes, void: IGNORE}, f"0 to {num_classes - 1} and {void} (void) are known")


class Frame(NamedTuple):
    """A picture and its label (IGNORE = void), uint8, and where the picture holds no measurement, if it says so.

    place: where it lies on the ground, if it says so. scale: at which it is to be run, whatever else is asked for.
    """

    image_3HW: Tensor
    label_HW: Tensor
    void_HW: Tensor | None = None
    place: Place | None = None
    scale: float | None = None

    def raster(self) -> Raster:
        """Give the picture as the engine takes it."""
        void_HW = None if self.void_HW is None else self.void_HW.numpy()
        raster = Raster(np.ascontiguousarray(self.image_3HW.permute(1, 2, 0).numpy()), void_HW=void_HW)
        raster.place = self.place
        return raster


@dataclass(frozen=True, slots=True)
class Frames:
    """Frames in memory: image_N3HW and label_NHW (IGNORE = void), uint8, all of one size; names, each once, in the
    same order; voids, places: of each picture, if it says so."""

    names: tuple[str, ...]
    image_N3HW: Tensor
    label_NHW: Tensor
    voids: tuple[Tensor | None, ...] = ()
    places: tuple[Place | None, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Frame:
        of_file = (some[index] if some else None for some in (self.voids, self.places))
        return Frame(self.image_N3HW[index], self.label_NHW[index], *of_file)


@dataclass(frozen=True, slots=True)
class FrameFiles:
    """Frames on disk, which may differ in size: one is read, and its mask checked, whenever it is asked for. Safe in
    many threads."""

    names: tuple[str, ...]
    pictures: tuple[Path, ...]
    masks: tuple[Path, ...]
    ids: LabelIds

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Frame:
        """Read a frame. Raises BadData: a file is unreadable, the mask is of another size or holds an unknown label."""
        image_3HW, void_HW, place = read_picture(self.pictures[index])
        label_HW = read_mask(self.masks[index], self.ids)
        if image_3HW.shape[1:] != label_HW.shape:
            raise BadData(f"{self.masks[index]} is {_size(label_HW)}; its picture is {_size(image_3HW)}")
        if void_HW is not None:
            label_HW[void_HW] = IGNORE  # the server answers no class there either
        return Frame(image_3HW, label_HW, void_HW, place)


FrameSet = Frames | FrameFiles
"""A data set's split: names, and frames by index."""


def pair_files(names: Sequence[str], pictures: Sequence[Path], masks: Sequence[Path], ids: LabelIds) -> FrameFiles:
    """List frames whose files are all there; nothing is read yet. Raises BadData naming the first that is not."""
    for picture, mask in zip(pictures, masks, strict=True):
        if not picture.is_file():
            raise BadData(f"there is no picture {picture}, which its data set lists")
        if not mask.is_file():
            raise BadData(f"{picture} has no mask; {mask} is wanted")
    return FrameFiles(tuple(names), tuple(pictures), tuple(masks), ids)


def hold(files: FrameFiles) -> Frames:
    """Read all frames into memory. Raises BadData, also where a picture's size is not that of those before it."""
    frames: list[Frame] = []
    for i, path in enumerate(files.pictures):
        frames.append(files[i])
        here, first = frames[-1][0], frames[0][0]
        if here.shape != first.shape:
            raise BadData(f"{path} is {_size(here)}; the pictures before it are {_size(first)}")
    images, labels, voids, places, _ = zip(*frames, strict=True)
    return Frames(files.names, torch.stack(images), torch.stack(labels), voids, places)


def choose(frames: FrameSet, rows: Sequence[int]) -> FrameSet:
    """Keep some of the frames, in the order of `rows`."""
    names = tuple(frames.names[i] for i in rows)
    if isinstance(frames, Frames):
        of_files = (tuple(some[i] for i in rows) if some else () for some in (frames.voids, frames.places))
        return Frames(names, frames.image_N3HW[rows], frames.label_NHW[rows], *of_files)
    pictures, masks = (tuple(paths[i] for i in rows) for paths in (frames.pictures, frames.masks))
    return FrameFiles(names, pictures, masks, frames.ids)


def hide_classes(frames: FrameSet, classes: Sequence[int]) -> FrameSet:
    """Make some classes void: their pixels have no label."""
    if isinstance(frames, Frames):
        return replace(frames, label_NHW=_hide(frames.label_NHW, classes))
    return replace(frames, ids=replace(frames.ids, class_256=_hide(frames.ids.class_256, classes)))


def _hide(labels: Tensor, classes: Sequence[int]) -> Tensor:
    return labels.masked_fill(torch.isin(labels, torch.tensor(classes, dtype=labels.dtype)), IGNORE)


def read_picture(path: Path) -> tuple[Tensor, Tensor | None, Place | None]:
    """Read image_3HW, RGB, as requests are read, void_HW where the file has unmeasured pixels, and its place.

    Raises BadData.
    """
    try:
        image = open_image(path, LIMITS)
        void_HW = image.void(slice(None))
        image_3HW = torch.from_numpy(image[:, :].transpose(2, 0, 1).copy())
    except (BadImage, TooLarge, OSError) as error:
        raise BadData(f"{path} cannot be read: {error}") from None
    for sentence in image.warnings:
        _warn(path, sentence)
    return image_3HW, None if void_HW is None else torch.from_numpy(void_HW), image.place


@cache
def _warn(path: Path, sentence: str) -> None:
    """Log a warning once, however often the picture is read."""
    log.warning("%s: %s", path, sentence)


def read_mask(path: Path, ids: LabelIds) -> Tensor:
    """Read label_HW of class indices and IGNORE. Raises BadData naming the first unknown id."""
    id_HW = torch.from_numpy(_read_ids(path))
    label_HW = ids.class_256[id_HW.clamp(0, len(ids.class_256) - 1)]
    strangers = id_HW[(label_HW == UNKNOWN) | (id_HW >= len(ids.class_256)) | (id_HW < 0)]
    if strangers.numel():
        raise BadData(f"{path} holds the label {int(strangers[0])}; {ids.known}")
    return label_HW.to(torch.uint8)


def _read_ids(path: Path) -> np.ndarray:
    """Read whole numbers [H, W], int64, turned as their picture is."""
    try:
        with Image.open(path) as picture:
            if picture.mode in INDEX_MODES:
                step = SPREAD.get(str(picture.tile[0][3]), 1) if picture.tile else 1
                return np.asarray(ImageOps.exif_transpose(picture)).astype(np.int64) // step
            mode = picture.mode
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadData(f"{path} cannot be read ({error})") from None
    raise BadData(f"{path} holds colours (Pillow's mode {mode}); a mask of class indices, grey or palette, is wanted")


def find_prefixed(frames: FrameSet, prefix: str) -> list[int]:
    """Find the frames whose names begin with `prefix`. Raises BadData: there are none."""
    rows = [row for row, name in enumerate(frames.names) if name.startswith(prefix)]
    if not rows:
        raise BadData(f"no frame's name begins with {prefix!r}; {frames.names[0]} is one of {len(frames)}")
    return rows


def find_listed(path: Path, names: Sequence[str]) -> list[int]:
    """Find where the names of a list are among `names`. Raises BadData."""
    listed, index = read_list(path), {name: i for i, name in enumerate(names)}
    for name in listed:
        if name not in index:
            raise BadData(f"{path} lists {name!r}, which is none of the {len(index)} frames")
    return [index[name] for name in listed]


def read_list(path: Path) -> list[str]:
    """Read names, one per line. Raises BadData: no such text file, no name in it, or a name twice."""
    try:
        names = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
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


def _size(array: Tensor) -> str:
    return f"{array.shape[-1]}x{array.shape[-2]} px"
