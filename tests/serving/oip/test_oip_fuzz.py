"""Whatever is sent by the Open Inference Protocol is answered or refused; nothing breaks the server."""

import json
from collections.abc import Callable
from typing import Any

import grpc
import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from penumbra.models.card import MAPS
from penumbra.models.errors import PenumbraError
from penumbra.serving.http import v2
from penumbra.serving.oip import grpc as oip_grpc
from penumbra.serving.oip.protocol import read_options
from penumbra.serving.oip.request import InferRequest
from penumbra.serving.oip.tensors import IMAGE, PROMPTS, check_inputs, read_boxes, read_image, read_tags
from tests.serving.server import Server

SPECS = (IMAGE, *PROMPTS["boxes"], *PROMPTS["tags"])
READERS = {"image": read_image, "boxes": read_boxes, "tags": read_tags}
DATATYPES = st.sampled_from(("UINT8", "BYTES", "FP32", "INT32", "INT64", "FP16", "BOOL", "no such"))
NAMES = st.sampled_from(("image", "boxes", "tags", "labels", "entropy", *MAPS, "")) | st.text(max_size=4)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6,
)  # fmt: skip
PARAMETERS = st.dictionaries(
    st.sampled_from(("samples", "seed", "overlap", "boxes", "tags", "alpha", "binary_data_output", "x")), ANY,
    max_size=3,
)  # fmt: skip
SHAPES = st.lists(st.integers(-1, 9), max_size=4) | st.sampled_from(([2, 3, 3], [1], [1, 5], [2**62, 4, 3]))


def _members(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={name: values | ANY for name, values in fields.items()})


INPUTS = _members(
    name=NAMES, datatype=DATATYPES, shape=SHAPES, data=st.lists(st.integers(-1, 300), max_size=20),
    parameters=_members(binary_data_size=st.integers(-1, 40), shared_memory_region=st.just("region")),
)  # fmt: skip
OUTPUTS = _members(name=NAMES, parameters=_members(binary_data=st.booleans(), classification=st.integers(0, 5)))
DOCUMENTS = _members(
    id=st.text(max_size=5), parameters=PARAMETERS, inputs=st.lists(INPUTS, max_size=3),
    outputs=st.lists(OUTPUTS, max_size=3),
)  # fmt: skip
LENGTHS = st.none() | st.just("exact") | st.integers(-9, 999).map(str) | st.text("0123456789+- x", max_size=6)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[bytes, str | None]:
    """A body and its header length: JSON of nearly the right members and some bytes behind it, cut anywhere."""
    head = json.dumps(draw(DOCUMENTS)).encode()
    length = draw(LENGTHS)
    body = head + draw(st.binary(max_size=60))
    cut = draw(st.none() | st.integers(0, len(body)))
    return body[:cut], str(len(head)) if length == "exact" else length


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """A request as its wire form, with some bytes of it exchanged."""
    message = pb.ModelInferRequest(model_name=draw(st.sampled_from(("toy-pointwise", "toy-boxed", "nope"))))
    for _ in range(draw(st.integers(0, 3))):
        shape = [size for size in draw(SHAPES) if size < 2**63]
        tensor = message.inputs.add(name=draw(NAMES), datatype=draw(DATATYPES), shape=shape)
        if draw(st.booleans()):
            tensor.contents.uint_contents.extend(draw(st.lists(st.integers(0, 300), max_size=12)))
        else:
            message.raw_input_contents.append(draw(st.binary(max_size=40)))
    message.parameters[draw(st.sampled_from(("samples", "seed", "x")))].int64_param = draw(st.integers(-2, 9))
    data = bytearray(message.SerializeToString())
    for place in draw(st.lists(st.integers(0, max(len(data) - 1, 0)), max_size=3)) if data else ():
        data[place] = draw(st.integers(0, 255))
    return bytes(data)


def _read_whole(request: InferRequest) -> None:
    for name, tensor in check_inputs(request.inputs, SPECS, model="m").items():
        READERS[name](tensor)
    read_options(request.parameters)


def _is_done_or_refused(work: Callable[[], object]) -> bool:
    """Whether something is done, or refused as its caller's fault in a sentence that fits a gRPC status."""
    try:
        work()
    except PenumbraError as error:
        return error.http_status in (400, 404, 413, 415) and len(str(error)) < 2000
    return True


@given(bodies())
@settings(max_examples=400)
def test_any_body_is_read_or_is_its_callers_fault(sent: tuple[bytes, str | None]) -> None:
    body, length = sent
    assert _is_done_or_refused(
        lambda: _read_whole(v2.read_body(body, model="m", version="", header_length=length, json_bytes=2**20))
    )


@given(messages() | st.binary(max_size=60))
@settings(max_examples=400)
def test_any_message_is_read_or_is_its_callers_fault(data: bytes) -> None:
    assert _is_done_or_refused(lambda: _read_whole(oip_grpc.read_message(oip_grpc.parse(pb.ModelInferRequest, data))))


@given(st.binary(max_size=80), st.sampled_from(("gzip", "deflate", "br", "identity", "", "x" * 99)))
@settings(max_examples=200)
def test_any_encoding_is_undone_or_is_its_callers_fault(body: bytes, encoding: str) -> None:
    assert _is_done_or_refused(lambda: v2.decompress(body, encoding, limit_bytes=100))


OVER_THE_WIRE = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(bodies(), st.sampled_from(("toy-pointwise", "toy-boxed", "toy-tagged")))
@OVER_THE_WIRE
def test_a_server_answers_any_body_and_lives(client: httpx.Client, sent: tuple[bytes, str | None], model: str) -> None:
    body, length = sent
    headers = {} if length is None else {"Inference-Header-Content-Length": length.strip()}  # as clients must
    answer = client.post(f"/v2/models/{model}/infer", content=body, headers=headers)
    assert answer.status_code in (200, 400), answer.text
    assert answer.status_code == 200 or set(answer.json()) == {"error"}
    assert client.get("/v2/health/live").json() == {"live": True}


@given(messages() | st.binary(max_size=60))
@OVER_THE_WIRE
def test_a_server_answers_any_message_and_lives(server: Server, data: bytes) -> None:
    with grpc.insecure_channel(server.grpc_address) as channel:
        call = channel.unary_unary(f"/{oip_grpc.SERVICE}/ModelInfer").future(data, timeout=30)
        assert call.code().name in ("OK", "INVALID_ARGUMENT", "NOT_FOUND"), call.details()
        live = channel.unary_unary(f"/{oip_grpc.SERVICE}/ServerLive")(b"", timeout=30)
        assert pb.ServerLiveResponse.FromString(live).live
