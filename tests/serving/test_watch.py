"""A server that looks at its store: what appears is served, what is broken is named, and nothing is taken away."""

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import httpx
import pytest

from penumbra.export.bundle import export_network
from penumbra.models.errors import BadArtifact
from penumbra.models.toy.net import ToyConfig, ToyNetwork
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.store import artifact_card
from penumbra.serving.gateway import Gateway
from penumbra.serving.oip.protocol import Inference
from penumbra.serving.telemetry import Telemetry
from penumbra.serving.watch import StoreWatch, look
from tests.conftest import FIXED
from tests.serving.http.asking import PNG
from tests.serving.server import serving, until
from tests.toys import toy_card

MODEL = "toy-latent"


def export(store: Path, form: str = "latent") -> Path:
    card, network = toy_card(form)
    return export_network(network, card, store)


class Watched:
    """A store, the models that were loaded from it, and a watch that looks when it is told to."""

    def __init__(self, store: Path) -> None:
        before = look(store)
        self.segmenter = Segmenter.open(store, threads=1, tuning=FIXED)
        gateway = Gateway(self.segmenter, Telemetry(), limit_requests=2, timeout_s=60)
        self.inference = Inference(gateway, store=store)
        self.watch = StoreWatch(store, before, every_s=3600, inference=self.inference)

    def look(self, times: int = 2) -> list[tuple[str, int]]:
        for _ in range(times):
            self.watch.check()
        return [(card.name, card.version) for card in self.segmenter.cards()]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    export(tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def watched(store: Path) -> Iterator[Watched]:
    made = Watched(store)
    yield made
    made.inference.gateway.close()


def test_a_new_version_and_a_new_model_are_served_once_they_are_the_same_in_two_looks(
    watched: Watched, store: Path
) -> None:
    assert watched.look() == [(MODEL, 1)]
    export(store)
    export(store, "pointwise")
    assert watched.look(1) == [(MODEL, 1)], "it may still be being copied"
    assert watched.look(1) == [(MODEL, 1), (MODEL, 2), ("toy-pointwise", 1)]


def test_what_is_being_copied_is_left_alone_until_it_is_whole(watched: Watched, store: Path) -> None:
    whole = export(store.parent / "elsewhere", "pointwise")
    place = store / "toy-pointwise" / "1"
    place.mkdir(parents=True)
    for file in sorted(whole.iterdir()):  # card.json comes first
        (place / file.name).write_bytes(file.read_bytes())
        assert watched.look(1) == [(MODEL, 1)]
    assert watched.look(1) == [(MODEL, 1), ("toy-pointwise", 1)] and not watched.segmenter.refused


def test_a_broken_version_is_refused_by_name_and_tried_again_only_when_it_has_changed(
    watched: Watched, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    graph = export(store) / "decode.ts"
    good = graph.read_bytes()
    graph.write_bytes(b"broken")
    assert watched.look(6) == [(MODEL, 1)], "the one before it stays"
    assert "decode.ts was changed" in watched.segmenter.refused[MODEL]
    assert caplog.text.count("not served") == 1
    graph.write_bytes(good)
    assert watched.look() == [(MODEL, 1), (MODEL, 2)] and not watched.segmenter.refused


def test_a_refusal_ends_with_its_cause_and_a_model_that_vanishes_is_served_on(watched: Watched, store: Path) -> None:
    (export(store) / "decode.ts").write_bytes(b"broken")
    (export(store, "pointwise") / "decode.ts").write_bytes(b"broken")
    watched.look()
    assert watched.segmenter.refused.keys() == {MODEL, "toy-pointwise"}
    rmtree(store / MODEL / "2")
    rmtree(store / "toy-pointwise")
    assert watched.look() == [(MODEL, 1)] and not watched.segmenter.refused
    rmtree(store)
    assert watched.look() == [(MODEL, 1)]


def test_what_a_caller_unloaded_comes_back_with_its_next_version_alone(watched: Watched, store: Path) -> None:
    watched.segmenter.unload(MODEL)
    assert watched.look() == []
    export(store)
    assert watched.look() == [(MODEL, 2)]


def test_what_was_refused_at_the_start_is_served_once_it_is_mended(store: Path, tmp_path: Path) -> None:
    export(store, "pointwise")
    graph = store / "toy-pointwise" / "1" / "decode.ts"
    good = graph.read_bytes()
    graph.write_bytes(b"broken")
    watched = Watched(store)
    assert watched.look() == [(MODEL, 1)] and watched.segmenter.refused.keys() == {"toy-pointwise"}
    graph.write_bytes(good)
    assert watched.look() == [(MODEL, 1), ("toy-pointwise", 1)] and not watched.segmenter.refused
    watched.inference.gateway.close()


def test_a_link_to_nothing_in_one_artifact_stops_no_server_and_hides_no_other_model(
    watched: Watched, store: Path
) -> None:
    place = export(store, "pointwise")
    (place / "golden.safetensors").unlink()
    (place / "golden.safetensors").symlink_to("/nonexistent")
    export(store)
    assert look(store).keys() == {MODEL, "toy-pointwise"}
    assert watched.look() == [(MODEL, 1), (MODEL, 2)] and watched.segmenter.refused.keys() == {"toy-pointwise"}


def test_a_failure_that_nobody_foresaw_refuses_one_model_and_leaves_the_others(
    watched: Watched, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(store)
    export(store, "pointwise")
    load = watched.segmenter.load

    def fail(directory: Path) -> Any:
        if directory.parent.name == MODEL:
            raise MemoryError
        return load(directory)

    monkeypatch.setattr(watched.segmenter, "load", fail)
    assert watched.look() == [(MODEL, 1), ("toy-pointwise", 1)]
    assert watched.segmenter.refused[MODEL] == f"{MODEL}/2 cannot be loaded; the server's log says why"


def refused_by(client: httpx.Client) -> float:
    return float(re.findall(r"^penumbra_models_refused (\S+)", client.get("/metrics").text, re.MULTILINE)[0])


def test_a_server_serves_what_is_exported_beside_it_and_counts_what_it_refuses(store: Path, tmp_path: Path) -> None:
    with serving(store, tmp_path, watch_store_s=0.1, predrain_s=0) as server, server.client() as client:
        assert client.get("/models/toy-latent").json()["version"] == 1 and refused_by(client) == 0
        export(store)
        until(lambda: client.get("/models/toy-latent").json()["version"] == 2, bound_s=60)
        asked = {"content": PNG, "headers": {"Content-Type": "image/png"}}
        for version, query in ((2, ""), (1, "&version=1")):
            answer = client.post(f"/segment?model=toy-latent{query}", **asked)  # type: ignore[arg-type]
            assert answer.headers["X-Penumbra-Version"] == str(version)
        draft = copytree(store / MODEL / "2", tmp_path / "3")
        (draft / "decode.ts").write_bytes(b"broken")
        os.replace(draft, store / MODEL / "3")
        until(lambda: refused_by(client) == 1, bound_s=60)
        (refused,) = client.get("/models").json()["refused"]
        assert refused["name"] == MODEL and f"not served: {store}/{MODEL}/3" in server.log.read_text()
        assert client.post("/segment?model=toy-latent", **asked).headers["X-Penumbra-Version"] == "2"  # type: ignore[arg-type]


def test_a_store_without_a_watch_is_read_at_the_start_alone(watched: Watched, store: Path) -> None:
    export(store)
    assert [card.version for card in watched.segmenter.cards()] == [1]
    with pytest.raises(BadArtifact):
        watched.inference.load_newest("unheard", store).result()
    watched.inference.load_newest(MODEL, store).result()
    assert watched.look() == [(MODEL, 1), (MODEL, 2)], "what a caller has loaded already is not loaded again"


def test_an_artifact_that_is_replaced_under_its_number_is_loaded_anew(
    watched: Watched, store: Path, tmp_path: Path
) -> None:
    before = watched.segmenter.cards()[0]
    config = ToyConfig(3, "latent", 9.0)
    card = dataclasses.replace(toy_card("latent")[0], config=dataclasses.asdict(config))
    other = export_network(ToyNetwork(config), card, tmp_path / "other")
    rmtree(store / MODEL / "1")
    copytree(other, store / MODEL / "1")
    assert watched.look() == [(MODEL, 1)]
    after = watched.segmenter.cards()[0]
    assert after != before and after == artifact_card(store / MODEL / "1")
