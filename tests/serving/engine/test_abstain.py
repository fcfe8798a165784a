"""`max_risk`, `max_class_risk`: pixels above calibrated entropies are withheld, in every form of the answer."""

import dataclasses
import io
import json
import math
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from penumbra.export.bundle import export_network
from penumbra.models.card import IGNORE, Calibration, Card, dump_card, parse_card
from penumbra.models.errors import BadArtifact, BadOption
from penumbra.serving.engine.options import Limits, SegmentOptions, abstain_above, class_candidates, parse_options
from penumbra.serving.engine.raster import Raster
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.http.routes import summary
from penumbra.serving.http.segment import answer_headers
from penumbra.serving.oip.protocol import read_options, response_of
from penumbra.serving.oip.request import InferRequest, RequestedOutput
from penumbra.serving.render import Style, render
from penumbra.serving.telemetry import Telemetry
from tests.conftest import GAIN, picture, toy_card

CALIBRATION = Calibration(
    risks=(0.05, 0.1), entropy_nats=(0.25, 0.5), num_frames=40, num_samples=1, data="made up", class_risks=(0.1, 0.2),
    class_entropy_nats=((0.3, None, 0.4), (0.6, 0.05, 0.4)),
)  # fmt: skip


def calibrated(form: str, calibration: Calibration | None = CALIBRATION) -> Card:
    return dataclasses.replace(toy_card(form)[0], calibration=calibration)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Segmenter]:
    store = tmp_path_factory.mktemp("calibrated")
    for form in ("pointwise", "latent"):
        export_network(toy_card(form)[1], calibrated(form), store)
    with Segmenter.open(store, threads=1, tuning=Tuning(1, 1)) as opened:
        yield opened


ASKED = InferRequest("toy-pointwise", outputs=[RequestedOutput("labels")])


def ask(max_risk: float | None, model: str = "toy-pointwise", **options: object) -> SegmentOptions:
    return SegmentOptions(model=model, max_risk=max_risk, outputs=("entropy",), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("max_risk", "threshold"), [(0.05, 0.25), (0.07, 0.25), (0.1, 0.5), (1.0, 0.5)])
def test_exactly_the_pixels_above_the_risks_entropy_are_withheld(
    segmenter: Segmenter, rng: np.random.Generator, max_risk: float, threshold: float
) -> None:
    image = picture(rng, 50, 70)
    logits = GAIN * image / 255
    prob = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    entropy = -(prob * np.log(prob)).sum(-1)
    prediction = segmenter.segment(image, ask(max_risk))
    clear = np.abs(entropy - threshold) > 1e-4
    wanted = np.where(entropy > threshold, IGNORE, image.argmax(-1))
    assert np.array_equal(prediction.labels_HW[clear], wanted[clear]) and clear.mean() > 0.99
    assert prediction.abstained == (prediction.labels_HW == IGNORE).mean() and 0.05 < prediction.abstained < 0.95
    assert np.abs(prediction.maps["entropy"] - entropy).max() < 1e-4, "maps are told in full"


BELOW_HALF = max(nats for nats in class_candidates(3).tolist() if nats <= 0.5)
"""Of a class only candidates are promised anything, so with a marginal threshold of 0.5 it is the next one below."""


@pytest.mark.parametrize(
    ("max_risk", "max_class_risk", "above"),
    [(None, 0.1, (0.3, -math.inf, 0.4)), (None, 0.5, (0.6, 0.05, 0.4)), (0.1, 0.2, (BELOW_HALF, 0.05, 0.4))],
)
def test_each_class_is_withheld_above_its_own_entropy_and_both_risks_hold_together(
    segmenter: Segmenter, rng: np.random.Generator, max_risk: float | None, max_class_risk: float, above: tuple[float]
) -> None:
    assert abstain_above(calibrated("pointwise"), max_risk, max_class_risk) == above
    image = picture(rng, 50, 70)
    free = segmenter.segment(image, ask(None))
    bounded = segmenter.segment(image, ask(max_risk, max_class_risk=max_class_risk))
    is_above = free.maps["entropy"] > np.float32(above)[free.labels_HW]
    assert np.array_equal(bounded.labels_HW, np.where(is_above, IGNORE, free.labels_HW))
    assert bounded.abstained == is_above.mean() and 0.05 < is_above.mean() < 0.95
    sentence = ("max_class_risk of 0.1 withholds green altogether",)
    assert bounded.warnings == (sentence if max_class_risk == 0.1 else ())
    image = image.copy()
    image[:, :, 1] = 0  # nothing is called green now
    assert segmenter.segment(image, ask(max_risk, max_class_risk=max_class_risk)).warnings == ()
    void = Raster(picture(rng, 50, 70), void_HW=np.ones((50, 70), np.bool_))
    assert segmenter.segment(void, ask(max_risk, max_class_risk=max_class_risk)).warnings == ()
    options, never = ask(max_risk, max_class_risk=max_class_risk), threading.Event()
    rest = segmenter.bands_from(80, picture(rng, 90, 70), options, limits=Limits(), cancelled=never)
    assert bool(rest.withheld) == (max_class_risk == 0.1), "what was answered before may have been green"


