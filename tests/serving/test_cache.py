"""The cache of answers: a hit is the answer, whatever its form, and whatever changes an answer is another one."""

import asyncio
import io
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from penumbra.models.errors import BadImage, BadOption, ModelFault
from penumbra.serving.cache import AnswerCache, key_of
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.options import PROBABILITIES, SegmentOptions
from penumbra.serving.engine.raster import Raster
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.gateway import Gateway
from penumbra.serving.render import WRITERS, Style, render
from penumbra.serving.telemetry import Request, Telemetry
from tests.conftest import FIXED, picture, toy_card
from tests.serving.server import serving

IMAGE = picture(np.random.Generator(np.random.PCG64(0)), 20, 30)
OPTIONS = SegmentOptions(model="toy-latent", samples=3, seed=1)
WAIT_S = 30
SIZE = 2 * 3 * 600 + 600 * (1 + 3 * 4)
"""Of an answer to IMAGE: the picture as sent and decoded, labels, three maps."""


@pytest.fixture(scope="module")
def segmenter(toy_store: Path) -> Iterator[Segmenter]:
    with Segmenter(threads=1, device="cpu", tuning=FIXED) as opened:
        for name in ("toy-latent", "toy-pointwise"):
            opened.load(toy_store / name / "1")
        yield opened


def gateway(segmenter: Segmenter, *, cache_bytes: int = 2**20) -> Gateway:
    made = Gateway(segmenter, Telemetry(), limit_requests=2, timeout_s=60, cache_bytes=cache_bytes)
    made.state = "ready"
    return made


def ask(to: Gateway, image: Any = IMAGE, options: SegmentOptions = OPTIONS) -> Prediction:
    return asyncio.run(to.answer(image, options, lambda prediction: None, request=Request()))[0]


def counts(of: Gateway) -> tuple[float, float]:
    values = [of.telemetry.registry.get_sample_value(f"penumbra_cache_{what}_total") for what in ("hits", "misses")]
    return values[0] or 0, values[1] or 0


def test_an_equal_request_is_answered_from_memory_and_says_so(segmenter: Segmenter) -> None:
    cached = gateway(segmenter)
    first, again = ask(cached), ask(cached, IMAGE.copy())
    assert first.age_s is None and again.age_s is not None and again.age_s >= 0
    assert again.labels_HW is first.labels_HW and again.maps == first.maps and again.num_samples == 3
    assert set(again.timing_ms) == {"wait"}
    assert counts(cached) == (1, 1)


def test_without_memory_nothing_is_kept(segmenter: Segmenter) -> None:
    plain = gateway(segmenter, cache_bytes=0)
    assert [ask(plain).age_s for _ in range(2)] == [None, None] and counts(plain) == (0, 0)


@pytest.mark.parametrize(
    "change",
    [{"seed": 2}, {"samples": 4}, {"overlap": 0.5}, {"outputs": ("entropy",)}, {"outputs": (PROBABILITIES,)},
     {"model": "toy-pointwise", "samples": 1}],
)  # fmt: skip
def test_whatever_changes_an_answer_is_another_one(segmenter: Segmenter, change: dict[str, Any]) -> None:
    cached, other = gateway(segmenter), replace(OPTIONS, **change)
    ask(cached)
    answer = ask(cached, options=other)
    assert answer.age_s is None and counts(cached) == (0, 2)
    assert answer.labels_HW.tobytes() == segmenter.segment(IMAGE, other).labels_HW.tobytes()


def test_a_pixel_more_or_less_is_another_picture(segmenter: Segmenter) -> None:
    cached, changed = gateway(segmenter), IMAGE.copy()
    changed[0, 0, 0] ^= 1
    for image in (IMAGE, changed, IMAGE.reshape(30, 20, 3)):
        assert ask(cached, image).age_s is None
    assert counts(cached) == (0, 3)


@pytest.mark.parametrize(
    "change", [{"deadline_ms": 60_000.0}, {"anytime": True}, {"priority": 1}, {"version": 1}]
)  # fmt: skip
def test_when_an_answer_is_wanted_does_not_change_it(segmenter: Segmenter, change: dict[str, Any]) -> None:
    cached = gateway(segmenter)
    ask(cached)
    assert ask(cached, options=replace(OPTIONS, **change)).age_s is not None


