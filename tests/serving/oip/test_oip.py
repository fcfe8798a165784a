"""The Open Inference Protocol as its clients use it: unmodified tritonclients against a real server of toys."""

import asyncio
import gzip
import io
import json
import queue
import socket
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_http_aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image
from tritonclient.utils import InferenceServerException

from penumbra.serving.engine.runtime import SIZES
from penumbra.serving.http import v2
from penumbra.serving.oip.protocol import Inference
from penumbra.serving.room import Bodies
from tests.conftest import picture
from tests.serving.conftest import BODY_BYTES
from tests.serving.server import Server, until

# gevent, behind tritonclient's HTTP client, and its own warnings are none of ours.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
MAPS = ("confidence", "entropy", "mutual_information")
Arrays = dict[str, np.ndarray]
OPTIONS = {"samples": 5, "seed": 11}


def _http_address(server: Server) -> str:
    return server.url.removeprefix("http://")


@pytest.fixture
def http(server: Server) -> Iterator[triton_http.InferenceServerClient]:
    with triton_http.InferenceServerClient(_http_address(server)) as connected:
        yield connected


@pytest.fixture
def grpc_client(server: Server) -> Iterator[triton_grpc.InferenceServerClient]:
    with triton_grpc.InferenceServerClient(server.grpc_address) as connected:
        yield connected


def _inputs(api: Any, image: np.ndarray, *, binary: bool = True) -> list[Any]:
    tensor = api.InferInput("image", list(image.shape), "UINT8")
    tensor.set_data_from_numpy(image, **({"binary_data": binary} if api is triton_http else {}))
    return [tensor]


def _arrays(result: Any) -> Arrays:
    return {name: result.as_numpy(name) for name in ("labels", *MAPS)}


def _by_npz(server: Server, image: np.ndarray) -> Arrays:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    with server.client() as client:
        answer = client.post(
            "/segment", params={"model": "toy-latent", **OPTIONS, "outputs": ",".join(MAPS)}, content=file.getvalue(),
            headers={"Content-Type": "image/png", "Accept": "application/x-npz"},
        )  # fmt: skip
    assert answer.status_code == 200
    return dict(np.load(io.BytesIO(answer.content)))


def _by_http(server: Server, image: np.ndarray, *, binary: bool, compressed: str | None = None) -> Arrays:
    wanted = [triton_http.InferRequestedOutput(name, binary_data=binary) for name in ("labels", *MAPS)]
    with triton_http.InferenceServerClient(_http_address(server)) as client:
        return _arrays(client.infer(
            "toy-latent", _inputs(triton_http, image, binary=binary), outputs=wanted, parameters=OPTIONS,
            request_compression_algorithm=compressed, response_compression_algorithm=compressed,
        ))  # fmt: skip


def _by_http_aio(server: Server, image: np.ndarray) -> Arrays:
    async def ask() -> Any:
        async with triton_http_aio.InferenceServerClient(_http_address(server)) as client:
            return await client.infer("toy-latent", _inputs(triton_http, image), parameters=OPTIONS)

    return _arrays(asyncio.run(ask()))


def _by_grpc(server: Server, image: np.ndarray, *, compressed: str | None = None) -> Arrays:
    with triton_grpc.InferenceServerClient(server.grpc_address) as client:
        return _arrays(client.infer(
            "toy-latent", _inputs(triton_grpc, image), parameters=OPTIONS, compression_algorithm=compressed
        ))  # fmt: skip


def _by_grpc_aio(server: Server, image: np.ndarray) -> Arrays:
    async def ask() -> Any:
        async with triton_grpc_aio.InferenceServerClient(server.grpc_address) as client:
            return await client.infer("toy-latent", _inputs(triton_grpc, image), parameters=OPTIONS)

    return _arrays(asyncio.run(ask()))


def _by_typed_contents(server: Server, image: np.ndarray) -> Arrays:
    message = triton_grpc.service_pb2.ModelInferRequest(model_name="toy-latent")
    tensor = message.inputs.add(name="image", datatype="UINT8", shape=image.shape)
    tensor.contents.uint_contents.extend(image.ravel().tolist())
    for name, value in OPTIONS.items():
        message.parameters[name].int64_param = value
    with grpc.insecure_channel(server.grpc_address) as channel:
        stub = triton_grpc.service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return _arrays(triton_grpc.InferResult(stub.ModelInfer(message, timeout=60)))


