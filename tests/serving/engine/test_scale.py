"""The scale of pictures: a network sees things at the size that it learned, and the answer is at the picture's."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.transform import from_origin
from torch.nn import functional as F

from penumbra.export.bundle import export_network
from penumbra.models.card import InputSpec, ScaleRule, WindowSpec
from penumbra.models.errors import BadOption, TooLarge
from penumbra.serving.engine import canvas
from penumbra.serving.engine.options import PROBABILITIES, Limits, SegmentOptions, parse_options
from penumbra.serving.engine.raster import Raster
from penumbra.serving.engine.scale import ScaledRaster, metres_of
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.spool import LONG
from tests.conftest import FIXED, GAIN, toy_card
from tests.serving.engine.tiffs import opened, tiff
from tests.toys import INPUT

RULES = {"none": ScaleRule(), "frame": ScaleRule("frame", 40), "gsd": ScaleRule("gsd", 10)}
WHOLE = WindowSpec(0, 0)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Segmenter]:
    store = tmp_path_factory.mktemp("store")
    for name, rule in RULES.items():
        for window in (None, WHOLE):
            spec = replace(INPUT, resolution=rule)
            card, network = toy_card("bright", name=name + "-whole" * bool(window), spec=spec, window=window)
            export_network(network, card, store)
    with Segmenter.open(store, device="cpu", threads=1, tuning=FIXED) as opened_:
        yield opened_


def photo(height: int, width: int) -> np.ndarray:
    coarse = np.random.Generator(np.random.PCG64(5)).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def by_hand(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Probabilities [K, H, W] of the toy on the whole image at another size, resized back."""
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].double()
    seen = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True).add(0.499).floor()
    prob = torch.softmax(GAIN * seen / 255, 1)
    return F.interpolate(prob, size=image.shape[:2], mode="bilinear", align_corners=False)[0].numpy()


def points(metres: float) -> list[GroundControlPoint]:
    """Corners of a picture of 60x80 pixels of so many metres."""
    corners = [(row, column) for row in (0, 60) for column in (0, 80)]
    return [GroundControlPoint(y, x, 5e5 + metres * x, 5.8e6 - metres * y) for y, x in corners]


def across(first: float) -> list[GroundControlPoint]:
    """Corners of pixels of 1e-4 degrees from a longitude on, with those beyond 180 degrees in the west."""
    return [
        GroundControlPoint(row, col, (first + col / 1e4 + 180) % 360 - 180, 52.4 - row / 1e4)
        for row in (0, 60) for col in (0, 80)
    ]  # fmt: skip