def test_the_cards_number_of_samples_is_the_same_wish_said_otherwise(segmenter: Segmenter) -> None:
    cached = gateway(segmenter)
    ask(cached, options=replace(OPTIONS, samples=4))
    assert ask(cached, options=replace(OPTIONS, samples=None)).age_s is not None


def test_what_is_wrong_is_refused_whether_or_not_the_answer_is_there(segmenter: Segmenter) -> None:
    cached = gateway(segmenter)
    ask(cached)
    for change in ({"deadline_ms": 0.0}, {"priority": 9}):
        with pytest.raises(BadOption):
            ask(cached, options=replace(OPTIONS, **change))  # type: ignore[arg-type]
    with pytest.raises(BadImage, match="int8"):
        ask(cached, IMAGE.view(np.int8))


def test_an_artifact_that_was_loaded_again_answers_anew(toy_store: Path) -> None:
    with Segmenter(threads=1, device="cpu", tuning=FIXED) as segmenter:
        segmenter.load(toy_store / "toy-latent" / "1")
        cached = gateway(segmenter)
        ask(cached)
        segmenter.unload("toy-latent")
        segmenter.load(toy_store / "toy-latent" / "1")
        assert [ask(cached).age_s is None for _ in range(2)] == [True, False]


def test_an_answer_with_fewer_samples_than_asked_is_not_kept(segmenter: Segmenter) -> None:
    card = segmenter.find("toy-latent").card
    prediction = segmenter.segment(IMAGE, OPTIONS)
    cache, key = AnswerCache(2**20), key_of(IMAGE, card, OPTIONS)
    cache.keep(key, replace(prediction, num_samples=2), image_bytes=IMAGE.nbytes)
    assert cache.find(key, card) is None
    cache.keep(key, prediction, image_bytes=IMAGE.nbytes)
    assert cache.find(key, card)


def ask_while_an_equal_one_is_written(cached: Gateway, write: Callable[[], None]) -> Prediction:
    """The answer to a request that comes while the first, whatever becomes of it, is at its writing."""
    writing, go = threading.Event(), threading.Event()

    def write_first(_: Prediction) -> None:
        writing.set()
        assert go.wait(WAIT_S)
        write()

    def ask_first() -> None:
        with suppress(ModelFault):
            asyncio.run(cached.answer(IMAGE, OPTIONS, write_first, request=Request()))

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(ask_first)
        assert writing.wait(WAIT_S)
        second = threads.submit(ask, cached)
        while cached._inflight < 2:
            time.sleep(0.001)
        go.set()
        first.result(WAIT_S)
        return second.result(WAIT_S)


def test_of_equal_requests_at_the_same_moment_one_is_computed(segmenter: Segmenter) -> None:
    cached = gateway(segmenter)
    assert ask_while_an_equal_one_is_written(cached, lambda: None).age_s is not None
    assert counts(cached) == (1, 1)


def test_an_early_answer_waits_for_no_equal_request(segmenter: Segmenter) -> None:
    cached, early = gateway(segmenter), replace(OPTIONS, anytime=True, deadline_ms=20_000)
    writing, go = threading.Event(), threading.Event()

    def write(_: Prediction) -> None:
        writing.set()
        assert go.wait(2 * WAIT_S)

    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(asyncio.run, cached.answer(IMAGE, OPTIONS, write, request=Request()))
        try:
            assert writing.wait(WAIT_S)
            assert ask(cached, options=early).age_s is None
        finally:
            go.set()
        first.result(WAIT_S)


def test_where_the_first_of_equal_requests_fails_the_next_is_computed(segmenter: Segmenter) -> None:
    cached = gateway(segmenter)

    def fail() -> None:
        raise ValueError

    assert ask_while_an_equal_one_is_written(cached, fail).age_s is None
    assert counts(cached) == (0, 2)


