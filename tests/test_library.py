"""What a program or a notebook has: the names of `penumbra`, and an answer that shows itself."""

import base64
import dataclasses
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import penumbra
from penumbra import PenumbraError, Segmenter, SegmentOptions
from penumbra.serving.engine.runtime import Tuning


def test_every_public_name_is_there_and_the_import_alone_loads_nothing_heavy() -> None:
    assert all(getattr(penumbra, name).__doc__ for name in penumbra.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Segmentor'"):
        _ = penumbra.Segmentor  # type: ignore[attr-defined]
    asked = "import sys, penumbra; assert not {'torch', 'numpy'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", asked], check=True)


@pytest.fixture(scope="module")
def segmenter(toy_store: Path) -> Iterator[Segmenter]:
    with Segmenter.open(toy_store, threads=1, tuning=Tuning(1, 1)) as opened:
        yield opened


def test_an_answer_shows_itself_with_pictures_legend_and_warnings(segmenter: Segmenter) -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 900, 3), np.uint8)
    prediction = segmenter.segment(image, SegmentOptions(model="toy-latent", samples=4))
    said = dataclasses.replace(prediction, warnings=("a sky < the sea",))
    shown = said._repr_html_()
    pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^']+)'", shown)]
    assert [picture.size for picture in pictures] == [(480, 32)] * 2
    assert "toy-latent" in shown and "4 samples" in shown and "a sky &lt; the sea" in shown
    assert all(prediction.card.classes[k].name in shown for k in np.unique(prediction.labels_HW))
    assert f"{prediction.scores.expected_error:.1%}" in shown


def test_an_answer_without_its_picture_or_maps_shows_its_labels(segmenter: Segmenter) -> None:
    image = np.zeros((40, 50, 3), np.uint8)
    prediction = segmenter.segment(image, SegmentOptions(model="toy-pointwise", outputs=()))
    shown = dataclasses.replace(prediction, image=None)._repr_html_()
    assert shown.count("<img") == 1 and "<td>100.0%</td>" in shown


def test_an_error_is_one_class(segmenter: Segmenter) -> None:
    with pytest.raises(PenumbraError, match="there is no model"):
        segmenter.segment(np.zeros((4, 4, 3), np.uint8), SegmentOptions(model="nobody"))
