"""What a real Triton answered, case by case: the same requests are read, checked and refused here, with its statuses.

The recorded requests are for Triton's models, so their bytes go through our readers and checks with those models'
tensors; cases that ask about server and models go to a real server, with a model of ours in the place of theirs.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.json_format import MessageToDict, Parse
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from penumbra.models.errors import PenumbraError
from penumbra.serving.http import v2
from penumbra.serving.oip import grpc as oip_grpc
from penumbra.serving.oip.tensors import Tensor, TensorSpec, check_inputs
from tests.models.golden import GOLDEN
from tests.serving.server import Server

RECORDED = GOLDEN / "triton_reference.json"
pytestmark = pytest.mark.skipif(not RECORDED.exists(), reason="the recorded answers of Triton are not here")
CASES: dict[str, dict[str, Any]] = json.loads(RECORDED.read_text()) if RECORDED.exists() else {"http": {}, "grpc": {}}

FIXED = (TensorSpec("X", "FP32", (-1, 4)),)
MODELS = {
    "fixed": FIXED, "boom": FIXED, "seg": (TensorSpec("IMAGE", "UINT8", (-1, -1, -1, 3)),),
    "echo_bytes": (TensorSpec("ENCODED", "BYTES", (-1, 1)),),
    "add_nobatch": (TensorSpec("A", "FP32", (-1, 3)), TensorSpec("B", "FP32", (-1, 3))),
}  # fmt: skip
OURS = {"fixed": "toy-pointwise", "seg": "toy-latent", "echo_bytes": "toy-bright", "add_nobatch": "toy-boxed"}

NOT_TENSORS = {
    "unknown_version": "says nothing of tensors; asked of the server below",
    "unknown_model": "says nothing of tensors; asked of the server below",
    "infer_get": "another method; asked of the server below",
    "oversized_65MiB": "Triton has no limit of the body; ours answers 413 (docs/use/limits.md)",
    "big_65MiB": "Triton has no limit of the message; ours answers RESOURCE_EXHAUSTED (docs/use/limits.md)",
    "model_exception": "the model fails, not the request; asked of the server in test_oip.py",
    "batch_too_big": "models here have no batch dimension",
}
ANSWERED_OTHERWISE: dict[str, int | str] = {
    "overflow_shape": "INVALID_ARGUMENT",  # Triton's product of sizes wraps round and its model then fails
    "uint8_contents_out_of_range": "INVALID_ARGUMENT",  # Triton takes the lowest byte of 300
    "unsupported_encoding": 415,  # Triton answers 501
    "batch_zero": 200,  # no batch dimension: an empty tensor is of the right shape, and refused as a picture later
}


def _bytes_of(text: str) -> bytes:
    r"""A recorded body: latin-1 with \xNN, \t, \n and \r for what is not printable."""
    plain = {b"t": b"\t", b"n": b"\n", b"r": b"\r", b"\\": b"\\"}

    def decode(match: re.Match[bytes]) -> bytes:
        return bytes([int(match[1], 16)]) if match[1] else plain[match[2]]

    return re.sub(rb"\\x([0-9a-f]{2})|\\([tnr\\])", decode, text.encode("latin-1"))


def _model_of(path: str) -> str:
    return path.split("/")[3]


def _read_http(request: dict[str, Any]) -> list[Tensor]:
    headers = {name.lower(): value for name, value in request["headers"].items()}
    body = _bytes_of(request["body"])
    assert len(body) == request["body_len"]
    plain = v2.decompress(body, headers.get("content-encoding", ""), limit_bytes=2**20)
    model = _model_of(request["path"])
    length = headers.get(v2.HEADER_LENGTH)
    read = v2.read_body(plain, model=model, version="", header_length=length, json_bytes=2**20)
    return list(check_inputs(read.inputs, MODELS[model], model=model).values())


def _read_grpc(request: str) -> list[Tensor]:
    read = oip_grpc.read_message(Parse(request, pb.ModelInferRequest()))
    return list(check_inputs(read.inputs, MODELS[read.model], model=read.model).values())


HTTP_TENSORS = [n for n, c in CASES["http"].items() if c["request"]["path"].endswith("/infer") and n not in NOT_TENSORS]
GRPC_TENSORS = [n for n, c in CASES["grpc"].items() if c["method"] == "ModelInfer" and n not in NOT_TENSORS]


@pytest.mark.parametrize("name", HTTP_TENSORS)
def test_a_body_is_taken_or_refused_as_triton_does(name: str) -> None:
    case = CASES["http"][name]
    recorded = case["response"]
    status, said = 200, ""
    try:
        assert _read_http(case["request"])
    except PenumbraError as error:
        status, said = error.http_status, str(error)
    wanted = 400 if recorded["status"] == 500 else recorded["status"]  # a body that does not parse is no server's fault
    assert status == ANSWERED_OTHERWISE.get(name, wanted), said
    assert status == 200 or said


@pytest.mark.parametrize("name", GRPC_TENSORS)
def test_a_message_is_taken_or_refused_as_triton_does(name: str) -> None:
    case = CASES["grpc"][name]
    code, said = "OK", ""
    try:
        assert _read_grpc(case["request"])
    except PenumbraError as error:
        code, said = error.grpc_status, str(error)
    wanted = case["result"]["code"]
    assert code == ANSWERED_OTHERWISE.get(name, wanted), said
    assert code == "OK" or said


def test_the_same_numbers_are_read_from_json_nested_json_and_raw_bytes() -> None:
    if not {"infer_json_ok", "infer_json_nested_data", "bin_ok", "deflate_request"} <= {*HTTP_TENSORS}:
        pytest.fail("the recorded requests lack those that this test compares")
    read = [bytes(_read_http(CASES["http"][name]["request"])[0].data) for name in
            ("infer_json_ok", "infer_json_nested_data", "bin_ok", "deflate_request")]  # fmt: skip
    assert read == [read[0]] * 4 and len(read[0]) == 16
    assert bytes(_read_grpc(CASES["grpc"]["infer_raw_ok"]["request"])[0].data) == read[0]


NOT_OFFERED = {
    "root": "the playground", "logging_get": "not offered", "tok_logging": "not offered", "tok_trace": "not offered",
    "tok_system_shm_status": "not offered", "tok_cuda_shm_status": "not offered",
    "trace_setting": "not offered", "log_settings": "not offered", "tok_trace_setting": "not offered",
    "tok_log_settings": "not offered",
}  # fmt: skip
OPEN_HERE = ("model_stats_unknown", "repository_index")
"""Restricted in the recorded server unless a token is sent; the recording with the token is the one that applies."""
CONTROLLED = ("tok_load_unknown", "tok_unload_unknown")
"""Asked of a server that allows it, in test_oip_repository.py."""
HTTP_DOCUMENTS = [
    name for name in CASES["http"] if name not in {*HTTP_TENSORS, *NOT_OFFERED, *OPEN_HERE, *CONTROLLED}
    and not ("infer" in CASES["http"][name]["request"]["path"] and name not in ("infer_get", "unknown_version"))
]  # fmt: skip
GRPC_DOCUMENTS = [
    name for name, case in CASES["grpc"].items() if case["method"] != "ModelStreamInfer" and name not in
    {*GRPC_TENSORS, *NOT_OFFERED, *OPEN_HERE, *CONTROLLED, "big_65MiB", "model_exception", "batch_too_big"}
]  # fmt: skip


def _ours(text: str) -> str:
    for theirs, model in OURS.items():
        text = re.sub(rf"(?<![\w-]){theirs}(?![\w-])", model, text)
    return text


@pytest.mark.parametrize("name", HTTP_DOCUMENTS)
def test_a_path_is_answered_as_triton_does(client: httpx.Client, name: str) -> None:
    request, recorded = CASES["http"][name]["request"], CASES["http"][name]["response"]
    body = _bytes_of(request["body"]) if request.get("body") else None
    answer = client.request(request["method"], _ours(request["path"]), content=body, headers=request["headers"])
    assert answer.status_code == recorded["status"]
    if recorded["status"] >= 400:
        assert {*answer.json()} == {*recorded["body"]} == {"error"} and answer.json()["error"]
    elif isinstance(recorded["body"], dict):
        assert {*recorded["body"]} <= {*answer.json()}


@pytest.fixture(scope="module")
def stub(server: Server) -> Iterator[service_pb2_grpc.GRPCInferenceServiceStub]:
    with grpc.insecure_channel(server.grpc_address) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.mark.parametrize("name", GRPC_DOCUMENTS)
def test_a_call_is_answered_as_triton_does(stub: service_pb2_grpc.GRPCInferenceServiceStub, name: str) -> None:
    case = CASES["grpc"][name]
    message = Parse(_ours(case["request"]), getattr(pb, f"{case['method']}Request")())
    try:
        code, said = (
            "OK",
            MessageToDict(getattr(stub, case["method"])(message, timeout=30), preserving_proto_field_name=True),
        )
    except grpc.RpcError as error:
        code, said = error.code().name, error.details()
    assert code == case["result"]["code"], said
    if code == "OK":
        assert {*case["result"]["response"]} <= {*said}
    else:
        assert said


@pytest.mark.skipif(not RECORDED.exists(), reason="the recorded answers of Triton are not here")
def test_every_recorded_case_is_asked_or_its_absence_has_a_reason() -> None:
    streams = {name for name, case in CASES["grpc"].items() if case["method"] == "ModelStreamInfer"}  # test_oip.py
    asked = {*HTTP_TENSORS, *GRPC_TENSORS, *HTTP_DOCUMENTS, *GRPC_DOCUMENTS, *CONTROLLED, *streams}
    assert {*CASES["http"], *CASES["grpc"]} - asked <= {*NOT_OFFERED, *OPEN_HERE, *NOT_TENSORS}