def _by_stream(server: Server, image: np.ndarray) -> Arrays:
    answers: queue.Queue[Any] = queue.Queue()
    with triton_grpc.InferenceServerClient(server.grpc_address) as client:
        client.start_stream(lambda result, error: answers.put(error or result), stream_timeout=120)
        client.async_stream_infer("toy-latent", _inputs(triton_grpc, image), parameters=OPTIONS)
        return _arrays(answers.get(timeout=60))


SURFACES: dict[str, Callable[[Server, np.ndarray], Arrays]] = {
    "json": lambda server, image: _by_http(server, image, binary=False),
    "binary": lambda server, image: _by_http(server, image, binary=True),
    "binary-gzip": lambda server, image: _by_http(server, image, binary=True, compressed="gzip"),
    "json-deflate": lambda server, image: _by_http(server, image, binary=False, compressed="deflate"),
    "http-aio": _by_http_aio,
    "grpc": _by_grpc,
    "grpc-gzip": lambda server, image: _by_grpc(server, image, compressed="gzip"),
    "grpc-aio": _by_grpc_aio,
    "grpc-typed": _by_typed_contents,
    "stream": _by_stream,
}


@pytest.fixture(scope="module")
def reference(server: Server) -> tuple[np.ndarray, Arrays]:
    image = picture(np.random.Generator(np.random.PCG64(5)), 75, 110)
    return image, _by_npz(server, image)


@pytest.mark.parametrize("surface", SURFACES)
def test_every_surface_answers_the_same_bytes(
    server: Server, reference: tuple[np.ndarray, Arrays], surface: str
) -> None:
    image, wanted = reference
    given = SURFACES[surface](server, image)
    assert {*given} == {*wanted} == {"labels", *MAPS}
    for name in wanted:
        assert given[name].dtype == wanted[name].dtype and given[name].shape == image.shape[:2]
        assert given[name].tobytes() == wanted[name].tobytes(), name


def test_an_answer_names_its_request_model_version_and_seed(http: triton_http.InferenceServerClient) -> None:
    inputs = _inputs(triton_http, np.zeros((8, 8, 3), np.uint8))
    answer = http.infer("toy-latent", inputs, model_version="1", request_id="a-7", parameters=OPTIONS).get_response()
    told = {name: answer[name] for name in ("id", "model_name", "model_version", "parameters")}
    assert 0 <= told["parameters"].pop("expected_error") <= 1
    assert told == {"id": "a-7", "model_name": "toy-latent", "model_version": "1", "parameters": OPTIONS}


def test_an_unknown_parameter_is_ignored_and_named(http: triton_http.InferenceServerClient) -> None:
    inputs = _inputs(triton_http, np.zeros((8, 8, 3), np.uint8))
    answer = http.infer("toy-latent", inputs, parameters={"sampels": 3}, timeout=5).get_response()
    assert "ignored unknown parameters: sampels, timeout" in answer["parameters"]["warnings"]


@pytest.mark.parametrize(
    ("more", "url", "headers", "named"),
    [
        ({"paramters": {"seed": 7}}, "", {}, "paramters in the request"),
        ({"seed": 7}, "", {}, "seed in the request"),
        ({"tensor": {"parameters": {"seed": 7}}}, "", {}, "seed in input image"),
        ({"tensor": {"sede": 7}}, "", {}, "sede in input image"),
        ({"outputs": [{"name": "labels", "parameters": {"seed": 7}}]}, "", {}, "seed in output labels"),
        ({}, "?sede=7", {}, "sede in the query"),
        ({}, "", {"Seed": "7"}, "seed in the headers"),
        ({}, "", {"X-Penumbra-Seed": "7"}, "x-penumbra-seed in the headers"),
        ({"parameters": {"sede": 7}, "sampels": 2}, "", {}, "sede, sampels in the request"),
    ],
)
def test_what_a_request_has_in_a_place_where_it_means_nothing_is_named(
    client: httpx.Client, more: dict[str, Any], url: str, headers: dict[str, str], named: str
) -> None:
    answer = client.post(f"/v2/models/toy-latent/infer{url}", json=_json_request(BLACK, **more), headers=headers)
    assert answer.status_code == 200, answer.text
    assert f"ignored unknown parameters: {named}; known are" in answer.json()["parameters"]["warnings"]


