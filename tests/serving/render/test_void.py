"""Pixels that hold no measurement: no label, no number, no share, in every form of the answer."""

import dataclasses
import io
import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.transform import from_origin

from penumbra.export.bundle import export_network
from penumbra.models.card import IGNORE, Calibration
from penumbra.models.errors import TooLarge
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.options import PROBABILITIES, SegmentOptions
from penumbra.serving.engine.raster import Raster, open_raster
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.files.predict import predict_file
from penumbra.serving.files.report import outcome_facts
from penumbra.serving.http.v2 import write_response
from penumbra.serving.oip.protocol import response_of
from penumbra.serving.oip.request import InferRequest, RequestedOutput
from penumbra.serving.oip.tensors import Output, classify
from penumbra.serving.render import Style, render
from penumbra.serving.render.tables import class_table
from penumbra.serving.spool import LONG, Spool
from penumbra.serving.telemetry import Telemetry
from tests.conftest import picture, toy_card

MODEL, SIZE = "toy-pointwise", (60, 80)
CALIBRATION = Calibration(risks=(0.05,), entropy_nats=(0.25,), num_frames=40, num_samples=1, data="made up")
MAPS = ("confidence", "margin", "entropy")
VOID = np.zeros(SIZE, bool)
VOID[10:50, 20:47] = True


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Segmenter]:
    store = tmp_path_factory.mktemp("calibrated")
    card, network = toy_card("pointwise")
    export_network(network, dataclasses.replace(card, calibration=CALIBRATION), store)
    with Segmenter.open(store, threads=1, tuning=Tuning(1, 1)) as opened:
        yield opened


@pytest.fixture
def pixels(rng: np.random.Generator) -> np.ndarray:
    return picture(rng, *SIZE) + 1


def with_nodata(path: Path, pixels_HW3: np.ndarray, void_HW: np.ndarray = VOID) -> Path:
    profile = {"driver": "GTiff", "height": len(pixels_HW3), "width": pixels_HW3.shape[1], "count": 3, "dtype": "uint8"}
    place = {"crs": "EPSG:32631", "transform": from_origin(500_000, 5_800_000, 10, 10)}
    with rasterio.open(path, "w", **profile, **place, nodata=0) as target:
        target.write(np.where(void_HW[..., None], 0, pixels_HW3).transpose(2, 0, 1))
    return path


def with_alpha(path: Path, pixels_HW3: np.ndarray) -> Path:
    profile = {"driver": "GTiff", "height": len(pixels_HW3), "width": pixels_HW3.shape[1], "count": 4, "dtype": "uint8"}
    with rasterio.open(
        path, "w", **profile, transform=from_origin(5, 5, 1, 1), photometric="rgb", alpha="yes"
    ) as target:
        target.write(np.dstack([pixels_HW3, np.where(VOID, 0, 255)]).astype(np.uint8).transpose(2, 0, 1))
    return path


def with_mask(path: Path, pixels_HW3: np.ndarray) -> Path:
    profile = {"driver": "GTiff", "height": len(pixels_HW3), "width": pixels_HW3.shape[1], "count": 3, "dtype": "uint8"}
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", **profile, transform=from_origin(5, 5, 1, 1)) as target,
    ):
        target.write(pixels_HW3.transpose(2, 0, 1))
        target.write_mask(~VOID)
    return path


@pytest.mark.parametrize("write", [with_nodata, with_alpha, with_mask])
def test_a_file_may_say_it_by_nodata_alpha_or_mask(
    segmenter: Segmenter, tmp_path: Path, pixels: np.ndarray, write: Callable[[Path, np.ndarray], Path]
) -> None:
    prediction = segmenter.segment(opened(write(tmp_path / "a.tif", pixels)), ask(0.05))
    assert prediction.num_void == VOID.sum() and (prediction.labels_HW[VOID] == IGNORE).all()
    assert all(np.array_equal(np.isnan(values), VOID) for values in prediction.maps.values())
    assert prediction.abstained == pytest.approx((prediction.labels_HW[~VOID] == IGNORE).mean())


