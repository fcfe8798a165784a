"""The scheduler's promises, each with a runtime that the test steps by events."""

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penumbra.models.card import Card, WindowSpec
from penumbra.models.errors import Cancelled, DeadlineExceeded, ModelFault, NotReady, PenumbraError, QueueFull
from penumbra.serving.engine.moments import Moments
from penumbra.serving.engine.noise import SeededNoise
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.plan import RequestPlan
from penumbra.serving.engine.raster import Raster
from penumbra.serving.engine.request import Cancellation, QueuedRequest
from penumbra.serving.engine.runtime import WindowInput
from penumbra.serving.engine.scheduler import Observer, Scheduler
from penumbra.serving.engine.throughput import Cores
from penumbra.serving.engine.windows import Window, cover
from tests.conftest import toy_card

WAIT_S = 30
"""Bound of every wait: reached only when something hangs."""
SPEC = WindowSpec(4, 4, overlap=0.0)


@dataclass(eq=False)
class SteppedRuntime:
    """Answers a window with the value of its first pixel. `run` waits for `go`; `before` may raise.

    Pixel 255 makes an answer of its own: a fault. batches: the first pixels of every batch that was run.
    """

    windows_per_batch: int = 1
    before: Callable[[list[int]], None] = lambda values: None
    card: Card = field(default_factory=lambda: toy_card("latent", window=SPEC)[0])
    batches: list[list[int]] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)

    def run(self, inputs: list[WindowInput]) -> list[Moments | ModelFault]:
        values = [round(float(window.image_hw3[0, 0, 0]) * 255) for window in inputs]
        self.entered.set()
        assert self.go.wait(WAIT_S)
        self.before(values)
        self.batches.append(values)
        return [
            ModelFault("not finite") if value == 255
            else Moments(np.full((4, 3, 4), value, np.float32), np.zeros((4, 4), np.float32), len(window.noise_SL))
            for value, window in zip(values, inputs, strict=True)
        ]  # fmt: skip


def runtime(*, going: bool = True, **options: object) -> SteppedRuntime:
    made = SteppedRuntime(**options)  # type: ignore[arg-type]
    if going:
        made.go.set()
    return made


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    made = Scheduler(queue_samples=10_000, cores=Cores(1))
    yield made
    made.close()


def work(
    scheduler: Scheduler, on: SteppedRuntime, num_windows: int, *, value: int = 1, samples: int = 1,
    anytime: bool = False, priority: int = 0, **options: object,
) -> QueuedRequest:  # fmt: skip
    """num_windows windows below each other, all pixels of them `value`."""
    image = np.full((4 * num_windows, 4, 3), value, np.uint8)
    noise = SeededNoise(on.card.sampling, seed=0, num_samples=samples)
    asked = SegmentOptions(samples=samples, anytime=anytime, priority=priority)
    plan = RequestPlan(on, asked, cover(4 * num_windows, 4, SPEC), noise)  # type: ignore[arg-type]
    return QueuedRequest(scheduler, plan, Raster(image), **options)  # type: ignore[arg-type]


def consume(stream: QueuedRequest) -> list[tuple[Window, float]]:
    with stream:
        return [(window, float(moments.summed_hKw[0, 0, 0])) for window, moments in stream.finished()]


def outcome(stream: QueuedRequest) -> int | PenumbraError:
    """How many windows were answered, or what ended the request."""
    try:
        return len(consume(stream))
    except PenumbraError as error:
        return error


def in_threads(*streams: QueuedRequest) -> list[int | PenumbraError]:
    with ThreadPoolExecutor(len(streams)) as threads:
        return list(threads.map(outcome, streams, timeout=WAIT_S))


def test_lanes_without_work_keep_no_picture_of_the_last_one(scheduler: Scheduler) -> None:
    request = work(scheduler, runtime(), 3)
    picture = weakref.ref(request.image_HW3)
    assert len(consume(scheduler.submit(request))) == 3
    del request
    end = time.perf_counter() + WAIT_S
    while picture() is not None and time.perf_counter() < end:
        gc.collect()
        time.sleep(0.001)
    assert picture() is None


