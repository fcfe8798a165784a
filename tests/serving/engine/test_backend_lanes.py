"""Graphs of libraries with threads of their own: one opening for every number of cores, calls side by side."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from penumbra.export.bundle import export_network
from penumbra.serving.engine.backends import lanes, load_backend
from penumbra.serving.engine.store import open_artifact
from tests.toys import toy_card


def test_a_graph_is_opened_once_for_every_power_of_two_of_cores_and_runs_side_by_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lanes, "num_cores", lambda: 6)
    opened: list[tuple[int, int]] = []
    together = threading.Barrier(2)

    def open_for(threads: int, at_a_time: int):
        opened.append((threads, at_a_time))

        def run(inputs: Sequence[Tensor]) -> list[Tensor]:
            if threads == 1:
                together.wait(30)  # one call at a time would never come to its end
            return [inputs[0] + threads]

        return run

    def ask(cores: int) -> float:
        torch.set_num_threads(cores)
        return float(graph(torch.zeros(()))[0])

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(6)
        graph = lanes.in_lanes(open_for)
        assert opened == [(6, 1)]
        assert [ask(cores) for cores in (6, 3, 2, 5, 8)] == [6, 2, 2, 4, 8]
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(ask, [1, 1])) == [1, 1]
        assert sorted(opened) == [(1, 6), (2, 3), (4, 1), (6, 1), (8, 1)]
    finally:
        torch.set_num_threads(before)


def test_a_graph_that_cannot_be_opened_is_told_when_it_is_made() -> None:
    def open_for(threads: int, at_a_time: int):
        raise RuntimeError("no such file")

    with pytest.raises(RuntimeError, match="no such file"):
        lanes.in_lanes(open_for)


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_calls_of_many_threads_at_once_each_get_their_own_answer(backend: str, tmp_path: Path) -> None:
    card, network = toy_card("latent")
    artifact = open_artifact(export_network(network, card, tmp_path, backend=backend))
    graphs = load_backend(artifact.card, artifact.directory, torch.device("cpu"))
    height, width = card.window.height, card.window.width
    images = [torch.full((1, 3, height, width), 0.1 * i) for i in range(8)]
    noise_S1L = artifact.golden.plain.noise_SBL[:, :1]

    def ask(turn: int) -> Tensor:
        torch.set_num_threads(1)
        return graphs.decode(graphs.encode(images[turn % 8]), noise_S1L)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(64)))
    for turn, answer in enumerate(answers):
        assert torch.equal(answer, answers[turn % 8])
        assert torch.allclose(answer, network.decode(network.encode(images[turn % 8]), noise_S1L), atol=1e-4)