@pytest.mark.parametrize("path", ["toy-latent/infer?seed=7", "toy-latent?version=2", "toy-latent/config?version=2"])
def test_an_option_in_the_query_is_refused(client: httpx.Client, path: str) -> None:
    answer = client.request("POST" if "infer" in path else "GET", f"/v2/models/{path}", json=_json_request(BLACK))
    assert answer.status_code == 400
    assert (
        answer.json()["error"] == f"{path.split('?')[1].split('=')[0]} is in the query; send it in the request's JSON"
    )


def test_an_option_in_grpcs_metadata_or_beside_an_input_is_named(
    grpc_client: triton_grpc.InferenceServerClient,
) -> None:
    inputs = _inputs(triton_grpc, BLACK)
    inputs[0]._input.parameters["samples"].int64_param = 3
    answer = grpc_client.infer("toy-latent", inputs, headers={"seed": "7", "traceparent": "x"}).get_response()
    said = answer.parameters["warnings"].string_param
    assert "ignored unknown parameters: samples in input image, seed in the metadata; known are" in said


@pytest.mark.parametrize("api", [triton_http, triton_grpc])
def test_the_priority_of_tritons_clients_is_taken_and_bounded(server: Server, api: Any) -> None:
    address = _http_address(server) if api is triton_http else server.grpc_address
    inputs = _inputs(api, np.zeros((8, 8, 3), np.uint8))
    with api.InferenceServerClient(address) as client:
        assert "warnings" not in str(client.infer("toy-latent", inputs, priority=1).get_response())
        with pytest.raises(InferenceServerException, match="priority is 4; 1 \\(first\\) to 3"):
            client.infer("toy-latent", inputs, priority=4)


def test_only_wanted_outputs_are_answered_each_in_its_form(http: triton_http.InferenceServerClient) -> None:
    image = picture(np.random.Generator(np.random.PCG64(1)), 9, 7)
    wanted = [triton_http.InferRequestedOutput("margin", binary_data=False),
              triton_http.InferRequestedOutput("labels", binary_data=True)]  # fmt: skip
    answer = http.infer("toy-pointwise", _inputs(triton_http, image), outputs=wanted)
    margin, labels = answer.get_response()["outputs"]
    assert margin["name"] == "margin" and len(margin["data"]) == 63
    assert labels["name"] == "labels" and labels["parameters"] == {"binary_data_size": 63}
    assert np.array_equal(answer.as_numpy("labels"), image.argmax(-1))


@pytest.mark.parametrize("api", [triton_http, triton_grpc])
def test_classification_answers_the_largest_values_and_their_places(server: Server, api: Any) -> None:
    image = picture(np.random.Generator(np.random.PCG64(2)), 6, 5)
    address = _http_address(server) if api is triton_http else server.grpc_address
    with api.InferenceServerClient(address) as client:
        plain = client.infer("toy-pointwise", _inputs(api, image)).as_numpy("entropy").ravel()
        wanted = [api.InferRequestedOutput("entropy", class_count=3)]
        top = client.infer("toy-pointwise", _inputs(api, image), outputs=wanted).as_numpy("entropy")
        many = [api.InferRequestedOutput("entropy", class_count=1001)]
        with pytest.raises(InferenceServerException, match="up to 1,000 are possible"):
            client.infer("toy-pointwise", _inputs(api, image), outputs=many)
    places = [int(text.decode().split(":")[1]) for text in top]
    assert [f"{plain[i]:f}:{i}".encode() for i in places] == top.tolist()
    assert np.array_equal(plain[places], np.sort(plain)[::-1][:3])


