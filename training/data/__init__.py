"""Data sets by the name a recipe gives them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models.card import ClassInfo
from models.errors import BadOption
from training.data import camvid, shapes
from training.data.frames import Frames

Split = Literal["train", "val"]


@dataclass(frozen=True, slots=True)
class DataSet:
    """Classes of a data set, its licence for the card, and how to load a split from its folder."""

    title: str
    licence: str
    classes: tuple[ClassInfo, ...]
    load: Callable[[Path, Split], Frames]


DATA_SETS = {
    "camvid": DataSet("CamVid", "CC BY-NC (CamVid): research, non-commercial use", camvid.CLASSES, camvid.load_camvid),
    "shapes": DataSet("procedural shapes", "none needed", shapes.CLASSES, shapes.draw_split),
}


def find_data(name: str) -> DataSet:
    """The data set called `name`. Raises BadOption naming the known ones."""
    if name not in DATA_SETS:
        raise BadOption(f"there is no data set {name!r}; known are {', '.join(sorted(DATA_SETS))}")
    return DATA_SETS[name]
