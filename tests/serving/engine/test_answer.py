"""An answer that is read while it is made: the same arrays, each row as early as it is final."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from penumbra.models.errors import Cancelled
from penumbra.serving.engine.answer import Unfolding, new_arrays
from penumbra.serving.engine.bands import BandStream
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.render import IN_BANDS, Style, render
from tests.conftest import picture

TALL = (400, 70)
OPTIONS = SegmentOptions("toy-latent", samples=4, seed=3)


@pytest.fixture(scope="module")
def segmenter(toy_store: Path) -> Iterator[Segmenter]:
    with Segmenter.open(toy_store, threads=1) as opened:
        yield opened


@pytest.fixture
def bands(segmenter: Segmenter, rng: np.random.Generator) -> BandStream:
    return segmenter.bands(picture(rng, *TALL), OPTIONS)


def unfolding(bands: BandStream) -> Unfolding:
    return Unfolding(bands, OPTIONS, new_arrays(bands, OPTIONS))


def test_the_first_rows_are_read_when_the_first_row_of_windows_is_stitched(bands: BandStream) -> None:
    with closing(unfolding(bands)) as answer:
        rows = answer.begun.labels_HW[:4]
        assert rows.shape == (4, TALL[1])
        assert bands.num_done == len(bands.work.plan.starts_x) < bands.work.plan.num_windows


def test_it_is_the_whole_answer_in_the_end(segmenter: Segmenter, rng: np.random.Generator) -> None:
    image = picture(rng, *TALL)
    whole = segmenter.segment(image, OPTIONS)
    with closing(segmenter.unfold(image, OPTIONS)) as answer:
        first = answer.begun.maps["entropy"][:100].copy()
        answered = answer.finish()
    assert np.array_equal(answered.labels_HW, whole.labels_HW)
    assert np.array_equal(first, whole.maps["entropy"][:100])
    assert all(np.array_equal(answered.maps[name], values) for name, values in whole.maps.items())


@pytest.mark.parametrize("media", IN_BANDS)
@pytest.mark.parametrize("shown", ["labels", "overlay", "entropy"])
def test_what_is_written_meanwhile_has_the_bytes_of_what_is_written_afterwards(
    segmenter: Segmenter, rng: np.random.Generator, media: str, shown: str
) -> None:
    image = picture(rng, 700, 70)  # more than one block of rows
    with closing(segmenter.unfold(image, OPTIONS)) as answer:
        early = render(answer.begun, media, Style(shown))
    assert early == render(segmenter.segment(image, OPTIONS), media, Style(shown))


def test_what_nobody_reads_leaves_the_queue(segmenter: Segmenter, bands: BandStream) -> None:
    with closing(unfolding(bands)) as answer:
        assert answer.begun.labels_HW[:1].size
    assert segmenter.scheduler.queued[0] == 0


def test_a_cancelled_answer_says_so_to_its_reader(bands: BandStream) -> None:
    with closing(unfolding(bands)) as answer:
        bands.work.cancelled.set()
        with pytest.raises(Cancelled):
            answer.begun.labels_HW[-1:]
