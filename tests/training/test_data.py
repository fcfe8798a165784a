"""Frames are read whole or refused with a sentence; the split depends on fraction and seed, or on a list, alone."""

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import ExifTags, Image
from rasterio import Affine

from penumbra.models.card import IGNORE
from penumbra.models.errors import BadData, BadOption
from penumbra.serving.engine.options import Limits
from penumbra.training.batches import Batches, choose_split
from penumbra.training.data import (
    CAMVID,
    CAMVID_VOID,
    find_data,
    find_pairs,
    load_camvid,
    load_folder,
    load_split,
    load_training,
)
from penumbra.training.frames import FrameFiles, choose, count_ids, hold, read_mask, read_picture, write_split
from tests.conftest import decode_image
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
    _write_pair(tmp_path, "a", label=CAMVID_VOID)
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
    with pytest.raises(BadData, match=r"holds no pictures \(\.png, \.apng, \.jpg"):
        load_camvid(tmp_path, "train")


def test_an_unknown_data_set_is_answered_with_the_known_ones() -> None:
    with pytest.raises(BadOption, match="no data set 'moon'; known are camvid, cityscapes, folder, shapes, voc"):
        find_data("moon")


def test_one_drive_of_a_split_can_be_asked_for(tmp_path: Path) -> None:
    for name in ("0001TP_1", "0006R0_1", "0001TP_2"):
        _write_pair(tmp_path, name)
    drive = load_split(find_data("camvid"), tmp_path, "train/0001TP")
    assert drive.names == ("0001TP_1", "0001TP_2") and drive[1][0].shape == (3, 4, 6)
    assert len(load_split(find_data("camvid"), tmp_path, "train")) == 3
    with pytest.raises(BadData, match=r"no frame's name begins with '0016'; 0001TP_1 is one of 3"):
        load_split(find_data("camvid"), tmp_path, "train/0016")


@pytest.mark.parametrize("name", ["camvid", "folder"])
def test_a_training_can_leave_frames_out_and_classes_void(name: str, tmp_path: Path) -> None:
    for label, frame in enumerate(("0001TP_1", "0006R0_1", "0016E5_1"), start=1):
        _write_pair(tmp_path, frame, label=label)
    (tmp_path / "val").symlink_to("train")
    classes = [info.name for info in CAMVID]
    (tmp_path / "classes.txt").write_text("\n".join(classes))
    data = find_data(name, tmp_path)
    train, val = load_training(data, tmp_path, void_classes=(classes[3],))
    assert [int(frame.label_HW[0, 0]) for frame in (*train, *val)] == [1, 2, IGNORE, 1, 2, IGNORE]
    assert [int(frame.label_HW[0, 0]) for frame in load_training(data, tmp_path)[0]] == [1, 2, 3]
    recipe = replace(tiny.recipe("cps", tmp_path, steps=1), labelled_fraction=1.0, leave_out=("0006R0",))
    labelled, rest = choose_split(train, recipe)
    assert labelled.tolist() == rest.tolist() == [0, 2]


def test_a_training_that_leaves_frames_out_keeps_the_labels_of_one_that_does_not(tmp_path: Path) -> None:
    frames, recipe = find_data("shapes").load(tmp_path, "train"), tiny.recipe("cps", tmp_path, steps=1)
    left_out = ("train03", "train09", "train11")
    labelled, rest = choose_split(frames, recipe)
    own = choose_split(frames, replace(recipe, leave_out=left_out))
    for indices, all_indices in zip(own, (labelled, rest), strict=True):
        assert indices.tolist() == [i for i in all_indices.tolist() if frames.names[i] not in left_out]
    assert sum(map(len, own)) == 13 and len(own[0]) < 4, "one that is left out had been labelled"
    path = tmp_path / "labelled.txt"
    write_split(path, frames, labelled)
    of_list = choose_split(frames, replace(recipe, labelled_list=str(path), leave_out=left_out))
    assert [indices.tolist() for indices in of_list] == [indices.tolist() for indices in own]


def test_the_draw_of_labels_is_the_one_that_checkpoints_of_the_zoo_had(tmp_path: Path) -> None:
    recipe = tiny.recipe("cps", tmp_path, steps=1)
    labelled, _ = choose_split(find_data("shapes").load(tmp_path, "train"), recipe)
    assert labelled.tolist() == [6, 9, 10, 12]


