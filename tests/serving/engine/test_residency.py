"""Models that have room in memory for some of them: all are answered, and what is at work stays."""

import errno
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from prometheus_client.parser import text_string_to_metric_families

from penumbra.models.errors import DeadlineExceeded, NotReady, PenumbraError, UnknownModel
from penumbra.serving.engine.options import Limits, SegmentOptions
from penumbra.serving.engine.residency import Residency
from penumbra.serving.engine.scheduler import Scheduler
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.signature import SIGNATURE, sign_card
from penumbra.serving.engine.store import CARD
from penumbra.serving.engine.throughput import Cores
from penumbra.serving.gateway import Gateway
from penumbra.serving.oip.protocol import Inference
from penumbra.serving.telemetry import Telemetry
from tests.conftest import FIXED, picture
from tests.serving.engine.stepped import WAIT_S, SteppedRuntime, outcome, work
from tests.serving.server import until

MB = 2**20
MODELS = ("toy-latent", "toy-opposed", "toy-pointwise")


@dataclass(eq=False)
class Leaving(SteppedRuntime):
    """Fails where it is run while it is out, and where it leaves while it runs."""

    is_there: bool = True
    running: int = 0

    def run(self, inputs: list) -> list:  # type: ignore[type-arg]
        assert self.is_there, "it was run while it was out"
        self.running += 1
        answers = super().run(inputs)
        self.running -= 1
        return answers

    def leave_memory(self) -> None:
        assert self.is_there and not self.running
        self.is_there = False


def models(number: int, *, going: bool = True) -> list[Leaving]:
    made = [Leaving() for _ in range(number)]
    for one in made:
        one.go.set() if going else None
    return made


@contextmanager
def served(
    engines: list[Leaving], *, room: int, before: Callable[[], None] = lambda: None, lanes: int = 1
) -> Iterator[tuple[Scheduler, Counter[Leaving]]]:
    """A scheduler of models of one MB each, and how often each was brought back."""
    loads: Counter[Leaving] = Counter()

    def load(runtime: Leaving, _: Path) -> None:
        before()
        assert sum(one.is_there for one in engines) < room
        runtime.is_there = True
        loads[runtime] += 1

    residency = Residency(room * MB, load=load)  # type: ignore[arg-type]
    with TemporaryDirectory() as place:
        (Path(place) / "graph").write_bytes(bytes(MB))
        for one in engines:
            residency.add(one, Path(place), load_s=0.0)  # type: ignore[arg-type]
    scheduler = Scheduler(queue_samples=10_000, cores=Cores(lanes, lanes, widen=False), residency=residency)
    yield scheduler, loads
    scheduler.close()


def ask(scheduler: Scheduler, engine: Leaving, num_windows: int, **options: object) -> int | PenumbraError:
    return outcome(scheduler.submit(work(scheduler, engine, num_windows, **options)))  # type: ignore[arg-type]


def wait_until_out(engine: Leaving) -> Leaving:
    until(lambda: not engine.is_there, bound_s=WAIT_S)
    return engine


@pytest.mark.parametrize("lanes", [1, 3])
def test_ten_models_in_room_for_three_answer_everything(lanes: int) -> None:
    engines = models(10)
    asked = np.random.Generator(np.random.PCG64(lanes)).integers(0, 10, 150).tolist()
    with served(engines, room=3, lanes=lanes) as (scheduler, loads), ThreadPoolExecutor(12) as threads:
        outcomes = threads.map(lambda number: ask(scheduler, engines[number], 1 + number), asked, timeout=WAIT_S)
        assert list(outcomes) == [1 + number for number in asked]
        assert scheduler._residency.resident == (3, 3 * MB) and sum(one.is_there for one in engines) == 3
    assert set(engines[:7]) <= set(loads), "they were out from the beginning"


def test_requests_that_come_together_wait_for_one_load() -> None:
    engines, loading, go = models(2), threading.Event(), threading.Event()

    def slow() -> None:
        loading.set()
        assert go.wait(WAIT_S)

    with served(engines, room=1, before=slow) as (scheduler, loads), ThreadPoolExecutor(8) as threads:
        out = wait_until_out(engines[0])
        asked = [threads.submit(ask, scheduler, out, 2) for _ in range(8)]
        assert loading.wait(WAIT_S)
        until(lambda: scheduler.queued[0] == 16)
        go.set()
        assert [one.result(WAIT_S) for one in asked] == [2] * 8
        assert loads == {out: 1}


