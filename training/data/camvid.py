"""CamVid in the SegNet tutorial's copy: 480x360 street scenes, 11 classes, label 11 is void.

Brostow, Fauqueur, Cipolla 2009. The folder has train/ and val/, each with images/*.jpg and masks/*.png.
"""

from pathlib import Path

from penumbra.models.classes import CAMVID
from penumbra.training.data.files import count_ids
from penumbra.training.data.folder import find_pairs
from penumbra.training.data.frames import Frames, hold

CLASSES = CAMVID
VOID = 11


def load_camvid(folder: Path, split: str) -> Frames:
    """All frames of `train` or `val`, in memory. Raises BadData."""
    return hold(find_pairs(folder / split, count_ids(len(CLASSES), void=VOID)))