def test_what_a_training_cannot_leave_out_is_named(tmp_path: Path) -> None:
    frames, recipe = find_data("shapes").load(tmp_path, "train"), tiny.recipe("cps", tmp_path, steps=1)
    with pytest.raises(BadData, match="no frame's name begins with 'moon'"):
        choose_split(frames, replace(recipe, leave_out=("moon",)))
    with pytest.raises(
        BadData, match="leave_out is train; that leaves 0 of 16 frames to train on, and 0 of 4 labelled"
    ):
        choose_split(frames, replace(recipe, leave_out=("train",)))
    labelled = tuple(frames.names[i] for i in choose_split(frames, recipe)[0])
    with pytest.raises(BadData, match="that leaves 12 of 16 frames to train on, and 0 of 4 labelled ones"):
        choose_split(frames, replace(recipe, leave_out=labelled))
    with pytest.raises(BadOption, match="void_classes has 'cone'; the classes are ground, disc, box"):
        load_training(find_data("shapes"), tmp_path, void_classes=("cone",))


def test_the_same_seed_splits_alike_and_another_does_not(tmp_path: Path) -> None:
    frames = find_data("shapes").load(tmp_path, "train")
    recipe = tiny.recipe("cps", tmp_path, steps=1)
    labelled, rest = choose_split(frames, recipe)
    assert labelled.tolist() == choose_split(frames, recipe)[0].tolist()
    assert labelled.tolist() != choose_split(frames, replace(recipe, seed=1))[0].tolist()
    assert sorted(labelled.tolist() + rest.tolist()) == list(range(16)) and len(labelled) == 4


def test_the_split_is_written_as_names(tmp_path: Path) -> None:
    frames = find_data("shapes").load(tmp_path, "train")
    write_split(tmp_path / "run" / "labelled.txt", frames, torch.tensor([1, 3]))
    assert (tmp_path / "run" / "labelled.txt").read_text() == "train01\ntrain03\n"


def test_a_fraction_that_leaves_no_labels_is_refused(tmp_path: Path) -> None:
    recipe = replace(tiny.recipe("cps", tmp_path, steps=1), labelled_fraction=0.01)
    with pytest.raises(BadOption, match=r"labelled_fraction 0\.01 leaves 0 of 16 frames"):
        choose_split(find_data("shapes").load(tmp_path, "train"), recipe)


def test_camvid_has_eleven_classes_of_eleven_colours() -> None:
    assert len(CAMVID) == len({c.color for c in CAMVID}) == CAMVID_VOID


def test_a_list_chooses_the_labelled_frames(tmp_path: Path) -> None:
    frames = find_data("shapes").load(tmp_path, "train")
    write_split(tmp_path / "labelled.txt", frames, torch.tensor([1, 3]))
    recipe = replace(tiny.recipe("cps", tmp_path, steps=1), labelled_list=str(tmp_path / "labelled.txt"))
    labelled, rest = choose_split(frames, recipe)
    assert labelled.tolist() == [1, 3] and sorted(rest.tolist()) == [0, 2, *range(4, 16)]


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
    recipe = replace(tiny.recipe("cps", tmp_path, steps=1), labelled_list=str(path))
    with pytest.raises(BadData, match=sentence):
        choose_split(find_data("shapes").load(tmp_path, "train"), recipe)


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


# -- one reader: what is measured and trained on is what is served ----------------------------------------------


def _scene(height: int = 24, width: int = 36) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([5 * x, 9 * y, 3 * (x + y)], axis=-1).astype(np.uint8))


