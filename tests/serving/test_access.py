"""The log: one line for every request, which its caller can find, and nothing in it that was sent."""

import json
import logging
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from bentoml.exceptions import BadInput, InternalServerError
from tritonclient.utils import InferenceServerException

from penumbra.serving.process import JsonLines, is_ours
from penumbra.serving.telemetry import Request, Telemetry, begin, logged
from tests.serving.http.asking import PNG
from tests.serving.server import Server, serving, until

KEY, SECRET = "infer-key-0123456789", "confidential"
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
PICTURE = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def keyed(toy_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    keys = f"infer@camera-7:{KEY}"
    directory = tmp_path_factory.mktemp("logged")
    with serving(toy_store, directory, api_keys=keys, log_format="json", predrain_s=0, limit_body_bytes=100_000) as it:
        yield it


@pytest.fixture
def caller(keyed: Server) -> Iterator[httpx.Client]:
    with keyed.client() as client:
        client.headers["Authorization"] = f"Bearer {KEY}"
        yield client


def lines_of(server: Server) -> list[dict[str, Any]]:
    """All that the server's processes have written so far; a line that is being written is none."""
    return [json.loads(line) for line in server.log.read_text().split("\n")[:-1]]


def lines_with(server: Server, request_id: str, number: int = 1) -> list[dict[str, Any]]:
    """The lines of the requests of an id, of which there are to be so many; they come after the answers."""

    def found() -> list[dict[str, Any]]:
        return [line for line in lines_of(server) if line.get("request_id") == request_id]

    until(lambda: len(found()) >= number, bound_s=30)
    assert len(found()) == number
    return found()


def tensor(height: int = 45, width: int = 70) -> triton.InferInput:
    given = triton.InferInput("image", [height, width, 3], "UINT8")
    given.set_data_from_numpy(np.zeros((height, width, 3), np.uint8))
    return given


def test_an_answered_request_has_one_line_with_all_that_an_operator_asks(keyed: Server, caller: httpx.Client) -> None:
    told = PICTURE | {"X-Request-ID": "shop-17", "traceparent": PARENT}
    answer = caller.post("/segment?model=toy-latent&seed=77", content=PNG, headers=told)
    assert answer.status_code == 200
    assert answer.headers["X-Request-ID"] == "shop-17" and answer.headers["traceparent"] == PARENT
    (line,) = lines_with(keyed, "shop-17")
    assert {name: line.pop(name) for name in ("ms", "queue_ms", "run_ms")}.keys() and line.pop("time")
    assert line == {
        "level": "INFO", "logger": "penumbra.access", "method": "POST", "path": "/segment", "status": 200,
        "model": "toy-latent", "size": "70x45", "windows": 4, "key": "camera-7", "request_id": "shop-17",
        "trace_id": TRACE,
    }  # fmt: skip


def test_a_call_and_every_request_of_a_stream_has_the_same_line_over_grpc(keyed: Server) -> None:
    metadata = {"authorization": f"Bearer {KEY}", "x-request-id": "shop-18", "traceparent": PARENT}
    answers: list[object] = []
    with triton.InferenceServerClient(keyed.grpc_address) as rpc:
        rpc.infer("toy-latent", [tensor()], headers=metadata, client_timeout=30)
        with pytest.raises(InferenceServerException):
            rpc.get_model_metadata("unheard", headers=metadata | {"x-request-id": "shop-19"}, client_timeout=30)
        rpc.start_stream(
            lambda result, error: answers.append(error),
            headers=metadata | {"x-request-id": "shop-20"},
            stream_timeout=60,
        )
        for model in ("toy-latent", "unheard"):
            rpc.async_stream_infer(model, [tensor(20, 30)])
        until(lambda: len(answers) == 2, bound_s=30)
        rpc.stop_stream()
    (line,), (refused,) = lines_with(keyed, "shop-18"), lines_with(keyed, "shop-19")
    service = "/inference.GRPCInferenceService"
    known = {"method": "GRPC", "path": f"{service}/ModelInfer", "status": 200, "model": "toy-latent", "size": "70x45",
             "windows": 4, "key": "camera-7", "trace_id": TRACE}  # fmt: skip
    assert {name: line[name] for name in known} == known and {"ms", "queue_ms", "run_ms"} <= line.keys()
    assert (refused["path"], refused["status"]) == (f"{service}/ModelMetadata", 404)
    streamed = lines_with(keyed, "shop-20", number=2)
    assert [(one["status"], one.get("size")) for one in streamed] == [(200, "30x20"), (404, None)]


def test_a_call_gives_its_id_back_at_its_end_whether_it_fails_or_not(keyed: Server) -> None:
    ended: list[tuple[grpc.StatusCode, str]] = []
    with grpc.insecure_channel(keyed.grpc_address) as channel:
        for method in ("ServerMetadata", "ModelMetadata", "TraceSetting"):
            for bearer in (f"Bearer {KEY}", ""):
                call = channel.unary_unary(f"/inference.GRPCInferenceService/{method}").future(
                    b"", metadata=[("authorization", bearer), ("x-request-id", "shop-21")], timeout=30
                )
                ended.append((call.code(), dict(call.trailing_metadata())["x-request-id"]))
    code = grpc.StatusCode
    assert ended == [(each, "shop-21") for each in (
        code.OK, code.UNAUTHENTICATED, code.NOT_FOUND, code.UNAUTHENTICATED, code.UNIMPLEMENTED, code.UNAUTHENTICATED,
    )]  # fmt: skip


def test_every_answer_has_an_id_of_its_own_where_none_fits(keyed: Server, caller: httpx.Client) -> None:
    given = [caller.get("/models", headers=headers).headers["X-Request-ID"] for headers in (
        {}, {}, {"X-Request-ID": "a b"}, {"X-Request-ID": "x" * 129}, {"X-Request-ID": "{}"}, {"X-Request-ID": ""},
    )]  # fmt: skip
    given += [caller.get(path).headers["X-Request-ID"] for path in ("/nowhere", "/readyz", "/metrics")]
    assert len(set(given)) == len(given) and all(re.fullmatch("[0-9a-f]{32}", one) for one in given)
    (line,) = lines_with(keyed, given[6])
    assert (line["path"], line["status"]) == ("/nowhere", 404)


def test_what_machines_ask_all_the_time_is_left_out_but_not_what_is_refused_them(
    keyed: Server, caller: httpx.Client
) -> None:
    for path in ("/livez", "/readyz", "/v2/health/ready", "/metrics"):
        assert caller.get(path, headers={"X-Request-ID": f"probe{path}"}).status_code == 200
    assert caller.get("/metrics", headers={"Authorization": "", "X-Request-ID": "stranger"}).status_code == 401
    (line,) = lines_with(keyed, "stranger")
    assert (line["status"], line["error"]) == (401, "Unauthenticated") and "key" not in line
    assert not [line for line in lines_of(keyed) if str(line.get("request_id")).startswith("probe")]


def test_a_job_has_two_lines_and_its_id_which_opens_it_is_in_none(keyed: Server, caller: httpx.Client) -> None:
    created = caller.post("/jobs?model=toy-latent", content=PNG, headers=PICTURE | {"X-Request-ID": "shop-30"})
    url = created.json()["url"]
    until(lambda: caller.get(url).json()["state"] == "done", bound_s=60)
    assert caller.get(f"{url}/result", headers={"X-Request-ID": "shop-31"}).status_code == 200
    assert lines_with(keyed, "shop-30")[0]["status"] == 202
    assert lines_with(keyed, "shop-31")[0]["path"] == "/jobs/{id}/result"
    until(lambda: [line for line in lines_of(keyed) if line.get("method") == "JOB"], bound_s=30)
    (job,) = [line for line in lines_of(keyed) if line.get("method") == "JOB"]
    assert (job["status"], job["model"], job["size"], job["windows"]) == (200, "toy-latent", "70x45", 4)
    assert created.json()["id"] not in keyed.log.read_text()


def test_what_callers_do_wrong_leaves_no_stack_and_nothing_of_what_they_sent(
    keyed: Server, caller: httpx.Client
) -> None:
    url = f"/segment?model={SECRET}&tags={SECRET}"
    caller.post(url, files={"image": (f"{SECRET}.png", PNG, "image/png")}, data={"boxes": SECRET})
    for path in ("/segment", "/jobs", "/v2/models/toy-latent/infer", f"/v2/models/toy-latent/infer?{SECRET}"):
        caller.post(path, content=SECRET.encode(), headers=PICTURE)
    caller.post("/segment", content=(SECRET * 10_000).encode(), headers=PICTURE)
    for body in (
        {"image": [[[SECRET]]]}, {"imagine": SECRET}, {"image": [[[1, 2, 3], [1]]]}, [SECRET], {"seed": SECRET},
        {"image": [[[1, 2, 3]]], "model": SECRET},
    ):  # fmt: skip
        assert caller.post("/predict", json=body).status_code in (400, 404)
    assert caller.post(
        "/predict", content=b"{" + SECRET.encode(), headers={"Content-Type": "application/json"}
    ).is_error
    host, port = keyed.url.removeprefix("http://").split(":")
    head = f"POST {url} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nX-Request-ID: gone\r\n"
    head += "Content-Type: image/png\r\nContent-Length: 5000\r\n\r\n"
    for raw in (f"{SECRET}\r\n\r\n", head + SECRET):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(raw.encode())
    (gone,) = lines_with(keyed, "gone")
    assert (gone["status"], gone["error"]) == (499, "Cancelled")
    with triton.InferenceServerClient(keyed.grpc_address) as rpc, pytest.raises(InferenceServerException):
        rpc.infer(SECRET, [tensor()], headers={"authorization": f"Bearer {KEY}"}, client_timeout=30)
    with grpc.insecure_channel(keyed.grpc_address) as channel:
        metadata = [("authorization", f"Bearer {KEY}"), ("x-request-id", "left")]
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer").future(b"\0", metadata=metadata)
        call.cancel()
    assert caller.get("/models", headers={"X-Request-ID": "last"}).status_code == 200
    lines_with(keyed, "last")
    told = keyed.log.read_text()
    assert SECRET not in told and KEY not in told and "Traceback" not in told
    assert not [line for line in lines_of(keyed) if "stack" in line or line["level"] == "ERROR"]


def test_a_line_of_text_says_the_same_in_the_same_words(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "penumbra.access")
    with logged(begin("GET", "/models/a b\n\x1b[31m?", {"x-request-id": "shop-1"})) as request:
        request.status = 404
    assert re.fullmatch(
        r"method=GET path=/models/a\?b\?\?\[31m\? status=404 ms=[\d.]+ request_id=shop-1", caplog.messages[0]
    )


def test_work_that_comes_from_nowhere_has_a_line_too_and_a_request_has_one_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "penumbra.access")
    with Telemetry().track("job") as job:
        job.model = "m"
    with logged(Request("POST", "/segment")) as outer, Telemetry().track("http") as inner:
        assert outer is inner
    assert [message.partition(" ")[0] for message in caplog.messages] == ["method=JOB", "method=POST"]
    assert "model=m" in caplog.messages[0] and "status=200" in caplog.messages[1]


def record(name: str, error: Exception | None) -> logging.LogRecord:
    return logging.LogRecord(name, logging.ERROR, "", 0, "%s\nfailed", ("it",), error and (type(error), error, None))


def test_a_failure_is_one_json_object_with_its_stack_and_a_callers_mistake_is_none_at_all() -> None:
    line = json.loads(JsonLines().format(record("penumbra", ValueError("why"))))
    assert line["message"] == "it\nfailed" and line["stack"] == "ValueError: why" and line["level"] == "ERROR"
    assert "stack" not in json.loads(JsonLines().format(record("penumbra", None)))
    odd = logging.LogRecord("penumbra", logging.ERROR, "", 0, "%s", ("mod\udce8le",), None)
    assert json.loads(JsonLines().format(odd))["message"] == "mod\udce8le", "a name that is no UTF-8"
    assert not is_ours(record("bentoml.http", BadInput("what was sent")), framework="bentoml")
    assert is_ours(record("bentoml.http", InternalServerError("why")), framework="bentoml")
    assert is_ours(record("penumbra", BadInput("x")), framework="bentoml")
