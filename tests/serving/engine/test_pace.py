"""What fits into a time: the anytime answer, and batches within a target.

Only inference moves the clock, so every sum of seconds is exact.
"""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from penumbra.export.bundle import export_network
from penumbra.models.card import NUM_VIEWS, Card
from penumbra.models.contract import Features
from penumbra.models.errors import BadOption, DeadlineExceeded, ModelFault
from penumbra.serving.engine import moments
from penumbra.serving.engine.backends import Backend
from penumbra.serving.engine.moments import Moments
from penumbra.serving.engine.options import Limits, SegmentOptions
from penumbra.serving.engine.runtime import Runtime, Tuning
from penumbra.serving.engine.scheduler import Scheduler
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.steps import WindowInput
from penumbra.serving.engine.throughput import SPARE, Cores, SecondsBySize
from tests.conftest import picture, toy_card
from tests.serving.engine.stepped import SPEC, WAIT_S, in_threads, work

ENCODE_S, SAMPLE_S, MOMENTS_S = 3.0, 1.0, 2.0
"""Of one window; the last two for each sample."""


class Clock:
    """Stands for `time.perf_counter`."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass(eq=False)
class TimedRuntime:
    """Takes `slower` x (ENCODE_S + S x SAMPLE_S) of the clock's seconds per window, and start_s per batch, once `go` is
    set.

    rounds: S of every window; batches: windows of every batch.
    """

    clock: Clock
    slower: float = 1.0
    start_s: float = 0.0
    windows_per_batch: int = 1
    lanes: int = 0
    stays_on_device: bool = False
    card: Card = field(default_factory=lambda: toy_card("latent", window=SPEC)[0])
    rounds: list[int] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)

    def run(self, inputs: list[WindowInput]) -> list[Moments | ModelFault]:
        self.entered.set()
        assert self.go.wait(WAIT_S)
        samples = [len(window.noise_SL) for window in inputs]
        self.clock.now += self.slower * (self.start_s + sum(ENCODE_S + S * SAMPLE_S for S in samples))
        self.batches.append(len(samples))
        self.rounds += samples
        return [Moments(torch.zeros(4, 4, 4), S) for S in samples]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", made)
        yield made


@pytest.fixture
def scheduler(clock: Clock) -> Iterator[Scheduler]:
    made = Scheduler(queue_samples=10_000, cores=Cores(1))
    yield made
    made.close()


def answer(scheduler: Scheduler, engine: TimedRuntime, num_windows: int, samples: int, within_s: float) -> set[int]:
    """Numbers of samples of the windows that count. Raises DeadlineExceeded."""
    asked = work(scheduler, engine, num_windows, samples=samples, anytime=True, deadline=engine.clock.now + within_s)  # type: ignore[arg-type]
    with scheduler.submit(asked) as stream:
        answers = list(stream.finished())[-num_windows:]
    assert [window.index for window, _ in answers] == list(range(num_windows))
    return {moments.num_samples for _, moments in answers}


def known(scheduler: Scheduler, engine: TimedRuntime) -> None:
    """Let the scheduler measure the least and the most samples."""
    engine.go.set()
    for samples in (1, 16):
        assert answer(scheduler, engine, 1, samples, within_s=1e9) == {samples}
    engine.rounds.clear()


@pytest.mark.parametrize(("within_s", "samples"), [(1e9, 16), (5 * 19 / SPARE, 16), (5 * 9 / SPARE, 6), (25.0, 1)])
def test_an_answer_has_the_most_samples_that_fit_the_time_left(
    scheduler: Scheduler, clock: Clock, within_s: float, samples: int
) -> None:
    engine = TimedRuntime(clock)
    known(scheduler, engine)
    started = clock.now
    assert answer(scheduler, engine, 5, 16, within_s + 1e-6) == {samples}
    assert engine.rounds == [samples] * 5
    assert clock.now - started <= within_s


@pytest.mark.parametrize(("law", "within_s", "samples"), [
    ("independent", 5 * 8, 5), ("antithetic", 5 * 8, 4), ("antithetic", 5 * 9, 6), ("antithetic", 5 * 4, 1),
])  # fmt: skip
def test_where_samples_come_in_pairs_none_is_left_alone(
    scheduler: Scheduler, clock: Clock, law: str, within_s: float, samples: int
) -> None:
    card = toy_card("latent", window=SPEC)[0]
    engine = TimedRuntime(clock, card=replace(card, sampling=replace(card.sampling, law=law)))
    known(scheduler, engine)
    assert answer(scheduler, engine, 5, 16, within_s / SPARE + 1e-6) == {samples}


def test_what_is_slower_than_ever_before_begins_again_with_fewer_samples(scheduler: Scheduler, clock: Clock) -> None:
    engine = TimedRuntime(clock)
    known(scheduler, engine)
    engine.slower, started = 3.0, clock.now
    (samples,) = answer(scheduler, engine, 5, 16, within_s=200)
    assert 1 <= samples < 16
    assert engine.rounds[-5:] == [samples] * 5 and engine.rounds[0] == 16
    assert clock.now - started <= 200


def test_the_first_request_of_a_model_finds_its_pace_on_the_way(scheduler: Scheduler, clock: Clock) -> None:
    engine, started = TimedRuntime(clock), clock.now
    engine.go.set()
    (samples,) = answer(scheduler, engine, 20, 16, within_s=200)
    assert samples < 16 and engine.rounds[-20:] == [samples] * 20
    assert clock.now - started <= 200
    assert engine.rounds == sorted(engine.rounds, reverse=True)


def test_even_one_sample_too_many_is_a_missed_deadline(scheduler: Scheduler, clock: Clock) -> None:
    engine = TimedRuntime(clock)
    known(scheduler, engine)
    with pytest.raises(DeadlineExceeded):
        answer(scheduler, engine, 5, 16, within_s=10)
    assert set(engine.rounds) == {1}
    assert scheduler.queued == (0, 0)


def test_without_the_option_a_deadline_is_missed_and_no_sample_left_out(scheduler: Scheduler, clock: Clock) -> None:
    engine = TimedRuntime(clock)
    known(scheduler, engine)
    (ended,) = in_threads(scheduler.submit(work(scheduler, engine, 5, samples=16, deadline=clock.now + 50)))  # type: ignore[arg-type]
    assert isinstance(ended, DeadlineExceeded) and set(engine.rounds) == {16}


@pytest.mark.parametrize("anytime", [True, False])
def test_an_answer_that_is_ready_too_late_is_a_missed_deadline(
    scheduler: Scheduler, clock: Clock, anytime: bool
) -> None:
    engine = TimedRuntime(clock)
    known(scheduler, engine)
    late = work(scheduler, engine, 1, samples=1, anytime=anytime, deadline=clock.now + 3)  # type: ignore[arg-type]
    (ended,) = in_threads(scheduler.submit(late))
    assert isinstance(ended, DeadlineExceeded) and engine.rounds == [1]


def test_those_who_share_the_device_count(scheduler: Scheduler, clock: Clock) -> None:
    """Ten requests of two windows: 120 of their 150 seconds are 6 for each window, which are 3 samples.

    The last to begin find time that was spared for surprises, and none came.
    """
    engine = TimedRuntime(clock)
    known(scheduler, engine)
    engine.go.clear()
    engine.entered.clear()
    streams = [scheduler.submit(work(scheduler, engine, 1))]  # type: ignore[arg-type]
    assert engine.entered.wait(WAIT_S)
    deadline = clock.now + ENCODE_S + SAMPLE_S + 150
    asked = [work(scheduler, engine, 2, samples=16, anytime=True, deadline=deadline) for _ in range(10)]  # type: ignore[arg-type]
    streams += map(scheduler.submit, asked)
    engine.go.set()
    assert in_threads(*streams) == [1] + [2] * 10
    assert engine.rounds[1:11] == engine.rounds[11:] and engine.rounds[1:8] == [3] * 7
    assert engine.rounds == sorted(engine.rounds[:11]) + sorted(engine.rounds[11:])
    assert clock.now <= deadline


@given(st.integers(1, 12), st.integers(1, 16), st.floats(0.1, 400), st.sampled_from((0.5, 1.0, 2.0)))
def test_where_one_sample_fits_every_window_has_the_same_samples_and_none_is_late(
    num_windows: int, samples: int, within_s: float, slower: float
) -> None:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", clock)
        scheduler = Scheduler(queue_samples=10_000, cores=Cores(1))
        engine = TimedRuntime(clock, slower)
        known(scheduler, engine)
        started = clock.now
        try:
            given_samples = answer(scheduler, engine, num_windows, samples, within_s)
        except DeadlineExceeded:
            given_samples = set()
        scheduler.close()
    least_s = slower * num_windows * (ENCODE_S + SAMPLE_S)
    if least_s <= SPARE * within_s:
        assert len(given_samples) == 1 and given_samples <= set(range(1, samples + 1))
        assert clock.now - started <= within_s
    assert scheduler.queued == (0, 0)


# -- the segmenter ---------------------------------------------------------------------------------


@pytest.fixture
def rounds(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """S of every window that a model runs; it takes the clock's seconds, and every fourth one three times as many."""
    run, made = Runtime.run, list[int]()

    def timed(runtime: Runtime, inputs: list[WindowInput]) -> list[Moments | ModelFault]:
        made.extend(len(window.noise_SL) for window in inputs)
        clock.now += sum((ENCODE_S + S) * (3 if len(made) % 4 == 0 else 1) for S in made[-len(inputs) :])
        return run(runtime, inputs)

    monkeypatch.setattr(Runtime, "run", timed)
    return made


