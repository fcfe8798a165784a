"""Cityscapes (Cordts et al. 2016), fine annotations: 2048x1024 street scenes, 19 of the 34 label ids are classes.

The folder has leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and gtFine/SPLIT/CITY/*_gtFine_labelIds.png, or
*_gtFine_labelTrainIds.png, whose ids are the 19 classes already.
"""

from pathlib import Path

from penumbra.models.card import IGNORE
from penumbra.models.classes import CITYSCAPES
from penumbra.models.errors import BadData
from penumbra.training.data.files import count_ids, name_ids
from penumbra.training.data.frames import FrameFiles, pair_files

CLASSES = CITYSCAPES
NUM_IDS = 34
CLASS_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The label id of every class; the other ids are void."""
PICTURE, TRAIN_IDS, LABEL_IDS = "_leftImg8bit.png", "_gtFine_labelTrainIds.png", "_gtFine_labelIds.png"


def load_cityscapes(folder: Path, split: str) -> FrameFiles:
    """The frames of `train` or `val`, named city/frame, read when asked for. Raises BadData."""
    pictures = sorted((folder / "leftImg8bit" / split).glob(f"*/*{PICTURE}"))
    if not pictures:
        raise BadData(f"{folder / 'leftImg8bit' / split} holds no CITY/*{PICTURE} pictures")
    names = [f"{path.parent.name}/{path.name.removesuffix(PICTURE)}" for path in pictures]
    masks = folder / "gtFine" / split
    if any(masks.glob(f"*/*{TRAIN_IDS}")):
        return pair_files(names, pictures, [masks / f"{name}{TRAIN_IDS}" for name in names], count_ids(len(CLASSES)))
    class_of = dict.fromkeys(range(NUM_IDS), IGNORE) | {i: k for k, i in enumerate(CLASS_IDS)}
    ids = name_ids(class_of, f"the label ids 0 to {NUM_IDS - 1} are known")
    return pair_files(names, pictures, [masks / f"{name}{LABEL_IDS}" for name in names], ids)
