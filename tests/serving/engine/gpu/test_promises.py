"""What the engine promises holds where windows stay on the device, here a CPU with torch's plain operators."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from penumbra.models.card import IGNORE, Calibration, Card, WindowSpec
from penumbra.models.contract import Features
from penumbra.models.errors import BadImage, Cancelled, ModelFault, PenumbraError
from penumbra.models.toy.net import ToyConfig, ToyNetwork
from penumbra.serving.engine import canvas as surfaces
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.backends import Backend
from penumbra.serving.engine.canvas import Copied, Surface, Transfers
from penumbra.serving.engine.gpu.pipeline import DeviceSteps
from penumbra.serving.engine.options import PROBABILITIES, Limits, SegmentOptions
from penumbra.serving.engine.raster import Pixels, Raster
from penumbra.serving.engine.request import Cancellation, QueuedRequest
from penumbra.serving.engine.runtime import Runtime, Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.steps import WindowInput
from penumbra.serving.engine.uncertainty import Band
from tests.conftest import picture, toy_card
from tests.serving.engine.gpu.eager import Models, opened
from tests.serving.engine.gpu.test_pipeline import assert_alike
from tests.serving.engine.stepped import WAIT_S

SPEC = WindowSpec(32, 40, overlap=0.5)
TUNING = Tuning(windows_per_batch=8, samples_per_call=2)
SIZES = [(75, 100), (32, 40), (20, 130), (100, 60)]
Outcome = Prediction | PenumbraError


class Dark(ToyNetwork):
    """A toy whose own map is NaN in black pixels."""

    def encode(self, image_B3hw: Tensor) -> Features:
        logits_B1Khw, brightness_B1hw = super().encode(image_B3hw)
        return logits_B1Khw, brightness_B1hw / (brightness_B1hw != 0)


def models(window: WindowSpec = SPEC) -> Models:
    forms: Any = ("latent", "bright", "boxed", "nan")
    made = {form: toy_card(form, window=window, name=form) for form in forms}
    risks = Calibration((0.05, 0.1), (0.25, 0.5), num_frames=40, num_samples=4, data="made up")
    card, network = made["latent"]
    dark = replace(made["bright"][0], name="dark"), Dark(ToyConfig(form="bright"))
    return {**made, "latent": (replace(card, calibration=risks), network), "dark": dark}


@pytest.fixture(scope="module")
def staying() -> Iterator[Segmenter]:
    with opened(models(), staying=True, tuning=TUNING) as segmenter:
        yield segmenter


def asked(segmenter: Segmenter, form: str, **options: object) -> SegmentOptions:
    card: Card = segmenter.find(form).card
    boxes = ((1, 2, 30, 19.5, 1), (0, 0, 9, 9, 2)) if form == "boxed" else ()
    outputs = (*card.maps(card.sampling_with(prompt=bool(boxes)).default_samples), PROBABILITIES)
    return SegmentOptions(form, outputs=outputs, boxes=boxes, **{"seed": 3, **options})  # type: ignore[arg-type]


@contextmanager
def held(segmenter: Segmenter) -> Iterator[None]:
    """Keep the lanes from batches."""
    go, begun = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        assert go.wait(WAIT_S)

    scheduler = segmenter.scheduler
    with scheduler._condition:  # or a lane that has answered, and is not done yet, would be free afterwards
        assert scheduler._condition.wait_for(lambda: not scheduler._working, WAIT_S)
    with ThreadPoolExecutor(1) as threads:
        holding = threads.submit(scheduler.call, hold)
        assert begun.wait(WAIT_S)
        try:
            yield
        finally:
            go.set()
            holding.result(WAIT_S)


def together(segmenter: Segmenter, *works: tuple[Pixels, SegmentOptions]) -> list[Outcome]:
    """Requests that are all in the queue before the first batch is made."""

    def outcome(image: Pixels, options: SegmentOptions) -> Outcome:
        try:
            return segmenter.segment(image, options)
        except PenumbraError as error:
            return error

    scheduler = segmenter.scheduler
    with ThreadPoolExecutor(len(works)) as threads:
        with held(segmenter):
            outcomes = [threads.submit(outcome, *work) for work in works]
            with scheduler._condition:
                assert scheduler._condition.wait_for(lambda: len(scheduler._requests) == len(works), WAIT_S)
        return [one.result(WAIT_S) for one in outcomes]


def assert_same(found: Outcome, expected: Prediction) -> None:
    """Byte for byte."""
    assert isinstance(found, Prediction), found
    assert found.maps.keys() == expected.maps.keys()
    pairs = [(found.labels_HW, expected.labels_HW), (found.prob_KHW, expected.prob_KHW)]
    pairs += [(found.maps[name], expected.maps[name]) for name in expected.maps]
    for here, there in pairs:
        assert here is not None and there is not None and here.tobytes() == there.tobytes()


@pytest.mark.parametrize("form", ["latent", "bright", "boxed"])
def test_requests_that_share_batches_have_the_bytes_of_each_alone(
    form: str, staying: Segmenter, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = [(picture(rng, *size), asked(staying, form, seed=seed)) for seed, size in enumerate(SIZES)]
    alone = [staying.segment(*work) for work in works]
    run, shared = Runtime.run, set[int]()

    def watched(runtime: Runtime, inputs: list[WindowInput]) -> object:
        shared.add(len({one.surface for one in inputs}))
        return run(runtime, inputs)

    monkeypatch.setattr(Runtime, "run", watched)
    for found, expected in zip(together(staying, *works), alone, strict=True):
        assert_same(found, expected)
    assert max(shared) == len(works)


@pytest.mark.parametrize(("form", "value"), [("nan", 255), ("dark", 0)])
def test_values_that_are_not_finite_end_their_own_request_and_no_other(
    form: str, value: int, staying: Segmenter, rng: np.random.Generator
) -> None:
    """In logits, and in a map of the network's own."""
    good = [(1 + picture(rng, *size), asked(staying, form)) for size in SIZES]
    bad = picture(rng, 75, 100)
    bad[60, 70] = value
    alone = [staying.segment(*work) for work in good]
    first, broken, *others = together(staying, good[0], (bad, asked(staying, form)), *good[1:])
    assert isinstance(broken, ModelFault) and "not finite" in str(broken)
    for found, expected in zip([first, *others], alone, strict=True):
        assert_same(found, expected)


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, turn: int, error: Exception) -> list[int]:
    """Let a method raise at its call of that number. Gives the number of calls so far."""
    method, calls = getattr(owner, name), [0]

    def failing(*arguments: Any, **options: Any) -> object:
        calls[0] += 1
        if calls[0] == turn:
            raise error
        return method(*arguments, **options)

    monkeypatch.setattr(owner, name, failing)
    return calls