def near(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for a pixel here and there that is rounded to the next value."""
    difference = np.abs(found - expected)
    assert difference.max() < 0.01 and (difference > 1e-5).mean() < 0.001


@pytest.mark.parametrize("name", ["none", "none-whole"])
@pytest.mark.parametrize("scale", [0.25, 0.5, 0.8, 1.7, 3.0])
@pytest.mark.parametrize("size", [(75, 100), (20, 141), (9, 7)])
def test_an_answer_at_a_factor_is_the_resized_images_resized_back(
    segmenter: Segmenter, name: str, scale: float, size: tuple[int, int]
) -> None:
    image, outputs = photo(*size), (PROBABILITIES, "entropy", "brightness")
    answer = segmenter.segment(image, SegmentOptions(model=name, scale=scale, outputs=outputs))
    expected = by_hand(image, (max(1, round(scale * size[0])), max(1, round(scale * size[1]))))
    assert answer.prob_KHW is not None and answer.labels_HW.shape == size and answer.warnings == ()
    near(answer.prob_KHW, expected)
    top = np.sort(expected, 0)
    assert (answer.labels_HW == expected.argmax(0))[top[-1] - top[-2] > 0.02].all()
    near(answer.maps["entropy"], -(answer.prob_KHW * np.log(answer.prob_KHW)).sum(0))


@pytest.mark.parametrize("scale", [0.5, 1.7])
def test_what_samples_disagree_about_is_what_they_do_at_the_networks_scale(segmenter: Segmenter, scale: float) -> None:
    image, asked = photo(75, 100), SegmentOptions(model="none", scale=scale, views="flip")
    assert segmenter.segment(image, asked).maps["mutual_information"].max() < 1e-5, "flipped pixels answer alike"


@pytest.mark.parametrize("scale", [0.5, 1.7])
@pytest.mark.parametrize("beside", [(), ("entropy", "expected_entropy")])
def test_a_single_window_has_no_seam_at_any_scale(segmenter: Segmenter, scale: float, beside: tuple[str, ...]) -> None:
    asked = SegmentOptions(model="none-whole", scale=scale, outputs=("seam", *beside))
    assert segmenter.segment(photo(75, 100), asked).maps["seam"].max() < 1e-5, "there is no other window"


@pytest.mark.parametrize("scale", [0.5, 1.7])
def test_mutual_information_is_resized_as_it_is(scale: float, tmp_path: Path) -> None:
    card, network = toy_card("latent", window=WHOLE)
    export_network(network, card, tmp_path)
    image, maps = photo(60, 80), ("entropy", "expected_entropy", "mutual_information")
    size = round(60 * scale), round(80 * scale)
    with Segmenter.open(tmp_path, device="cpu", threads=1, tuning=FIXED) as opened_:
        answer = opened_.segment(image, SegmentOptions(scale=scale, outputs=maps)).maps
        seen = ScaledRaster(Raster(image), size)[:, :]
        there_HW = torch.from_numpy(opened_.segment(seen, SegmentOptions(outputs=maps)).maps["mutual_information"])
    expected = F.interpolate(there_HW[None, None], size=image.shape[:2], mode="bilinear", align_corners=False)[0, 0]
    assert there_HW.mean() > 1e-3 and np.allclose(answer["mutual_information"], expected, atol=1e-5)
    assert np.allclose(answer["entropy"] - answer["expected_entropy"], expected, atol=1e-5)


@pytest.mark.parametrize("scale", [2, np.float32(2), np.int64(2)])
def test_a_factor_may_be_any_number(segmenter: Segmenter, scale: Any) -> None:
    assert segmenter.plan(40, 60, SegmentOptions(model="none", scale=scale)).windows.height == 80


def test_without_a_rule_a_factor_of_one_changes_nothing(segmenter: Segmenter) -> None:
    image = photo(300, 400)
    plain, one = (segmenter.segment(image, SegmentOptions(model="none", scale=scale)) for scale in (None, 1.0))
    assert plain.maps["entropy"].tobytes() == one.maps["entropy"].tobytes() and plain.warnings == one.warnings == ()


def test_a_picture_far_from_the_cards_frame_is_run_at_it_and_says_so(segmenter: Segmenter) -> None:
    for size, warned in (((40, 60), False), ((48, 60), False), ((160, 240), True), ((20, 30), True)):
        image = photo(*size)
        answer = segmenter.segment(image, SegmentOptions(model="frame", outputs=(PROBABILITIES,)))
        factor = 40 / size[0] if warned else 1
        expected = by_hand(image, (round(factor * size[0]), round(factor * size[1])))
        assert answer.prob_KHW is not None
        near(answer.prob_KHW, expected)
        said = f"frame learned from frames of 40 px, so the image was run at {factor:.3g} times its size"
        assert answer.warnings == ((said,) if warned else ())
    exact = segmenter.segment(photo(48, 60), SegmentOptions(model="frame", scale="card", outputs=(PROBABILITIES,)))
    assert exact.prob_KHW is not None and exact.warnings == ()
    near(exact.prob_KHW, by_hand(photo(48, 60), (40, 50)))
    plain = segmenter.segment(photo(160, 240), SegmentOptions(model="frame", scale=1.0))
    assert plain.warnings == ()


@pytest.mark.parametrize(
    ("place", "metres"),
    [
        ({"crs": "EPSG:32631", "transform": from_origin(500_000, 5_800_000, 2.5, 2.5)}, 2.5),
        ({"crs": "EPSG:3857", "transform": from_origin(334_000, 6_870_000, 40, 40)}, 24.5),
        ({"crs": "EPSG:4326", "transform": from_origin(3, 52.4, 1e-4, 1e-4)}, 8.7),
        ({"crs": "EPSG:32631", "gcps": points(2.5)}, 2.5),
        ({"crs": "EPSG:32631", "gcps": points(2.5)[:1]}, 0),
        ({"crs": "EPSG:32631", "gcps": points(2.5)[::3]}, 0),
        ({"crs": "EPSG:32631", "gcps": [*points(2.5), GroundControlPoint(1, np.inf, 5e5, 5.8e6)]}, 0),
        ({"crs": "EPSG:4326", "gcps": across(3.0)}, 8.7),
        ({"crs": "EPSG:4326", "gcps": across(179.996)}, 8.7),
        ({"crs": None, "transform": from_origin(0, 0, 5, 5)}, 0),
        ({"crs": "EPSG:32631", "transform": from_origin(1e9, 1e9, 5, 5)}, 0),
    ],
)
def test_pixels_are_measured_on_the_ground(segmenter: Segmenter, place: dict[str, Any], metres: float) -> None:
    raster = opened(tiff(photo(60, 80), **place))
    assert metres_of(raster.place, 60, 80) == pytest.approx(metres, rel=0.02)
    answer = segmenter.segment(raster, SegmentOptions(model="gsd", outputs=(PROBABILITIES,)))
    factor = metres / 10 if metres else 1
    factor = 1 if 0.8 <= factor <= 1.25 else factor
    assert answer.prob_KHW is not None
    if not metres:
        assert "the image does not say how large its own are; give scale" in answer.warnings[0]
    else:
        assert bool(answer.warnings) == (factor != 1)
        exact = metres_of(raster.place, 60, 80) / 10 if factor != 1 else 1
        expected = by_hand(photo(60, 80), (round(exact * 60), round(exact * 80)))
        near(answer.prob_KHW, expected)


def test_void_pixels_of_a_resized_raster_are_void_in_its_answer(segmenter: Segmenter) -> None:
    mask = np.full((60, 80), 255, np.uint8)
    mask[10:20, 30:33] = 0
    raster = opened(tiff(photo(60, 80), mask=mask))
    answer = segmenter.segment(raster, SegmentOptions(model="none", scale=0.5))
    assert ((answer.labels_HW == 255) == (mask == 0)).all() and answer.num_void == 30
    assert np.isnan(answer.maps["entropy"][mask == 0]).all()


@pytest.mark.parametrize("scale", [0.3, 2.1])
def test_work_that_goes_on_has_the_bytes_of_one_run(segmenter: Segmenter, scale: float) -> None:
    image = photo(300, 130)
    options = SegmentOptions(model="none", scale=scale, outputs=("entropy",))
    whole = segmenter.segment(image, options)
    for y in (0, 1, 57, 150, 299):
        bands = list(segmenter.bands_from(y, image, options, limits=LONG, cancelled=threading.Event()))
        assert bands[0].y0 <= y and bands[-1].y0 + len(bands[-1].labels) == 300
        rest = np.concatenate([band.maps["entropy"] for band in bands])
        assert rest.tobytes() == whole.maps["entropy"][bands[0].y0 :].tobytes()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("size", [(40, 50), (13, 90), (150, 201), (7, 3)])
@pytest.mark.parametrize("at_once", [1, 700, 2**22])
def test_any_part_of_a_resized_image_has_the_pixels_of_the_whole(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, dtype: str, size: tuple[int, int], at_once: int
) -> None:
    image = rng.integers(0, 250, (100, 120, 2)).astype(dtype)
    scaled = ScaledRaster(Raster(image), size)
    whole = scaled[:, :]
    monkeypatch.setattr("penumbra.serving.engine.scale.AT_ONCE", at_once)
    assert scaled[:, :].tobytes() == whole.tobytes()
    assert whole.shape == (*size, 2) and whole.dtype == dtype and scaled.shape == whole.shape
    for rows, columns in ((slice(0, 3), slice(1, 3)), (slice(2, 7), slice(0, 2)), (slice(5, None), slice(None))):
        assert scaled[rows, columns].tobytes() == np.ascontiguousarray(whole[rows, columns]).tobytes()
    pixels = torch.from_numpy(image.astype(float)).permute(2, 0, 1)[None]
    expected = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)[0]
    assert np.abs(whole - expected.permute(1, 2, 0).numpy()).max() <= (1e-3 if dtype == "float32" else 0.502)


def test_what_a_scale_cannot_be_is_refused(segmenter: Segmenter) -> None:
    image = photo(40, 60)
    for text, named in (("big", "scale is 'big'"), ("nan", "scale is 'nan'")):
        with pytest.raises(BadOption, match=named):
            parse_options({"scale": text})
    assert (parse_options({"scale": "0.5"}).scale, parse_options({"scale": "card"}).scale) == (0.5, "card")
    for scale in (0.0, -1.0, 1e9, "2"):
        with pytest.raises(BadOption, match=r"0\.01 to 100 is possible, or card"):
            segmenter.segment(image, SegmentOptions(model="none", scale=scale))
    with pytest.raises(BadOption, match="scale is 'card', and the card of none names none"):
        segmenter.segment(image, SegmentOptions(model="none", scale="card"))


@pytest.mark.parametrize("scale", [None, "card"])
def test_a_picture_too_thin_for_the_cards_frame_is_refused_and_answered_at_a_scale_of_its_own(
    tmp_path: Path, scale: Any
) -> None:
    card, network = toy_card("bright", spec=replace(INPUT, resolution=ScaleRule("frame", 360)))
    export_network(network, card, tmp_path)
    limits = Limits(memory_bytes=3_000_000)
    with Segmenter.open(tmp_path, device="cpu", threads=1, tuning=FIXED, limits=limits) as opened_:
        for size, named in (((1, 500), "500x1 px"), ((500, 1), "1x500 px"), ((3, 3), "3x3 px")):
            image = photo(*size)
            with pytest.raises(BadOption, match=rf"of {named} would be run at \d+ times .* give scale, for example 1"):
                opened_.segment(image, SegmentOptions(scale=scale))
            assert opened_.segment(image, SegmentOptions(scale=1.0)).labels_HW.shape == size
        with pytest.raises(TooLarge, match=r"\(memory_bytes\) is 3,000,000; .* run it at a smaller scale"):
            opened_.segment(photo(4, 500), SegmentOptions(scale=scale))
        with pytest.raises(TooLarge, match=r"the plan of windows alone takes 17,\d+,\d+ bytes"):
            opened_.plan(
                2, 1_000_000, SegmentOptions(scale=1.0), limits=replace(limits, pixels=2**40, queue_samples=2**40)
            )


def test_no_picture_is_refused_for_the_width_of_its_bands(segmenter: Segmenter) -> None:
    asked = SegmentOptions(model="none", scale=0.02)
    assert segmenter.plan(40_000, 200_000, asked, limits=LONG).windows.size == (40_000, 200_000)


@pytest.mark.parametrize("name", ["none", "none-whole"])
@pytest.mark.parametrize("scale", [0.3, 1.7])
@pytest.mark.parametrize("piece_pixels", [1, 700])
def test_an_answer_at_a_factor_is_read_out_in_pieces_of_the_same_bytes(
    segmenter: Segmenter, name: str, scale: float, piece_pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = (PROBABILITIES, "entropy", "seam", "brightness")
    image, asked = photo(75, 100), SegmentOptions(model=name, scale=scale, outputs=outputs)
    whole = segmenter.segment(image, asked)
    monkeypatch.setattr(canvas, "PIECE_PIXELS", piece_pixels)
    heights = [len(band.labels) for band in segmenter.bands(image, asked)]
    assert max(heights) <= max(1, piece_pixels // 100) and len(heights) > 10 and sum(heights) == 75
    pieces = segmenter.segment(image, asked)
    assert pieces.labels_HW.tobytes() == whole.labels_HW.tobytes() and pieces.scores == whole.scores
    assert pieces.prob_KHW is not None and whole.prob_KHW is not None
    assert pieces.prob_KHW.tobytes() == whole.prob_KHW.tobytes()
    assert all(pieces.maps[one].tobytes() == whole.maps[one].tobytes() for one in whole.maps)


def test_boxes_are_in_the_pictures_own_pixels(tmp_path: Path) -> None:
    card, network = toy_card("boxed")
    export_network(network, card, tmp_path)
    grey = np.full((64, 96, 3), 100, np.uint8)
    with Segmenter.open(tmp_path, device="cpu", threads=1, tuning=FIXED) as here:
        answer = here.segment(grey, SegmentOptions(scale=0.5, boxes=((20, 10, 60, 40, 2),)))
    assert (answer.labels_HW[14:36, 24:56] == 2).all() and (answer.labels_HW[44:] != 2).all()


def test_the_default_rule_is_none() -> None:
    assert InputSpec().resolution == ScaleRule("none", 0)