def test_models_in_memory_answer_while_another_is_loaded() -> None:
    engines, loading, go = models(3), threading.Event(), threading.Event()

    def slow() -> None:
        loading.set()
        assert go.wait(WAIT_S)

    with served(engines, room=2, before=slow, lanes=2) as (scheduler, _), ThreadPoolExecutor(1) as threads:
        out = wait_until_out(engines[0])
        waiting = threads.submit(ask, scheduler, out, 2)
        assert loading.wait(WAIT_S)
        (resident,) = [one for one in engines if one.is_there]  # the third one leaves for it
        assert ask(scheduler, resident, 3) == 3 and not waiting.done()
        go.set()
        assert waiting.result(WAIT_S) == 2


def test_a_request_waits_for_a_load_no_longer_than_its_deadline() -> None:
    engines, go = models(2), threading.Event()

    def slow() -> None:
        assert go.wait(WAIT_S)

    with served(engines, room=1, before=slow) as (scheduler, loads):
        out = wait_until_out(engines[0])
        assert isinstance(ask(scheduler, out, 1, deadline=time.perf_counter() + 0.05), DeadlineExceeded)
        go.set()
        assert ask(scheduler, out, 3) == 3 and loads == {out: 1}


def test_a_model_at_work_stays_until_its_batch_has_ended() -> None:
    out, at_work = models(2, going=False)
    with served([out, at_work], room=1, lanes=2) as (scheduler, loads), ThreadPoolExecutor(2) as threads:
        wait_until_out(out)
        first = threads.submit(ask, scheduler, at_work, 1)
        assert at_work.entered.wait(WAIT_S)
        second = threads.submit(ask, scheduler, out, 1)
        until(lambda: scheduler._residency._leaving)
        assert at_work.is_there and not loads
        out.go.set()
        at_work.go.set()
        assert first.result(WAIT_S) == second.result(WAIT_S) == 1 and loads == {out: 1}


def test_models_that_have_work_all_the_time_take_turns() -> None:
    engines = models(2, going=False)
    with served(engines, room=1) as (scheduler, loads), ThreadPoolExecutor(2) as threads:
        wait_until_out(engines[0])
        asked = [threads.submit(ask, scheduler, engine, 50) for engine in engines]
        until(lambda: scheduler.queued[0] == 100)
        for engine in engines:
            engine.go.set()
        assert [one.result(WAIT_S) for one in asked] == [50, 50]
        assert len(loads) == 2, "the one that was in came back, too: neither waited for the other's end"


def test_a_model_that_has_work_stays_for_some_time_whoever_waits() -> None:
    out, stays = models(2)
    with served([out, stays], room=1) as (scheduler, loads), ThreadPoolExecutor(1) as threads:
        wait_until_out(out)
        scheduler._residency._stays[stays].load_s = WAIT_S  # type: ignore[index]
        stays.go.clear()
        first = threads.submit(ask, scheduler, stays, 30)
        assert stays.entered.wait(WAIT_S)
        request = scheduler.submit(work(scheduler, out, 1))
        stays.go.set()
        assert first.result(WAIT_S) == 30 and outcome(request) == 1
        assert loads == {out: 1} and len(stays.batches) == 30


@pytest.mark.parametrize("error", [NotReady("it is broken"), RuntimeError("device lost")], ids=lambda error: str(error))
def test_a_load_that_fails_ends_the_requests_that_wait_for_it_and_no_other(error: Exception) -> None:
    def fail() -> None:
        raise error

    said = (
        "it is broken"
        if isinstance(error, NotReady)
        else "the model could not be loaded again; the server's log says why"
    )
    out, other = models(2)
    with served([out, other], room=1, before=fail) as (scheduler, _), ThreadPoolExecutor(2) as threads:
        wait_until_out(out)
        for _ in range(2):  # the exchange that failed is over
            assert [str(one) for one in threads.map(lambda _: ask(scheduler, out, 5), range(2))] == [said] * 2


def test_a_model_that_fails_as_it_leaves_holds_up_no_other() -> None:
    out, other = models(2)

    def fail() -> None:
        other.is_there = False
        raise RuntimeError("device lost")

    with served([out, other], room=1) as (scheduler, _):
        wait_until_out(out)
        other.leave_memory = fail  # type: ignore[method-assign]
        assert "could not be loaded again" in str(ask(scheduler, out, 5)) and ask(scheduler, out, 5) == 5


# -- the same with artifacts -----------------------------------------------------------------------


