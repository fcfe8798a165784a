"""While models are loaded the server says at once that it lives and is not ready; if it cannot become so, it ends."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.serving.server import END_S, ROOT, START_S, Server, free_ports, starting, until

MODEL = "toy-pointwise"
WORK = [
    ("POST", "/segment"), ("POST", "/predict"), ("POST", "/jobs"), ("GET", "/models"), ("GET", "/"),
    ("GET", "/docs.json"),
    ("GET", "/v2"), ("POST", f"/v2/models/{MODEL}/infer"), ("GET", f"/v2/models/{MODEL}/ready"), ("GET", "/none"),
    ("POST", "/v2/repository/index"), ("GET", "/schema.json"),
]  # fmt: skip


@pytest.fixture
def held_store(toy_store: Path, tmp_path: Path) -> Path:
    """A store whose loading waits until `release` writes the card, which is a pipe."""
    place = tmp_path / "store" / MODEL / "1"
    shutil.copytree(toy_store / MODEL / "1", place)
    (place / "card.json").rename(tmp_path / "card.json")
    os.mkfifo(place / "card.json")
    return tmp_path / "store"


def release(store: Path) -> None:
    """Give the card to the reader of the pipe, once there is one, and to those who come later its file."""
    place = store / MODEL / "1" / "card.json"
    card = (store.parent / "card.json").read_bytes()
    with place.open("wb") as pipe:
        place.rename(store.parent / "pipe")
        place.write_bytes(card)
        pipe.write(card)


def answers(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/livez", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture
def loading(held_store: Path, tmp_path: Path) -> Iterator[Server]:
    """A server that will be loading until it is released."""
    with starting(held_store, tmp_path, predrain_s=60, log_level="INFO") as server:
        until(lambda: answers(server) or server.process.poll() is not None)
        yield server


def health(server: Server) -> int:
    with grpc.insecure_channel(server.grpc_address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        return int(check(health_pb2.HealthCheckRequest(), timeout=END_S, wait_for_ready=True).status)


def test_while_loading_every_route_answers_at_once_and_then_works(loading: Server, held_store: Path) -> None:
    with loading.client() as client:
        for path in ("/livez", "/healthz", "/v2/health/live"):
            assert (client.get(path).status_code, client.get(path).json()) == (200, {"live": True})
        for path in ("/readyz", "/v2/health/ready"):
            answer = client.get(path)
            assert (answer.status_code, answer.json()["ready"], answer.headers["Retry-After"]) == (503, False, "2")
        for method, path in WORK:
            answer = client.request(method, path)
            assert answer.status_code == 503 and int(answer.headers["Retry-After"]) > 0, path
            assert "still loading" in answer.json()["error"]
        assert "penumbra_request_seconds" in client.get("/metrics").text
        assert health(loading) == health_pb2.HealthCheckResponse.NOT_SERVING
        with triton.InferenceServerClient(loading.grpc_address) as calls:
            assert calls.is_server_live() and not calls.is_server_ready()
            with pytest.raises(triton.InferenceServerException, match="still loading") as refusal:
                calls.get_server_metadata()
            assert refusal.value.status() == "StatusCode.UNAVAILABLE"
            assert "ready: " not in loading.log.read_text()
            release(held_store)
            until(lambda: client.get("/readyz").status_code == 200)
            assert calls.is_server_ready() and calls.is_model_ready(MODEL)
        assert health(loading) == health_pb2.HealthCheckResponse.SERVING
        assert [model["name"] for model in client.get("/models").json()["models"]] == [MODEL]
    (line,) = [line for line in loading.log.read_text().splitlines() if "ready: " in line]
    assert f"{loading.url}/ and gRPC on {loading.grpc_address}, with {MODEL}" in line
    os.kill(loading.process.pid, signal.SIGKILL)  # its predrain is long


def test_sigterm_while_loading_ends_the_server_without_its_predrain(loading: Server) -> None:
    loading.process.send_signal(signal.SIGTERM)
    assert loading.process.wait(END_S) == 0
    assert "Traceback" not in loading.log.read_text()


# -- a server that cannot become ready -----------------------------------------------------------


def ended(store: Path, directory: Path, **variables: str) -> tuple[int, str]:
    """The exit code of `bentoml serve`, which no command line of ours stands before, and what it said."""
    port, grpc_port = free_ports(2)
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("PENUMBRA_", "BENTOML_"))} | {
        "TMPDIR": str(directory), "BENTOML_HOME": str(directory / "bentoml"), "BENTOML_DO_NOT_TRACK": "True",
        "PENUMBRA_STORE": str(store), "PENUMBRA_GRPC_ADDRESS": f"127.0.0.1:{grpc_port}",
    } | variables  # fmt: skip
    command = [sys.executable, "-m", "bentoml", "serve", "penumbra.serving.service:Penumbra", "--port", str(port)]
    done = subprocess.run(
        [*command, "--host", "127.0.0.1", "--working-dir", str(ROOT)], cwd=ROOT, env=environment,
        capture_output=True, timeout=START_S,
    )  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))  # nobody holds it any more
    return done.returncode, (done.stdout + done.stderr).decode()


def test_a_store_of_which_no_model_is_accepted_ends_the_server_with_the_reason(toy_store: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_store / MODEL, tmp_path / "store" / MODEL)
    with (tmp_path / "store" / MODEL / "1" / "encode.ts").open("ab") as graph:
        graph.write(b"x")
    with starting(tmp_path / "store", tmp_path) as server:
        assert server.process.wait(START_S) == 1
    said = server.log.read_text()
    assert said.count("the server cannot start: ") == 1 and "encode.ts was changed" in said and "Traceback" not in said


def test_a_grpc_port_that_is_taken_meanwhile_ends_the_server_with_the_reason(toy_store: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", free_ports(1)[0])) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, said = ended(toy_store, tmp_path, PENUMBRA_GRPC_ADDRESS=address)
    assert code == 1 and f"gRPC cannot listen on {address}" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"PENUMBRA_DEVICE": "cuda:99"}, "the device is 'cuda:99'"),
        ({"PENUMBRA_JOBS": "/proc/jobs"}, "jobs cannot be kept in /proc/jobs"),
        ({"PENUMBRA_LIMIT_PIXEL": "1"}, "the nearest is PENUMBRA_LIMIT_PIXELS"),
        ({"PENUMBRA_API_KEYS_FILE": "/none"}, "the API keys in /none cannot be read"),
        ({"PENUMBRA_STORE": "/none"}, "the store /none has no model to serve: it is empty"),
    ],
)
def test_what_keeps_a_server_from_starting_ends_it_in_a_sentence(
    toy_store: Path, tmp_path: Path, variables: dict[str, str], reason: str
) -> None:
    code, said = ended(toy_store, tmp_path, **variables)
    assert code == 1 and said.count(reason) == 1 and "Traceback" not in said


def test_a_default_directory_of_jobs_that_others_may_enter_is_refused(toy_store: Path, tmp_path: Path) -> None:
    (tmp_path / "penumbra-jobs").mkdir()
    (tmp_path / "penumbra-jobs").chmod(0o777)
    code, said = ended(toy_store, tmp_path)
    assert code == 1 and "penumbra-jobs is there and no directory of this user alone" in said