@pytest.fixture
def segmenter(toy_store: Path, rounds: list[int]) -> Iterator[Segmenter]:
    with Segmenter(threads=1, device="cpu", tuning=Tuning(1, 3)) as opened:
        for name in ("toy-latent", "toy-opposed"):
            opened.load(toy_store / name / "1")
            rounds.clear()  # loading runs fewer than four
        yield opened


@pytest.mark.parametrize("within_s", [200.0, 250.0, 400.0])
def test_an_answer_with_fewer_samples_is_the_answer_to_that_many(
    segmenter: Segmenter, clock: Clock, rounds: list[int], rng: np.random.Generator, within_s: float
) -> None:
    image, asked = picture(rng, 90, 130), SegmentOptions("toy-latent", samples=16, seed=5, anytime=True)
    early = segmenter.segment(image, asked, deadline=clock.now + within_s)
    assert 1 <= early.num_samples < 16 and early.num_asked == 16
    assert f"time for {early.num_samples} of the 16 samples" in early.warnings[-1]
    assert rounds[-early.num_windows :] == [early.num_samples] * early.num_windows
    plain = segmenter.segment(image, replace(asked, samples=early.num_samples, anytime=False))
    assert plain.labels_HW.tobytes() == early.labels_HW.tobytes()
    assert {name: m.tobytes() for name, m in plain.maps.items()} == {n: m.tobytes() for n, m in early.maps.items()}