def test_a_body_that_is_one_encoded_picture_needs_no_json(client: httpx.Client) -> None:
    image = picture(np.random.Generator(np.random.PCG64(3)), 20, 30)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    answer = client.post(
        "/v2/models/toy-pointwise/infer", content=file.getvalue(), headers={"Inference-Header-Content-Length": "0"}
    )
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers["inference-header-content-length"])
    outputs = json.loads(answer.content[:length])["outputs"]
    assert outputs[0]["name"] == "labels" and outputs[0]["shape"] == [20, 30]
    assert answer.content[length : length + 600] == image.argmax(-1).astype(np.uint8).tobytes()


def _packed(encoding: str, body: bytes) -> bytes:
    return gzip.compress(body) if encoding == "gzip" else zlib.compress(body)


@pytest.mark.parametrize(
    ("encoding", "change", "status", "says"),
    [
        ("gzip", lambda body: body, 200, ""),
        ("GZip", lambda body: body, 200, ""),
        ("deflate", lambda body: body, 200, ""),
        ("gzip", lambda body: body[:-9], 400, "ends too early"),
        ("gzip", lambda body: body[:1], 400, "ends too early"),
        ("gzip", lambda body: b"", 400, "ends too early"),
        ("deflate", lambda body: body[:-1], 400, "ends too early"),
        ("gzip", lambda body: body + b"garbage", 400, "is not gzip"),
        ("deflate", lambda body: body + b"garbage", 400, "behind its end"),
        ("deflate", lambda body: body + body, 400, "behind its end"),
        ("gzip", lambda body: body[:-8] + bytes(8), 400, "is not gzip"),
        ("zstd", lambda body: body, 415, "'zstd'"),
        ("gzip, gzip", lambda body: body, 415, "'gzip, gzip'"),
    ],
)
def test_an_encoded_body_is_read_whole_or_refused(
    client: httpx.Client, encoding: str, change: Callable[[bytes], bytes], status: int, says: str
) -> None:
    body = change(_packed(encoding.lower(), json.dumps(_json_request(BLACK)).encode()))
    answer = client.post("/v2/models/toy-latent/infer", content=body, headers={"Content-Encoding": encoding})
    assert answer.status_code == status and says in answer.text


@pytest.mark.parametrize("size", [1, 7, 40_000, 200_000])
def test_gzip_of_several_members_is_read_as_one(size: int) -> None:
    plain = np.random.Generator(np.random.PCG64(1)).bytes(200_000)
    parts = [plain[:size], b"", plain[size:]]
    counted: list[int] = []
    body = b"".join(map(gzip.compress, parts))
    assert v2.decompress(body, "gzip", limit_bytes=len(plain), take=counted.append) == plain
    assert sum(counted) == len(plain)


@pytest.mark.parametrize("path", ["/segment", "/jobs", "/predict", "/v2/repository/index"])
def test_an_encoded_body_is_refused_where_none_is_read(client: httpx.Client, path: str) -> None:
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json" if path == "/predict" else "image/png"}
    answer = client.post(path, content=gzip.compress(b"x"), headers=headers)
    assert answer.status_code == 415 and "'gzip'" in answer.json()["error"] and path in answer.json()["error"]


def _json_request(image: np.ndarray, **more: Any) -> dict[str, Any]:
    tensor = {"name": "image", "datatype": "UINT8", "shape": list(image.shape), "data": image.tolist()}
    return {"inputs": [tensor | more.pop("tensor", {})]} | more


BLACK, WHITE = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
"""toy-nan answers black pictures and fails on white ones."""


