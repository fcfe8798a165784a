"""How requests end early or fail: alone, at once, and with every window accounted for."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from penumbra.models.errors import Cancelled, DeadlineExceeded, ModelFault, NotReady
from penumbra.serving.engine.request import Cancellation, QueuedRequest
from penumbra.serving.engine.scheduler import Observer, Scheduler
from penumbra.serving.engine.throughput import Cores
from tests.serving.engine.stepped import WAIT_S, SteppedRuntime, consume, in_threads, runtime, work

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
    engine = runtime(going=False)
    streams = [scheduler.submit(work(scheduler, engine, 2, value=1))]
    assert engine.entered.wait(WAIT_S)
    streams[0].deadline = soon = time.perf_counter() + 0.01
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
@pytest.mark.parametrize("is_lost", [False, True])
def test_a_gpu_that_can_run_nothing_any_more_ends_the_lanes_and_another_failure_of_it_does_not(
    monkeypatch: pytest.MonkeyPatch, is_lost: bool
) -> None:
    def fail(values: list[int]) -> None:
        if values != [2]:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def synchronize(device: torch.device | None = None) -> None:
        if is_lost and device == torch.device("cuda:1"):
            fail([1])

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    scheduler = Scheduler(queue_samples=10_000, cores=Cores(1), in_order=True)
    engine = runtime(going=False, before=fail)
    streams = [scheduler.submit(work(scheduler, engine, 1, value=value)) for value in (1, 2)]
    engine.go.set()
    ended = in_threads(*streams)
    assert isinstance(ended[0], ModelFault) and isinstance(ended[1], ModelFault) == is_lost
    if is_lost:
        scheduler._threads[0].join(WAIT_S)
    assert scheduler.is_alive != is_lost
    scheduler.close()


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
