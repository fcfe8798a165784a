"""PASCAL VOC 2012 (Everingham et al. 2010): objects of 20 classes and a background, palette masks, 255 is void.

The folder is VOC2012 itself: JPEGImages/, SegmentationClass/ and the lists of ImageSets/Segmentation/.
"""

from pathlib import Path

from penumbra.models.classes import VOC
from penumbra.training.data.files import count_ids
from penumbra.training.data.frames import FrameFiles, pair_files, read_list

CLASSES = VOC


def load_voc(folder: Path, split: str) -> FrameFiles:
    """The frames that `train.txt` or `val.txt` lists, read when asked for. Raises BadData."""
    names = read_list(folder / "ImageSets" / "Segmentation" / f"{split}.txt")
    pictures = [folder / "JPEGImages" / f"{name}.jpg" for name in names]
    masks = [folder / "SegmentationClass" / f"{name}.png" for name in names]
    return pair_files(names, pictures, masks, count_ids(len(CLASSES)))
