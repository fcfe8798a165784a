"""The engine end to end on toys: labels and uncertainties are the closed forms, alone and in a crowd."""

import json
import math
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from penumbra.export.bundle import export_network
from penumbra.models.card import MAPS, MAPS_OF_ONE, WindowSpec
from penumbra.models.contract import Features
from penumbra.models.errors import (
    BadArtifact,
    BadImage,
    BadOption,
    Cancelled,
    DeadlineExceeded,
    ModelFault,
    TooLarge,
    UnknownModel,
)
from penumbra.models.toy.net import ToyConfig, ToyNetwork
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.noise import SeededNoise
from penumbra.serving.engine.options import PROBABILITIES, Limits, SegmentOptions
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.store import CARD, GOLDEN, sha256_of
from tests.conftest import FIXED, GAIN, picture, toy_card

SIZES = [(1, 1), (7, 200), (32, 48), (33, 49), (90, 121), (200, 64)]


@pytest.fixture(scope="module")
def segmenter(toy_store: Path) -> Iterator[Segmenter]:
    with Segmenter.open(toy_store, threads=1, device="cpu", tuning=FIXED) as opened:
        yield opened


@pytest.fixture(scope="module")
def exact_segmenter(toy_store: Path) -> Iterator[Segmenter]:
    with Segmenter.open(toy_store, threads=1, device="cpu", tuning=Tuning(deterministic=True)) as opened:
        yield opened


