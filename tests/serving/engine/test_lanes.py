"""Batches that run at a time: how cores are shared out, and what a request sees of it, which is nothing."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch

from penumbra.models.card import Card
from penumbra.models.errors import ModelFault
from penumbra.serving.engine.moments import Moments
from penumbra.serving.engine.scheduler import Observer, Scheduler
from penumbra.serving.engine.steps import WindowInput
from penumbra.serving.engine.throughput import Cores
from tests.conftest import toy_card
from tests.serving.engine.stepped import SPEC, WAIT_S, consume, in_threads, runtime, work
from tests.serving.server import until

THREADS = 4


@dataclass(eq=False)
class MetRuntime:
    """`meet` is called in every batch with the number of its first window's samples and of the lane's cores."""

    meet: Callable[[int, int], None]
    windows_per_batch: int = 1
    lanes: int = 0
    stays_on_device: bool = False
    card: Card = field(default_factory=lambda: toy_card("latent", window=SPEC)[0])

    def run(self, inputs: list[WindowInput]) -> list[Moments | ModelFault]:
        samples = [len(window.noise_SL) for window in inputs]
        self.meet(samples[0], torch.get_num_threads())
        return [Moments(torch.zeros(4, 4, 4), S) for S in samples]


@pytest.fixture(params=[Cores(THREADS, lanes=2), Cores(THREADS, lanes=THREADS)], ids=["two lanes", "four"])
def scheduler(request: pytest.FixtureRequest) -> Iterator[Scheduler]:
    made = Scheduler(queue_samples=10_000, cores=request.param)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("cores", "of_batch"),
    [
        (Cores(4, lanes=4), {1: 4, 2: 2, 3: 1, 4: 1, 100: 1}),
        (Cores(4, lanes=2), {1: 4, 2: 2, 3: 2, 100: 2}),
        (Cores(4, lanes=1), {1: 4, 100: 4}),
        (Cores(4, lanes=4, widen=False), {1: 1, 2: 1, 100: 1}),
    ],
)
def test_few_windows_have_more_cores_each(cores: Cores, of_batch: dict[int, int]) -> None:
    assert {num_windows: cores.of_batch(num_windows) for num_windows in of_batch} == of_batch


def test_a_model_that_was_tuned_for_few_lanes_has_more_cores_in_each_batch() -> None:
    cores = Cores(8, lanes=8)
    assert [cores.of_batch(100, lanes) for lanes in (0, 8, 4, 1)] == [1, 1, 2, 8]
    assert Cores(8, lanes=8, widen=False).of_batch(100, 1) == 1


def test_a_window_alone_has_all_cores_and_a_crowd_shares_them(scheduler: Scheduler) -> None:
    seen: list[int] = []
    alone = MetRuntime(lambda _, cores: seen.append(cores))
    consume(scheduler.submit(work(scheduler, alone, 1)))  # type: ignore[arg-type]
    assert seen == [THREADS]
    seen.clear()
    consume(scheduler.submit(work(scheduler, alone, 20)))  # type: ignore[arg-type]
    assert set(seen) == {scheduler._cores.least}


def test_as_many_batches_run_at_a_time_as_there_are_lanes_and_never_on_more_cores_than_there_are(
    scheduler: Scheduler,
) -> None:
    lanes = scheduler._cores.lanes
    all_at_once = threading.Barrier(lanes)
    lock, used, most = threading.Lock(), 0, 0

    def meet(_: int, cores: int) -> None:
        nonlocal used, most
        with lock:
            used += cores
            most = max(most, used)
        all_at_once.wait(WAIT_S)
        with lock:
            used -= cores

    engine = MetRuntime(meet)
    assert in_threads(*[scheduler.submit(work(scheduler, engine, 4)) for _ in range(4)]) == [4] * 4  # type: ignore[arg-type]
    assert most == THREADS


def test_windows_that_end_in_another_order_are_stitched_in_the_plans(scheduler: Scheduler) -> None:
    engine = runtime(going=False)
    last_first = threading.Event()

    def before(_: list[int]) -> None:
        first = not engine.batches and not last_first.is_set()
        if first and threading.current_thread().name == "inference-0":
            assert last_first.wait(WAIT_S)
        last_first.set()

    engine.before = before
    engine.go.set()
    answers = consume(scheduler.submit(work(scheduler, engine, 12)))
    assert [window.index for window, _ in answers] == list(range(12))


def test_a_call_runs_while_the_other_lanes_work(scheduler: Scheduler) -> None:
    """The second lane's window ends only after a call that the first lane runs."""
    called = threading.Event()

    def meet(samples: int, _: int) -> None:
        if threading.current_thread().name != "inference-0":
            assert called.wait(WAIT_S)

    engine = MetRuntime(meet)
    with ThreadPoolExecutor(1) as threads:
        reader = threads.submit(in_threads, scheduler.submit(work(scheduler, engine, 8)))  # type: ignore[arg-type]
        assert scheduler.call(lambda: threading.current_thread().name) == "inference-0"
        called.set()
        assert reader.result(WAIT_S) == [8]


