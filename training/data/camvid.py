"""CamVid in the SegNet tutorial's copy: 480x360 street scenes, 11 classes, label 11 is void.

Brostow, Fauqueur, Cipolla 2009. The folder has train/ and val/, each with images/*.jpg and masks/*.png.
"""

from pathlib import Path

from models.classes import CAMVID
from training.data.frames import Frames, load_frames

CLASSES = CAMVID
VOID = 11


def load_camvid(folder: Path, split: str) -> Frames:
    """All frames of `train` or `val`. Raises BadData."""
    return load_frames(folder / split, num_classes=len(CLASSES), void=VOID)