def test_a_picture_with_transparent_pixels_is_predicted_into_pictures(
    segmenter: Segmenter, tmp_path: Path, pixels: np.ndarray
) -> None:
    Image.fromarray(np.dstack([pixels, np.where(VOID, 0, 255).astype(np.uint8)])).save(tmp_path / "a.png")
    outcome = predict_file(segmenter, tmp_path / "a.png", ask(), tmp_path / "out")
    assert outcome.prediction.num_void == VOID.sum() and "white is nan" not in str(outcome.files)
    assert outcome_facts(outcome)["void_pixels"] == VOID.sum()
    heat = np.asarray(Image.open(tmp_path / "out" / "a_entropy.png").convert("L"))
    assert heat[VOID].max() == heat.min() < heat[~VOID].max()


def opened(path: Path) -> Raster:
    raster = open_raster(path)
    assert raster is not None
    return raster


def ask(max_risk: float | None = None, *outputs: str) -> SegmentOptions:
    return SegmentOptions(MODEL, max_risk=max_risk, outputs=(*MAPS, *outputs))


@pytest.fixture
def void(segmenter: Segmenter, tmp_path: Path, pixels: np.ndarray) -> Prediction:
    return segmenter.segment(opened(with_nodata(tmp_path / "a.tif", pixels)), ask(None, PROBABILITIES))


@pytest.fixture
def whole(segmenter: Segmenter, pixels: np.ndarray) -> Prediction:
    """The answer to the same pixels, all of them measured."""
    return segmenter.segment(pixels, ask())


def test_every_array_is_void_there_and_the_same_elsewhere(void: Prediction, whole: Prediction) -> None:
    assert void.num_void == VOID.sum() and whole.num_void == 0
    assert np.array_equal(void.labels_HW == IGNORE, VOID)
    assert np.array_equal(void.labels_HW[~VOID], whole.labels_HW[~VOID])
    for name, values in void.maps.items():
        assert np.array_equal(np.isnan(values), VOID) and np.array_equal(values[~VOID], whole.maps[name][~VOID])
    assert void.prob_KHW is not None and (np.isnan(void.prob_KHW) == VOID).all()


def test_every_file_of_numbers_is_not_a_number_there(void: Prediction) -> None:
    with np.load(io.BytesIO(render(void, "application/x-npz", Style()))) as file:
        assert all((np.isnan(file[name]) == VOID).all() for name in (*MAPS, PROBABILITIES))
        assert np.array_equal(file["labels"] == IGNORE, VOID)
    with rasterio.MemoryFile(render(void, "image/tiff", Style("entropy"))) as memory, memory.open() as file:
        assert math.isnan(file.nodata) and np.array_equal(np.isnan(file.read(1)), VOID)


def test_shares_and_means_are_of_the_measured_pixels(void: Prediction, whole: Prediction) -> None:
    document = json.loads(render(void, "application/json", Style()), parse_constant=pytest.fail)
    assert document["void_pixels"] == VOID.sum() and document["abstained"] is None
    assert sum(row["share"] for row in document["classes"]) == pytest.approx(1)
    for row in document["classes"]:
        mine = (whole.labels_HW == row["id"]) & ~VOID
        assert row["pixels"] == mine.sum() and row["share"] == pytest.approx(mine.sum() / (~VOID).sum())
        assert row["mean_entropy"] == pytest.approx(whole.maps["entropy"][mine].mean(), rel=1e-4)


def test_regions_and_their_areas_leave_it_out(void: Prediction) -> None:
    document = json.loads(render(void, "application/geo+json", Style()), parse_constant=pytest.fail)
    about = [feature["properties"] for feature in document["features"]]
    assert sum(one["pixels"] for one in about) == (~VOID).sum()
    assert sum(one["area_m2"] for one in about) == pytest.approx((~VOID).sum() * 100 / 0.9996**2, rel=1e-4)


def test_only_measured_pixels_are_abstained_from(
    segmenter: Segmenter, tmp_path: Path, pixels: np.ndarray, whole: Prediction
) -> None:
    withheld = (whole.maps["entropy"] > CALIBRATION.entropy_nats[0]) & ~VOID
    wanted = withheld.sum() / (~VOID).sum()
    prediction = segmenter.segment(opened(with_nodata(tmp_path / "a.tif", pixels)), ask(0.05))
    assert prediction.num_void == VOID.sum() and prediction.abstained == pytest.approx(wanted) and 0.05 < wanted < 0.95
    assert np.array_equal(prediction.labels_HW == IGNORE, withheld | VOID)
    assert sum(row["share"] for row in class_table(prediction)) == pytest.approx(1 - wanted)
    telemetry = Telemetry()
    telemetry.answered(prediction, {})
    assert metric(telemetry, "penumbra_abstain_ratio_sum") == pytest.approx(wanted)


