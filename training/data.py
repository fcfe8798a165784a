"""Data sets by the name that a recipe gives them: classes, licence, and where pictures and masks lie in a folder."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from penumbra.models.card import IGNORE, Card, ClassInfo
from penumbra.models.classes import CAMVID, CITYSCAPES, VOC, read_classes
from penumbra.models.errors import BadData, BadOption
from penumbra.serving.engine.decode import SUFFIXES
from penumbra.training import shapes
from penumbra.training.frames import (
    FrameFiles,
    Frames,
    FrameSet,
    LabelIds,
    choose,
    count_ids,
    find_listed,
    find_prefixed,
    hide_classes,
    hold,
    name_ids,
    pair_files,
    read_list,
)

FOLDER = "folder"
"""The name of data whose classes are in its own folder."""
CAMVID_VOID = 11
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The label id of every class; the other ids are void."""
NUM_CITYSCAPES_IDS = 34
PICTURE, TRAIN_IDS, LABEL_IDS = "_leftImg8bit.png", "_gtFine_labelTrainIds.png", "_gtFine_labelIds.png"


@dataclass(frozen=True, slots=True)
class DataSet:
    """A data set: its classes, its licence for the card, and how to load `train` or `val` from its folder."""

    title: str
    licence: str
    classes: tuple[ClassInfo, ...]
    load: Callable[[Path, str], FrameSet]


def find_data(name: str, folder: Path = Path()) -> DataSet:
    """Find the data set called `name`; that of the name `folder` is what lies in the folder.

    Raises BadOption naming the known ones, and BadData where a plain folder does not name its classes.
    """
    if name == FOLDER:
        return DataSet(folder.resolve().name, "unknown", read_folder_classes(folder), load_folder)
    if name not in DATA_SETS:
        raise BadOption(f"there is no data set {name!r}; known are {', '.join(sorted({*DATA_SETS, FOLDER}))}")
    return DATA_SETS[name]


def find_left_out(card: Card, data: DataSet, split: str = "train") -> list[str]:
    """Find what each training on this split that a card tells of left out of it, as it says; nothing is empty."""
    left_out = r"(?: without (.*?(?=, \d+ of )|.*?))?, "
    return re.findall(rf"(?:^|[:;] ){re.escape(data.title)} {re.escape(split)}{left_out}", card.provenance.data)


def has_no_class(left_out: str, name: str) -> bool:
    """Tell whether a class is among what was left out; its name may have commas and an "and"."""
    return bool(re.search(rf"(?:^| and ){re.escape(name)}(?: and |$)", left_out))


def has_no_frames(left_out: str, prefix: str, data: DataSet) -> bool:
    """Tell whether all frames whose names begin so are among what was left out."""
    classes = {"", *(info.name for info in data.classes)}
    return any(prefix.startswith(part) for part in left_out.split(" and ") if part not in classes)


def load_split(data: DataSet, folder: Path, split: str) -> FrameSet:
    """Load a split, or the part `split/prefix` of it whose frames' names begin so: a drive, a city.

    Raises BadData, also where no name begins so.
    """
    split, _, prefix = split.partition("/")
    frames = data.load(folder, split)
    return choose(frames, find_prefixed(frames, prefix)) if prefix else frames


def load_training(data: DataSet, folder: Path, *, void_classes: Sequence[str] = ()) -> tuple[FrameSet, FrameSet]:
    """Load what a training sees, train and val, without labels of `void_classes` in either.

    Raises BadData. Raises BadOption: there is no such class.
    """
    train, val = data.load(folder, "train"), data.load(folder, "val")
    names = [info.name for info in data.classes]
    if unknown := [name for name in void_classes if name not in names]:
        raise BadOption(f"void_classes has {unknown[0]!r}; the classes are {', '.join(names)}")
    hidden = [names.index(name) for name in void_classes]
    return (hide_classes(train, hidden), hide_classes(val, hidden)) if hidden else (train, val)


def load_camvid(folder: Path, split: str) -> Frames:
    """Load CamVid (Brostow et al. 2009), the SegNet tutorial's copy, into memory: 480x360 street scenes, 11 is void.

    The folder has train/ and val/, each with images/*.jpg and masks/*.png. Raises BadData.
    """
    return hold(find_pairs(folder / split, count_ids(len(CAMVID), void=CAMVID_VOID)))