@pytest.fixture
def store(toy_store: Path, tmp_path: Path) -> Path:
    for name in MODELS:
        shutil.copytree(toy_store / name, tmp_path / "store" / name)
    return tmp_path / "store"


def opened(store: Path, **options: object) -> Segmenter:
    """With room for no model: the last one stays until another is asked for."""
    limits = Limits(model_bytes=1)
    return Segmenter.open(store, threads=1, device="cpu", tuning=FIXED, limits=limits, **options)


def page(telemetry: Telemetry) -> dict[str, float]:
    families = text_string_to_metric_families(telemetry.page("")[0].decode())
    return {s.name + "".join(s.labels.values()): s.value for family in families for s in family.samples}


def test_answers_are_the_same_whether_a_model_was_out_or_not_and_every_surface_says_which_are(store: Path) -> None:
    image, telemetry = picture(np.random.Generator(np.random.PCG64(0)), 60, 70), Telemetry()
    with Segmenter.open(store, threads=1, device="cpu", tuning=FIXED) as all_in, \
        opened(store, observer=telemetry) as one_in:  # fmt: skip
        telemetry.follow("models_in_memory", lambda: one_in.residency.resident[0])
        telemetry.follow("model_bytes", lambda: one_in.residency.resident[1])
        inference = Inference(Gateway(one_in, telemetry, limit_requests=1, timeout_s=60))
        inference.gateway.state = "ready"
        for name in (*MODELS, *MODELS):
            expected, answer = (one.segment(image, SegmentOptions(name)) for one in (all_in, one_in))
            assert answer.labels_HW.tobytes() == expected.labels_HW.tobytes()
            assert all(answer.maps[map].tobytes() == expected.maps[map].tobytes() for map in expected.maps)
            assert [card.name for card in one_in.cards() if one_in.is_in_memory(card)] == [name]
            reasons = {entry["name"]: entry.get("reason") for entry in inference.index()}
            assert [known for known, why in reasons.items() if not why] == [name]
            assert all(inference.is_model_ready(known) for known in MODELS)
        counted = page(telemetry)
        assert counted["penumbra_models_in_memory"] == 1 and counted["penumbra_model_bytes"] > 0
        assert all(counted[f"penumbra_model_loads_total{name}"] == 3 for name in MODELS[:2])
        assert counted[f"penumbra_model_evictions_total{MODELS[0]}"] == 3


@pytest.mark.parametrize(
    ("file", "why"), [("decode.ts", "decode.ts was changed after its export"), (SIGNATURE, f"readable {SIGNATURE}")]
)
def test_what_has_changed_on_the_disk_while_it_was_out_is_refused_and_others_go_on(
    store: Path, file: str, why: str
) -> None:
    image, key = picture(np.random.Generator(np.random.PCG64(0)), 20, 30), Ed25519PrivateKey.generate()
    for name in MODELS:
        sign_card(store / name / "1", (store / name / "1" / CARD).read_bytes(), key)
    with opened(store, trusted_keys=(key.public_key(),)) as segmenter:
        until(lambda: segmenter.residency.resident[0] == 1)
        assert segmenter.segment(image, SegmentOptions(MODELS[0])).num_windows == 1, "it came back as it was"
        assert segmenter.segment(image, SegmentOptions(MODELS[1])).num_windows == 1
        (store / MODELS[0] / "1" / file).unlink()
        if file != SIGNATURE:
            (store / MODELS[0] / "1" / file).write_bytes(b"another graph")
        with pytest.raises(NotReady, match=f"{MODELS[0]} version 1 left memory and cannot be loaded again"):
            segmenter.segment(image, SegmentOptions(MODELS[0]))
        assert why in segmenter.refused[MODELS[0]]
        with pytest.raises(UnknownModel):
            segmenter.find(MODELS[0])
        assert [segmenter.segment(image, SegmentOptions(name)).num_windows for name in MODELS[1:]] == [1, 1]


def test_a_disk_that_fails_for_a_moment_takes_no_model_away(
    store: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> str:
        raise OSError(errno.EMFILE, "too many open files")

    image = picture(rng, 20, 30)
    with opened(store) as segmenter:
        until(lambda: segmenter.residency.resident[0] == 1)
        with monkeypatch.context() as patch:
            patch.setattr("penumbra.serving.engine.store.sha256_of", fail)
            with pytest.raises(NotReady, match="cannot be loaded again"):
                segmenter.segment(image, SegmentOptions(MODELS[0]))
        assert not segmenter.refused
        assert segmenter.segment(image, SegmentOptions(MODELS[0])).num_windows == 1, "and it is loaded when asked again"