def _turned(path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    _scene().save(path, quality=95, exif=exif)


def _deep_grey(path: Path) -> None:
    Image.fromarray(np.arange(24 * 36, dtype=np.uint16).reshape(24, 36) * 75).save(path)


def _transparent(path: Path) -> None:
    _scene().convert("RGBA").save(path)


def _ground(path: Path) -> None:
    with rasterio.open(path, "w", driver="GTiff", height=24, width=36, count=3, dtype="uint8", nodata=0,
                       crs="EPSG:32631", transform=Affine(10, 0, 500000, 0, -10, 5800000)) as file:  # fmt: skip
        file.write(np.asarray(_scene()).transpose(2, 0, 1))


WAYS = {"turned.jpg": _turned, "deep.png": _deep_grey, "transparent.webp": _transparent, "ground.tif": _ground}


@pytest.mark.parametrize("name", WAYS)
def test_a_frame_is_read_as_the_server_reads_it(name: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    (tmp_path / "classes.txt").write_text("a\nb\n")
    path = tmp_path / "images" / name
    WAYS[name](path)
    served_HW3 = decode_image(path.read_bytes(), Limits())
    Image.new("L", (served_HW3.shape[1], served_HW3.shape[0]), 1).save(tmp_path / "masks" / f"{path.stem}.png")
    frames = load_folder(tmp_path, "val")
    image_3HW, label_HW, said_HW, *_ = frames[0]
    assert image_3HW.permute(1, 2, 0).numpy().tobytes() == served_HW3.tobytes()
    void_HW = (served_HW3 == 0).all(-1) if name == "ground.tif" else np.zeros(served_HW3.shape[:2], bool)
    assert (label_HW.numpy() == np.where(void_HW, IGNORE, 1)).all()
    assert (name == "ground.tif") == (said_HW is not None and void_HW.any())
    assert isinstance(frames, FrameFiles)
    for held in (hold(frames), choose(hold(frames), [0])):
        again = held[0].void_HW
        assert said_HW is again is None or (again is not None and (again.numpy() == void_HW).all())


def test_what_the_reader_warns_of_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "dark.png"
    Image.fromarray(np.arange(24 * 36, dtype=np.uint16).reshape(24, 36)).save(path)  # 10 bits in 16
    first, again = read_picture(path)[0], read_picture(path)[0]
    assert first.max() > 200 and (first == again).all()
    assert [record.message for record in caplog.records] == [caplog.records[0].message]
    assert "dark.png" in caplog.text and "1023" in caplog.text


@pytest.mark.parametrize("mode", ["L", "P", "1", "I;16"])
def test_the_labels_of_a_mask_are_its_numbers_whatever_its_type(mode: str, tmp_path: Path) -> None:
    ids_HW = np.arange(24).reshape(4, 6) % (2 if mode == "1" else 11)
    dtype = {"1": bool, "I;16": np.uint16}.get(mode, np.uint8)
    mask = Image.fromarray(ids_HW.astype(dtype))
    if mode == "P":
        mask = Image.fromarray(ids_HW.astype(np.uint8), "L").convert("L")
        mask.putpalette([9] * 768)
    mask.save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png", count_ids(11)).tolist() == ids_HW.tolist()


@pytest.mark.parametrize("bits", [2, 4])
def test_the_labels_of_a_grey_mask_of_few_bits_are_its_numbers(bits: int, tmp_path: Path) -> None:
    ids_HW = np.arange(24).reshape(4, 6) % 2**bits
    plain = np.unpackbits(ids_HW.astype(np.uint8)[:, :, None], axis=2)[:, :, -bits:].reshape(4, -1)
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(plain, axis=1))
    parts = {b"IHDR": struct.pack(">IIBBBBB", 6, 4, bits, 0, 0, 0, 0), b"IDAT": zlib.compress(rows), b"IEND": b""}
    chunks = (len(part).to_bytes(4) + kind + part + zlib.crc32(kind + part).to_bytes(4) for kind, part in parts.items())
    (tmp_path / "mask.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    assert read_mask(tmp_path / "mask.png", count_ids(2**bits)).tolist() == ids_HW.tolist()


def test_a_label_over_255_is_named_and_not_cut_to_8_bits(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 6), 257, np.uint16)).save(tmp_path / "mask.png")
    with pytest.raises(BadData, match=r"holds the label 257; 0 to 10 and 255 \(void\) are known$"):
        read_mask(tmp_path / "mask.png", count_ids(11))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_a_mask_of_colours_is_refused(mode: str, tmp_path: Path) -> None:
    Image.new(mode, (6, 4)).save(tmp_path / "mask.png")
    with pytest.raises(BadData, match=rf"holds colours \(Pillow's mode {mode}\); a mask of class indices"):
        read_mask(tmp_path / "mask.png", count_ids(11))


def test_two_pictures_of_one_name_are_refused(tmp_path: Path) -> None:
    _write_pair(tmp_path, "a")
    Image.new("RGB", (6, 4)).save(tmp_path / "train" / "images" / "a.png")
    with pytest.raises(BadData, match="holds several pictures called a, which would share one mask"):
        find_pairs(tmp_path / "train", count_ids(11))
