"""What is loaded and refused, changed and read by several threads: no change is lost, and every reader sees a whole."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from penumbra.models.errors import BadArtifact
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.gateway import Gateway
from penumbra.serving.oip.protocol import Inference
from penumbra.serving.telemetry import Telemetry
from tests.conftest import FIXED
from tests.serving.engine.stepped import WAIT_S

MODELS = ("toy-latent", "toy-opposed", "toy-pointwise")


@pytest.fixture
def segmenter(toy_store: Path) -> Iterator[Segmenter]:
    with Segmenter(threads=1, device="cpu", tuning=FIXED) as opened:
        for name in MODELS:
            opened.load(toy_store / name / "1")
        yield opened


class Watched:
    """A lock that says when somebody is about to wait for it."""

    def __init__(self, meets: threading.Semaphore) -> None:
        self._lock, self._meets = threading.Lock(), meets

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self._meets.release()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def interleave(segmenter: Segmenter, table: str, one: Callable[[], object], other: Callable[[], object]) -> None:
    """Run `other` in its own thread when `one` has begun to read a table that it will replace: until it is done, or
    waits."""
    meets = threading.Semaphore(0)

    def run_other() -> None:
        other()
        meets.release()

    thread = threading.Thread(target=run_other)

    class Shown(dict[str, Any]):
        """Whatever a copy or a change of all of it is made from."""

        def __iter__(self) -> Iterator[str]:  # so that {**shown} asks for its keys
            return super().__iter__()

        def keys(self) -> Any:
            self.show()
            return super().keys()

        def items(self) -> Any:
            self.show()
            return super().items()

        def __or__(self, more: Any) -> Any:
            self.show()
            return super().__or__(more)

        def show(self) -> None:
            if threading.current_thread() is not thread and not thread.ident:
                thread.start()
                assert meets.acquire(timeout=WAIT_S)

    segmenter._tables = Watched(meets)  # type: ignore[assignment]
    setattr(segmenter, table, Shown(getattr(segmenter, table)))
    one()
    assert thread.ident, "the table was never read"
    thread.join(WAIT_S)


def names(segmenter: Segmenter) -> list[str]:
    return [card.name for card in segmenter.cards()]


def test_two_models_that_are_unloaded_at_once_are_both_gone(segmenter: Segmenter) -> None:
    interleave(
        segmenter, "_runtimes", lambda: segmenter.unload("toy-latent"), lambda: segmenter.unload("toy-opposed")
    )  # fmt: skip
    assert names(segmenter) == ["toy-pointwise"]


def test_a_model_that_is_loaded_while_another_is_unloaded_is_there_and_the_other_is_not(
    segmenter: Segmenter, toy_store: Path
) -> None:
    segmenter.unload("toy-latent")
    interleave(
        segmenter, "_runtimes", lambda: segmenter.load(toy_store / "toy-latent" / "1"),
        lambda: segmenter.unload("toy-opposed"),
    )  # fmt: skip
    assert names(segmenter) == ["toy-latent", "toy-pointwise"]


def test_two_refusals_at_once_are_both_kept_and_one_that_is_forgotten_stays_forgotten(segmenter: Segmenter) -> None:
    def refuse(name: str) -> Callable[[], object]:
        return lambda: segmenter.refuse(Path("store", name, "1"), BadArtifact("broken"))

    refuse("old")()
    interleave(segmenter, "refused", refuse("a"), refuse("b"))
    assert set(segmenter.refused) == {"old", "a", "b"}
    interleave(segmenter, "refused", lambda: segmenter.accept("old"), refuse("c"))
    assert set(segmenter.refused) == {"a", "b", "c"}


def test_a_reader_goes_on_with_what_it_began_to_read(segmenter: Segmenter) -> None:
    segmenter.refuse(Path("store/a/1"), BadArtifact("broken"))
    reading = iter(segmenter.refused.items())
    segmenter.refuse(Path("store/b/1"), BadArtifact("broken"))
    segmenter.accept("a")
    assert [name for name, _ in reading] == ["a"] and list(segmenter.refused) == ["b"]


def test_a_model_that_is_asked_for_many_times_at_once_is_loaded_once_and_holds_no_other_work_up(
    segmenter: Segmenter, toy_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, go, loads = segmenter.load, threading.Event(), list[Path]()

    def slow(directory: Path) -> object:
        loads.append(directory)
        assert go.wait(WAIT_S)
        return load(directory)

    async def scenario() -> None:
        inference = Inference(Gateway(segmenter, Telemetry(), limit_requests=1, timeout_s=60), store=toy_store)
        segmenter.unload("toy-latent")
        monkeypatch.setattr(segmenter, "load", slow)
        waiting = [asyncio.ensure_future(inference.load("toy-latent")) for _ in range(64)]
        await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.to_thread(lambda: None), WAIT_S)  # as large requests are read
        assert not go.is_set()
        go.set()
        await asyncio.gather(*waiting)

    asyncio.run(scenario())
    assert loads == [toy_store / "toy-latent" / "1"] and names(segmenter) == list(MODELS)