# -- order and fairness --------------------------------------------------------------------------


def test_every_window_is_answered_once_and_in_order_under_many_threads(scheduler: Scheduler) -> None:
    one, other = runtime(windows_per_batch=5), runtime(windows_per_batch=3)
    rng = np.random.Generator(np.random.PCG64(0))
    requests = [
        (int(value), int(num), int(samples))
        for value, num, samples in zip(
            rng.integers(0, 250, 120), rng.integers(1, 40, 120), rng.integers(1, 3, 120), strict=True
        )
    ]

    def request(number: int) -> list[tuple[int, float]]:
        value, num_windows, samples = requests[number]
        stream = scheduler.submit(work(scheduler, (one, other)[number % 2], num_windows, value=value, samples=samples))
        return [(window.index, answer) for window, answer in consume(stream)]

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(request, range(len(requests)), timeout=WAIT_S))
    for (value, num_windows, _), answer in zip(requests, answers, strict=True):
        assert answer == [(index, value) for index in range(num_windows)]
    assert sum(map(len, one.batches + other.batches)) == sum(num for _, num, _ in requests)
    assert max(map(len, one.batches)) > 1
    assert scheduler.queued == (0, 0)


def test_a_small_request_is_not_starved_by_a_huge_one(scheduler: Scheduler) -> None:
    engine = runtime(going=False)
    streams = [scheduler.submit(work(scheduler, engine, 200, value=1))]
    assert engine.entered.wait(WAIT_S)
    streams.append(scheduler.submit(work(scheduler, engine, 2, value=2)))
    engine.go.set()
    assert in_threads(*streams) == [200, 2]
    order = [value for batch in engine.batches for value in batch]
    small = [place for place, value in enumerate(order) if value == 2]
    assert len(small) == 2 and small[-1] <= 5


@pytest.mark.parametrize(("samples", "turns"), [(1, [1, 2, 2, 2]), (4, [1, 2, 1, 2, 1, 2])])
def test_turns_are_taken_by_windows_times_samples(scheduler: Scheduler, samples: int, turns: list[int]) -> None:
    """Against windows of 4 samples, three of 1 sample go together and three of 4 samples alternate."""
    engine = runtime(going=False)
    streams = [scheduler.submit(work(scheduler, engine, 40, value=1, samples=4))]
    assert engine.entered.wait(WAIT_S)
    streams.append(scheduler.submit(work(scheduler, engine, 3, value=2, samples=samples)))
    engine.go.set()
    assert in_threads(*streams) == [40, 3]
    assert [value for batch in engine.batches for value in batch][: len(turns)] == turns


def test_windows_of_different_requests_share_a_batch_but_never_of_different_sample_counts(
    scheduler: Scheduler,
) -> None:
    engine = runtime(going=False, windows_per_batch=4)
    streams = [scheduler.submit(work(scheduler, engine, 1, value=0))]
    assert engine.entered.wait(WAIT_S)
    streams += [scheduler.submit(work(scheduler, engine, 1, value=v)) for v in (1, 2, 3)]
    streams.append(scheduler.submit(work(scheduler, engine, 1, value=9, samples=2)))
    engine.go.set()
    assert in_threads(*streams) == [1] * 5
    assert sorted(map(sorted, engine.batches)) == [[0], [1, 2, 3], [9]]


def test_a_request_is_only_a_few_windows_ahead_of_its_reader(scheduler: Scheduler) -> None:
    engine = runtime(windows_per_batch=2)
    stream = scheduler.submit(work(scheduler, engine, 100))
    for _ in range(3):
        scheduler.call(lambda: None)
    assert 0 < sum(map(len, engine.batches)) <= 2 * 2 + 2
    assert len(consume(stream)) == 100


# -- priorities ----------------------------------------------------------------------------------


