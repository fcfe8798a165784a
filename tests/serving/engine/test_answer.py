"""Bands of an answer: each row as early as it is final, and all of them collected."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from penumbra.models.errors import Cancelled
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.segmenter import Segmenter
from tests.conftest import FIXED, picture

TALL = (400, 70)
OPTIONS = SegmentOptions("toy-latent", samples=4, seed=3)


@pytest.fixture(scope="module")
def segmenter(toy_store: Path) -> Iterator[Segmenter]:
    with Segmenter.open(toy_store, threads=1, tuning=FIXED) as opened:
        yield opened


def test_the_first_rows_are_final_when_the_first_row_of_windows_is_stitched(
    segmenter: Segmenter, rng: np.random.Generator
) -> None:
    done: list[tuple[int, int]] = []
    request = segmenter.bands(picture(rng, *TALL), OPTIONS)
    with closing(request.bands(lambda *numbers: done.append(numbers))) as bands:
        assert next(bands).y0 == 0
    in_a_row, num_windows = len(request.plan.windows.starts_x), request.plan.windows.num_windows
    assert done == [(number, num_windows) for number in range(in_a_row + 1)] and in_a_row < num_windows
    assert segmenter.scheduler.queued == (0, 0)


def test_the_bands_are_the_whole_answer_in_the_end(segmenter: Segmenter, rng: np.random.Generator) -> None:
    image = picture(rng, *TALL)
    whole, bands = segmenter.segment(image, OPTIONS), list(segmenter.bands(image, OPTIONS))
    assert np.array_equal(np.concatenate([band.labels for band in bands]), whole.labels_HW)
    for name, values in whole.maps.items():
        assert np.array_equal(np.concatenate([band.maps[name] for band in bands]), values)


def test_a_cancelled_answer_says_so_to_its_reader(segmenter: Segmenter, rng: np.random.Generator) -> None:
    request = segmenter.bands(picture(rng, *TALL), OPTIONS)
    bands = iter(request)
    assert next(bands).labels.size
    request.cancelled.set()
    with pytest.raises(Cancelled):
        list(bands)