def test_a_models_first_request_is_planned_with_what_loading_measured(
    segmenter: Segmenter, clock: Clock, rounds: list[int], rng: np.random.Generator
) -> None:
    """Of 1 and 4 samples, and the line through the two says that 2 windows of 6 samples take 18 seconds."""
    asked = SegmentOptions("toy-latent", samples=16, anytime=True, overlap=0.0)
    early = segmenter.segment(picture(rng, 64, 48), asked, deadline=clock.now + 18 / SPARE + 1e-6)
    assert early.num_samples == 6 and rounds == [6, 6]


def test_an_answer_comes_down_to_one_sample_only_where_nobody_named_the_mutual_information(
    segmenter: Segmenter, clock: Clock, rounds: list[int], rng: np.random.Generator
) -> None:
    """Of 2 windows: 8 seconds with one sample, 10 with two."""
    asked = SegmentOptions("toy-latent", samples=16, anytime=True, overlap=0.0)
    for outputs, samples, maps in (
        (asked.outputs, 1, {"confidence", "entropy"}),
        (("mutual_information",), 2, {"mutual_information"}),
        (asked.outputs, 1, {"confidence", "entropy"}),
    ):
        wanted = replace(asked, outputs=outputs)
        rounds.clear()  # or every fourth would be slow
        early = segmenter.segment(picture(rng, 64, 48), wanted, deadline=clock.now + 8 / SPARE + 1e-6)
        assert early.num_samples == samples and set(early.maps) == maps


