"""The scores of a picture in every form of an answer, and what the server counts of them."""

import dataclasses
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image

from penumbra.export.bundle import export_network
from penumbra.models.card import Novelty
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.files.report import Outcome, Result, report, summarise
from penumbra.serving.http.openapi import document
from penumbra.serving.http.routes import summary
from penumbra.serving.http.segment import answer_headers
from penumbra.serving.oip.protocol import response_of
from penumbra.serving.oip.request import InferRequest
from penumbra.serving.render import Style, render
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


def test_every_surface_tells_the_scores_and_the_warning(scored: Prediction, tmp_path: Path) -> None:
    error, novelty = scored.scores.expected_error, scored.scores.novelty
    assert error and novelty == 2 / 3
    told = json.loads(render(scored, "application/json", Style()))
    regions = json.loads(render(scored, "application/geo+json", Style()))["penumbra"]
    for facts in (told, regions):
        assert facts["scores"] == {"expected_error": error, "novelty": novelty}
        assert any("stranger than 2 of the 3 pictures that toy-pointwise" in sentence for sentence in facts["warnings"])
    headers = answer_headers(scored)
    assert float(headers["X-Penumbra-Expected-Error"]) == pytest.approx(error, abs=1e-6)
    assert float(headers["X-Penumbra-Novelty"]) == pytest.approx(novelty, abs=1e-6)
    parameters = response_of(scored, InferRequest("toy-pointwise")).parameters
    assert (parameters["expected_error"], parameters["novelty"]) == (error, novelty)
    (tmp_path / "it.tif").write_bytes(render(scored, "image/tiff", Style()))
    with rasterio.open(tmp_path / "it.tif") as file:
        assert float(file.tags()["PENUMBRA_NOVELTY"]) == pytest.approx(novelty)
    grey = Image.open(io.BytesIO(render(scored, "image/png", Style("entropy"))))
    assert json.loads(grey.info["Penumbra"])["expected_error"] == error  # type: ignore[attr-defined]


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
    assert plain.facts["scores"] == {"expected_error": plain.scores.expected_error, "novelty": None}
    assert "X-Penumbra-Novelty" not in answer_headers(plain) and plain.warnings == ()
    assert "novelty" not in response_of(plain, InferRequest("toy-boxed")).parameters
    assert (summary(plain.card)["novelty"], summary(segmenter.find("toy-pointwise").card)["novelty"]) == (
        None, "entropy",
    )  # fmt: skip


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
    warning = scored.warnings[-1]
    other = re.sub(r"its mean entropy is \S+", "its mean entropy is 4.5", warning)
    assert other != warning
    results = [Result(name, "", "made", warnings=text) for name, text in (("a", warning), ("b", other))]
    (line,) = summarise(results)
    assert line.startswith("warning of 2: this picture is stranger than 2 of the 3") and line.endswith(": a, b")


def test_the_api_document_has_the_scores() -> None:
    answer = document({"version": "1"}, typed="")["paths"]["/segment"]["post"]["responses"]["200"]
    assert {*answer["headers"]} == {"X-Penumbra-Expected-Error", "X-Penumbra-Novelty"}
    scores = answer["content"]["application/json"]["schema"]["properties"]["scores"]
    assert {*scores["properties"]} == {"expected_error", "novelty"}
