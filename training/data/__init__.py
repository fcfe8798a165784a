"""Data sets by the name a recipe gives them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from penumbra.models.card import ClassInfo
from penumbra.models.errors import BadOption
from penumbra.training.data import camvid, cityscapes, folder, shapes, voc
from penumbra.training.data.frames import FrameSet

Split = Literal["train", "val"]


@dataclass(frozen=True, slots=True)
class DataSet:
    """Classes of a data set, its licence for the card, and how to load a split from its folder."""

    title: str
    licence: str
    classes: tuple[ClassInfo, ...]
    load: Callable[[Path, Split], FrameSet]


DATA_SETS = {
    "camvid": DataSet("CamVid", "CC BY-NC (CamVid): research, non-commercial use", camvid.CLASSES, camvid.load_camvid),
    "cityscapes": DataSet(
        "Cityscapes", "Cityscapes terms: non-commercial use", cityscapes.CLASSES, cityscapes.load_cityscapes
    ),
    "shapes": DataSet("procedural shapes", "none needed", shapes.CLASSES, shapes.draw_split),
    "voc": DataSet("PASCAL VOC 2012", "Flickr terms of use (pictures of VOC)", voc.CLASSES, voc.load_voc),
}
FOLDER = "folder"
"""The name of data whose classes are in its own folder."""


def find_data(name: str, place: Path = Path()) -> DataSet:
    """The data set called `name`; `folder` is what lies at `place`.

    Raises BadOption naming the known ones, and BadData where a plain folder does not name its classes.
    """
    if name == FOLDER:
        return DataSet(place.resolve().name, "unknown", folder.read_folder_classes(place), folder.load_folder)
    if name not in DATA_SETS:
        raise BadOption(f"there is no data set {name!r}; known are {', '.join(sorted({*DATA_SETS, FOLDER}))}")
    return DATA_SETS[name]
