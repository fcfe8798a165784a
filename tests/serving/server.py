"""A real server process for a test: `penumbra serve` on a free port, its directories its own, always ended."""

import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]
FIXED = {"windows_per_batch": 4, "samples_per_call": 4}
"""As `tests.conftest.FIXED`."""
MEASURED = {"windows_per_batch": 0, "samples_per_call": 0}
"""As a server does by itself, which takes it 0.3 s a model: for tests of how much it can do."""
START_S, END_S = 300, 30
"""Bounds of waiting, not expectations: reached only when something is wrong."""


@dataclass(frozen=True, slots=True)
class Server:
    url: str
    grpc_address: str
    process: subprocess.Popen[bytes]
    log: Path

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False)


def until(condition: Callable[[], object], *, bound_s: float = START_S) -> None:
    """Poll until a condition holds; an assertion fails when it never does."""
    end = time.monotonic() + bound_s
    while not condition():
        assert time.monotonic() < end, "the condition never came true"
        time.sleep(0.02)


@contextmanager
def serving(store: Path, directory: Path, *, root: Path = ROOT, **settings: object) -> Iterator[Server]:
    """A ready server over a store. settings: PENUMBRA_* variables by name; sizes of batches are `FIXED`. root: of the
    checkout that is served from."""
    with starting(store, directory, root=root, **settings) as server:
        until(lambda: server.process.poll() is not None or _is_ready(server))
        assert server.process.poll() is None, f"the server ended:\n{server.log.read_text()}"
        yield server


@contextmanager
def starting(store: Path, directory: Path, *, root: Path = ROOT, **settings: object) -> Iterator[Server]:
    """The same, from its first moment on."""
    port, grpc_port = free_ports(2)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PENUMBRA_", "BENTOML_"))}
    environment |= {"HOME": str(directory), "TMPDIR": str(directory), "PENUMBRA_THREADS": "1"}
    environment |= {f"PENUMBRA_{name.upper()}": str(value) for name, value in (FIXED | settings).items()}
    command = [sys.executable, "-m", "penumbra", "serve", "--store", str(store)]
    command += ["--port", str(port), "--grpc-port", str(grpc_port)]
    log = directory / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    server = Server(f"http://127.0.0.1:{port}", f"127.0.0.1:{grpc_port}", process, log)
    try:
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the session that was started above
            process.wait(END_S)


def free_port() -> int:
    return free_ports(1)[0]


def free_ports(number: int) -> list[int]:
    """Ports below those that the system gives to outgoing connections: polling one of those can meet itself. They are
    this process's own: a server has its port only seconds later, when it listens."""
    free: list[int] = []
    first = 20_000 + 120 * (os.getpid() % 100)
    for port in random.SystemRandom().sample(range(first, first + 120), 120):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            free.append(port)
        if len(free) == number:
            return free
    raise AssertionError(f"{number} ports are not free")


def _is_ready(server: Server) -> bool:
    """Ask as cheaply as can be: a start is timed beside this."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
