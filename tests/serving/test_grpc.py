"""gRPC with an unmodified tritonclient, against a real server of toys."""

import io

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image
from tritonclient.utils import InferenceServerException

from tests.conftest import picture
from tests.serving.server import Server

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def triton_client(server: Server):
    with triton.InferenceServerClient(server.grpc_address) as connected:
        yield connected


def _pixels(image: np.ndarray) -> triton.InferInput:
    tensor = triton.InferInput("image", list(image.shape), "UINT8")
    tensor.set_data_from_numpy(image)
    return tensor


def test_a_tensor_of_pixels_is_answered_with_exact_labels(
    triton_client: triton.InferenceServerClient, rng: np.random.Generator
) -> None:
    image = picture(rng, 50, 70)
    answer = triton_client.infer("toy-pointwise", [_pixels(image)], request_id="17", client_timeout=30)
    assert np.array_equal(answer.as_numpy("labels"), image.argmax(-1))
    assert answer.as_numpy("entropy").shape == (50, 70)
    assert answer.get_response().id == "17"


def test_an_encoded_file_is_answered_like_its_pixels(
    triton_client: triton.InferenceServerClient, rng: np.random.Generator
) -> None:
    image = picture(rng, 40, 40)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    tensor = triton.InferInput("image", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([buffer.getvalue()], dtype=object))
    wanted = [triton.InferRequestedOutput("mutual_information")]
    options = {"outputs": wanted, "parameters": {"samples": 3, "seed": 5}, "client_timeout": 30}
    from_file = triton_client.infer("toy-latent", [tensor], **options)
    from_pixels = triton_client.infer("toy-latent", [_pixels(image)], **options)
    assert from_file.as_numpy("labels") is None
    assert np.array_equal(from_file.as_numpy("mutual_information"), from_pixels.as_numpy("mutual_information"))


@pytest.mark.parametrize(
    ("model", "shape", "parameters", "status", "says"),
    [
        ("nope", (8, 8, 3), {}, "StatusCode.NOT_FOUND", "nope"),
        ("toy-latent", (8, 8, 3), {"samples": 0}, "StatusCode.INVALID_ARGUMENT", "samples is 0"),
        ("toy-latent", (8, 8, 4), {}, "StatusCode.INVALID_ARGUMENT", "[8, 8, 4]"),
        ("toy-latent", (8, 8, 3), {"colour": "red"}, "StatusCode.INVALID_ARGUMENT", "colour"),
    ],
)
def test_a_bad_request_is_named_by_status_and_sentence(
    triton_client: triton.InferenceServerClient,
    model: str,
    shape: tuple[int, ...],
    parameters: dict,
    status: str,
    says: str,
) -> None:
    with pytest.raises(InferenceServerException) as refused:
        triton_client.infer(model, [_pixels(np.zeros(shape, np.uint8))], parameters=parameters, client_timeout=30)
    assert refused.value.status() == status
    assert says in refused.value.message()


def test_health_readiness_and_metadata_are_answered(
    triton_client: triton.InferenceServerClient, server: Server
) -> None:
    assert triton_client.is_server_live(client_timeout=10)
    assert triton_client.is_server_ready(client_timeout=10)
    assert triton_client.is_model_ready("toy-latent", client_timeout=10)
    assert not triton_client.is_model_ready("nope", client_timeout=10)
    assert [i.name for i in triton_client.get_model_metadata("toy-latent", client_timeout=10).inputs] == ["image"]
    with grpc.insecure_channel(server.grpc_address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert (
            health.Check(health_pb2.HealthCheckRequest(), timeout=10).status == health_pb2.HealthCheckResponse.SERVING
        )


def test_a_call_that_is_not_offered_says_so(triton_client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="not offered"):
        triton_client.get_trace_settings(client_timeout=10)


def test_a_typed_pixel_above_255_is_refused_by_its_value(server: Server) -> None:
    request = triton.service_pb2.ModelInferRequest(model_name="toy-pointwise")
    tensor = request.inputs.add(name="image", datatype="UINT8", shape=[1, 1, 3])
    tensor.contents.uint_contents.extend([1, 2, 300])
    with grpc.insecure_channel(server.grpc_address) as channel:
        stub = triton.service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.ModelInfer(request, timeout=10)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "300" in refused.value.details()