def test_where_memory_is_short_for_two_windows_at_a_time_they_run_one_by_one(scheduler: Scheduler) -> None:
    lock, running, most = threading.Lock(), 0, [0]

    def meet(samples: int, _: int) -> None:
        nonlocal running
        with lock:
            running += 1
            most[-1] = max(most[-1], running)
        try:
            time.sleep(0.002)  # lets the other lanes come in
            if running > 1:
                raise MemoryError
        finally:
            with lock:
                running -= 1

    engine = MetRuntime(meet)
    for _ in range(scheduler._cores.lanes):
        assert in_threads(*[scheduler.submit(work(scheduler, engine, 5)) for _ in range(3)]) == [5] * 3  # type: ignore[arg-type]
        most.append(0)
    assert most[0] > 1 and most[-2] == 1 and scheduler._most_working == 1
    assert scheduler.queued == (0, 0)


def test_memory_that_was_short_beside_a_window_that_has_just_ended_fails_nothing() -> None:
    scheduler = Scheduler(queue_samples=10_000, cores=Cores(2, lanes=2, widen=False))
    both, failed = threading.Barrier(2), threading.Event()

    def meet(samples: int, _: int) -> None:
        if samples == 2 and not failed.is_set():
            both.wait(WAIT_S)
            until(lambda: scheduler._working == 1)
            failed.set()
            raise MemoryError
        if not failed.is_set():
            both.wait(WAIT_S)

    engine = MetRuntime(meet)
    asked = [work(scheduler, engine, 1, samples=samples) for samples in (1, 2)]  # type: ignore[arg-type]
    assert in_threads(*map(scheduler.submit, asked)) == [1, 1]
    scheduler.close()


def test_what_does_not_fit_even_alone_fails_its_own_request(scheduler: Scheduler) -> None:
    def meet(samples: int, _: int) -> None:
        if samples == 2:
            raise MemoryError

    engine = MetRuntime(meet)
    asked = [work(scheduler, engine, 5, samples=samples) for samples in (1, 2, 1, 2)]  # type: ignore[arg-type]
    outcomes = in_threads(*map(scheduler.submit, asked))
    assert outcomes[::2] == [5, 5] and all(isinstance(one, ModelFault) for one in outcomes[1::2])
    assert scheduler._most_working == scheduler._cores.lanes


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_lane_that_dies_ends_all_and_nobody_waits_for_ever() -> None:
    class Deadly(Observer):
        def batch_done(self, model: str, *, windows: int, capacity: int, samples: int) -> None:
            raise RuntimeError

    scheduler = Scheduler(queue_samples=100, cores=Cores(2, lanes=2), observer=Deadly())
    engine = runtime(going=False)
    streams = [scheduler.submit(work(scheduler, engine, 40, value=value)) for value in (1, 2)]
    engine.go.set()
    outcomes = in_threads(*streams)
    assert all(isinstance(one, ModelFault) for one in outcomes)
    scheduler.close()
    assert not scheduler.is_alive


def test_a_window_that_ran_while_its_request_began_again_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first lane is at work on window 0 with 16 samples while the second finds that time is short."""
    now = [1000.0]
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: now[0])
        scheduler = Scheduler(queue_samples=100, cores=Cores(2, lanes=2))
        began_again = threading.Event()

        def meet(samples: int, _: int) -> None:
            now[0] += 1.0
            if samples < 16:
                began_again.set()
            elif threading.current_thread().name == "inference-0":
                assert began_again.wait(WAIT_S)
            else:
                now[0] += 300.0

        engine = MetRuntime(meet)
        asked = work(scheduler, engine, 6, samples=16, anytime=True, deadline=now[0] + 500)  # type: ignore[arg-type]
        with scheduler.submit(asked) as stream:
            answers = [(window.index, moments.num_samples) for window, moments in stream.finished()]
        scheduler.close()
    (samples,) = {samples for _, samples in answers[-6:]}
    assert samples < 16 and [index for index, _ in answers[-6:]] == list(range(6))
    assert all(index == place for place, (index, _) in enumerate(answers[:-6]))