@pytest.mark.parametrize(
    ("model", "body", "status", "says"),
    [
        ("toy-latent", _json_request(BLACK, outputs=[{"name": "NOPE"}]), 400, "no output 'NOPE'"),
        ("toy-latent", _json_request(BLACK, parameters={"samples": 65}), 400, "samples is 65"),
        ("toy-latent", _json_request(BLACK, parameters={"overlap": "x"}), 400, "overlap is 'x'"),
        ("toy-latent", _json_request(BLACK, parameters={"priority": "high"}), 400, "priority is 'high'"),
        ("toy-latent/versions/abc", _json_request(BLACK), 404, "Not Found"),
        ("toy-latent/versions/0", _json_request(BLACK), 404, "toy-latent has no version 0"),
        ("toy-latent", _json_request(BLACK, parameters={"triton_x": 1}), 400, "reserved"),
        ("toy-latent", _json_request(BLACK, parameters={"outputs": "margin"}), 400, "has its own field"),
        ("toy-latent", _json_request(BLACK, parameters={"samples": [1]}), 400, "'samples' is no string, number"),
        ("toy-latent", _json_request(BLACK, tensor={"name": "IMAGE"}), 400, "no input 'IMAGE'"),
        ("toy-latent", _json_request(BLACK, id=7), 400, "id is 7; a string"),
        ("toy-latent", _json_request(BLACK[:0]), 400, "the image is uint8 [0, 4, 3]"),
        ("toy-latent", _json_request(BLACK, tensor={"datatype": "BYTES", "shape": [1], "data": ["no"]}), 400,
         "the image cannot be read"),
        ("toy-latent", _json_request(BLACK, tensor={"parameters": {"binary_data_size": 0}}), 400, "only one of"),
        ("toy-boxed", {"inputs": []}, 400, "the input image is missing"),
        ("toy-boxed", {"inputs": [{"name": "boxes", "datatype": "FP32", "shape": [0, 5], "data": []}]}, 400,
         "the input image is missing"),
        ("nope", {}, 404, "there is no model 'nope'"),
        ("toy-nan", _json_request(WHITE), 500, "toy-nan"),
    ],
)  # fmt: skip
def test_a_bad_request_is_named_by_status_and_sentence(
    client: httpx.Client, model: str, body: dict[str, Any], status: int, says: str
) -> None:
    answer = client.post(f"/v2/models/{model}/infer", json=body)
    assert answer.status_code == status and says in answer.json()["error"]


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_a_body_that_unpacks_beyond_the_limit_is_refused(client: httpx.Client, pack: Callable[[bytes], bytes]) -> None:
    body = pack(bytes(50 * BODY_BYTES))
    assert len(body) < BODY_BYTES
    headers = {"Content-Encoding": "gzip" if pack is gzip.compress else "deflate"}
    answer = client.post("/v2/models/toy-latent/infer", content=body, headers=headers)
    assert answer.status_code == 413 and f"{BODY_BYTES:,}" in answer.json()["error"]


def test_a_message_that_is_or_unpacks_beyond_the_limit_is_refused(
    grpc_client: triton_grpc.InferenceServerClient,
) -> None:
    inputs = _inputs(triton_grpc, np.zeros((600, 600, 3), np.uint8))
    for compression in (None, "gzip"):
        with pytest.raises(InferenceServerException) as refused:
            grpc_client.infer("toy-latent", inputs, client_timeout=30, compression_algorithm=compression)
        assert refused.value.status() == "StatusCode.RESOURCE_EXHAUSTED"


def test_a_stream_answers_in_order_and_outlives_a_bad_request(
    grpc_client: triton_grpc.InferenceServerClient,
) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    grpc_client.start_stream(lambda result, error: answers.put(error or result), stream_timeout=120)
    inputs = _inputs(triton_grpc, WHITE)
    for number, model in enumerate(("toy-latent", "nope", "toy-nan", "toy-pointwise")):
        grpc_client.async_stream_infer(model, inputs, request_id=str(number))
    first, unknown, failed, last = (answers.get(timeout=60) for _ in range(4))
    assert first.get_response().id == "0" and first.get_response().parameters["triton_final_response"].bool_param
    assert "there is no model 'nope'" in unknown.message() and "toy-nan" in failed.message()
    assert last.get_response().id == "3" and last.as_numpy("labels").shape == (4, 4)
    grpc_client.stop_stream()


def test_a_failed_message_of_a_stream_names_its_request(server: Server) -> None:
    message = triton_grpc.service_pb2.ModelInferRequest(model_name="nope", id="e1")
    with grpc.insecure_channel(server.grpc_address) as channel:
        stub = triton_grpc.service_pb2_grpc.GRPCInferenceServiceStub(channel)
        (answer,) = stub.ModelStreamInfer(iter([message]), timeout=30)
        assert answer.infer_response.id == "e1" and answer.error_message
        assert list(stub.ModelStreamInfer(iter([]), timeout=30)) == []