PLACES: list[tuple[type, str]] = [
    (Runtime, "surface"), (Surface, "__init__"), (Surface, "strip"), (DeviceSteps, "cut"), (Backend, "encode"),
    (DeviceSteps, "noise"), (Backend, "decode"), (Transfers, "room"), (Transfers, "up"),
]  # fmt: skip


@pytest.mark.parametrize("spec", [SPEC, WindowSpec(32, 40, overlap=0.5, last="clip")], ids=["shifted", "clipped"])
@pytest.mark.parametrize("strip_bytes", [1, surfaces.STRIP_BYTES], ids=["strips", "whole"])
@pytest.mark.parametrize(("owner", "name"), PLACES, ids=[f"{owner.__name__}.{name}" for owner, name in PLACES])
def test_where_memory_is_short_a_batch_is_halved_and_answers_stay_right(
    owner: type, name: str, strip_bytes: int, spec: WindowSpec, rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(surfaces, "STRIP_BYTES", strip_bytes)
    short = torch.OutOfMemoryError("CUDA out of memory")
    with opened(models(spec), staying=True, tuning=TUNING) as segmenter:
        works = [(picture(rng, *size), asked(segmenter, "latent")) for size in ((75, 100), (60, 90))]
        alone = [segmenter.segment(*work) for work in works]
        for turn in (1, 2, 3, 5, 8):
            segmenter.find("latent").windows_per_batch = 8
            with pytest.MonkeyPatch.context() as patched:
                calls = fail_at(patched, owner, name, turn, short)
                outcomes = together(segmenter, *works)
            halved = segmenter.find("latent").windows_per_batch < 8
            is_single = spec.last == "clip" and not halved
            assert halved or is_single or calls[0] < turn, "a clipped window that is run by itself has no half"
            for found, expected in zip(outcomes, alone, strict=True):
                if not (is_single and isinstance(found, ModelFault)):
                    assert_same(found, expected)


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("spec", [SPEC, WindowSpec(32, 40, overlap=0.5, last="clip")], ids=["shifted", "clipped"])
def test_a_batch_whose_halves_do_not_fit_either_is_run_in_smaller_parts(
    spec: WindowSpec, most: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Backend.encode

    def short(backend: Backend, image_B3hw: Tensor) -> Features:
        if len(image_B3hw) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(backend, image_B3hw)

    with opened(models(spec), staying=True, tuning=TUNING) as segmenter:
        works = [(picture(rng, *size), asked(segmenter, "latent")) for size in ((75, 100), (60, 90), (300, 40))]
        alone = [segmenter.segment(*work) for work in works]
        monkeypatch.setattr(Backend, "encode", short)
        for chosen in (works[:1], works[2:], works):
            segmenter.find("latent").windows_per_batch = 8
            expected = [alone[[id(one) for one in works].index(id(work))] for work in chosen]
            for found, whole in zip(together(segmenter, *chosen), expected, strict=True):
                assert_same(found, whole)


def test_fewer_samples_in_the_middle_begin_again_and_give_their_own_answer(
    staying: Segmenter, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, options = picture(rng, 100, 130), asked(staying, "latent", samples=16, overlap=0.0)
    expected = staying.segment(image, replace(options, samples=3))
    takes = 0

    def fit_samples(requests: list[QueuedRequest]) -> None:
        nonlocal takes
        takes += 1
        if takes == 2:
            requests[0].restart(3)

    monkeypatch.setattr(staying.scheduler._throughput, "fit_samples", fit_samples)
    found = staying.segment(image, replace(options, anytime=True))
    assert found.num_samples == 3
    assert_same(found, expected)


def test_a_request_that_leaves_in_the_middle_harms_no_other(staying: Segmenter, rng: np.random.Generator) -> None:
    other, options = picture(rng, 100, 130), asked(staying, "latent")
    expected = staying.segment(other, options)
    cancelled = Cancellation()
    leaving = iter(staying.bands(picture(rng, 300, 130), options, cancelled=cancelled))
    assert next(leaving).y0 == 0
    with ThreadPoolExecutor(1) as threads:
        beside = threads.submit(staying.segment, other, options)
        cancelled.set()
        with pytest.raises(Cancelled):
            list(leaving)
        assert_same(beside.result(WAIT_S), expected)
    assert staying.scheduler.queued == (0, 0)


class Damaged(Raster):
    """Breaks off at row 900, which is far below the rows that the first windows need."""

    def __getitem__(self, part: tuple[slice, slice]) -> np.ndarray:
        if part[0].stop is None or part[0].stop > 900:
            raise BadImage("the image is damaged from row 900 on")
        return super().__getitem__(part)


@pytest.mark.parametrize("is_staying", [False, True])
def test_rows_above_the_damage_of_a_picture_are_answered_before_it_is_told(is_staying: bool) -> None:
    image, bands = Damaged(np.zeros((1000, 40, 3), np.uint8)), list[Band]()
    with opened(models(), staying=is_staying, tuning=TUNING) as segmenter:
        plan = segmenter.plan(1000, 40, asked(segmenter, "latent"))
        with pytest.raises(BadImage, match="row 900"):
            bands.extend(QueuedRequest(segmenter.scheduler, plan, image))
    assert 200 < sum(len(band.labels) for band in bands) < 900  # the damage is told at once, ahead of other lanes


@pytest.mark.parametrize("count", [1, 64, 65, 200])
def test_many_boxes_are_drawn_as_the_cpu_draws_them(count: int, rng: np.random.Generator) -> None:
    image = picture(rng, 75, 100)
    corners = np.sort(rng.uniform(0, 74, (count, 2, 2)), axis=1)
    boxes = tuple((*low, *(high + 0.1), k % 3) for k, (low, high) in enumerate(corners))
    answers = []
    for is_staying in (False, True):
        with opened(models(), staying=is_staying, tuning=TUNING) as segmenter:
            answers.append(segmenter.segment(image, replace(asked(segmenter, "boxed"), boxes=boxes)))
    assert_alike(*answers)


@pytest.mark.parametrize("y", [0, 16, 31, 32, 64, 99])
def test_long_work_goes_on_with_the_bytes_of_the_whole(y: int, staying: Segmenter, rng: np.random.Generator) -> None:
    image, options = picture(rng, 100, 130), replace(asked(staying, "bright"), outputs=("entropy", "brightness"))
    limits, never = Limits(), threading.Event()
    whole = list(staying.bands(image, options))
    rest = list(staying.bands_from(y, image, options, limits=limits, cancelled=never))
    assert rest and rest[0].y0 <= y
    assert [_bytes(band) for band in rest] == [_bytes(band) for band in whole if band.y0 >= rest[0].y0]


def _bytes(band: Band) -> list[object]:
    return [band.y0, band.labels.tobytes(), {name: values.tobytes() for name, values in band.maps.items()}]


@pytest.mark.parametrize("options", [{"max_risk": 0.05}, {"max_risk": 0.1, "overlap": 0.0}, {}])
def test_void_pixels_and_withheld_ones_are_the_same_on_both_ways(
    options: dict[str, object], staying: Segmenter, rng: np.random.Generator
) -> None:
    void_HW = rng.random((75, 100)) < 0.2
    image = Raster(picture(rng, 75, 100), void_HW=void_HW)
    there = staying.segment(image, asked(staying, "latent", **options))
    with opened(models(), staying=False, tuning=TUNING) as segmenter:
        here = segmenter.segment(image, asked(segmenter, "latent", **options))
    assert_alike(here, there)
    assert (there.labels_HW[void_HW] == IGNORE).all() and np.isnan(there.maps["entropy"][void_HW]).all()
    assert ((there.labels_HW[~void_HW] == IGNORE).mean() > 0.1) == ("max_risk" in options)


class Counted(Raster):
    """A picture that counts the rows whose pixels and whose void were read."""

    def __init__(self, pixels_HW3: np.ndarray, *, void_HW: np.ndarray) -> None:
        super().__init__(pixels_HW3, void_HW=void_HW)
        self.read, self.asked = list[int](), list[int]()

    def __getitem__(self, part: tuple[slice, slice]) -> np.ndarray:
        self.read += range(*part[0].indices(self.shape[0]))
        return super().__getitem__(part)

    def void(self, rows: slice) -> np.ndarray | None:
        self.asked += range(*rows.indices(self.shape[0]))
        return super().void(rows)


@pytest.mark.parametrize("strip_bytes", [1, 3 * 100 * 40, 2**24])
def test_where_a_picture_is_void_is_read_once(
    strip_bytes: int, staying: Segmenter, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surfaces, "STRIP_BYTES", strip_bytes)
    image = Counted(picture(rng, 175, 100), void_HW=rng.random((175, 100)) < 0.2)
    whole = staying.segment(image, asked(staying, "latent"))
    assert image.asked == image.read == list(range(175))
    monkeypatch.setattr(surfaces, "STRIP_BYTES", 2**24)
    assert_same(staying.segment(image, asked(staying, "latent")), whole)


def test_rows_that_are_answered_already_are_not_read_out_again(
    staying: Segmenter, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    laid_out, lay_out = list[range](), surfaces.lay_out
    monkeypatch.setattr(
        surfaces, "lay_out", lambda wanted, rows, *rest: laid_out.append(rows) or lay_out(wanted, rows, *rest)
    )
    options, never = replace(asked(staying, "bright"), outputs=("entropy",)), threading.Event()
    bands = list(staying.bands_from(64, picture(rng, 100, 130), options, limits=Limits(), cancelled=never))
    assert [rows.start for rows in laid_out] == [band.y0 for band in bands] and bands[0].y0 == 64


@pytest.mark.parametrize("strip_bytes", [1, 3 * 130 * 40])
def test_a_picture_larger_than_a_strip_has_the_same_bytes(
    strip_bytes: int, staying: Segmenter, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = [(picture(rng, *size), asked(staying, "latent", overlap=0.7)) for size in ((300, 130), (130, 131))]
    expected = [staying.segment(*work) for work in works]
    monkeypatch.setattr(surfaces, "STRIP_BYTES", strip_bytes)
    for found, whole in zip(together(staying, *works), expected, strict=True):
        assert_same(found, whole)


def test_a_copy_that_fails_ends_the_requests_of_its_batch_and_the_lane_lives_on(
    staying: Segmenter, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = [(picture(rng, *size), asked(staying, "latent")) for size in SIZES]
    expected = [staying.segment(*work) for work in works]
    with monkeypatch.context() as patched:
        fail_at(patched, Copied, "wait", 1, RuntimeError("CUDA error: an illegal memory access was encountered"))
        faults = together(staying, *works)
    assert all(isinstance(fault, ModelFault) and "illegal" not in str(fault) for fault in faults), faults
    assert staying.scheduler.is_alive
    for found, whole in zip(together(staying, *works), expected, strict=True):
        assert_same(found, whole)


AFTERWARDS: list[tuple[str, Callable[[], Exception]]] = [
    ("memory", lambda: torch.OutOfMemoryError("CUDA out of memory")),
    ("other", lambda: RuntimeError("CUDA error: invalid argument")),
]


@pytest.mark.parametrize(("kind", "error"), AFTERWARDS, ids=[kind for kind, _ in AFTERWARDS])
def test_a_failure_after_a_canvas_changed_is_a_fault_and_never_a_wrong_answer(
    kind: str, error: Callable[[], Exception], staying: Segmenter, rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    works = [(picture(rng, *size), asked(staying, "latent")) for size in ((75, 100), (60, 90))]
    expected = [staying.segment(*work) for work in works]
    for turn in (1, 2, 3):
        staying.find("latent").windows_per_batch = 8
        with monkeypatch.context() as patched:
            fail_at(patched, Transfers, "down", turn, error())
            for found, whole in zip(together(staying, *works), expected, strict=True):
                if not isinstance(found, ModelFault):
                    assert_same(found, whole)


def test_a_request_of_one_window_is_queued_behind_another_and_not_after_it(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(models(), staying=True, tuning=TUNING) as staying:  # where no lane was ever given up
        _queue_two(staying, rng, monkeypatch)


def _queue_two(staying: Segmenter, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    image, options = picture(rng, 32, 40), asked(staying, "latent")
    encode, wait = Backend.encode, Copied.wait
    begun, second = threading.Semaphore(0), threading.Event()

    def encoded(backend: Backend, image_B3hw: Tensor) -> Features:
        begun.release()
        return encode(backend, image_B3hw)

    def held_up(copied: Copied) -> object:
        assert second.wait(WAIT_S)
        return wait(copied)

    monkeypatch.setattr(Backend, "encode", encoded)
    monkeypatch.setattr(Copied, "wait", held_up)
    with ThreadPoolExecutor(2) as threads:
        works = []
        for _ in range(2):
            works.append(threads.submit(staying.segment, image, options))
            has_begun = begun.acquire(timeout=WAIT_S / 4)
        second.set()
        assert has_begun, "it waited until the batch before it was answered"
        for work in works:
            work.result(WAIT_S)