@pytest.fixture
def slow(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Segmenter]:
    """A network that takes ENCODE_S + S x (SAMPLE_S + MOMENTS_S) of every window, and 32 samples unless told."""
    encode, decode, accumulate = Backend.encode, Backend.decode, moments.operators.accumulate

    def timed_encode(backend: Backend, image_B3hw: Tensor) -> Features:
        clock.now += ENCODE_S * len(image_B3hw)
        return encode(backend, image_B3hw)

    def timed_decode(backend: Backend, features: Features, noise_SBL: Tensor) -> Tensor:
        clock.now += SAMPLE_S * noise_SBL.shape[0] * noise_SBL.shape[1]
        return decode(backend, features, noise_SBL)

    def timed_accumulate(logits_SBKhw: Tensor, *sums: Any, **options: Any) -> None:
        clock.now += MOMENTS_S * logits_SBKhw.shape[0] * logits_SBKhw.shape[1]
        accumulate(logits_SBKhw, *sums, **options)

    monkeypatch.setattr(Backend, "encode", timed_encode)
    monkeypatch.setattr(Backend, "decode", timed_decode)
    monkeypatch.setattr(moments.operators, "accumulate", timed_accumulate)
    card, network = toy_card("latent")
    card = replace(card, sampling=replace(card.sampling, default_samples=32))
    directory = export_network(network, card, tmp_path / "store")
    with Segmenter(threads=1, device="cpu") as opened:
        opened.load(directory)
        yield opened


def test_a_slow_networks_pace_is_known_before_its_first_request(slow: Segmenter) -> None:
    """It is loaded without a run of 32 samples, which would take 99 seconds."""
    runtime = slow.find("toy-latent")
    pace, window = slow.scheduler._throughput.by_samples(runtime), runtime.card.window
    seconds = {S: pace.seconds(S) * window.height * window.width for S in (1, 2, 8, 32, 64)}
    assert seconds == pytest.approx({S: ENCODE_S + S * (SAMPLE_S + MOMENTS_S) for S in seconds})


def test_a_slow_networks_first_answer_is_in_time(slow: Segmenter, clock: Clock, rng: np.random.Generator) -> None:
    asked, within_s = SegmentOptions("toy-latent", anytime=True, overlap=0.0), 2 * (3 + 6 * 3) / SPARE + 1e-6
    started = clock.now
    early = slow.segment(picture(rng, 64, 48), asked, deadline=started + within_s)
    assert early.num_samples == 6 and clock.now - started <= within_s


def test_members_are_never_left_out(segmenter: Segmenter, clock: Clock, rng: np.random.Generator) -> None:
    asked = SegmentOptions("toy-opposed", anytime=True)
    assert segmenter.segment(picture(rng, 90, 130), asked, deadline=clock.now + 1000).num_samples == 2
    with pytest.raises(DeadlineExceeded):
        segmenter.segment(picture(rng, 90, 130), asked, deadline=clock.now + 10)


def test_long_work_has_no_deadline_to_be_early_for(segmenter: Segmenter, rng: np.random.Generator) -> None:
    with pytest.raises(BadOption, match="only for images that are answered at once"):
        segmenter.bands_from(
            0, picture(rng, 9, 9), SegmentOptions("toy-latent", anytime=True), limits=Limits(), cancelled=None  # type: ignore[arg-type]
        )  # fmt: skip


# -- batches within a target -----------------------------------------------------------------------


def batches(scheduler: Scheduler, engine: TimedRuntime, *, num_requests: int) -> list[int]:
    """Windows of each batch that is made of so many requests of one window and one sample, which all wait."""
    engine.go.clear()
    engine.entered.clear()
    streams = [scheduler.submit(work(scheduler, engine, 1))]  # type: ignore[arg-type]
    assert engine.entered.wait(WAIT_S)
    streams += [scheduler.submit(work(scheduler, engine, 1)) for _ in range(num_requests)]  # type: ignore[arg-type]
    engine.batches.clear()
    engine.go.set()
    assert in_threads(*streams) == [1] * (num_requests + 1)
    return engine.batches[1:]