@pytest.mark.parametrize("api", [triton_http, triton_grpc])
def test_what_server_and_models_are_is_told_alike(server: Server, api: Any) -> None:
    address = _http_address(server) if api is triton_http else server.grpc_address
    as_json = {} if api is triton_http else {"as_json": True}
    with api.InferenceServerClient(address) as client:
        assert client.is_server_live() and client.is_server_ready()
        assert client.is_model_ready("toy-latent") and client.is_model_ready("toy-latent", "1")
        assert not client.is_model_ready("nope") and not client.is_model_ready("toy-latent", "2")
        told = client.get_server_metadata(**as_json)
        assert told["name"] == "penumbra" and "binary_tensor_data" in told["extensions"]
        metadata = client.get_model_metadata("toy-boxed", **as_json)
        assert [tensor["name"] for tensor in metadata["inputs"]] == ["image", "boxes"]
        config = client.get_model_config("toy-boxed", **as_json)
        config = config.get("config", config)
        assert config["name"] == "toy-boxed" and config["input"][1]["optional"] is True
        assert config["input"][0]["data_type"] == "TYPE_UINT8" and [*map(int, config["input"][0]["dims"])] == [
            -1,
            -1,
            3,
        ]
        assert config["parameters"]["classes"]["string_value"] == "red,green,blue"
        index = client.get_model_repository_index(**as_json)
        index = index.get("models", []) if isinstance(index, dict) else index
        assert {"name": "toy-latent", "version": "1", "state": "READY"} in index


def test_a_version_that_is_no_number_is_refused_by_grpc(grpc_client: triton_grpc.InferenceServerClient) -> None:
    for version, says in (("abc", "the version is 'abc'"), ("-1", "the version is '-1'")):
        for ask in (grpc_client.get_model_metadata, grpc_client.is_model_ready, grpc_client.get_model_config):
            with pytest.raises(InferenceServerException, match=says) as refused:
                ask("toy-latent", version)
            assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.parametrize("api", [triton_http, triton_grpc])
def test_statistics_count_answers_and_failures_of_a_model(server: Server, api: Any) -> None:
    address = _http_address(server) if api is triton_http else server.grpc_address
    as_json = {} if api is triton_http else {"as_json": True}

    def stats(model: str) -> dict[str, Any]:
        (document,) = client.get_inference_statistics(model, **as_json)["model_stats"]
        return {
            name: int(spent["count"]) if "count" in spent else 0 for name, spent in document["inference_stats"].items()
        }

    with api.InferenceServerClient(address) as client:
        before, failed_before = stats("toy-latent"), stats("toy-nan")
        for _ in range(3):
            client.infer("toy-latent", _inputs(api, BLACK))
        with pytest.raises(InferenceServerException):
            client.infer("toy-nan", _inputs(api, WHITE))
        with pytest.raises(InferenceServerException):
            client.infer("toy-latent", _inputs(api, BLACK), outputs=[api.InferRequestedOutput("nope")])
        after, failed_after = stats("toy-latent"), stats("toy-nan")
    counted = ("success", "queue", "compute_input", "compute_infer", "compute_output")
    assert [after[name] - before.get(name, 0) for name in counted] == [3] * 5
    assert after.get("fail", 0) == before.get("fail", 0)
    assert failed_after["fail"] - failed_before.get("fail", 0) == 1


def test_models_are_neither_loaded_nor_unloaded_unless_it_is_allowed(
    http: triton_http.InferenceServerClient, grpc_client: triton_grpc.InferenceServerClient
) -> None:
    for client in (http, grpc_client):
        for change in (client.load_model, client.unload_model):
            with pytest.raises(InferenceServerException, match="PENUMBRA_MODEL_CONTROL"):
                change("toy-latent")
        assert client.is_model_ready("toy-latent")


