"""Every server: how it is started for an artifact, in a process of its own, and how one client asks it.

All of them run on this machine's cores with as many threads of torch as there are cores, one worker, batching on, and
glibc told to keep freed memory, which Penumbra tells it by itself.
"""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import tritonclient.grpc as triton

from benchmarks.overhead import family_of
from benchmarks.peers.network import PEERS, THREADS
from tests.serving.server import END_S, MEASURED, ROOT, free_port, free_ports, serving, until

Ask = Callable[[bytes], bytes]
"""One client's way to send a JPEG and get the label map's PNG."""
START_S = 180
FILE_BYTES = 2**17
"""What a JPEG is padded to for Triton, which batches equal shapes alone; decoders stop at a picture's end."""
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**31 - 1), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
SITE = Path(httpx.__file__).parents[1]
HERE = Path(__file__).parent
TRITON = PEERS / "pytriton/tritonserver"
TRITON_CONFIG = """
backend: "python"
max_batch_size: 16
input [ { name: "image" data_type: TYPE_UINT8 dims: [ -1 ] } ]
output [ { name: "labels" data_type: TYPE_UINT8 dims: [ -1 ] } ]
dynamic_batching { }
instance_group [ { kind: KIND_CPU count: 1 } ]
"""


@dataclass(frozen=True, slots=True)
class Task:
    """What is served: one artifact, its pictures run whole or in windows. folder: the server's own place."""

    artifact: Path
    whole: bool
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return KEEP_MEMORY | {
            "PEER_ARTIFACT": str(self.artifact), "PEER_WHOLE": str(int(self.whole)), "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(THREADS), "HOME": str(self.folder), "BENTOML_HOME": str(self.folder),
            "BENTOML_DO_NOT_TRACK": "True", "PYTHONWARNINGS": "ignore",
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Up:
    """A server that is up. connect: connects one client. While others have their turn its processes are stopped: some
    ask every moment whether there is work, which the others would pay for."""

    process: int
    connect: Callable[[], Ask]

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Stop it but for its turns."""
        self._send(signal.SIGSTOP)
        try:
            yield
        finally:
            self._send(signal.SIGCONT)  # so that it can end

    @contextmanager
    def turn(self) -> Iterator[None]:
        self._send(signal.SIGCONT)
        try:
            yield
        finally:
            self._send(signal.SIGSTOP)

    def _send(self, number: int) -> None:
        """Signal all its processes; those that are to wake the last first, or a parent would find children asleep."""
        family = family_of(self.process)
        for one in reversed(family) if number == signal.SIGCONT else family:
            with suppress(ProcessLookupError):
                os.kill(one, number)


@contextmanager
def penumbra(task: Task) -> Iterator[Up]:
    store = task.artifact.parents[1]
    settings = MEASURED | {"threads": THREADS, "log_level": "WARNING", "predrain_s": 0}  # sizes as it finds them
    with serving(store, task.folder, **settings) as server:
        path = f"/segment?model={task.artifact.parent.name}"
        headers = {"Content-Type": "image/jpeg", "Accept": "image/png"}

        yield Up(server.process.pid, lambda: _connect(server.url, path, headers))


@contextmanager
def bentoml(task: Task) -> Iterator[Up]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "bentoml", "serve", "benchmarks.peers.bento:Segment"]
    with _running([*command, "--host", "127.0.0.1", "--port", str(port)], task, ready=f"{url}/readyz") as process:
        in_json = partial(_in_json, url, "/segment", lambda jpeg: {"images": [jpeg]}, lambda answer: answer[0])
        yield Up(process, in_json)


@contextmanager
def litserve(task: Task) -> Iterator[Up]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with _running([sys.executable, "-m", "benchmarks.peers.lit", str(port)], task, ready=f"{url}/health") as process:
        in_json = partial(_in_json, url, "/predict", lambda jpeg: {"image": jpeg}, lambda answer: answer["labels"])
        yield Up(process, in_json)


def _connect(url: str, path: str, headers: dict[str, str]) -> Ask:
    """Connect a client that costs little: what it takes of the two cores, no server has."""
    connection = HTTPConnection(str(urlsplit(url).hostname), urlsplit(url).port, timeout=300)

    def ask(body: bytes) -> bytes:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{url}{path} answered {answer.status}: {content[:200]!r}")
        return content

    return ask


def _in_json(url: str, path: str, wrap: Callable[[str], object], unwrap: Callable[[Any], str]) -> Ask:
    """Connect a client that sends and gets files in JSON, in base64."""
    ask = _connect(url, path, {"Content-Type": "application/json"})

    def in_json(jpeg: bytes) -> bytes:
        body = json.dumps(wrap(base64.b64encode(jpeg).decode())).encode()
        return base64.b64decode(unwrap(json.loads(ask(body))))

    return in_json


@contextmanager
def tritonserver(task: Task) -> Iterator[Up]:
    """Its wheel brings the Python backend alone, so the TorchScript files are run by a model of that."""
    model, backends = task.folder / "repository/segment/1", task.folder / "backends"
    model.mkdir(parents=True)
    shutil.copy(HERE / "triton_model.py", model / "model.py")
    (model.parent / "config.pbtxt").write_text(TRITON_CONFIG)
    shutil.copytree(TRITON / "backends", backends)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(TRITON / "python_backend_stubs" / version / "triton_python_backend_stub", backends / "python")
    http, grpc = free_ports(2)
    command = [
        TRITON / "bin/tritonserver", "--model-repository", model.parents[1], "--backend-directory", backends,
        "--http-port", http, "--grpc-port", grpc, "--http-address", "127.0.0.1", "--grpc-address", "127.0.0.1",
        "--allow-metrics", "false", "--backend-config", f"python,stub-timeout-seconds={START_S}",
    ]  # fmt: skip
    libraries = [Path(sys.base_prefix) / "lib", PEERS / "nvidia_pytriton.libs"]
    more = {"LD_LIBRARY_PATH": ":".join(map(str, libraries)), "PEER_PATH": f"{SITE}:{ROOT}:{PEERS}"}
    ready = f"http://127.0.0.1:{http}/v2/health/ready"
    with _running(list(map(str, command)), task, ready=ready, **more) as process:

        def connect() -> Ask:
            client = triton.InferenceServerClient(f"127.0.0.1:{grpc}")
            image = triton.InferInput("image", [1, FILE_BYTES], "UINT8")

            def ask(jpeg: bytes) -> bytes:
                image.set_data_from_numpy(np.frombuffer(jpeg.ljust(FILE_BYTES, b"\0"), np.uint8)[None])
                png: bytes = client.infer("segment", [image], client_timeout=300).as_numpy("labels").tobytes()
                return png

            return ask

        yield Up(process, connect)


Server = Callable[[Task], AbstractContextManager[Up]]
"""Starts a server for a task."""
SERVERS: dict[str, Server] = {"penumbra": penumbra, "bentoml": bentoml, "litserve": litserve, "triton": tritonserver}
NEEDS = {"litserve": PEERS / "litserve", "triton": TRITON, "monai": PEERS / "monai"}
"""What must be there; the rest is in the environment that Penumbra runs in."""


@contextmanager
def _running(command: list[str], task: Task, *, ready: str, **more: str) -> Iterator[int]:
    """The id of a process in a session of its own, ready, and ended with all that it started."""
    log = task.folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | task.environment | more, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        until(lambda: process.poll() is not None or _is_ready(ready), bound_s=START_S)
        assert process.poll() is None, f"{command[0]} ended:\n{log.read_text(errors='replace')[-2000:]}"
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the session that was started above; LitServe leaves its workers
        process.wait(END_S)


def _is_ready(url: str) -> bool:
    assert urlsplit(url).hostname == "127.0.0.1"
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
