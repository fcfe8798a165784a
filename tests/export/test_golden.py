"""Golden windows cut from pictures."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from penumbra.export.golden import golden_image, windows_of
from penumbra.models.card import WindowSpec
from penumbra.models.errors import BadImage, BadOption
from penumbra.models.inputs import InputSpec, ScaleRule
from tests.conftest import picture, toy_card


@pytest.mark.parametrize("last", ["shift", "clip"])
def test_golden_windows_are_whole_ones_however_the_last_of_a_picture_lie(
    tmp_path: Path, rng: np.random.Generator, last: str
) -> None:
    path, small = tmp_path / "a.png", tmp_path / "b.png"
    Image.fromarray(picture(rng, 71, 103)).save(path)
    Image.fromarray(picture(rng, 20, 103)).save(small)
    card = toy_card("pointwise")[0]
    damaged = tmp_path / "c.png"
    damaged.write_bytes(path.read_bytes()[:400])
    with pytest.raises(BadImage, match=r"c\.png: .*; take it out of the pictures"):
        windows_of([path, damaged], card)
    card = dataclasses.replace(card, window=dataclasses.replace(card.window, last=last))
    window = card.window
    windows_BChw = windows_of([path], card)
    assert windows_BChw.shape == (2, 3, window.height, window.width)
    if last == "clip":
        with pytest.raises(BadOption, match="are cut from pictures of"):
            windows_of([small], card)


def test_golden_windows_are_of_pictures_at_the_cards_scale(tmp_path: Path, rng: np.random.Generator) -> None:
    small = picture(rng, 60, 90)
    for name, pixels in (("small", small), ("large", small.repeat(2, 0).repeat(2, 1))):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    card = toy_card("pointwise")[0]
    card = dataclasses.replace(card, input=dataclasses.replace(card.input, resolution=ScaleRule("frame", 60)))
    asis, halved = (windows_of([tmp_path / f"{name}.png"], card) for name in ("small", "large"))
    assert np.corrcoef(asis.ravel(), halved.ravel())[0, 1] > 0.8


def test_golden_windows_of_a_model_that_sees_pictures_whole_are_their_middles_about_as_large_as_the_smallest(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    card = toy_card("pointwise", window=WindowSpec(0, 0))[0]
    shown = [picture(rng, *size) for size in ((70, 100), (700, 601), (65, 600), (63, 600))]
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for path, pixels in zip(files, shown, strict=True):
        Image.fromarray(pixels).save(path)
    middles = np.stack([shown[0][3:67, 2:98], shown[1][318:382, 252:348], shown[2][:64, 252:348]])
    wanted_BChw = torch.from_numpy(middles).permute(0, 3, 1, 2) / 255
    assert torch.allclose(windows_of(files[:3], card, 3), wanted_BChw, atol=1e-6)
    assert windows_of(files[1:2], card).shape == (2, 3, 512, 512)
    with pytest.raises(BadOption, match=r"3\.png is run at 600x63; .* are cut from pictures of 64x64 or more"):
        windows_of(files, card, 4)


@pytest.mark.parametrize(
    ("spec", "least", "most"),
    [
        (InputSpec(), -1.5, 1.5),
        (InputSpec((104.0,) * 3, (1.0,) * 3, 1.0), -104, 151),
        (InputSpec((0.0,) * 3, (1.0,) * 3, 10_000.0, dtype="uint16"), 0, 1),
        (InputSpec((0.5,) * 3, (1.0,) * 3, low=(100.0,) * 3, high=(3000.0,) * 3, dtype="uint16"), -0.5, 0.5),
        (InputSpec((30_000.0,) * 3, (1.0,) * 3, 1.0, dtype="uint16"), -30_000, 30_000),
    ],
)
def test_drawn_golden_windows_have_the_values_that_pictures_have(spec: InputSpec, least: float, most: float) -> None:
    image_BChw = golden_image(dataclasses.replace(toy_card("pointwise")[0], input=spec))
    assert float(image_BChw.min()) == pytest.approx(least, abs=0.2 * (most - least))
    assert float(image_BChw.max()) == pytest.approx(most, abs=0.2 * (most - least))


def test_how_a_picture_is_read_whose_file_does_not_state_it_is_said_once(
    tmp_path: Path, rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    Image.fromarray(rng.integers(0, 4000, (64, 96), dtype=np.uint16)).save(tmp_path / "deep.png")
    with caplog.at_level(logging.WARNING, "penumbra"):
        windows_of([tmp_path / "deep.png"], toy_card("pointwise")[0])
    assert caplog.text.count("deep.png: ") == 1 and "uint16 values are read as 0 (black) to 4095" in caplog.text