def order_of(scheduler: Scheduler, *requests: tuple[int, int, int], windows_per_batch: int = 1) -> list[int]:
    """Values in the order their windows were run, of (value, windows, priority) that wait at the same time."""
    engine = runtime(going=False, windows_per_batch=windows_per_batch)
    streams = [scheduler.submit(work(scheduler, engine, 1, value=0))]
    assert engine.entered.wait(WAIT_S)
    streams += [
        scheduler.submit(work(scheduler, engine, num, value=value, priority=level)) for value, num, level in requests
    ]
    engine.go.set()
    assert in_threads(*streams) == [1, *(num for _, num, _ in requests)]
    return [value for batch in engine.batches for value in batch][1:]


def test_a_request_of_the_first_priority_overtakes_all_that_wait(scheduler: Scheduler) -> None:
    waiting = [(value, 1, 2 + value % 2) for value in range(10, 30)]
    assert order_of(scheduler, *waiting, (1, 1, 1))[0] == 1


def test_no_priority_waits_for_ever_whatever_comes_before_it(scheduler: Scheduler) -> None:
    """Every one that waits is a request of its own, and still one in 17 that are served is of the last priority."""
    order = order_of(scheduler, *[(1, 1, 1)] * 170, *[(3, 1, 3)] * 10)
    assert [order[:place].count(3) for place in range(17, 171, 17)] == list(range(1, 11))


@pytest.mark.parametrize("windows_per_batch", [1, 3])
def test_priorities_share_the_device_by_their_strides(scheduler: Scheduler, windows_per_batch: int) -> None:
    requests = [(level, 3, level) for level in (3, 2, 1)] * 30
    first = order_of(scheduler, *requests, windows_per_batch=windows_per_batch)[:105]
    assert [first.count(level) for level in (1, 2, 3)] == pytest.approx([80, 20, 5], abs=2)


def test_a_priority_that_comes_back_does_not_make_up_for_its_pause(scheduler: Scheduler) -> None:
    order_of(scheduler, *[(2, 1, 2)] * 30)
    order = order_of(scheduler, *[(3, 1, 3), (2, 1, 2)] * 20)
    assert [order[:place].count(3) for place in (5, 10, 15, 20, 25)] == [1, 2, 3, 4, 5]


def test_a_request_of_the_first_priority_still_takes_turns_with_its_equals(scheduler: Scheduler) -> None:
    assert order_of(scheduler, (1, 3, 1), (2, 3, 1))[:6] in ([1, 2] * 3, [2, 1] * 3)


# -- leaving early -------------------------------------------------------------------------------


def test_a_cancelled_requests_windows_leave_before_the_next_batch(scheduler: Scheduler) -> None:
    engine, cancelled = runtime(going=False), threading.Event()
    streams = [
        scheduler.submit(work(scheduler, engine, 50, value=1, cancelled=cancelled)),
        scheduler.submit(work(scheduler, engine, 3, value=2)),
    ]
    assert engine.entered.wait(WAIT_S)
    cancelled.set()
    engine.go.set()
    ended, finished = in_threads(*streams)
    assert isinstance(ended, Cancelled) and finished == 3
    assert [value for batch in engine.batches for value in batch].count(1) <= 1
    assert scheduler.queued == (0, 0)


def test_an_expired_request_is_told_so_and_others_go_on(scheduler: Scheduler) -> None:
    engine = runtime(going=False)
    streams = [
        scheduler.submit(work(scheduler, engine, 50, value=1, deadline=time.perf_counter())),
        scheduler.submit(work(scheduler, engine, 3, value=2)),
    ]
    engine.go.set()
    ended, finished = in_threads(*streams)
    assert isinstance(ended, DeadlineExceeded) and finished == 3
    assert scheduler.queued == (0, 0)


def told_while_a_batch_runs(scheduler: Scheduler, engine: SteppedRuntime, *late: QueuedRequest) -> list[object]:
    """What ends requests before the batch at work does; the one that it is of ends by itself afterwards."""
    ended = in_threads(*late)
    assert engine.batches == [] and not engine.go.is_set()
    return [type(end) for end in ended]


