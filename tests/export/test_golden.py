"""Golden windows cut from pictures."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from penumbra.export.golden import windows_of
from penumbra.models.errors import BadImage, BadOption
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
