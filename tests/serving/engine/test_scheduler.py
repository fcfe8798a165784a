"""The scheduler's promises, each with a runtime that the test steps by events."""

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penumbra.models.errors import Cancelled, ModelFault, NotReady, PenumbraError, QueueFull
from penumbra.serving.engine.request import QueuedRequest
from penumbra.serving.engine.scheduler import Scheduler
from penumbra.serving.engine.throughput import Cores
from tests.serving.engine.stepped import WAIT_S, consume, in_threads, outcome, runtime, work
from tests.serving.server import until

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


@pytest.mark.parametrize(("share", "last"), [(1, 18), (3, 13)])
def test_small_requests_that_keep_coming_hold_a_large_one_up_by_their_turns_and_no_more(
    scheduler: Scheduler, share: int, last: int
) -> None:
    """Two small ones wait at any time; three take turns, and after a share of three a large one has three of five."""
    engine = runtime(going=False)
    small: list[QueuedRequest] = []

    def come(run: list[int]) -> None:
        while large.ahead > 1:  # until its thread has looked: what holds it up are others' turns alone
            time.sleep(0.001)
        if run == [2] and len(small) < 60:
            small.append(scheduler.submit(work(scheduler, engine, 1, value=2)))

    engine.before = come
    large = work(scheduler, engine, 6, value=1)
    large.plan = replace(large.plan, share=share)
    scheduler.submit(large)
    assert engine.entered.wait(WAIT_S)
    with ThreadPoolExecutor(1) as threads:
        reader = threads.submit(outcome, large)
        come([2])
        come([2])
        engine.go.set()
        assert reader.result(WAIT_S) == 6
    order = [value for batch in engine.batches for value in batch]
    assert max(place for place, value in enumerate(order, 1) if value == 1) <= last
    for request in small:
        scheduler.withdraw(request)


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


def test_closing_refuses_new_work_and_finishes_the_accepted(scheduler: Scheduler) -> None:
    engine = runtime(going=False)
    stream = scheduler.submit(work(scheduler, engine, 30))
    with ThreadPoolExecutor(2) as threads:
        reader = threads.submit(outcome, stream)
        closing = threads.submit(scheduler.close)
        until(lambda: scheduler._stopped)
        with pytest.raises(NotReady, match="draining"):
            scheduler.submit(work(scheduler, engine, 1))
        engine.go.set()
        assert reader.result(WAIT_S) == 30
        closing.result(WAIT_S)
    assert not scheduler.is_alive
    with pytest.raises(NotReady, match="closed"):
        scheduler.call(lambda: None)


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


def test_lanes_without_work_keep_no_picture_of_the_last_one(scheduler: Scheduler) -> None:
    request = work(scheduler, runtime(), 3)
    picture = weakref.ref(request.image_HWC)
    assert len(consume(scheduler.submit(request))) == 3
    del request
    end = time.perf_counter() + WAIT_S
    while picture() is not None and time.perf_counter() < end:
        gc.collect()
        time.sleep(0.001)
    assert picture() is None