def test_a_class_of_which_no_candidate_is_within_both_risks_is_withheld_for_both(
    segmenter: Segmenter, rng: np.random.Generator
) -> None:
    first = float(class_candidates(3)[0])
    card = calibrated("pointwise", dataclasses.replace(CALIBRATION, entropy_nats=(first - 0.001, 0.5)))
    assert abstain_above(card, 0.05, 0.2) == (-math.inf,) * 3
    runtime = segmenter.find("toy-pointwise")
    usual, runtime.card = runtime.card, card
    try:
        withheld = segmenter.segment(picture(rng, 50, 70), ask(0.05, max_class_risk=0.2))
    finally:
        runtime.card = usual
    assert withheld.abstained == 1
    assert withheld.warnings == ("max_risk of 0.05 and max_class_risk of 0.2 withhold red, green, blue altogether",)


def test_a_risk_of_classes_needs_a_calibration_of_its_own() -> None:
    marginal = dataclasses.replace(CALIBRATION, class_risks=(), class_entropy_nats=())
    with pytest.raises(BadOption, match=r"max_class_risk is 0\.1; toy-pointwise is not calibrated for it"):
        abstain_above(calibrated("pointwise", marginal), None, 0.1)
    with pytest.raises(BadOption, match=r"max_class_risk is 0\.01; toy-pointwise is calibrated for 0\.1, 0\.2"):
        abstain_above(calibrated("pointwise"), None, 0.01)
    assert read_options({"max_class_risk": 0.1}).max_class_risk == 0.1


def test_nothing_is_withheld_unasked(segmenter: Segmenter, rng: np.random.Generator) -> None:
    prediction = segmenter.segment(picture(rng, 40, 50), ask(None))
    assert prediction.abstained is None and not (prediction.labels_HW == IGNORE).any()


def test_a_smaller_risk_withholds_more() -> None:
    assert abstain_above(calibrated("pointwise"), 0.05) < abstain_above(calibrated("pointwise"), 0.1)


@pytest.mark.parametrize(
    ("card", "max_risk", "sentence"),
    [
        (calibrated("pointwise", None), 0.1, "toy-pointwise is not calibrated"),
        (calibrated("pointwise"), 0.01, r"max_risk is 0\.01; toy-pointwise is calibrated for 0\.05, 0\.1"),
        (calibrated("pointwise"), 1.5, r"max_risk is 1\.5; 0 to 1 is possible"),
        (calibrated("pointwise"), -0.1, r"max_risk is -0\.1; 0 to 1 is possible"),
    ],
)
def test_a_risk_that_cannot_be_kept_is_refused_with_a_sentence(card: Card, max_risk: float, sentence: str) -> None:
    with pytest.raises(BadOption, match=sentence):
        abstain_above(card, max_risk)


def test_it_is_refused_before_the_pixels_are_looked_at(segmenter: Segmenter) -> None:
    with pytest.raises(BadOption, match="calibrated for"):
        segmenter.plan(10, 10, ask(0.001))


def test_it_is_an_option_of_text_and_of_grpc_parameters() -> None:
    assert parse_options({"max_risk": "0.05"}).max_risk == 0.05
    assert read_options({"max_risk": 0.05}).max_risk == 0.05
    with pytest.raises(BadOption, match="max_risk is 'low'; a number is wanted"):
        parse_options({"max_risk": "low"})


