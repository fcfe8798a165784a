"""The scores of a picture in every form of an answer, and what the server counts of them."""

import dataclasses
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image

from penumbra.export.bundle import export_network
from penumbra.models.card import Novelty
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.raster import Raster
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.files.rank import scores_of
from penumbra.serving.files.report import Outcome, Result, outcome_facts, report, summarise
from penumbra.serving.http.openapi import document
from penumbra.serving.http.routes import summary
from penumbra.serving.http.segment import answer_headers
from penumbra.serving.oip.grpc import pb, write_response
from penumbra.serving.oip.protocol import response_of
from penumbra.serving.oip.request import InferRequest
from penumbra.serving.render import Style, render
from penumbra.serving.render.notebook import html_of
from penumbra.serving.render.tables import class_table
from penumbra.serving.telemetry import Telemetry
from tests.conftest import picture, toy_card

NOVELTY = Novelty("entropy", (0.0, 0.01, 5.0), num_pictures=3, num_samples=1, data="made up", warn_above=0.5)
OUTPUTS = ("confidence", "entropy")


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Segmenter]:
    store = tmp_path_factory.mktemp("scored")
    for form, novelty in (("pointwise", NOVELTY), ("boxed", None)):
        card, network = toy_card(form)
        export_network(network, dataclasses.replace(card, novelty=novelty), store)
    with Segmenter.open(store, threads=1, tuning=Tuning(1, 1)) as opened:
        yield opened


@pytest.fixture
def scored(segmenter: Segmenter, rng: np.random.Generator) -> Prediction:
    return segmenter.segment(picture(rng, 40, 50), SegmentOptions(model="toy-pointwise", outputs=OUTPUTS))


def _tags(prediction: Prediction) -> dict[str, str]:
    with rasterio.MemoryFile(render(prediction, "image/tiff", Style("entropy"))) as file, file.open() as dataset:
        return {name.removeprefix("PENUMBRA_").lower(): text for name, text in dataset.tags().items()}


def _text(prediction: Prediction, picture: str) -> dict[str, Any]:
    png = Image.open(io.BytesIO(render(prediction, "image/png", Style(picture))))
    return dict(json.loads(png.info["Penumbra"]))


def _in_grpc(prediction: Prediction) -> dict[str, float]:
    written = write_response(response_of(prediction, InferRequest(prediction.card.name)))
    answered = pb.ModelInferResponse.FromString(written)
    return {name: value.double_param for name, value in answered.parameters.items()}


def _in_notebook(prediction: Prediction) -> dict[str, float]:
    told = re.findall(r">(expected error|novelty): ([\d.]+)%", html_of(prediction))
    return {name.replace(" ", "_"): float(percents) / 100 for name, percents in told}


NULL, ABSENT = "null", "absent"
SURFACES: dict[str, tuple[str, Callable[[Prediction], Mapping[str, Any]]]] = {
    "JSON": (NULL, lambda one: json.loads(render(one, "application/json", Style()))["scores"]),
    "GeoJSON": (NULL, lambda one: json.loads(render(one, "application/geo+json", Style()))["penumbra"]["scores"]),
    "PNG of labels": (NULL, partial(_text, picture="labels")),
    "PNG of a map": (NULL, partial(_text, picture="entropy")),
    "PNG over the picture": (NULL, partial(_text, picture="overlay")),
    "npz": (NULL, lambda one: json.loads(
        zipfile.ZipFile(io.BytesIO(render(one, "application/x-npz", Style()))).comment
    )),
    "predict --json": (NULL, lambda one: outcome_facts(Outcome(Path("it.png"), one, [], {}))["scores"]),
    "rank": (NULL, scores_of),
    "TIFF": (ABSENT, _tags),
    "notebooks": (ABSENT, _in_notebook),
    "headers, also of jobs": (ABSENT, lambda one: {
        name.removeprefix("X-Penumbra-").replace("-", "_").lower(): text for name, text in answer_headers(one).items()
    }),
    "REST parameters": (ABSENT, lambda one: response_of(one, InferRequest(one.card.name)).parameters),
    "gRPC parameters": (ABSENT, _in_grpc),
}  # fmt: skip
"""By surface, how it says that there is no such score, and where it has the scores."""


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("kind", ["with a reference", "without one", "void"])
def test_every_surface_tells_the_same_scores(
    surface: str, kind: str, segmenter: Segmenter, rng: np.random.Generator
) -> None:
    pixels, void_HW = picture(rng, 40, 50), np.full((40, 50), kind == "void")
    model = "toy-boxed" if kind == "without one" else "toy-pointwise"
    answer = segmenter.segment(Raster(pixels, void_HW=void_HW), SegmentOptions(model=model, outputs=OUTPUTS))
    expected = answer.scores.expected_error, answer.scores.novelty
    assert tuple(map(bool, expected)) == (kind != "void", kind == "with a reference")
    missing, read = SURFACES[surface]
    told = read(answer)
    for name, score in zip(("expected_error", "novelty"), expected, strict=True):
        assert (name in told) == (missing == NULL or score is not None)
        value = told.get(name)
        assert value is score is None or float(value) == pytest.approx(
            score, abs=1e-3 if surface == "notebooks" else 1e-6
        )


