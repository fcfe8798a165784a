"""Graphs of libraries with threads of their own: opened for all cores and for lanes, whose calls run side by side."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from penumbra.export.bundle import export_network
from penumbra.models.errors import BadArtifact
from penumbra.serving.engine.backends import load_backend
from penumbra.serving.engine.backends.lanes import LaneGraph
from penumbra.serving.engine.runtime import Runtime, Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.store import open_artifact
from tests.toys import toy_card


@pytest.fixture(autouse=True)
def six_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    yield
    torch.set_num_threads(before)


def test_a_graph_is_opened_for_all_cores_and_for_a_lanes_share_and_runs_side_by_side() -> None:
    opened: list[tuple[int, int]] = []
    together = threading.Barrier(3)

    def open_for(threads: int, at_a_time: int):
        opened.append((threads, at_a_time))

        def run(inputs: Sequence[Tensor]) -> list[Tensor]:
            if threads == 2:
                together.wait(30)  # one call at a time would never come to its end
            return [inputs[0] + threads]

        return run

    def ask(cores: int) -> float:
        torch.set_num_threads(cores)
        return float(graph(torch.zeros(()))[0])

    graph = LaneGraph(open_for)
    assert [ask(cores) for cores in (6, 2, 1)] == [6, 6, 6]
    assert [graph.open(cores) for cores in (6, 2, 2)] == [False, True, False]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ask, [2, 2, 2])) == [2, 2, 2]
    assert [ask(cores) for cores in (6, 3, 1)] == [6, 6, 6]
    assert opened == [(6, 1), (2, 3)]


def test_both_openings_of_a_loaded_model_reproduce_its_golden_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, network = toy_card("latent")
    artifact = export_network(network, card, tmp_path, backend="openvino")
    opening = LaneGraph.open

    def open_wrongly(graph: LaneGraph, threads: int) -> bool:
        opening(graph, threads)
        run = graph._opened[threads]
        graph._opened[threads] = lambda inputs: [tensor + 1 for tensor in run(inputs)]
        return True

    with Segmenter(threads=2) as segmenter:
        segmenter.load(artifact)
        backend = segmenter.find(card.name)._backend
        graphs = [graph for graph in backend._graphs.values() if isinstance(graph, LaneGraph)]
        assert [sorted(graph._opened) for graph in graphs] == [[1, 2]] * 2
        monkeypatch.setattr(LaneGraph, "open", open_wrongly)
        with pytest.raises(BadArtifact, match="does not reproduce its golden window"):
            segmenter.load(artifact)


def test_sizes_and_speed_are_measured_in_the_opening_that_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, network = toy_card("latent")
    artifact = export_network(network, card, tmp_path, backend="onnx")
    seen: list[int] = []
    warm_up = Runtime.warm_up
    monkeypatch.setattr(Runtime, "warm_up", lambda *given: (seen.append(torch.get_num_threads()), warm_up(*given))[1])
    with Segmenter(threads=4, tuning=Tuning(lanes=2)) as segmenter:
        segmenter.load(artifact)
        graphs = segmenter.find(card.name)._backend._graphs.values()
    assert seen == [2] and {graph._share for graph in graphs if isinstance(graph, LaneGraph)} == {2}


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_calls_of_many_threads_at_once_each_get_their_own_answer(backend: str, tmp_path: Path) -> None:
    card, network = toy_card("latent")
    artifact = open_artifact(export_network(network, card, tmp_path, backend=backend))
    graphs = load_backend(artifact.card, artifact.directory, torch.device("cpu"))
    height, width = card.window.height, card.window.width
    assert graphs.prepare(1)
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
