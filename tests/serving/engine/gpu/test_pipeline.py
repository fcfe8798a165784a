"""The way that windows go on a GPU gives what their way on a CPU gives: here on a CPU, by the CPU's operators."""

from dataclasses import replace

import numpy as np
import pytest

from penumbra.models.card import Card, WindowSpec
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.options import PROBABILITIES, SegmentOptions
from penumbra.serving.engine.raster import Pixels, Raster
from tests.conftest import picture, toy_card
from tests.models.small import SMALL, card_of, seeded
from tests.models.small import picture as any_picture
from tests.serving.engine.gpu.eager import Models, opened

SHIFTS = [
    WindowSpec(32, 40, overlap=0.25),
    WindowSpec(32, 40, overlap=0.9, blend="uniform"),
    WindowSpec(32, 40, overlap=0.0, padding="mirror", centred=True),
    WindowSpec(32, 40, padding="mean_or_black", last="clip"),
    WindowSpec(32, 40, padding="black", centred=True),
    WindowSpec(0, 0),
]


def asked(card: Card, *, prompted: bool = False, **options: object) -> SegmentOptions:
    boxes = ((3.0, 3.0, 60.2, 40.5, 1), (0, 0, 7, 9, 2)) if prompted and card.prompt.kind == "boxes" else ()
    tags = (1,) if prompted and card.prompt.kind == "tags" else ()
    samples = card.sampling_with(prompt=bool(boxes or tags)).default_samples
    outputs = (*card.maps(samples), PROBABILITIES)
    return SegmentOptions(card.name, outputs=outputs, boxes=boxes, tags=tags, seed=3, **options)  # type: ignore[arg-type]


def assert_alike(here: Prediction, there: Prediction) -> None:
    assert there.maps.keys() == here.maps.keys()
    sums = [(one.scores.expected_error, one.scores.novelty, *one.scores.means) for one in (here, there)]
    assert sums[1] == pytest.approx(sums[0], abs=1e-5)
    assert np.mean(here.labels_HW != there.labels_HW) <= 1e-3
    for name, values in here.maps.items():
        np.testing.assert_allclose(there.maps[name], values, atol=2e-5, err_msg=name)
    assert here.prob_KHW is not None and there.prob_KHW is not None
    np.testing.assert_allclose(there.prob_KHW, here.prob_KHW, atol=1e-5)


def both(models: Models, image: Pixels, *options: SegmentOptions) -> None:
    answers: list[list[Prediction]] = []
    for staying in (False, True):
        with opened(models, staying=staying) as segmenter:
            answers.append([segmenter.segment(image, one) for one in options])
    for here, there in zip(*answers, strict=True):
        assert_alike(here, there)


@pytest.mark.parametrize("name", SMALL)
def test_every_network_answers_alike_on_both_ways(name: str) -> None:
    card = card_of(name)
    both({"small": (card, seeded(name))}, any_picture(card, (100, 130)), asked(card), asked(card, prompted=True))


@pytest.mark.parametrize("spec", SHIFTS)
@pytest.mark.parametrize("size", [(75, 100), (20, 100), (20, 30), (200, 41), (1, 1)])
@pytest.mark.parametrize("form", ["latent", "boxed", "bright"])
def test_windows_lie_alike_on_both_ways(
    form: str, size: tuple[int, int], spec: WindowSpec, rng: np.random.Generator
) -> None:
    card, network = toy_card(form, window=spec, name="toy")  # type: ignore[arg-type]
    prompted = form == "boxed" and min(size) > 1
    options = asked(card)
    if prompted:
        boxes = ((0.4, 0, size[1] / 2, size[0] - 0.5, 1), (size[1] / 3, 2.5, size[1], size[0], 2))
        options = replace(options, boxes=boxes, outputs=(*card.maps(3), PROBABILITIES))
    both({"toy": (card, network)}, picture(rng, *size), options)


@pytest.mark.parametrize("views", ["flip", "d4", "scales"])
@pytest.mark.parametrize("form", ["latent", "boxed", "bright"])
def test_views_are_alike_on_both_ways(form: str, views: str, rng: np.random.Generator) -> None:
    card, network = toy_card(form, window=WindowSpec(32, 32), name="toy")  # type: ignore[arg-type]
    options = replace(asked(card, prompted=form == "boxed"), views=views, outputs=("default", PROBABILITIES))
    both({"toy": (card, network)}, picture(rng, 60, 75), options)


@pytest.mark.parametrize("scale", [0.4, 2.5])
def test_pictures_at_another_scale_are_answered_alike_on_both_ways(scale: float, rng: np.random.Generator) -> None:
    card, network = toy_card("bright", name="toy")
    void_HW = np.zeros((150, 100), np.bool_)
    void_HW[60:70, 5:9] = True
    both({"toy": (card, network)}, picture(rng, 150, 100), asked(card, scale=scale))
    both({"toy": (card, network)}, Raster(picture(rng, 150, 100), void_HW=void_HW), asked(card, scale=scale))
