"""Frames are read whole or refused with a sentence; the split depends on fraction and seed, or on a list, alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from penumbra.models.card import IGNORE
from penumbra.models.errors import BadData, BadOption
from penumbra.training.batches import Batches, choose_split
from penumbra.training.data import find_data
from penumbra.training.data.camvid import CLASSES, VOID, load_camvid
from penumbra.training.data.frames import read_split, split_labelled, write_split
from tests.training import tiny


def _write_pair(folder: Path, name: str, *, label: int = 3, size: tuple[int, int] = (6, 4)) -> None:
    for kind in ("images", "masks"):
        (folder / "train" / kind).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (10, 20, 30)).save(folder / "train" / "images" / f"{name}.jpg")
    Image.new("L", size, label).save(folder / "train" / "masks" / f"{name}.png")


def test_pictures_and_masks_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    _write_pair(tmp_path, "b", label=2)
    _write_pair(tmp_path, "a", label=1)
    frames = load_camvid(tmp_path, "train")
    assert frames.names == ("a", "b")
    assert frames.image_N3HW.shape == (2, 3, 4, 6) and frames.image_N3HW.dtype == torch.uint8
    assert frames.label_NHW.unique(dim=0)[:, 0, 0].tolist() == [1, 2]


def test_the_void_label_becomes_ignore(tmp_path: Path) -> None:
    _write_pair(tmp_path, "a", label=VOID)
    assert (load_camvid(tmp_path, "train").label_NHW == IGNORE).all()


def test_the_indices_of_a_palette_mask_are_its_labels(tmp_path: Path) -> None:
    _write_pair(tmp_path, "a")
    mask = Image.new("P", (6, 4), 7)
    mask.putpalette([200] * 768)
    mask.save(tmp_path / "train" / "masks" / "a.png")
    assert (load_camvid(tmp_path, "train").label_NHW == 7).all()


def test_a_missing_mask_is_named(tmp_path: Path) -> None:
    _write_pair(tmp_path, "a")
    (tmp_path / "train" / "masks" / "a.png").unlink()
    with pytest.raises(BadData, match=r"a\.jpg has no mask; .*a\.png is wanted$"):
        load_camvid(tmp_path, "train")


def test_a_label_beyond_the_classes_is_named_with_its_file(tmp_path: Path) -> None:
    _write_pair(tmp_path, "a", label=12)
    with pytest.raises(BadData, match=r"a\.png holds the label 12; 0 to 10 and 11 \(void\) are known$"):
        load_camvid(tmp_path, "train")


def test_a_mask_of_another_size_is_named_with_both_sizes(tmp_path: Path) -> None:
    _write_pair(tmp_path, "a", size=(5, 4))
    with pytest.raises(BadData, match=r"a\.png is 5x4 px; its picture is 6x4 px$"):
        load_camvid(tmp_path, "train")


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    _write_pair(tmp_path, "a")
    (tmp_path / "train" / "masks" / "a.png").write_text("no picture")
    with pytest.raises(BadData, match=r"a\.png cannot be read"):
        load_camvid(tmp_path, "train")


def test_an_empty_folder_says_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"holds no \.jpg or \.png pictures"):
        load_camvid(tmp_path, "train")


def test_an_unknown_data_set_is_answered_with_the_known_ones() -> None:
    with pytest.raises(BadOption, match="no data set 'moon'; known are camvid, cityscapes, folder, shapes, voc"):
        find_data("moon")


def test_the_same_seed_splits_alike_and_another_does_not(tmp_path: Path) -> None:
    frames = find_data("shapes").load(tmp_path, "train")
    labelled, rest = split_labelled(frames, fraction=0.25, seed=0)
    assert labelled.tolist() == split_labelled(frames, fraction=0.25, seed=0)[0].tolist()
    assert labelled.tolist() != split_labelled(frames, fraction=0.25, seed=1)[0].tolist()
    assert sorted(labelled.tolist() + rest.tolist()) == list(range(16)) and len(labelled) == 4


def test_the_split_is_written_as_names(tmp_path: Path) -> None:
    frames = find_data("shapes").load(tmp_path, "train")
    write_split(tmp_path / "run" / "labelled.txt", frames, torch.tensor([1, 3]))
    assert (tmp_path / "run" / "labelled.txt").read_text() == "train01\ntrain03\n"


def test_a_fraction_that_leaves_no_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match=r"labelled_fraction 0\.01 leaves 0 of 16 frames"):
        split_labelled(find_data("shapes").load(tmp_path, "train"), fraction=0.01, seed=0)


def test_camvid_has_eleven_classes_of_eleven_colours() -> None:
    assert len(CLASSES) == len({c.color for c in CLASSES}) == VOID


def test_a_list_chooses_the_labelled_frames(tmp_path: Path) -> None:
    frames = find_data("shapes").load(tmp_path, "train")
    write_split(tmp_path / "labelled.txt", frames, torch.tensor([1, 3]))
    labelled, rest = read_split(tmp_path / "labelled.txt", frames)
    assert labelled.tolist() == [1, 3] and sorted(rest.tolist()) == [0, 2, *range(4, 16)]
    recipe = replace(tiny.recipe("cps", tmp_path, steps=1), labelled_list=str(tmp_path / "labelled.txt"))
    assert choose_split(frames, recipe)[0].tolist() == [1, 3]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train01\nmoon\n", r"list\.txt lists 'moon', which is none of the 16 frames$"),
        ("train01\ntrain01\n", r"list\.txt holds 'train01' twice$"),
        ("\n", r"list\.txt is empty; one name per line is wanted$"),
        (None, r"list\.txt cannot be read"),
    ],
)
def test_a_list_that_cannot_be_followed_is_named(text: str | None, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadData, match=sentence):
        read_split(path, find_data("shapes").load(tmp_path, "train"))


def test_without_any_labels_weak_ones_are_wanted(tmp_path: Path) -> None:
    frames = find_data("shapes").load(tmp_path, "train")
    recipe = replace(tiny.recipe("cps", tmp_path, steps=1), labelled_fraction=0.0)
    with pytest.raises(BadOption, match=r"labelled_fraction is 0\.0 and labelled_batch 3; both or neither can be 0"):
        choose_split(frames, recipe)
    with pytest.raises(BadOption, match="there is nothing to learn from"):
        choose_split(frames, replace(recipe, labelled_batch=0))
    recipe = replace(recipe, labelled_batch=0, weak_labels="tags")
    split = choose_split(frames, recipe)
    views = Batches(frames, split, recipe, torch.Generator(), num_classes=3).draw()
    assert [len(indices) for indices in split] == [0, 16]
    assert views.image_B3hw.shape == (0, 3, 48, 64) and views.label_Bhw.shape == (0, 48, 64)
    assert views.tags_BK is not None and views.tags_BK.shape == (2, 3)
