"""CUDA graphs of a network's parts, with a stand-in that tapes operations on the CPU and replays them in place."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from penumbra.export.bundle import export_network
from penumbra.serving.engine.backends import Backend
from penumbra.serving.engine.runtime import Runtime, Tuning
from penumbra.serving.engine.store import open_artifact
from tests.models.small import card_of, image, noise, seeded

NAME = "np_semiseg film"
"""A network with a latent."""
CPU = torch.device("cpu")


class Tape(TorchDispatchMode):
    """Replaying repeats each operation, and puts what comes out where it lay: as a CUDA graph does, it looks at nothing
    but the memory that it was captured with."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, given))
        return given

    def replay(self) -> None:
        for function, args, kwargs, given in self.operations:
            for kept, again in zip(
                pytree.tree_leaves(given), pytree.tree_leaves(function(*args, **kwargs)), strict=True
            ):
                if isinstance(kept, Tensor) and kept.data_ptr() != again.data_ptr():
                    kept.copy_(again)


class StandIn:
    """What graphs.py asks of torch.cuda, and what it did; `refuse`: the number of the first capture that fails."""

    def __init__(self) -> None:
        self.did: list[str] = []
        self.replays, self.refuse = 0, 1000

    def into(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = self.stream("default")
        for name in ("stream_context", "graph", "CUDAGraph", "Stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name.removesuffix("_context"), getattr(self, name))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool")
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)

    def stream(self, name: str) -> Any:
        return SimpleNamespace(name=name, wait_stream=lambda other: self.did.append(f"{name} waits for {other.name}"))

    def Stream(self, _: torch.device) -> Any:
        return self.stream("side")

    def current_stream(self, _: torch.device) -> Any:
        return self.current

    @contextmanager
    def stream_context(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def CUDAGraph(self) -> Any:
        tape = Tape()

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return SimpleNamespace(tape=tape, replay=replay)

    @contextmanager
    def graph(self, graph: Any, pool: str, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert (pool, stream.name, capture_error_mode) == ("the pool", "side", "thread_local")
        assert self.current.name == "side"
        self.did.append("capture")
        if self.did.count("capture") >= self.refuse:
            self.current = stream  # torch leaves it so, where the end of a capture raises
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        with graph.tape:
            yield


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    found = StandIn()
    found.into(monkeypatch)
    return found


class Counted:
    """A backend on the eager network, which counts the calls of its parts and on which stream they were made."""

    def __init__(self, cuda: StandIn) -> None:
        network, self.streams = seeded(NAME), list[str]()

        def counted(part: Any) -> Any:
            def run(*arguments: Any) -> Any:
                self.streams.append(cuda.current.name)
                return part(*arguments)

            return run

        graphs = {"encode": counted(network.encode), "decode": counted(network.decode)}
        self.backend = Backend(graphs, device=CPU, one_at_a_time=False, can_capture=True)

    def answer(self, num_windows: int, num_samples: int, *, seed: int = 0) -> Tensor:
        pixels, draws = image(num_windows) + seed, noise(NAME, num_samples, num_windows) + seed
        return self.backend.decode(self.backend.encode(pixels), draws).clone()


def test_a_captured_call_gives_the_bits_of_the_one_that_runs_and_runs_nothing(cuda: StandIn) -> None:
    graphs = Counted(cuda)
    expected = [graphs.answer(2, 3, seed=seed) for seed in range(3)]
    graphs.backend.capture(graphs.answer(2, 3) for _ in range(1))
    graphs.streams.clear()
    assert all(torch.equal(graphs.answer(2, 3, seed=seed), wanted) for seed, wanted in enumerate(expected))
    assert graphs.streams == []


def test_a_call_is_captured_once_on_a_side_stream_after_three_runs_there(cuda: StandIn) -> None:
    graphs = Counted(cuda)
    graphs.backend.capture(graphs.answer(2, 3) for _ in range(2))
    assert graphs.streams == ["side"] * (3 + 1) * 2
    assert cuda.did == ["side waits for default", "capture", "default waits for side"] * 2
    assert cuda.replays == 4


def test_features_go_from_one_captured_part_to_the_next_without_a_copy(cuda: StandIn) -> None:
    graphs = Counted(cuda)
    graphs.backend.capture(graphs.answer(2, 3) for _ in range(1))
    with torch.inference_mode():
        captured = graphs.backend.encode(image(2))
        elsewhere = tuple(tensor.clone() for tensor in captured)
        here = graphs.backend.decode(captured, noise(NAME, 3, 2)).clone()
        graphs.streams.clear()
        assert torch.equal(graphs.backend.decode(elsewhere, noise(NAME, 3, 2)), here)
    assert graphs.streams == ["default"]  # what lies elsewhere is not taken for what the other part gave


def test_calls_of_other_sizes_run_as_they_are_and_none_is_captured_later(cuda: StandIn) -> None:
    graphs, plain = Counted(cuda), Counted(cuda)
    graphs.backend.capture(graphs.answer(2, 3) for _ in range(1))
    graphs.streams.clear()
    for num_windows, num_samples in ((1, 3), (2, 1), (3, 3)):
        assert torch.equal(graphs.answer(num_windows, num_samples), plain.answer(num_windows, num_samples))
    assert graphs.streams == ["default"] * 5 and cuda.did.count("capture") == 2


@pytest.mark.parametrize("refuse", [1, 2, 3])
def test_what_cannot_be_captured_is_told_once_and_run_without(
    refuse: int, cuda: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    graphs, plain = Counted(cuda), Counted(cuda)
    cuda.refuse = refuse
    with caplog.at_level(logging.INFO):
        graphs.backend.capture(graphs.answer(num_windows, 3) for num_windows in (2, 1))
    assert [record.message for record in caplog.records] == [
        "not every call is a CUDA graph, and the others run without: operation not permitted when stream is capturing",
        f"{refuse - 1} calls are CUDA graphs, for which torch holds 0 MiB more",
    ]
    assert cuda.current.name == "default" and cuda.did.count("capture") == refuse
    for num_windows in (2, 1):
        assert torch.equal(graphs.answer(num_windows, 3, seed=1), plain.answer(num_windows, 3, seed=1))


@pytest.mark.parametrize(
    ("name", "samples_per_call", "captures", "replays"), [(NAME, 3, 6, 4), (NAME, 8, 4, 2), ("cps", 1, 4, 2)]
)
def test_warming_up_captures_the_sizes_that_it_found(
    name: str, samples_per_call: int, captures: int, replays: int,
    cuda: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """For one window and two: encode, and decode of a chunk and of what it leaves of eight; members have no chunk."""
    runtime = _runtime(tmp_path, name)
    before = runtime.run(runtime.golden_inputs())
    with caplog.at_level(logging.INFO):
        runtime.warm_up(Tuning(windows_per_batch=2, samples_per_call=samples_per_call, cuda_graphs=True))
    assert cuda.did.count("capture") == captures
    assert f"{captures} calls are CUDA graphs, for which torch holds 0 MiB more" in caplog.messages
    cuda.replays = 0
    after = runtime.run(runtime.golden_inputs())
    assert cuda.replays == replays
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(one.stats_hCw, other.stats_hCw, rtol=1e-6)  # in chunks of another size


def test_images_that_are_seen_whole_are_not_captured_nor_anything_unless_it_is_set(
    cuda: StandIn, tmp_path: Path
) -> None:
    runtime = _runtime(tmp_path, NAME)
    runtime.warm_up(Tuning(2, 2))
    window = replace(runtime.card.window, height=0, width=0)
    runtime.card = replace(runtime.card, window=window)
    runtime.warm_up(Tuning(2, 2, cuda_graphs=True))
    assert cuda.did == []


def _runtime(store: Path, name: str) -> Runtime:
    artifact = open_artifact(export_network(seeded(name), card_of(name), store))
    runtime = Runtime(artifact, device=CPU)
    runtime._backend._can_capture = True
    return runtime
