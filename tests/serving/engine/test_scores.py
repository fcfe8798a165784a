"""Scores of a picture: what the maps say on the mean, whatever is asked for, cut or void, and a warning in words."""

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from penumbra.export.bundle import export_network
from penumbra.models.card import Calibration, Novelty
from penumbra.models.errors import Cancelled
from penumbra.serving.engine.canvas import Wanted, lay_out, read_band
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.plain import UNITS
from penumbra.serving.engine.raster import Raster
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.scores import Scores, score, warn_of_strangeness
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.spool import LONG, Spool
from tests.conftest import picture, toy_card

MEANS = (0.1, 0.2, 0.3, 0.4)
BY_ENTROPY = Novelty("entropy", MEANS, num_pictures=200, num_samples=2, data="made up", warn_above=0.75)
BY_OWN = dataclasses.replace(BY_ENTROPY, map="brightness")
BY_BOTH = dataclasses.replace(BY_OWN, scales=((0.5, 1.0), (0.5, 2.0)))
LATENT = dataclasses.replace(toy_card("latent")[0], novelty=BY_ENTROPY)
ALL_WITHHELD = Calibration((0.1,), (0.0,), 9, 1, "made up")
MAPS = ("confidence", "entropy")


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Segmenter]:
    store = tmp_path_factory.mktemp("scored")
    for form, novelty in (("latent", BY_ENTROPY), ("bright", BY_OWN), ("pointwise", None)):
        card, network = toy_card(form)
        export_network(network, dataclasses.replace(card, novelty=novelty, calibration=ALL_WITHHELD), store)
    with Segmenter.open(store, threads=1, tuning=Tuning(1, 1)) as opened:
        yield opened


def sums_of(entropy: float, own: float | None = None) -> list[int]:
    """The sums of ten pixels whose expected error is 0.25, and whose maps have these means."""
    means = 0.25, entropy, entropy if own is None else own
    return [round(mean * UNITS * 10) for mean in means]


@pytest.mark.parametrize("model", ["latent", "bright", "pointwise"])
def test_scores_are_the_means_of_the_maps_with_and_without_them(
    segmenter: Segmenter, rng: np.random.Generator, model: str
) -> None:
    own = ("brightness",) if model == "bright" else ()
    options = SegmentOptions(model=f"toy-{model}", outputs=(*MAPS, *own), samples=2 if model == "latent" else None)
    image = picture(rng, 70, 90)
    told = segmenter.segment(image, options)
    assert told.scores.expected_error == pytest.approx(1 - told.maps["confidence"].mean(dtype=float), abs=1e-6)
    means = [told.maps[name].mean(dtype=float) for name in ("entropy", *own)]
    assert told.scores.means == pytest.approx(means, abs=1e-6)
    novelty = told.scores.novelty
    assert novelty == (None if model == "pointwise" else np.mean(np.array(MEANS) < told.scores.means[-1]))
    bare = segmenter.segment(image, dataclasses.replace(options, outputs=()))
    assert bare.scores == told.scores and bare.facts["scores"] == {
        "expected_error": told.scores.expected_error, "novelty": novelty,
    }  # fmt: skip


def test_a_void_pixel_counts_for_nothing_and_a_withheld_one_for_itself(
    segmenter: Segmenter, rng: np.random.Generator
) -> None:
    void_HW, pixels = np.arange(90) < np.full((70, 1), 40), picture(rng, 70, 90)
    pixels[:, :40] = 0  # where the toy is least sure
    options = SegmentOptions(model="toy-pointwise", outputs=MAPS)
    told, part = (segmenter.segment(image, options) for image in (Raster(pixels), Raster(pixels, void_HW=void_HW)))
    assert part.scores.expected_error == pytest.approx(1 - np.nanmean(part.maps["confidence"], dtype=float), abs=1e-6)
    assert told.scores.expected_error > 1.2 * part.scores.expected_error
    withheld = segmenter.segment(Raster(pixels, void_HW=void_HW), dataclasses.replace(options, max_risk=0.1))
    assert withheld.abstained == 1 and withheld.scores == part.scores
    nothing = Raster(picture(rng, 70, 90), void_HW=np.ones((70, 90), bool))
    assert segmenter.segment(nothing, SegmentOptions(model="toy-pointwise")).scores == Scores()


def test_sums_are_the_same_in_whatever_bands_rows_are_read(rng: np.random.Generator) -> None:
    prob_hKw = rng.dirichlet((1, 1, 1), (9, 70)).astype(np.float32).transpose(0, 2, 1)
    canvas = torch.from_numpy(np.ascontiguousarray(np.concatenate((prob_hKw, prob_hKw[:, :1]), axis=1)))

    def sums(*edges: int) -> np.ndarray:
        found = []
        for rows in map(range, edges, edges[1:]):
            segment, num_bytes = lay_out(Wanted(()), rows, 70, LATENT, 2)
            found.append(read_band(canvas, segment, num_bytes, LATENT).sums_hN)
        return np.concatenate(found)

    assert np.array_equal(sums(0, 9), sums(0, 1, 4, 9)) and sums(0, 9)[:, :2].all() and not sums(0, 9)[:, 2].any()


