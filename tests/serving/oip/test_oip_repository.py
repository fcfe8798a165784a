"""Loading and unloading models by the protocol, on a server that allows it."""

from collections.abc import Iterator
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from tests.serving.server import Server, serving

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
MODEL = "toy-pointwise"


@pytest.fixture(scope="module")
def store(toy_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of its own: one good model, and one whose graph was changed after its export."""
    own = tmp_path_factory.mktemp("controlled")
    for name in (MODEL, "toy-latent"):
        copytree(toy_store / name, own / name)
    (own / "toy-latent" / "1" / "decode.ts").write_bytes(b"changed")
    return own


@pytest.fixture(scope="module")
def controlled(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("controlled-server")
    with serving(store, directory, model_control=True, predrain_s=0) as started:
        yield started


@pytest.fixture(params=[triton_http, triton_grpc])
def client(request: pytest.FixtureRequest, controlled: Server) -> Iterator[Any]:
    api = request.param
    address = controlled.url.removeprefix("http://") if api is triton_http else controlled.grpc_address
    with api.InferenceServerClient(address) as connected:
        yield connected


def _index(client: Any) -> dict[str, tuple[str, str]]:
    is_http = isinstance(client, triton_http.InferenceServerClient)
    entries = (
        client.get_model_repository_index() if is_http else client.get_model_repository_index(as_json=True)["models"]
    )
    return {entry["name"]: (entry["state"], entry.get("reason", "")) for entry in entries}


def _labels(client: Any, image: np.ndarray) -> np.ndarray:
    api = triton_http if isinstance(client, triton_http.InferenceServerClient) else triton_grpc
    tensor = api.InferInput("image", list(image.shape), "UINT8")
    tensor.set_data_from_numpy(image)
    labels: np.ndarray = client.infer(MODEL, [tensor]).as_numpy("labels")
    return labels


def test_a_model_is_unloaded_and_loaded_again(client: Any, rng: np.random.Generator) -> None:
    image = rng.integers(0, 230, (40, 50, 3), dtype=np.uint8)
    client.unload_model(MODEL)
    assert not client.is_model_ready(MODEL) and _index(client)[MODEL] == ("UNAVAILABLE", "unloaded")
    with pytest.raises(InferenceServerException, match=f"there is no model '{MODEL}'"):
        _labels(client, image)
    client.load_model(MODEL)
    client.load_model(MODEL)  # once more changes nothing
    assert client.is_model_ready(MODEL) and _index(client)[MODEL] == ("READY", "")
    assert np.array_equal(_labels(client, image), image.argmax(-1))


def test_a_model_that_is_refused_says_why_and_is_served_once_it_is_repaired(
    client: Any, controlled: Server, store: Path, toy_store: Path
) -> None:
    state, reason = _index(client)["toy-latent"]
    assert reason.startswith("toy-latent/1/decode.ts was changed"), "callers see names, and the log the path"
    assert f"{store}/toy-latent/1/decode.ts was changed" in controlled.log.read_text()
    refused = httpx.get(f"{controlled.url}/models", timeout=60, trust_env=False).json()["refused"]
    assert refused == [{"name": "toy-latent", "error": reason}]
    assert state == "UNAVAILABLE" and "was changed after its export" in reason
    with pytest.raises(
        InferenceServerException,
        match=r"failed to load 'toy-latent': toy-latent/1/decode.ts was changed",
    ):
        client.load_model("toy-latent")
    broken = store / "toy-latent" / "1"
    kept = broken / "decode.ts"
    content = kept.read_bytes()
    kept.write_bytes((toy_store / "toy-latent" / "1" / "decode.ts").read_bytes())
    client.load_model("toy-latent")
    assert client.is_model_ready("toy-latent") and _index(client)["toy-latent"] == ("READY", "")
    client.unload_model("toy-latent")
    kept.write_bytes(content)
    with pytest.raises(InferenceServerException):
        client.load_model("toy-latent")


def test_a_new_version_is_loaded_beside_the_old_one(client: Any, store: Path) -> None:
    card = (store / MODEL / "1" / "card.json").read_text()
    newer = store / MODEL / "2"
    copytree(store / MODEL / "1", newer)
    (newer / "card.json").write_text(card.replace('"version": 1', '"version": 2', 1))
    client.load_model(MODEL)
    assert client.is_model_ready(MODEL, "1") and client.is_model_ready(MODEL, "2")
    rmtree(newer)
    client.unload_model(MODEL)
    client.load_model(MODEL)
    assert client.is_model_ready(MODEL, "1") and not client.is_model_ready(MODEL, "2")


def test_loading_what_is_not_there_fails_as_tritons_does_and_unloading_it_is_no_error(controlled: Server) -> None:
    with httpx.Client(base_url=controlled.url, timeout=60, trust_env=False) as plain:
        refused = plain.post("/v2/repository/models/nope/load")
        assert refused.status_code == 500
        assert refused.json() == {"error": "failed to load 'nope'; it is not in the store"}
        assert plain.post("/v2/repository/models/nope/unload").status_code == 200
        assert {entry["name"] for entry in plain.post("/v2/repository/index", json={"ready": True}).json()} == {MODEL}
    pb = triton_grpc.service_pb2
    with grpc.insecure_channel(controlled.grpc_address) as channel:
        stub = triton_grpc.service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as failed:
            stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="nope"), timeout=30)
        assert failed.value.code() is grpc.StatusCode.INTERNAL
        stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="nope"), timeout=30)