@pytest.fixture
def aiming(clock: Clock) -> Iterator[Scheduler]:
    """Batches of n windows of one sample take 9 + 4 n seconds, so 5 of them are within half of 60 and 6 are not."""
    made = Scheduler(queue_samples=10_000, cores=Cores(1), target_s=60.0)
    yield made
    made.close()


def test_batches_grow_to_what_the_target_allows_and_stay_there(aiming: Scheduler, clock: Clock) -> None:
    engine = TimedRuntime(clock, start_s=9.0, windows_per_batch=32)
    assert batches(aiming, engine, num_requests=40) == [2, 3, 4, 5, 6] + [5] * 4
    assert batches(aiming, engine, num_requests=21) == [5] * 4 + [1]


def test_batches_follow_a_machine_that_slows_down_and_recovers(aiming: Scheduler, clock: Clock) -> None:
    engine = TimedRuntime(clock, start_s=9.0, windows_per_batch=32)
    batches(aiming, engine, num_requests=40)
    engine.slower = 1.5
    assert batches(aiming, engine, num_requests=40)[-1] == 2  # 1.5 x (9 + 2 x 4) is 25.5, and with 3 it is 31.5
    engine.slower = 1.0
    assert 5 in batches(aiming, engine, num_requests=60)[-4:]


def test_a_target_that_no_batch_can_meet_leaves_batches_of_one(clock: Clock) -> None:
    scheduler = Scheduler(queue_samples=10_000, cores=Cores(1), target_s=1.0)
    engine = TimedRuntime(clock, windows_per_batch=8)
    assert batches(scheduler, engine, num_requests=5) == [1] * 5
    scheduler.close()


def test_without_a_target_batches_are_as_large_as_the_model_takes(scheduler: Scheduler, clock: Clock) -> None:
    assert batches(scheduler, TimedRuntime(clock, windows_per_batch=8), num_requests=20) == [8, 8, 4]


# -- the pace --------------------------------------------------------------------------------------


def test_a_pace_is_a_line_through_what_was_measured() -> None:
    pace = SecondsBySize()
    assert pace.seconds(4) == 0
    pace.learn(8, 16.0)
    assert [pace.seconds(S) for S in (1, 4, 8, 16)] == [2, 8, 16, 32]
    pace.learn(1, 9.0)
    assert [pace.seconds(S) for S in (1, 8, 15)] == pytest.approx([9, 16, 23])


def test_a_pace_follows_the_machine() -> None:
    pace = SecondsBySize()
    for seconds in [1.0] * 5 + [3.0] * 20:
        pace.learn(4, seconds)
    assert pace.seconds(4) == pytest.approx(3, rel=0.01)


# -- views ------------------------------------------------------------------------------------------


class ViewedRuntime(TimedRuntime):
    """Takes as long again for every view of a window."""

    def run(self, inputs: list[WindowInput]) -> list[Moments | ModelFault]:
        num_views = NUM_VIEWS[inputs[0].views]
        answers = super().run([one for one in inputs for _ in range(num_views)])
        return [replace(one, num_samples=one.num_samples * num_views) for one in answers[::num_views]]  # type: ignore[type-var]


@pytest.mark.parametrize(("within_s", "samples"), [(1e9, 16), (2 * 5 * 9 / SPARE, 6), (2 * 5 * 8 / SPARE, 5)])
def test_a_view_takes_as_long_as_a_window(scheduler: Scheduler, clock: Clock, within_s: float, samples: int) -> None:
    """What was learnt without views plans an answer with two of them: as many samples as fit into half of the time."""
    engine = ViewedRuntime(clock)
    known(scheduler, engine)
    engine.card = replace(engine.card, views="flip")
    assert answer(scheduler, engine, 5, 16, within_s=within_s) == {2 * samples}
    assert engine.rounds == [samples] * 10
