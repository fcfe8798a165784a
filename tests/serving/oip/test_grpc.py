"""gRPC with an unmodified tritonclient, against a real server of toys."""

import io

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from tests.conftest import picture
from tests.serving.server import Server


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


def _tensor(name: str, values: np.ndarray, datatype: str) -> triton.InferInput:
    tensor = triton.InferInput(name, list(values.shape), datatype)
    tensor.set_data_from_numpy(values)
    return tensor


def test_boxes_and_tags_are_tensors(triton_client: triton.InferenceServerClient, rng: np.random.Generator) -> None:
    image = picture(rng, 40, 50)
    boxes = np.array([[0, 0, 20, 40, 1], [20, 0, 50, 40, 2]], np.float32)
    prompted = [_pixels(image), _tensor("boxes", boxes, "FP32")]
    answer = triton_client.infer("toy-boxed", prompted, parameters={"alpha": 1000.0}, client_timeout=30)
    assert answer.get_response().parameters["members"].string_param == "plain,boxed,mixed"
    wanted = image + 255 * np.where(np.arange(50) < 20, [[0], [1], [0]], [[0], [0], [1]]).T
    boxed_counts_twice = image * 1.0 + 2 * (wanted - image) / 3
    clear = np.diff(np.sort(boxed_counts_twice, axis=-1))[:, :, -1] > 60
    assert np.array_equal(answer.as_numpy("labels")[clear], boxed_counts_twice.argmax(-1)[clear]) and clear.mean() > 0.5
    names = _tensor("tags", np.array([b"red", b"2"], object), "BYTES")
    ids = _tensor("tags", np.array([0, 2], np.int64), "INT64")
    answers = [triton_client.infer("toy-tagged", [_pixels(image), tags], client_timeout=30) for tags in (names, ids)]
    labels = [one.as_numpy("labels") for one in answers]
    assert np.array_equal(labels[0], labels[1]) and set(np.unique(labels[0])) <= {0, 2}


@pytest.mark.parametrize(
    ("model", "values", "datatype", "says"),
    [
        ("toy-boxed", np.zeros((1, 4), np.float32), "FP32", "has the shape [1, 4]; [-1, 5]"),
        ("toy-boxed", np.array([[0, 0, 5, 5, 0.5]], np.float32), "FP32", "a class id is wanted"),
        ("toy-boxed", np.array([[0, 0, 5, np.nan, 1]], np.float32), "FP32", "four numbers"),
        ("toy-boxed", np.array([[0, 0, 99, 5, 1]], np.float32), "FP32", "leaves the image"),
        ("toy-latent", np.array([[0, 0, 5, 5, 1]], np.float32), "FP32", "no input 'boxes'"),
    ],
)
def test_boxes_that_are_none_are_refused(
    triton_client: triton.InferenceServerClient, model: str, values: np.ndarray, datatype: str, says: str
) -> None:
    inputs = [_pixels(np.zeros((8, 8, 3), np.uint8)), _tensor("boxes", values, datatype)]
    with pytest.raises(InferenceServerException) as refused:
        triton_client.infer(model, inputs, client_timeout=30)
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT" and says in refused.value.message()


def test_a_question_that_is_read_in_the_event_loop_has_a_limit(server: Server) -> None:
    with grpc.insecure_channel(server.grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.RepositoryModelLoad(service_pb2.RepositoryModelLoadRequest(model_name="a" * 2**16), timeout=30)
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "the limit of RepositoryModelLoad is 65,536" in refused.value.details()


def test_metadata_names_a_models_prompts_and_maps(triton_client: triton.InferenceServerClient) -> None:
    boxed, bright = (triton_client.get_model_metadata(f"toy-{name}") for name in ("boxed", "bright"))
    assert [(i.name, i.datatype, list(i.shape)) for i in boxed.inputs][1:] == [("boxes", "FP32", [-1, 5])]
    assert [o.name for o in bright.outputs][-2:] == ["brightness", "probabilities"] and len(bright.inputs) == 1


@pytest.mark.parametrize(
    ("model", "shape", "parameters", "status", "says"),
    [
        ("nope", (8, 8, 3), {}, "StatusCode.NOT_FOUND", "nope"),
        ("toy-latent", (8, 8, 3), {"samples": 0}, "StatusCode.INVALID_ARGUMENT", "samples is 0"),
        ("toy-latent", (8, 8, 4), {}, "StatusCode.INVALID_ARGUMENT", "has the shape [8, 8, 4]; [-1, -1, 3]"),
        ("toy-latent", (8, 8, 3), {"outputs": "entropy"}, "StatusCode.INVALID_ARGUMENT", "has its own field"),
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


@pytest.mark.parametrize("parameter", [{"string_param": "2"}, {"double_param": 1.5}, {"int64_param": -3}])
def test_a_number_of_classes_that_is_none_is_refused(server: Server, parameter: dict[str, object]) -> None:
    request = triton.service_pb2.ModelInferRequest(model_name="toy-pointwise", raw_input_contents=[bytes(3)])
    request.inputs.add(name="image", datatype="UINT8", shape=[1, 1, 3])
    output = request.outputs.add(name="entropy")
    output.parameters["classification"].CopyFrom(triton.service_pb2.InferParameter(**parameter))
    with grpc.insecure_channel(server.grpc_address) as channel:
        stub = triton.service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError, match=r"classification is .*; a whole number from 0 is wanted") as refused:
            stub.ModelInfer(request, timeout=10)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


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
