"""On labelled frames: an export that answers alike changes nothing, and another is measured by how much."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from penumbra.__main__ import main
from penumbra.export.bundle import export_checkpoint
from penumbra.export.parity import Frame, check_parity, measure_frames
from penumbra.models.card import IGNORE
from penumbra.models.checkpoint import save_checkpoint
from penumbra.models.contract import Features
from penumbra.models.errors import BadOption, ParityFailed
from penumbra.models.toy.net import ToyConfig, ToyNetwork
from penumbra.serving.engine.store import open_artifact
from tests.conftest import GAIN, toy_card

CARD, NETWORK = toy_card("pointwise")


def frame(rng: np.random.Generator, height: int = 50, width: int = 60) -> Frame:
    """A picture whose labels are what the toy answers: the brightest channel. A corner is void."""
    image_HW3 = rng.permuted(np.broadcast_to(np.array([20, 90, 200], np.uint8), (height, width, 3)), axis=2)
    label_HW = image_HW3.argmax(2).astype(np.uint8)
    label_HW[:5, :5] = IGNORE
    return image_HW3, label_HW


class Exported(ToyNetwork):
    """A backend that answers the network's logits with the classes moved by one where the picture is dark in red."""

    device, dtype = torch.device("cpu"), torch.float32

    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        logits_SBKhw = super().decode(features, noise_SBL)
        dark = logits_SBKhw[:, :, :1] < GAIN * 50 / 255
        return torch.where(dark, logits_SBKhw.roll(1, dims=2), logits_SBKhw)


def test_an_export_that_answers_alike_changes_nothing(rng: np.random.Generator) -> None:
    parity = measure_frames(NETWORK, NETWORK, CARD, [frame(rng), frame(rng, 20, 30)])
    assert (parity.max_abs, parity.label_flips_percent, parity.miou_change, parity.num_frames) == (0, 0, 0, 2)
    assert parity.entropy_rank_correlation == 1 and parity.variance_ratio == 1


def test_a_third_of_wrong_labels_costs_the_iou_that_it_must(rng: np.random.Generator) -> None:
    """Wrong where red is darkest: green there is called blue, and blue red, half of either."""
    image_HW3, label_HW = frame(rng, 32, 48)
    parity = measure_frames(NETWORK, Exported(ToyConfig(gain=GAIN)), CARD, [(image_HW3, label_HW)])
    wrong = image_HW3[..., 0] == 20
    assert parity.label_flips_percent == pytest.approx(100 * wrong.mean(), abs=1e-6)
    answer = np.where(wrong, (image_HW3.argmax(2) + 1) % 3, image_HW3.argmax(2))
    known = label_HW != IGNORE
    shares = [
        np.sum((answer == k) & (label_HW == k) & known) / np.sum(((answer == k) | (label_HW == k)) & known)
        for k in range(3)
    ]
    assert parity.miou_change == pytest.approx(100 * (np.mean(shares) - 1))
    with pytest.raises(ParityFailed, match="relative error"):
        check_parity(parity, CARD)


def test_a_stray_pixel_of_a_class_that_the_truth_lacks_is_no_class_lost() -> None:
    image_HW3 = np.full((32, 48, 3), (200, 90, 20), np.uint8)
    image_HW3[0, 0] = (20, 90, 200)
    parity = measure_frames(NETWORK, Exported(ToyConfig(gain=GAIN)), CARD, [(image_HW3, image_HW3.argmax(2) * 0)])
    assert 0 < abs(parity.miou_change or 0) < 0.1


def test_void_beyond_a_small_picture_counts_nothing(rng: np.random.Generator) -> None:
    image_HW3, label_HW = frame(rng, 10, 10)
    label_HW[:] = IGNORE
    label_HW[9, 9] = image_HW3[9, 9].argmax()
    assert measure_frames(NETWORK, NETWORK, CARD, [(image_HW3, label_HW)]).miou_change == 0


def test_no_frame_is_refused_and_so_are_frames_without_a_label(rng: np.random.Generator) -> None:
    image_HW3, label_HW = frame(rng, 10, 10)
    for frames in ([], [(image_HW3, np.full_like(label_HW, IGNORE))]):
        with pytest.raises(BadOption, match="no labelled frame"):
            measure_frames(NETWORK, NETWORK, CARD, frames)


def test_what_the_frames_showed_is_in_the_card(rng: np.random.Generator, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "toy.safetensors", *toy_card("latent"))
    directory = export_checkpoint(
        tmp_path / "toy.safetensors", tmp_path / "store", precision="bf16", frames=[frame(rng)]
    )
    facts = open_artifact(directory).card.export
    assert facts and facts.parity.num_frames == 1
    assert facts.parity.miou_change is not None and abs(facts.parity.miou_change) < 1


def test_the_verb_reads_labelled_frames_and_prints_what_is_allowed(rng: np.random.Generator, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for kind in ("images", "masks"):
        (data / kind).mkdir(parents=True)
    (data / "classes.txt").write_text("red\ngreen\nblue\n")
    (data / "val.txt").write_text("a\nb\nc\n")
    for name in "abc":
        image_HW3, label_HW = frame(rng)
        Image.fromarray(image_HW3).save(data / "images" / f"{name}.png")
        Image.fromarray(label_HW).save(data / "masks" / f"{name}.png")
    card, network = toy_card("latent")
    save_checkpoint(tmp_path / "toy.safetensors", card, network)
    verb = ["export", str(tmp_path / "toy.safetensors"), "--store", str(tmp_path / "store"), "--precision", "bf16"]
    result = CliRunner().invoke(main, [*verb, "--data", str(data), "--set", "folder", "--every", "2"])
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines()[1:]}
    assert rows["num_frames"] == ["2"] and rows["label_flips_percent"][1:] == ["<=", "0.5"]
    assert float(rows["miou_change"][0]) == pytest.approx(0, abs=1)
    deep = replace(card, name="deep", input=replace(card.input, dtype="uint16"))
    save_checkpoint(tmp_path / "toy.safetensors", deep, network)
    refused = CliRunner().invoke(main, [*verb, "--data", str(data), "--set", "folder"])
    assert refused.exit_code == 2 and "as uint16, and labelled frames are red, green, blue as uint8" in refused.stderr