def test_every_form_of_the_answer_says_what_was_withheld(segmenter: Segmenter, rng: np.random.Generator) -> None:
    prediction = segmenter.segment(picture(rng, 40, 50), ask(0.05))
    share = prediction.abstained
    document = json.loads(render(prediction, "application/json", Style()))
    assert document["abstained"] == share
    assert sum(row["share"] for row in document["classes"]) == pytest.approx(1 - (share or 0))
    assert float(answer_headers(prediction)["X-Penumbra-Abstained"]) == pytest.approx(share, abs=1e-6)
    assert response_of(prediction, ASKED).parameters["abstained"] == share
    shown = Image.open(io.BytesIO(render(prediction, "image/png", Style()))).convert("RGB")
    black = np.asarray(shown)[prediction.labels_HW == IGNORE]
    assert len(black) and not black.any()


def test_unasked_no_answer_speaks_of_it(segmenter: Segmenter, rng: np.random.Generator) -> None:
    prediction = segmenter.segment(picture(rng, 40, 50), ask(None))
    assert "X-Penumbra-Abstained" not in answer_headers(prediction)
    assert "abstained" not in response_of(prediction, ASKED).parameters


def test_the_share_is_a_metric(segmenter: Segmenter, rng: np.random.Generator) -> None:
    telemetry, image = Telemetry(), picture(rng, 40, 50)
    for max_risk in (None, 0.05):
        telemetry.answered(segmenter.segment(image, ask(max_risk)), {})
    page = telemetry.page("")[0].decode()
    assert 'penumbra_abstain_ratio_count{model="toy-pointwise"} 1.0' in page


def test_the_list_of_models_names_the_calibrated_risks() -> None:
    assert summary(calibrated("pointwise"), is_tuned_here=False)["risks"] == [0.05, 0.1]
    assert summary(calibrated("pointwise"), is_tuned_here=False)["class_risks"] == [0.1, 0.2]
    assert summary(calibrated("pointwise", None), is_tuned_here=False)["risks"] == []


@pytest.mark.parametrize("changed", [{"samples": 3}, {"overlap": 0.5}])
def test_an_response_of_another_kind_than_the_calibration_warns(
    segmenter: Segmenter, rng: np.random.Generator, changed: dict[str, object]
) -> None:
    image = picture(rng, 40, 50)
    usual = segmenter.segment(image, ask(0.1, "toy-latent", samples=1))
    other = segmenter.segment(image, ask(0.1, "toy-latent", **({"samples": 1} | changed)))
    assert usual.warnings == () and "was calibrated with 1 samples, overlap 0.25" in other.warnings[0]


def test_a_card_keeps_its_calibration_in_json() -> None:
    assert parse_card(dump_card(calibrated("pointwise"))).calibration == CALIBRATION


@pytest.mark.parametrize(
    "wrong",
    [
        {"risks": (0.1, 0.05)}, {"risks": (0.0, 0.1)}, {"risks": (0.1, 1.0)}, {"risks": (0.1,)},
        {"entropy_nats": (0.5, 0.25)}, {"entropy_nats": (-1.0, 0.5)}, {"risks": ()},
        {"class_risks": (0.2, 0.1)}, {"class_risks": (0.1,)}, {"class_risks": (0.1, 1.0)},
        {"class_entropy_nats": ((0.3, None, 0.4), (0.6, 0.05))},
        {"class_entropy_nats": ((0.3, None, 0.4), (0.2, 0.05, 0.4))},
        {"class_entropy_nats": ((0.3, 0.01, 0.4), (0.6, None, 0.4))},
        {"class_entropy_nats": ((-0.5, None, 0.4), (0.6, 0.05, 0.4))},
        {"risks": (), "entropy_nats": (), "class_risks": (), "class_entropy_nats": ()},
    ],
)  # fmt: skip
def test_a_calibration_that_contradicts_itself_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(BadArtifact, match="ascending risks between 0 and 1"):
        parse_card(dump_card(calibrated("pointwise", dataclasses.replace(CALIBRATION, **wrong))))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"entropy_nats": (0.1, float("inf"))}, "calibration.entropy_nats.1. is inf; it should be a finite number"),
        ({"num_frames": 0}, "calibration.num_frames is 0; it should be greater than or equal to 1"),
    ],
)
def test_a_calibration_out_of_range_is_refused_by_its_field(wrong: dict[str, object], sentence: str) -> None:
    with pytest.raises(BadArtifact, match=sentence):
        parse_card(dump_card(calibrated("pointwise", dataclasses.replace(CALIBRATION, **wrong))))  # type: ignore[arg-type]
