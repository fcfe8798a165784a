"""Each layout of files is read as its data set publishes it, frame by frame; what is wrong is named with its file."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from penumbra.models.card import IGNORE, ClassInfo
from penumbra.models.errors import BadData
from penumbra.training.data import CITYSCAPES_IDS, find_data
from penumbra.training.frames import find_listed, write_split


def _save(path: Path, mode: str, color: tuple[int, int, int] | int, *, size: tuple[int, int] = (6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)
    return path


def _voc(folder: Path, *, label: int = 20) -> Path:
    """Two listed frames of different sizes and one that is not listed; the mask of the first is returned."""
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000032\n2007_000039\n")
    for name, size in (("2007_000032", (6, 4)), ("2007_000039", (4, 8)), ("2007_000001", (4, 8))):
        _save(folder / "JPEGImages" / f"{name}.jpg", "RGB", (90, 90, 90), size=size)
        mask = Image.new("P", size, label)
        mask.putpalette([value for k in range(256) for value in (255 - k, k, 7)])
        mask.putpixel((0, 0), 255)
        path = folder / "SegmentationClass" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        mask.save(path)
    return folder / "SegmentationClass" / "2007_000032.png"


def _cityscapes(folder: Path, *, label: int = 26, kind: str = "labelIds") -> Path:
    for city in ("aachen", "bochum"):
        _save(folder / "leftImg8bit" / "train" / city / f"{city}_0_leftImg8bit.png", "RGB", (10, 20, 30))
        _save(folder / "gtFine" / "train" / city / f"{city}_0_gtFine_{kind}.png", "L", label)
    return folder / "gtFine" / "train" / "aachen" / f"aachen_0_gtFine_{kind}.png"


def _folder(folder: Path, *, label: int = 1) -> Path:
    (folder / "classes.txt").write_text("soil\nred clover\n")
    for name in ("a.png", "b.jpg"):
        _save(folder / "images" / name, "RGB", (10, 20, 30))
        _save(folder / "masks" / f"{name[0]}.png", "L", label)
    return folder / "masks" / "a.png"


def test_voc_reads_listed_frames_of_any_size_with_palette_masks(tmp_path: Path) -> None:
    _voc(tmp_path)
    data = find_data("voc")
    frames = data.load(tmp_path, "train")
    assert frames.names == ("2007_000032", "2007_000039") and len(frames) == 2
    image_3HW, label_HW, *_ = frames[1]
    assert image_3HW.shape == (3, 8, 4) and label_HW.shape == (8, 4)
    assert image_3HW.dtype == label_HW.dtype == torch.uint8
    assert label_HW[0, 0] == IGNORE and (label_HW.flatten()[1:] == 20).all()
    assert data.classes[20].name == "tv monitor" and data.classes[0].name == "background"


def test_voc_without_its_list_is_refused(tmp_path: Path) -> None:
    _voc(tmp_path)
    with pytest.raises(BadData, match=r"the list .*val\.txt cannot be read"):
        find_data("voc").load(tmp_path, "val")


def test_a_listed_picture_that_is_not_there_is_named(tmp_path: Path) -> None:
    _voc(tmp_path)
    (tmp_path / "JPEGImages" / "2007_000039.jpg").unlink()
    with pytest.raises(BadData, match=r"there is no picture .*2007_000039\.jpg"):
        find_data("voc").load(tmp_path, "train")


def test_cityscapes_label_ids_become_the_nineteen_classes(tmp_path: Path) -> None:
    path = _cityscapes(tmp_path)
    mask = Image.new("L", (34, 1))
    mask.putdata(list(range(34)))
    mask.save(path)
    _save(tmp_path / "leftImg8bit" / "train" / "aachen" / "aachen_0_leftImg8bit.png", "RGB", (1, 2, 3), size=(34, 1))
    frames = find_data("cityscapes").load(tmp_path, "train")
    assert frames.names == ("aachen/aachen_0", "bochum/bochum_0")
    expected = [CITYSCAPES_IDS.index(i) if i in CITYSCAPES_IDS else IGNORE for i in range(34)]
    assert frames[0][1].flatten().tolist() == expected
    assert find_data("cityscapes").classes[int(frames[1][1][0, 0])].name == "car"  # label id 26


def test_cityscapes_train_ids_are_read_as_they_are(tmp_path: Path) -> None:
    _cityscapes(tmp_path, label=18, kind="labelTrainIds")
    assert (find_data("cityscapes").load(tmp_path, "train")[0][1] == 18).all()


def test_a_plain_folder_names_its_classes(tmp_path: Path) -> None:
    _folder(tmp_path)
    data = find_data("folder", tmp_path)
    assert data.title == tmp_path.name
    assert data.classes == (ClassInfo("soil", (0, 0, 0)), ClassInfo("red clover", (128, 0, 0)))
    assert data.load(tmp_path, "val").names == ("a", "b")


def test_a_plain_folder_is_split_by_lists(tmp_path: Path) -> None:
    _folder(tmp_path)
    (tmp_path / "train.txt").write_text("b\n")
    frames = find_data("folder", tmp_path).load(tmp_path, "train")
    assert frames.names == ("b",) and frames[0][0].shape == (3, 4, 6)


def test_a_plain_folder_is_split_by_folders(tmp_path: Path) -> None:
    _folder(tmp_path)
    _save(tmp_path / "train" / "images" / "c.png", "RGB", (0, 0, 0))
    _save(tmp_path / "train" / "masks" / "c.png", "L", 0)
    assert find_data("folder", tmp_path).load(tmp_path, "train").names == ("c",)


def test_a_plain_folder_without_splits_cannot_be_trained_on(tmp_path: Path) -> None:
    _folder(tmp_path)
    with pytest.raises(BadData, match=r"has neither train/ nor train\.txt"):
        find_data("folder", tmp_path).load(tmp_path, "train")


def test_a_split_that_is_not_there_is_never_all_frames(tmp_path: Path) -> None:
    _folder(tmp_path)
    for split in ("vla", "test"):
        with pytest.raises(BadData, match=rf"has neither {split}/ nor {split}\.txt"):
            find_data("folder", tmp_path).load(tmp_path, split)
    (tmp_path / "train.txt").write_text("b\n")
    with pytest.raises(BadData, match=r"has neither val/ nor val\.txt"):
        find_data("folder", tmp_path).load(tmp_path, "val")
    with pytest.raises(BadData, match="no split 'test'; there are train and val"):
        find_data("shapes").load(tmp_path, "test")


def test_a_name_with_a_blank_is_one_name_in_a_list(tmp_path: Path) -> None:
    _folder(tmp_path)
    _save(tmp_path / "images" / "a b.png", "RGB", (10, 20, 30))
    _save(tmp_path / "masks" / "a b.png", "L", 1)
    (tmp_path / "train.txt").write_bytes(b"\xef\xbb\xbfa b\r\n")
    frames = find_data("folder", tmp_path).load(tmp_path, "train")
    assert frames.names == ("a b",)
    write_split(tmp_path / "labelled.txt", frames, torch.tensor([0]))
    assert find_listed(tmp_path / "labelled.txt", frames.names) == [0]


def test_a_plain_folder_without_class_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"there is no .*classes\.txt"):
        find_data("folder", tmp_path)


LAYOUTS = [
    ("voc", "train", _voc, r"holds the label 21; 0 to 20 and 255 \(void\) are known$", 21),
    ("cityscapes", "train", _cityscapes, r"holds the label 34; the label ids 0 to 33 are known$", 34),
    ("folder", "val", _folder, r"holds the label 2; 0 to 1 and 255 \(void\) are known$", 2),
]


@pytest.mark.parametrize(("name", "split", "write", "sentence", "label"), LAYOUTS, ids=lambda value: str(value)[:10])
def test_every_layout_names_the_mask_that_is_wrong(
    name: str, split: str, write: Callable[..., Path], sentence: str, label: int, tmp_path: Path
) -> None:
    mask = write(tmp_path, label=label)
    load = find_data(name, tmp_path).load
    with pytest.raises(BadData, match=f"{mask.name} {sentence}"):
        load(tmp_path, split)[0]
    _save(mask, "L", 0, size=(5, 4))
    with pytest.raises(BadData, match=rf"{mask.name} is 5x4 px; its picture is 6x4 px$"):
        load(tmp_path, split)[0]
    mask.write_text("no picture")
    with pytest.raises(BadData, match=f"{mask.name} cannot be read"):
        load(tmp_path, split)[0]
    mask.unlink()
    with pytest.raises(BadData, match=f"has no mask; .*{mask.name} is wanted$"):
        load(tmp_path, split)


def test_files_are_read_only_when_they_are_asked_for(tmp_path: Path) -> None:
    mask = _voc(tmp_path)
    frames = find_data("voc").load(tmp_path, "train")
    mask.write_text("no picture")
    assert frames[1][1].shape == (8, 4)
    with pytest.raises(BadData, match=mask.name):
        frames[0]