def test_a_strange_picture_is_warned_of_first(scored: Prediction) -> None:
    sentence = "this picture is stranger than 2 of the 3 pictures that toy-pointwise was calibrated on"
    regions = json.loads(render(scored, "application/geo+json", Style()))["penumbra"]
    assert regions["warnings"][0].startswith(sentence) and answer_headers(scored)["X-Penumbra-Warning"].startswith(
        sentence
    )


def test_a_class_and_a_region_have_the_error_expected_among_their_pixels(scored: Prediction) -> None:
    for row in class_table(scored):
        of_class = 1 - scored.maps["confidence"][scored.labels_HW == row["id"]].mean(dtype=float)
        assert row["expected_error"] == pytest.approx(of_class, abs=1e-6)
    features = json.loads(render(scored, "application/geo+json", Style()))["features"]
    pixels, errors = (np.array([one["properties"][name] for one in features]) for name in ("pixels", "expected_error"))
    assert (pixels * errors).sum() / pixels.sum() == pytest.approx(scored.scores.expected_error, abs=1e-6)


def test_a_model_without_a_reference_tells_its_expected_error_alone(
    segmenter: Segmenter, rng: np.random.Generator
) -> None:
    plain = segmenter.segment(picture(rng, 40, 50), SegmentOptions(model="toy-boxed", outputs=()))
    assert plain.scores.expected_error and plain.scores.novelty is None and plain.warnings == ()
    cards = plain.card, segmenter.find("toy-pointwise").card
    assert [summary(card, is_tuned_here=False)["novelty"] for card in cards] == [None, "entropy"]


def test_scores_are_counted_by_model(scored: Prediction) -> None:
    telemetry = Telemetry()
    telemetry.answered(scored, {})
    page = telemetry.page("")[0].decode()
    assert 'penumbra_novelty_bucket{le="0.5",model="toy-pointwise"} 0.0' in page
    assert 'penumbra_novelty_bucket{le="0.75",model="toy-pointwise"} 1.0' in page
    assert 'penumbra_expected_error_count{model="toy-pointwise"} 1.0' in page


def test_the_command_line_tells_them_and_groups_what_is_strange(
    scored: Prediction, capsys: pytest.CaptureFixture[str]
) -> None:
    report(Outcome(Path("it.png"), scored, class_table(scored), {}))
    assert re.search(r"expected error [\d.]+ %\s+novelty 66\.7 %", capsys.readouterr().out)
    warning = scored.warnings[0]
    other = re.sub(r"its mean entropy is \S+", "its mean entropy is 4.5", warning)
    assert other != warning
    results = [Result(name, "made", warnings=text) for name, text in (("a", warning), ("b", other))]
    (line,) = summarise(results)
    assert line.startswith("warning of 2: this picture is stranger than 2 of the 3") and line.endswith(": a, b")


def test_the_api_document_has_the_scores() -> None:
    paths = document({"version": "1"}, typed="")["paths"]
    for operation in (paths["/segment"]["post"], paths["/jobs/{id}/result"]["get"]):
        answer = operation["responses"]["200"]
        assert {*answer["headers"]} >= {"X-Penumbra-Expected-Error", "X-Penumbra-Novelty"}
        assert not any("nullable" in header["schema"] for header in answer["headers"].values()), "absent, not null"
        regions = answer["content"]["application/geo+json"]["schema"]["properties"]["penumbra"]
        for facts in (answer["content"]["application/json"]["schema"], regions):
            scores = facts["properties"]["scores"]
            assert {*scores["properties"]} == {*scores["required"]} == {"expected_error", "novelty"}
            assert all(score["nullable"] for score in scores["properties"].values())