def test_health_is_watched_and_services_are_reflected(server: Server) -> None:
    with grpc.insecure_channel(server.grpc_address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=20)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = stub.ServerReflectionInfo(iter([asked]), timeout=20)
        names = {service.name for service in answer.list_services_response.service}
        assert {"inference.GRPCInferenceService", "grpc.health.v1.Health"} <= names
        asked = reflection_pb2.ServerReflectionRequest(file_containing_symbol="inference.GRPCInferenceService")
        (answer,) = stub.ServerReflectionInfo(iter([asked]), timeout=20)
        assert b"ModelStreamInfer" in answer.file_descriptor_response.file_descriptor_proto[0]


def test_the_api_document_lists_every_path_and_every_listed_path_exists(client: httpx.Client) -> None:
    listed = client.get("/docs.json").json()["paths"]
    listed = {path: methods for path, methods in listed.items() if path.startswith("/v2")}
    served = {
        route.path for route in v2.routes(Inference(None), body_bytes=1, json_bytes=1, bodies=Bodies(1))[1].routes
    }  # type: ignore
    assert {*listed} == {"/v2", *(f"/v2{path}" for path in served)} - {"/v2/repository/{name}/index"}
    for path, methods in listed.items():
        for method, operation in methods.items():
            answer = client.request(method, path.format(model="toy-latent", version=1), json={})
            wanted = {"infer": 400, "promote": 400, "load": 403, "unload": 403}.get(path.rpartition("/")[2], 200)
            assert answer.status_code == wanted and str(wanted) in operation["responses"], (method, path)


def _gauge(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next((line.split()[-1] for line in lines if line.startswith(name + " ")), 0))  # not counted yet


WINDOWS = 'penumbra_windows_total{model="toy-latent"}'
LONG = {"samples": 60, "overlap": 0.55}
"""With these a picture of 500 x 500 is 726 windows and 43,560 samples: seconds of work for a toy."""
LONG_WINDOWS = 726


def _leave_rest(server: Server, image: np.ndarray) -> None:
    inputs = [{"name": "image", "datatype": "UINT8", "shape": list(image.shape),
               "parameters": {"binary_data_size": image.size}}]  # fmt: skip
    head = json.dumps({"parameters": LONG, "inputs": inputs}).encode()
    host, port = _http_address(server).split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v2/models/toy-latent/infer HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: "
            + f"{len(head)}\r\nContent-Length: {len(head) + image.size}\r\n\r\n".encode() + head + image.tobytes()
        )  # fmt: skip
        with server.client() as client:
            until(lambda: _gauge(client, "penumbra_queue_windows") > 50, bound_s=30)


def _leave_grpc(server: Server, image: np.ndarray) -> None:
    message = triton_grpc.service_pb2.ModelInferRequest(model_name="toy-latent")
    message.inputs.add(name="image", datatype="UINT8", shape=image.shape)
    message.raw_input_contents.append(image.tobytes())
    message.parameters["samples"].int64_param = LONG["samples"]
    message.parameters["overlap"].double_param = LONG["overlap"]
    with grpc.insecure_channel(server.grpc_address) as channel:
        call = triton_grpc.service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer.future(message)
        with server.client() as client:
            until(lambda: _gauge(client, "penumbra_queue_windows") > 50, bound_s=30)
        call.cancel()


@pytest.mark.parametrize("leave", [_leave_rest, _leave_grpc])
def test_a_caller_that_goes_away_frees_its_windows_within_a_batch(
    server: Server, client: httpx.Client, leave: Callable[[Server, np.ndarray], None]
) -> None:
    cancelled, before = (_gauge(client, name) for name in ("penumbra_cancelled_total", WINDOWS))
    leave(server, np.zeros((500, 500, 3), np.uint8))
    until(lambda: _gauge(client, "penumbra_cancelled_total") == cancelled + 1, bound_s=30)
    run_when_noticed = _gauge(client, WINDOWS)
    until(lambda: _gauge(client, "penumbra_queue_windows") == 0, bound_s=30)
    run = _gauge(client, WINDOWS)
    assert run - run_when_noticed <= max(SIZES) and run - before < LONG_WINDOWS - max(SIZES)