def ask(model: str, **options: object) -> SegmentOptions:
    maps = MAPS_OF_ONE if model in ("toy-pointwise", "toy-nan") else MAPS
    return SegmentOptions(model=model, outputs=maps, **options)  # type: ignore[arg-type]


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(np.maximum(p, 1e-300))).sum(-1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("overlap", [None, 0.0, 0.6])
def test_labels_are_the_brightest_channel_and_maps_the_closed_forms(
    segmenter: Segmenter, rng: np.random.Generator, size: tuple[int, int], overlap: float | None
) -> None:
    image = picture(rng, *size)
    prediction = segmenter.segment(image, ask("toy-pointwise", overlap=overlap))
    p = softmax(GAIN * image.astype(np.float64) / 255)
    ranked = np.sort(p, axis=-1)
    clear = ranked[:, :, -1] - ranked[:, :, -2] > 1e-5
    assert (prediction.labels_HW == image.argmax(-1))[clear].all()
    wanted = {
        "confidence": ranked[:, :, -1], "margin": ranked[:, :, -1] - ranked[:, :, -2], "entropy": entropy(p),
        "expected_entropy": entropy(p), "seam": np.zeros(size),
    }  # fmt: skip
    for name, values in wanted.items():
        np.testing.assert_allclose(prediction.maps[name], values, atol=2e-5, err_msg=name)


def test_a_latent_is_the_documented_noise_for_every_window(segmenter: Segmenter, rng: np.random.Generator) -> None:
    image = picture(rng, 70, 90)
    prediction = segmenter.segment(image, ask("toy-latent", samples=5, seed=11))
    noise_SL = SeededNoise(prediction.card.sampling, seed=11, num_samples=5).draw(0).astype(np.float64)
    p_SHWK = softmax(GAIN * image / 255 + noise_SL[:, None, None])
    np.testing.assert_allclose(prediction.maps["entropy"], entropy(p_SHWK.mean(0)), atol=2e-5)
    np.testing.assert_allclose(prediction.maps["expected_entropy"], entropy(p_SHWK).mean(0), atol=2e-5)
    information = entropy(p_SHWK.mean(0)) - entropy(p_SHWK).mean(0)
    np.testing.assert_allclose(prediction.maps["mutual_information"], information, atol=2e-5)
    assert information.mean() > 0.05


def test_two_samples_that_disagree_completely_carry_ln2_nats(tmp_path: Path, rng: np.random.Generator) -> None:
    """One channel is bright and one dark: the members are sure of the one and of the other."""
    card, network = toy_card("opposed", name="steep")
    network.config = type(network.config)(form="opposed", gain=100.0)
    export_network(network, card, tmp_path)
    image = np.full((50, 70, 3), 128, np.uint8)
    image[:, :, 0], image[:, :, 2] = 255, 0
    with Segmenter.open(tmp_path, threads=1, device="cpu", tuning=FIXED) as opened:
        prediction = opened.segment(image, ask("steep"))
    for name in ("entropy", "mutual_information"):
        np.testing.assert_allclose(prediction.maps[name], math.log(2), atol=1e-5)
    np.testing.assert_allclose(prediction.maps["expected_entropy"], 0, atol=1e-5)
    np.testing.assert_allclose(prediction.maps["confidence"], 0.5, atol=1e-5)
    assert set(np.unique(prediction.labels_HW)) <= {0, 2}


def test_opposed_members_follow_their_closed_form_everywhere(segmenter: Segmenter, rng: np.random.Generator) -> None:
    image = picture(rng, 40, 60)
    prediction = segmenter.segment(image, ask("toy-opposed"))
    p_SHWK = np.stack([softmax(sign * GAIN * image.astype(np.float64) / 255) for sign in (1, -1)])
    np.testing.assert_allclose(prediction.maps["entropy"], entropy(p_SHWK.mean(0)), atol=2e-5)
    np.testing.assert_allclose(prediction.maps["expected_entropy"], entropy(p_SHWK).mean(0), atol=2e-5)
    assert prediction.num_samples == 2


class Placed(ToyNetwork):
    """Sure of red in the left half of every window, and of blue in the right: neighbours contradict each other."""

    def encode(self, image_B3hw: Tensor) -> Features:
        left_w = torch.cumsum(torch.ones_like(image_B3hw[:1, 0, 0]), 1) <= image_B3hw.shape[3] / 2
        red, blue = (torch.tensor(color)[:, None] for color in ([100.0, 0, 0], [0, 0, 100.0]))
        logits_3w = torch.where(left_w, red, blue)
        return ((0 * image_B3hw + logits_3w[None, :, None])[:, None],)


def test_what_overlapping_windows_of_one_pass_disagree_about_is_its_seam(tmp_path: Path) -> None:
    card = toy_card("pointwise", window=WindowSpec(32, 40, overlap=0.5, blend="uniform"))[0]
    export_network(Placed(ToyConfig()), card, tmp_path)
    image, asked = np.zeros((32, 60, 3), np.uint8), SegmentOptions("toy-pointwise", outputs=("default", "seam"))
    with Segmenter.open(tmp_path, threads=1, device="cpu", tuning=FIXED) as opened:
        prediction = opened.segment(image, asked)
        apart = opened.segment(np.zeros((32, 80, 3), np.uint8), replace(asked, overlap=0.0))
    assert not apart.maps["seam"].any()
    assert set(prediction.maps) == {"confidence", "entropy", "seam"}
    seam_nats = np.zeros((32, 60))
    seam_nats[:, 20:40] = math.log(2)  # the right half of the first window on the left half of the second
    np.testing.assert_allclose(prediction.maps["seam"], seam_nats, atol=1e-5)
    np.testing.assert_allclose(prediction.maps["entropy"], seam_nats, atol=1e-5)


# -- alone = in a crowd --------------------------------------------------------------------------


def crowd(segmenter: Segmenter, images: list[np.ndarray], options: list[SegmentOptions]) -> list[Prediction]:
    with ThreadPoolExecutor(len(images)) as threads:
        return list(threads.map(segmenter.segment, images, options))


@pytest.mark.parametrize("exact", [True, False])
def test_the_same_seed_gives_the_same_answer_alone_and_in_a_crowd(
    segmenter: Segmenter, exact_segmenter: Segmenter, rng: np.random.Generator, exact: bool
) -> None:
    engine = exact_segmenter if exact else segmenter
    sizes = rng.integers(1, 130, (17, 2))
    images = [picture(rng, *size) for size in sizes]
    options = [ask("toy-latent" if i % 3 else "toy-opposed", seed=i) for i in range(17)]
    for runtime in (engine.find("toy-latent"), engine.find("toy-opposed")):
        runtime.windows_per_batch = runtime.windows_per_batch if exact else 8  # batches do mix
    together = crowd(engine, images, options)
    for image, option, prediction in zip(images, options, together, strict=True):
        alone = engine.segment(image, option)
        if exact:
            assert alone.labels_HW.tobytes() == prediction.labels_HW.tobytes()
        for name, values in alone.maps.items():
            if exact:
                assert values.tobytes() == prediction.maps[name].tobytes()
            np.testing.assert_allclose(values, prediction.maps[name], atol=1e-5)


def test_another_seed_gives_another_answer(segmenter: Segmenter, rng: np.random.Generator) -> None:
    image = picture(rng, 20, 20)
    one, other = (segmenter.segment(image, ask("toy-latent", seed=seed)) for seed in (1, 2))
    assert not np.allclose(one.maps["entropy"], other.maps["entropy"], atol=1e-3)


def test_an_image_that_breaks_the_model_fails_alone(segmenter: Segmenter, rng: np.random.Generator) -> None:
    images = [picture(rng, 60, 80) for _ in range(9)]
    images[4][50, 70] = 255
    segmenter.find("toy-nan").windows_per_batch = 8

    def outcome(image: np.ndarray) -> Prediction | ModelFault:
        try:
            return segmenter.segment(image, ask("toy-nan"))
        except ModelFault as fault:
            return fault

    with ThreadPoolExecutor(9) as threads:
        outcomes = list(threads.map(outcome, images))
    assert [isinstance(outcome, ModelFault) for outcome in outcomes] == [i == 4 for i in range(9)]
    assert "not finite" in str(outcomes[4])


class Glaring(ToyNetwork):
    """Its own map is NaN at pure white pixels, and its logits are sound."""

    def encode(self, image_B3hw: Tensor) -> Features:
        members, brightness = super().encode(image_B3hw)
        return members, torch.where(brightness == 1, torch.full_like(brightness, torch.nan), brightness)


def test_a_map_of_the_models_own_that_is_not_finite_is_a_fault_too(tmp_path: Path, rng: np.random.Generator) -> None:
    export_network(Glaring(ToyConfig(form="bright")), toy_card("bright")[0], tmp_path)
    with Segmenter.open(tmp_path, threads=1, device="cpu", tuning=FIXED) as opened:
        asked, image = SegmentOptions("toy-bright", outputs=("brightness",)), picture(rng, 60, 80)
        assert np.isfinite(opened.segment(image, asked).maps["brightness"]).all()
        image[50, 70] = 255
        with pytest.raises(ModelFault, match="not finite"):
            opened.segment(image, asked)


@pytest.mark.parametrize("wrong", [0.5, float("nan")])
def test_own_maps_belong_to_the_golden_window(toy_store: Path, tmp_path: Path, wrong: float) -> None:
    place = Path(shutil.copytree(toy_store / "toy-bright" / "1", tmp_path / "toy-bright" / "1"))
    tensors = load_file(place / GOLDEN)
    save_file(tensors | {"extras_BEhw": tensors["extras_BEhw"] + wrong}, place / GOLDEN)
    card = json.loads((place / CARD).read_text("utf-8"))
    card["export"]["files"][GOLDEN] = sha256_of(place / GOLDEN)
    (place / CARD).write_text(json.dumps(card), "utf-8")
    with (
        Segmenter(threads=1, device="cpu", tuning=FIXED) as segmenter,
        pytest.raises(BadArtifact, match="golden window"),
    ):
        segmenter.load(place)


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("break_it", ["flip", "remove", "card"])
def test_a_broken_artifact_is_listed_as_refused_and_keeps_no_other_away(
    toy_store: Path, tmp_path: Path, break_it: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = Path(shutil.copytree(toy_store, tmp_path / "store"))
    graph = store / "toy-latent" / "1" / "decode.ts"
    if break_it == "flip":
        graph.write_bytes(graph.read_bytes()[:-1] + b"?")
    elif break_it == "remove":
        graph.unlink()
    else:
        (graph.parent / "card.json").write_text("{}")
    with Segmenter.open(store, threads=1, device="cpu", tuning=FIXED) as opened:
        others = sorted(path.name for path in toy_store.iterdir() if path.name != "toy-latent")
        assert [card.name for card in opened.cards()] == others
        assert list(opened.refused) == ["toy-latent"]
        assert opened.refused["toy-latent"] in caplog.text
        with pytest.raises(UnknownModel, match=", ".join(others)):
            opened.find("toy-latent")


def test_an_artifact_in_a_directory_of_another_name_is_refused(toy_store: Path, tmp_path: Path) -> None:
    """Or one model could be listed under one name and found under another."""
    copy = Path(shutil.copytree(toy_store / "toy-latent" / "1", tmp_path / "renamed" / "1"))
    with Segmenter(threads=1, device="cpu", tuning=FIXED) as segmenter, pytest.raises(BadArtifact, match="renamed"):
        segmenter.load(copy)


def test_models_are_found_by_name_and_version(segmenter: Segmenter) -> None:
    assert segmenter.find("toy-latent").card.name == segmenter.find("toy-latent", 1).card.name
    with pytest.raises(UnknownModel, match="toy-latent has no version 2; loaded are 1"):
        segmenter.find("toy-latent", 2)
    with pytest.raises(UnknownModel, match=r"no model 'x'; there are toy-.*, toy-latent"):
        segmenter.find("x")
    with pytest.raises(BadOption, match="option model is needed"):
        segmenter.find(None)


def test_every_refusal_comes_before_any_window_runs(segmenter: Segmenter, rng: np.random.Generator) -> None:
    image = picture(rng, 40, 40)
    with pytest.raises(BadOption, match="samples is 0"):
        segmenter.segment(image, ask("toy-latent", samples=0))
    with pytest.raises(BadOption, match="overlap is 1"):
        segmenter.segment(image, ask("toy-latent", overlap=1.0))
    with pytest.raises(BadImage, match="float64"):
        segmenter.segment(image / 255, ask("toy-latent"))  # type: ignore[arg-type]
    assert segmenter.scheduler.queued == (0, 0)


def test_what_could_never_fit_the_queue_is_refused_with_a_remedy(toy_store: Path, rng: np.random.Generator) -> None:
    with Segmenter(limits=Limits(queue_samples=15), threads=1, device="cpu", tuning=FIXED) as segmenter:
        segmenter.load(toy_store / "toy-latent" / "1")
        refused = r"4 windows x 4 samples = 16 window-samples and .*limit_queue_samples\) is 15; lower the overlap"
        with pytest.raises(TooLarge, match=refused):
            segmenter.segment(picture(rng, 40, 60), ask("toy-latent", samples=4))
        assert segmenter.segment(picture(rng, 40, 60), ask("toy-latent", samples=2)).num_windows == 4


def test_cancelled_and_expired_requests_end_so(segmenter: Segmenter, rng: np.random.Generator) -> None:
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(Cancelled):
        segmenter.segment(picture(rng, 9, 9), ask("toy-latent"), cancelled=cancelled)
    with pytest.raises(DeadlineExceeded):
        segmenter.segment(picture(rng, 9, 9), ask("toy-latent"), deadline=time.perf_counter() - 1)
    assert segmenter.scheduler.queued == (0, 0)


def test_leaving_the_bands_early_withdraws_the_rest(segmenter: Segmenter, rng: np.random.Generator) -> None:
    bands = segmenter.bands(picture(rng, 2000, 48), ask("toy-latent"))
    rows = iter(bands)
    assert next(rows).y0 == 0
    rows.close()  # type: ignore[attr-defined]
    assert segmenter.scheduler.queued == (0, 0)


def test_bands_follow_each_other_down_the_image(segmenter: Segmenter, rng: np.random.Generator) -> None:
    image = picture(rng, 300, 100)
    bands = segmenter.bands(image, ask("toy-pointwise"))
    y = 0
    for band in bands:
        assert band.y0 == y
        y += len(band.labels)
    assert y == 300


def test_a_whole_image_window_serves_any_size(tmp_path: Path, rng: np.random.Generator) -> None:
    card, network = toy_card("pointwise", name="whole", window=WindowSpec(0, 0))
    export_network(network, card, tmp_path)
    with Segmenter.open(tmp_path, threads=1, device="cpu", tuning=FIXED) as opened:
        for size in SIZES:
            image = picture(rng, *size)
            prediction = opened.segment(image, SegmentOptions("whole"))
            assert prediction.num_windows == 1
            p = softmax(GAIN * image.astype(np.float64) / 255)
            np.testing.assert_allclose(prediction.maps["entropy"], entropy(p), atol=2e-5)


def test_phases_are_timed(segmenter: Segmenter, rng: np.random.Generator) -> None:
    timing_ms = segmenter.segment(picture(rng, 80, 80), ask("toy-latent")).timing_ms
    assert set(timing_ms) == {"queue", "run", "stitch", "read_out", "total"}
    assert all(ms >= 0 for ms in timing_ms.values()) and timing_ms["total"] > 0


def test_bands_that_nobody_asks_for_hold_no_place_in_the_queue(segmenter: Segmenter) -> None:
    segmenter.bands(np.zeros((50, 60, 3), np.uint8), SegmentOptions("toy-pointwise"))
    assert segmenter.scheduler.queued == (0, 0)


def test_the_probabilities_are_those_that_labels_and_maps_are_read_from(
    segmenter: Segmenter, rng: np.random.Generator
) -> None:
    image = rng.integers(0, 255, (21, 34, 3), dtype=np.uint8)
    plain = segmenter.segment(image, SegmentOptions(model="toy-latent", samples=4, seed=1))
    outputs = ("entropy", PROBABILITIES)
    asked = segmenter.segment(image, SegmentOptions("toy-latent", samples=4, seed=1, outputs=outputs))
    assert plain.prob_KHW is None
    assert asked.prob_KHW is not None
    assert asked.prob_KHW.sum(0) == pytest.approx(1, abs=1e-6)
    assert (asked.prob_KHW.argmax(0) == plain.labels_HW).all()
    assert asked.prob_KHW.max(0).tobytes() == plain.maps["confidence"].tobytes()
    assert set(asked.maps) == {"entropy"}


def test_probabilities_beyond_their_limit_are_refused_with_their_size(toy_store: Path) -> None:
    too_large = pytest.raises(TooLarge, match=r"at 34x21 px have [0-9,]+ bytes and the limit is 1,000")
    with Segmenter.open(toy_store, limits=Limits(probability_bytes=1000), tuning=FIXED) as segmenter, too_large:
        segmenter.segment(np.zeros((21, 34, 3), np.uint8), SegmentOptions("toy-latent", outputs=(PROBABILITIES,)))