def test_work_that_another_process_went_on_with_has_the_scores_of_the_whole(
    segmenter: Segmenter, rng: np.random.Generator, tmp_path: Path
) -> None:
    image, options = picture(rng, 150, 90), SegmentOptions(model="toy-pointwise", outputs=())
    raster, stop = Raster(image), threading.Event()

    def stop_midway(num_done: int, num_windows: int) -> None:
        if 2 * num_done > num_windows:
            stop.set()

    with pytest.raises(Cancelled):
        Spool(tmp_path / "s", segmenter, raster, options, source="it").fill(
            limits=LONG, cancelled=stop, progress=stop_midway
        )
    assert 0 < (tmp_path / "s" / "row.sums").stat().st_size < 150 * 40
    rest = Spool(tmp_path / "s", segmenter, raster, options, source="it").fill(limits=LONG, cancelled=threading.Event())
    assert rest.scores == segmenter.segment(image, options).scores


@pytest.mark.parametrize(("mean", "novelty"), [(0.05, 0.0), (0.1, 0.0), (0.25, 0.5), (0.35, 0.75), (9.0, 1.0)])
def test_novelty_is_the_share_of_reference_pictures_that_were_less_strange(mean: float, novelty: float) -> None:
    scores = score(LATENT, sums_of(mean), 10, num_samples=2, is_usual=True)
    assert scores.novelty == novelty and scores.expected_error == pytest.approx(0.25)
    assert bool(warn_of_strangeness(LATENT, scores)) == (novelty > 0.75)


@pytest.mark.parametrize(
    ("entropy", "own", "novelty"),
    [(0.5, 0.5, 0.0), (0.75, 0.5, 0.5), (-0.5, 0.5, 0.0), (0.5, 1.0, 0.5), (0.5, 0.0, 0.5), (0.75, 9.0, 1.0)],
)
def test_two_maps_make_a_picture_as_strange_as_the_one_that_finds_it_stranger(
    entropy: float, own: float, novelty: float
) -> None:
    """Too high an entropy, and too much or too little of the other map."""
    card = dataclasses.replace(toy_card("bright")[0], novelty=BY_BOTH)
    scores = score(card, sums_of(entropy, own), 10, num_samples=2, is_usual=True)
    assert scores.novelty == novelty and bool(warn_of_strangeness(card, scores)) == (novelty == 1)


def test_an_entropy_of_another_overlap_is_compared_with_none(segmenter: Segmenter, rng: np.random.Generator) -> None:
    image, options = picture(rng, 70, 90), SegmentOptions(model="toy-latent", samples=2)
    usual, otherwise = (
        segmenter.segment(image, dataclasses.replace(options, overlap=overlap)).scores for overlap in (None, 0.6)
    )
    assert usual.novelty is not None and otherwise.novelty is None and otherwise.means


def test_an_entropy_is_compared_with_those_of_as_many_samples_and_no_prompt_alone() -> None:
    bright = dataclasses.replace(toy_card("bright")[0], novelty=BY_OWN)
    both = dataclasses.replace(bright, novelty=BY_BOTH)
    assert score(both, sums_of(9), 10, num_samples=2, is_usual=True).novelty == 1
    for num_samples, is_usual in ((3, True), (2, False)):
        for card in (LATENT, both):
            assert score(card, sums_of(9), 10, num_samples=num_samples, is_usual=is_usual).novelty is None
        assert score(bright, sums_of(9), 10, num_samples=num_samples, is_usual=is_usual).novelty == 1


def test_the_warning_says_against_what_and_how_far(segmenter: Segmenter) -> None:
    (sentence,) = warn_of_strangeness(LATENT, Scores(0.1, 1.0, (0.5,)))
    assert sentence == (
        "this picture is stranger than all of the 200 pictures that toy-latent was calibrated on (its mean entropy is "
        "0.5 nats, and 75 % of theirs are at most 0.3): its answer may be wrong, and its uncertainties too"
    )
    bright = dataclasses.replace(toy_card("bright")[0], novelty=BY_BOTH)
    (sentence,) = warn_of_strangeness(bright, Scores(0.1, 1.0, (0.5, 3.0)))
    assert "(its mean entropy is 0.5 nats, brightness is 3: up to 1.25 deviations from theirs, and 75 % of" in sentence
    white = np.full((40, 40, 3), 255, np.uint8)
    warnings = segmenter.segment(white, SegmentOptions(model="toy-bright", outputs=())).warnings
    assert len(warnings) == 1 and "its mean brightness is" in warnings[0]