def load_cityscapes(folder: Path, split: str) -> FrameFiles:
    """List Cityscapes (Cordts et al. 2016), fine annotations: 2048x1024 street scenes, 19 of 34 label ids are classes.

    The folder has leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and gtFine/SPLIT/CITY/*_gtFine_labelIds.png, or
    *_gtFine_labelTrainIds.png, whose ids are the 19 classes already. Frames are named city/frame. Raises BadData.
    """
    pictures = sorted((folder / "leftImg8bit" / split).glob(f"*/*{PICTURE}"))
    if not pictures:
        raise BadData(f"{folder / 'leftImg8bit' / split} holds no CITY/*{PICTURE} pictures")
    names = [f"{path.parent.name}/{path.name.removesuffix(PICTURE)}" for path in pictures]
    masks = folder / "gtFine" / split
    if any(masks.glob(f"*/*{TRAIN_IDS}")):
        return pair_files(names, pictures, [masks / f"{name}{TRAIN_IDS}" for name in names], count_ids(len(CITYSCAPES)))
    class_of = dict.fromkeys(range(NUM_CITYSCAPES_IDS), IGNORE) | {i: k for k, i in enumerate(CITYSCAPES_IDS)}
    ids = name_ids(class_of, f"the label ids 0 to {NUM_CITYSCAPES_IDS - 1} are known")
    return pair_files(names, pictures, [masks / f"{name}{LABEL_IDS}" for name in names], ids)


def load_voc(folder: Path, split: str) -> FrameFiles:
    """List PASCAL VOC 2012 (Everingham et al. 2010): 20 classes and a background, palette masks, 255 is void.

    The folder is VOC2012 itself: JPEGImages/, SegmentationClass/ and the lists of ImageSets/Segmentation/, which name
    the frames. Raises BadData.
    """
    names = read_list(folder / "ImageSets" / "Segmentation" / f"{split}.txt")
    pictures = [folder / "JPEGImages" / f"{name}.jpg" for name in names]
    masks = [folder / "SegmentationClass" / f"{name}.png" for name in names]
    return pair_files(names, pictures, masks, count_ids(len(VOC)))


def load_folder(folder: Path, split: str) -> FrameSet:
    """List a plain folder: images/ in the formats that the server reads, masks/ of the same names, and classes.txt.

    A mask is a PNG of class indices, 255 where there is no label. The two splits are train/ and val/ with an images/
    and a masks/ each, or the lists train.txt and val.txt of names. A folder without either is all validation.
    Raises BadData.
    """
    ids = count_ids(len(read_folder_classes(folder)))
    if (folder / split).is_dir():
        return find_pairs(folder / split, ids)
    frames, listed = find_pairs(folder, ids), folder / f"{split}.txt"
    if listed.is_file():
        return choose(frames, find_listed(listed, frames.names))
    if split != "val" or (folder / "train.txt").is_file():
        raise BadData(f"{folder} has neither {split}/ nor {split}.txt; its {split} frames are wanted")
    return frames


def read_folder_classes(folder: Path) -> tuple[ClassInfo, ...]:
    """Read the classes that `classes.txt` names, one per line. Raises BadData, BadOption."""
    path = folder / "classes.txt"
    if not path.is_file():
        raise BadData(f"there is no {path}; a plain folder names its classes in it, one per line")
    return read_classes(str(path))


def find_pairs(folder: Path, ids: LabelIds) -> FrameFiles:
    """Pair all pictures of `folder/images` with their masks of `folder/masks`. Raises BadData."""
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


DATA_SETS = {
    "camvid": DataSet("CamVid", "CC BY-NC (CamVid): research, non-commercial use", CAMVID, load_camvid),
    "cityscapes": DataSet("Cityscapes", "Cityscapes terms: non-commercial use", CITYSCAPES, load_cityscapes),
    "shapes": DataSet("procedural shapes", "none needed", shapes.CLASSES, shapes.draw_split),
    "voc": DataSet("PASCAL VOC 2012", "Flickr terms of use (pictures of VOC)", VOC, load_voc),
}