@pytest.mark.parametrize("position", ["at work", "waiting"])
def test_a_cancelled_request_is_told_while_a_batch_runs(scheduler: Scheduler, position: str) -> None:
    engine, cancelled = runtime(going=False), Cancellation()
    first = scheduler.submit(
        work(scheduler, engine, 2, value=1, cancelled=cancelled if position == "at work" else Cancellation())
    )
    assert engine.entered.wait(WAIT_S)
    second = scheduler.submit(
        work(scheduler, engine, 2, value=2, cancelled=cancelled if position == "waiting" else Cancellation())
    )
    leaving, staying = (first, second) if position == "at work" else (second, first)
    with ThreadPoolExecutor(1) as threads:
        told = threads.submit(told_while_a_batch_runs, scheduler, engine, leaving)
        cancelled.set()
        assert scheduler.queued == (2, 2)
        assert told.result(WAIT_S) == [Cancelled]
    engine.go.set()
    assert in_threads(staying) == [2] and scheduler.queued == (0, 0)


def test_expired_requests_are_told_while_a_batch_runs(scheduler: Scheduler) -> None:
    engine, soon = runtime(going=False), time.perf_counter() + 0.01
    streams = [scheduler.submit(work(scheduler, engine, 2, value=1, deadline=soon))]
    assert engine.entered.wait(WAIT_S)
    streams.append(scheduler.submit(work(scheduler, engine, 2, value=2, deadline=soon)))
    assert told_while_a_batch_runs(scheduler, engine, *streams) == [DeadlineExceeded] * 2
    assert scheduler.queued == (0, 0)
    engine.go.set()
    assert len(consume(scheduler.submit(work(scheduler, engine, 3, value=3)))) == 3


def test_a_request_that_was_cancelled_before_it_was_submitted_is_told_without_a_lane(scheduler: Scheduler) -> None:
    engine, cancelled = runtime(going=False), Cancellation()
    busy = scheduler.submit(work(scheduler, engine, 1))
    assert engine.entered.wait(WAIT_S)
    cancelled.set()
    late = scheduler.submit(work(scheduler, engine, 1, cancelled=cancelled))
    assert told_while_a_batch_runs(scheduler, engine, late) == [Cancelled]
    engine.go.set()
    assert in_threads(busy) == [1]


