"""A real server process for tests: its own port and folders, ready when it says so, ended by its pid."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

READY_S = 90
"""Enough for the first export of the demo models on a busy machine."""


@dataclass(frozen=True)
class Server:
    port: int
    grpc_port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_server(store: Path, **settings: str) -> Iterator[Server]:
    """`penumbra serve` over a store, with settings as environment; SIGTERM at the end, SIGKILL if that is ignored."""
    port, grpc_port = free_port(), free_port()
    log = store.parent / f"server-{port}.log"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PENUMBRA_", "BENTOML_"))}
    environment |= {"PENUMBRA_PREDRAIN_S": "0.5", **settings}
    command = [sys.executable, "-m", "penumbra", "serve", "--store", str(store), "--port", str(port)]
    command += ["--grpc-port", str(grpc_port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=Path(__file__).parents[1]
        )
    server = Server(port, grpc_port, process, log)
    try:
        _wait_until_ready(server)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def _wait_until_ready(server: Server) -> None:
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended while starting:\n{server.log.read_text()[-3000:]}")
        try:
            with urllib.request.urlopen(f"{server.url}/readyz", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the server was not ready after {READY_S} s:\n{server.log.read_text()[-3000:]}")