def test_nobody_waits_longer_for_an_equal_request_than_its_deadline() -> None:
    cache, key = AnswerCache(2**20), key_of(IMAGE, toy_card("latent")[0], OPTIONS)
    with cache.first(key, timeout_s=0), cache.first(key, timeout_s=0.01), cache.first(key, timeout_s=-1):
        pass
    assert not cache._in_work


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(0, 4))
def test_the_last_used_are_kept_as_many_as_there_is_room_for(seeds: list[int], room: int) -> None:
    card = toy_card("latent")[0]
    labels_HW, maps = np.zeros((20, 30), np.uint8), {name: np.zeros((20, 30), np.float32) for name in "abc"}
    cache, used, raster = AnswerCache(room * SIZE + 1), list[int](), Raster(IMAGE)
    for seed in seeds:
        key = key_of(IMAGE, card, replace(OPTIONS, seed=seed))
        kept = cache.find(key, card)
        assert (kept is not None) == (seed in used)
        cache.keep(
            key, Prediction(card, seed, 3, 1, (), (), labels_HW, maps, {}, image=raster), image_bytes=IMAGE.nbytes
        )
        used = [*(other for other in used if other != seed), seed][-room:] if room else []


def test_a_picture_of_many_bands_takes_the_room_that_it_takes() -> None:
    card, labels_HW, void_HW = toy_card("latent")[0], np.zeros((20, 30), np.uint8), np.zeros((20, 30), bool)
    cache, raster = AnswerCache(600 * (1 + 13 * 4)), Raster(np.zeros((20, 30, 13), np.float32), void_HW=void_HW)
    key = key_of(IMAGE, card, OPTIONS)
    cache.keep(key, Prediction(card, 1, 3, 1, (), (), labels_HW, {}, {}, image=raster), image_bytes=0)
    assert cache.find(key, card) is None, "of void pixels there is a byte more"


def test_an_answer_larger_than_the_memory_leaves_the_others_there(segmenter: Segmenter) -> None:
    cached = gateway(segmenter, cache_bytes=SIZE + 1)
    ask(cached)
    assert ask(cached, np.zeros((200, 300, 3), np.uint8)).age_s is None
    assert ask(cached).age_s is not None


@pytest.mark.parametrize("media", WRITERS)
def test_every_format_writes_a_kept_answer_to_the_same_bytes(segmenter: Segmenter, media: str) -> None:
    cached, buffer = gateway(segmenter), io.BytesIO()
    Image.fromarray(IMAGE).save(buffer, "TIFF")
    for style in [Style()] + [Style("overlay"), Style("entropy")] * (media in ("image/png", "image/tiff")):

        def write(prediction: Prediction, style: Style = style) -> bytes:
            return render(replace(prediction, timing_ms={}), media, style)

        bodies = [asyncio.run(cached.answer(buffer.getvalue(), OPTIONS, write, request=Request()))[1] for _ in range(2)]
        assert bodies[0] == bodies[1]
    assert counts(cached)[1] == 1


def test_all_surfaces_of_a_server_share_it(toy_store: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(IMAGE).save(buffer, "PNG")
    file = triton.InferInput("image", [1], "BYTES")
    file.set_data_from_numpy(np.array([buffer.getvalue()], object))
    options = {"samples": 3, "seed": 1}
    with serving(toy_store, tmp_path, cache_mb=1) as server, server.client() as http:
        asked = {"params": options | {"model": "toy-latent"}, "content": buffer.getvalue()}
        first, again = (http.post("/segment", headers={"Content-Type": "image/png"}, **asked) for _ in range(2))
        assert "age" not in first.headers and int(again.headers["age"]) >= 0
        assert first.json()["classes"] == again.json()["classes"]
        with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
            answer = client.infer("toy-latent", [file], parameters=options).get_response()
            statistics = client.get_inference_statistics("toy-latent")["model_stats"][0]["inference_stats"]
        assert answer["parameters"]["age_s"] >= 0
        assert statistics["cache_hit"]["count"] == 1 and statistics["compute_infer"]["count"] == 0
        assert "penumbra_cache_hits_total 2.0" in http.get("/metrics").text
