"""CamVid in the SegNet tutorial's copy: 480x360 street scenes, 11 classes, label 11 is void.

Brostow, Fauqueur, Cipolla 2009. The folder has train/ and val/, each with images/*.jpg and masks/*.png.
"""

from pathlib import Path

from models.card import ClassInfo
from training.data.frames import Frames, load_frames

CLASSES = (
    ClassInfo("Sky", (128, 128, 128)),
    ClassInfo("Building", (128, 0, 0)),
    ClassInfo("Pole", (192, 192, 128)),
    ClassInfo("Road", (128, 64, 128)),
    ClassInfo("Pavement", (60, 40, 222)),
    ClassInfo("Tree", (128, 128, 0)),
    ClassInfo("SignSymbol", (192, 128, 128)),
    ClassInfo("Fence", (64, 64, 128)),
    ClassInfo("Car", (64, 0, 128)),
    ClassInfo("Pedestrian", (64, 64, 0)),
    ClassInfo("Bicyclist", (0, 128, 192)),
)
VOID = 11


def load_camvid(folder: Path, split: str) -> Frames:
    """All frames of `train` or `val`. Raises BadData."""
    return load_frames(folder / split, num_classes=len(CLASSES), void=VOID)