def test_closing_waits_for_no_work_whose_caller_has_left(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lane rests because the reader is behind, and then the reader leaves."""
    engine, rests, wait = runtime(), threading.Event(), scheduler._condition.wait

    def resting() -> bool:
        if scheduler._stopped:
            rests.set()  # under the lock, so whoever leaves now comes when it rests
        return wait()

    monkeypatch.setattr(scheduler._condition, "wait", resting)
    with ThreadPoolExecutor(1) as threads:
        with scheduler.submit(work(scheduler, engine, 100)):
            closing = threads.submit(scheduler.close)
            assert rests.wait(WAIT_S)
        closing.result(WAIT_S)


def test_leaving_a_stream_gives_its_place_in_the_queue_back(scheduler: Scheduler) -> None:
    engine = runtime()
    with scheduler.submit(work(scheduler, engine, 500)) as stream:
        next(stream.finished())
    assert scheduler.queued == (0, 0)


# -- the door ------------------------------------------------------------------------------------


def test_a_full_queue_refuses_at_the_door_and_says_when_to_come_again() -> None:
    engine = runtime(going=False)
    scheduler = Scheduler(queue_samples=100, cores=Cores(1))
    streams = [scheduler.submit(work(scheduler, engine, 20, samples=4))]
    with pytest.raises(QueueFull, match="80 of 100 window-samples and this request needs 21") as refusal:
        scheduler.submit(work(scheduler, engine, 21))
    assert 1 <= refusal.value.retry_after_s <= 60
    streams.append(scheduler.submit(work(scheduler, engine, 20)))
    assert scheduler.queued == (40, 100)
    engine.go.set()
    assert in_threads(*streams) == [20, 20]
    scheduler.close()


def test_an_empty_queue_takes_a_request_larger_than_itself() -> None:
    scheduler = Scheduler(queue_samples=10, cores=Cores(1))
    assert len(consume(scheduler.submit(work(scheduler, runtime(), 30)))) == 30
    scheduler.close()


def test_draining_refuses_new_work_and_finishes_the_accepted(scheduler: Scheduler) -> None:
    engine = runtime(going=False)
    stream = scheduler.submit(work(scheduler, engine, 5))
    scheduler.drain()
    with pytest.raises(NotReady, match="draining"):
        scheduler.submit(work(scheduler, engine, 1))
    engine.go.set()
    assert in_threads(stream) == [5]


def test_closing_finishes_accepted_work(scheduler: Scheduler) -> None:
    engine = runtime(going=False)
    stream = scheduler.submit(work(scheduler, engine, 30))
    with ThreadPoolExecutor(2) as threads:
        reader = threads.submit(outcome, stream)
        closing = threads.submit(scheduler.close)
        engine.go.set()
        assert reader.result(WAIT_S) == 30
        closing.result(WAIT_S)
    assert not scheduler.is_alive
    with pytest.raises(NotReady, match="closed"):
        scheduler.call(lambda: None)


# -- failures ------------------------------------------------------------------------------------


def test_a_failing_window_fails_only_its_own_request(scheduler: Scheduler) -> None:
    def fail(values: list[int]) -> None:
        if 13 in values:
            raise ValueError("thirteen")

    engine = runtime(going=False, windows_per_batch=8, before=fail)
    streams = [scheduler.submit(work(scheduler, engine, 1, value=0))]
    assert engine.entered.wait(WAIT_S)
    streams += [scheduler.submit(work(scheduler, engine, 4, value=value)) for value in (1, 13, 2, 3)]
    engine.go.set()
    outcomes = in_threads(*streams)
    assert outcomes[:2] == [1, 4] and outcomes[3:] == [4, 4]
    assert isinstance(outcomes[2], ModelFault) and "thirteen" not in str(outcomes[2])


def test_a_window_that_is_not_finite_ends_only_its_own_request(scheduler: Scheduler) -> None:
    engine = runtime(going=False, windows_per_batch=8)
    streams = [scheduler.submit(work(scheduler, engine, 1, value=0))]
    assert engine.entered.wait(WAIT_S)
    streams += [scheduler.submit(work(scheduler, engine, 4, value=value)) for value in (1, 255, 2)]
    engine.go.set()
    outcomes = in_threads(*streams)
    assert outcomes[1] == outcomes[3] == 4
    assert isinstance(outcomes[2], ModelFault)
    assert any({1, 255} <= set(batch) for batch in engine.batches)
    assert scheduler.queued == (0, 0)


@pytest.mark.parametrize(
    "shortage",
    [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_out_of_memory_halves_the_batch_and_everything_is_answered(shortage: Exception) -> None:
    class Counting(Observer):
        seen = 0

        def out_of_memory(self, model: str) -> None:
            self.seen += 1

    def too_much(values: list[int]) -> None:
        if len(values) > 2:
            raise shortage

    observer = Counting()
    scheduler = Scheduler(queue_samples=10_000, cores=Cores(1), observer=observer)
    engine = runtime(going=False, windows_per_batch=8, before=too_much)
    streams = [scheduler.submit(work(scheduler, engine, 1, value=0))]
    assert engine.entered.wait(WAIT_S)
    streams += [scheduler.submit(work(scheduler, engine, 10, value=value)) for value in (1, 2, 3)]
    engine.go.set()
    assert in_threads(*streams) == [1, 10, 10, 10]
    assert engine.windows_per_batch == 2 and max(map(len, engine.batches)) == 2 and observer.seen >= 2
    scheduler.close()


def test_a_batch_that_is_halved_does_not_undo_what_another_lane_has_found(scheduler: Scheduler) -> None:
    def too_much(values: list[int]) -> None:
        if len(values) > 2:
            engine.windows_per_batch = 1  # meanwhile
            raise MemoryError

    engine = runtime(going=False, windows_per_batch=8, before=too_much)
    streams = [scheduler.submit(work(scheduler, engine, 1, value=0))]
    assert engine.entered.wait(WAIT_S)
    streams.append(scheduler.submit(work(scheduler, engine, 4)))
    engine.go.set()
    assert in_threads(*streams) == [1, 4] and engine.windows_per_batch == 1


def test_one_window_that_never_fits_is_a_fault_and_not_a_loop(scheduler: Scheduler) -> None:
    def too_much(_: list[int]) -> None:
        raise MemoryError

    (ended,) = in_threads(scheduler.submit(work(scheduler, runtime(before=too_much), 5)))
    assert isinstance(ended, ModelFault)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_inference_thread_dies_nobody_waits_for_it() -> None:
    class Deadly(Observer):
        def batch_done(self, model: str, *, windows: int, capacity: int, samples: int) -> None:
            raise RuntimeError("an observer that fails")

    scheduler = Scheduler(queue_samples=10_000, cores=Cores(1), observer=Deadly())
    engine = runtime(going=False)
    streams = [scheduler.submit(work(scheduler, engine, 20, value=value)) for value in (1, 2, 3)]
    assert engine.entered.wait(WAIT_S)
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(scheduler.call, lambda: 1)
        engine.go.set()
        assert all(isinstance(ended, ModelFault) for ended in in_threads(*streams))
        with pytest.raises(NotReady):
            call.result(WAIT_S)
    scheduler.close()
    assert not scheduler.is_alive
    with pytest.raises(NotReady):
        scheduler.submit(work(scheduler, engine, 1))


# -- calls ---------------------------------------------------------------------------------------


def test_a_call_runs_in_the_inference_thread_and_returns(scheduler: Scheduler) -> None:
    assert scheduler.call(lambda: threading.current_thread().name) == "inference-0"


def test_a_calls_exception_is_raised_where_it_was_called_and_the_thread_goes_on(scheduler: Scheduler) -> None:
    def fail() -> None:
        raise KeyError("of the caller")

    with pytest.raises(KeyError, match="of the caller"):
        scheduler.call(fail)
    assert len(consume(scheduler.submit(work(scheduler, runtime(), 2)))) == 2


@given(
    st.lists(
        st.tuples(st.integers(1, 12), st.integers(1, 3), st.sampled_from(("", "cancel", "leave", "nan", "fail"))),
        max_size=12,
    )
)
@settings(max_examples=40)
def test_whatever_requests_do_every_one_ends_and_the_queue_is_empty(
    requests: list[tuple[int, int, str]],
) -> None:
    def fail(values: list[int]) -> None:
        if 13 in values:
            raise ValueError

    engine = runtime(windows_per_batch=3, before=fail)
    scheduler = Scheduler(queue_samples=10_000, cores=Cores(1))

    def request(num_windows: int, samples: int, what: str) -> int | PenumbraError:
        cancelled = threading.Event()
        value = {"nan": 255, "fail": 13}.get(what, 1)
        stream = scheduler.submit(
            work(scheduler, engine, num_windows, value=value, samples=samples, cancelled=cancelled)
        )
        if what == "cancel":
            cancelled.set()
        if what == "leave":
            with stream:
                return num_windows
        return outcome(stream)

    with ThreadPoolExecutor(8) as threads:
        ended = list(threads.map(lambda r: request(*r), requests, timeout=WAIT_S))
    for (num_windows, _, what), end in zip(requests, ended, strict=True):
        if what in ("", "leave"):
            assert end == num_windows
        elif what == "cancel":
            assert end == num_windows or isinstance(end, Cancelled)
        else:
            assert isinstance(end, ModelFault)
    assert scheduler.queued == (0, 0)
    scheduler.close()