def metric(telemetry: Telemetry, name: str) -> float:
    (line,) = [line for line in telemetry.page("")[0].decode().splitlines() if line.startswith(f"{name}{{")]
    return float(line.split()[-1])


def test_the_metric_of_entropy_is_of_the_measured_pixels(void: Prediction, whole: Prediction) -> None:
    telemetry = Telemetry()
    telemetry.answered(void, {})
    assert metric(telemetry, "penumbra_entropy_mean_sum") == pytest.approx(
        whole.maps["entropy"][~VOID].mean(), rel=1e-4
    )


def test_tensors_are_not_a_number_there_and_null_in_json(void: Prediction) -> None:
    wanted = InferRequest(MODEL, outputs=[RequestedOutput("entropy"), RequestedOutput("labels")])
    answer = response_of(void, wanted)
    entropy = answer.outputs[0].values
    assert isinstance(entropy, np.ndarray) and np.array_equal(np.isnan(entropy), VOID)
    text = bytes(write_response(answer, encoding="").body)
    data = json.loads(text, parse_constant=pytest.fail)["outputs"][0]["data"]
    assert np.array_equal(np.isnan(np.array(data, np.float32)), VOID.ravel()), "as tritonclient reads it"


def test_more_numbers_than_json_is_for_are_refused(void: Prediction, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penumbra.serving.http.v2.MOST_NUMBERS", 10)
    answer = response_of(void, InferRequest(MODEL, outputs=[RequestedOutput("labels")]))
    with pytest.raises(TooLarge, match="numbers and the limit of JSON is 10; ask for binary_data"):
        write_response(answer, encoding="")


def test_the_largest_values_of_a_map_are_numbers() -> None:
    values = np.array([[0.25, np.nan], [0.5, np.nan]], np.float32)
    assert classify(Output("entropy", "FP32", values), 2).values == (b"0.500000:2", b"0.250000:0")


def test_pictures_show_it_as_what_has_no_label(void: Prediction) -> None:
    labels = np.asarray(Image.open(io.BytesIO(render(void, "image/png", Style()))))
    assert np.array_equal(labels == IGNORE, VOID)
    for levels in (32, 256, 65536):
        grey = np.asarray(Image.open(io.BytesIO(render(void, "image/png", Style("entropy", levels)))))
        assert not grey[VOID].any()
    assert render(void, "image/png", Style("overlay")) and render(void, "image/tiff", Style("overlay"))


def test_rows_on_disk_are_void_too_and_counted_after_a_stop(
    segmenter: Segmenter, tmp_path: Path, pixels: np.ndarray, void: Prediction
) -> None:
    raster = opened(with_nodata(tmp_path / "a.tif", pixels))
    for _ in range(2):  # the second has only the last band to run
        spool = Spool(tmp_path / "spool", segmenter, raster, ask(), source="a")
        found = spool.fill(limits=LONG, cancelled=threading.Event())
        assert found.num_void == VOID.sum() and np.array_equal(found.labels_HW[:], void.labels_HW)
        assert np.array_equal(found.maps["entropy"][:], void.maps["entropy"], equal_nan=True)


def test_a_raster_without_any_measurement_is_answered(segmenter: Segmenter, tmp_path: Path, pixels: np.ndarray) -> None:
    path = with_nodata(tmp_path / "a.tif", pixels, np.ones(SIZE, bool))
    prediction = segmenter.segment(opened(path), ask(0.05))
    assert prediction.abstained == 0 and prediction.num_void == VOID.size
    telemetry = Telemetry()
    telemetry.answered(prediction, {})
    assert class_table(prediction) == [] and "penumbra_entropy_mean_sum{" not in telemetry.page("")[0].decode()
    document = json.loads(render(prediction, "application/geo+json", Style()), parse_constant=pytest.fail)
    assert document["features"] == []
    for media, style in (("image/png", Style("entropy")), ("image/tiff", Style("entropy")), ("image/tiff", Style())):
        assert render(prediction, media, style)
    outcome = predict_file(segmenter, path, ask(), tmp_path / "out")
    assert outcome.classes == [] and outcome.prediction.num_void == VOID.size
