"""Callers who are slow, break off, vanish or do not listen, at the server and through nginx as `deploy/nginx` has it.

Forty at a time. Meanwhile others are answered, and when it is over the server holds nothing of them.
"""

import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest
import tritonclient.grpc as triton

from loadtests.pictures import check, picture
from loadtests.run import scrape
from tests.reliability.load import HEADERS
from tests.reliability.test_crash import worker_of
from tests.reliability.test_shortage import labels_of
from tests.serving.server import MEASURED, ROOT, Server, free_ports, serving, until

pytestmark = pytest.mark.slow
NUM_CALLERS, NUM_GOOD = 40, 4
PROXY_S = 1
"""In place of the seconds that nginx gives its callers, so that the test need not wait for them."""
ASKED, SLOW = picture("small", 8), picture("large", 8)
POST = b"POST /segment?model=toy-pointwise HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
SIZED = POST + b"Content-Length: %d\r\n\r\n" % len(ASKED.png)
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


def stall(sent: bytes) -> Callable[[socket.socket], None]:
    return lambda caller: caller.sendall(sent)


def reset(caller: socket.socket) -> None:
    """Goes away in the middle of a body, with a reset in place of an end."""
    caller.sendall(SIZED + ASKED.png[: len(ASKED.png) // 2])
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    caller.close()


def break_off(caller: socket.socket) -> None:
    """Ends in the middle of a chunk."""
    caller.sendall(CHUNKED + b"1000\r\nnot so many")
    caller.shutdown(socket.SHUT_WR)


def listen_never(caller: socket.socket) -> None:
    """Asks for more than the system's buffers hold."""
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    asked = picture("medium", 8).png
    caller.sendall(POST + b"Accept: application/x-npz\r\nContent-Length: %d\r\n\r\n" % len(asked) + asked)


FAULTS: dict[str, tuple[Callable[[socket.socket], None], bool]] = {
    "head that does not end": (stall(POST), True),
    "body that does not come": (stall(SIZED), True),
    "half a body": (stall(SIZED + ASKED.png[:100]), True),
    "half a chunk": (stall(CHUNKED + b"1000\r\nnot so many"), True),
    "end in a chunk": (break_off, False),
    "bad chunk": (stall(CHUNKED + b"zz\r\n"), False),
    "reset in a body": (reset, False),
    "answer unread": (listen_never, False),
}
"""What each caller does, and whether nginx keeps it from the server altogether."""


@pytest.fixture(scope="module")
def server(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(store, tmp_path_factory.mktemp("callers"), predrain_s=0, **MEASURED) as started:
        yield started


@contextmanager
def proxied(servers: list[Server], place: Path) -> Iterator[tuple[int, int]]:
    """nginx before some servers: its two ports."""
    if not shutil.which("nginx"):
        pytest.skip("nginx is not installed")
    ports = free_ports(2)
    text = (ROOT / "deploy/nginx/penumbra.conf").read_text()
    for listening, port in zip(("127.0.0.1:8080", "127.0.0.1:8081"), ports, strict=True):
        text = text.replace(listening, f"127.0.0.1:{port}")
    for known, addresses in (
        ("127.0.0.1:3000", [server.url.removeprefix("http://") for server in servers]),
        ("127.0.0.1:3001", [server.grpc_address for server in servers]),
    ):
        line = f"server {known} max_fails=1 fail_timeout=10s;"
        assert line in text
        text = text.replace(line, "\n".join(line.replace(known, address) for address in addresses))
    text = text.replace("server 127.0.0.1:3000;", f"server {servers[0].url.removeprefix('http://')};")  # of jobs
    text = re.sub(r"(client_header_timeout|client_body_timeout|send_timeout) \d\ds", rf"\1 {PROXY_S}s", text)
    (place / "nginx.conf").write_text(text)
    command = ["nginx", "-p", str(place), "-c", str(place / "nginx.conf"), "-e", "errors.log", "-g", "daemon off;"]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        until(lambda: process.poll() is not None or is_open(ports[0]), bound_s=20)
        assert process.poll() is None, (place / "errors.log").read_text()
        yield ports
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def is_open(port: int) -> bool:
    with suppress(OSError), closing(socket.create_connection(("127.0.0.1", port), timeout=5)):
        return True
    return False


@pytest.fixture(scope="module")
def way(request: pytest.FixtureRequest, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port that callers connect to."""
    if request.param == "direct":
        yield int(server.url.rpartition(":")[2])
        return
    with proxied([server], tmp_path_factory.mktemp("nginx")) as (port, _):
        yield port


@pytest.mark.parametrize("way", ["direct", "nginx"], indirect=True)
@pytest.mark.parametrize("fault", FAULTS)
def test_bad_callers_keep_nobody_from_an_answer_and_leave_nothing(
    server: Server, way: int, fault: str, request: pytest.FixtureRequest
) -> None:
    do, is_kept_away = FAULTS[fault]
    worker, before = worker_of(server), scrape(server)
    at_rest = worker.num_fds()
    with ExitStack() as callers:
        for _ in range(NUM_CALLERS):
            caller = callers.enter_context(socket.create_connection(("127.0.0.1", way), timeout=30))
            do(caller)
        time.sleep(0.2)  # let what is refused be refused; the good callers come in any case
        if is_kept_away and "nginx" in request.node.name:
            assert worker.num_fds() < at_rest + NUM_CALLERS / 2, "nginx keeps them to itself"
        slowest_s = max(good_caller(way) for _ in range(NUM_GOOD))
        print(f"{fault}: others answered within {slowest_s:.2f} s")
        if is_kept_away and "nginx" in request.node.name:
            assert ends(caller), "nginx does not wait for ever"
    until(lambda: worker.num_fds() <= at_rest and scrape(server)["penumbra_inflight"] == 0, bound_s=60)
    after = scrape(server)
    failed = {name for name in after if name.startswith("answers 5") and after[name] > before.get(name, 0)}
    assert not failed and worker_of(server).pid == worker.pid


def good_caller(port: int) -> float:
    began = time.perf_counter()
    answer = httpx.post(
        f"http://127.0.0.1:{port}/segment?model=toy-pointwise", content=ASKED.png, headers=HEADERS, timeout=60,
        trust_env=False,
    )  # fmt: skip
    check(labels_of(answer), ASKED, exact=True)
    return time.perf_counter() - began


def ends(caller: socket.socket) -> bool:
    """Whether the other side closes the connection, with or without a word."""
    try:
        while caller.recv(4096):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


def test_behind_nginx_a_killed_server_costs_no_answer(store: Path, tmp_path: Path, server: Server) -> None:
    """Of two servers one is killed with requests in flight: nginx asks the other."""
    (tmp_path / "second").mkdir()
    with (
        serving(store, tmp_path / "second", predrain_s=0, **MEASURED) as second,
        proxied([server, second], tmp_path) as (port, grpc_port),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as client,
    ):

        def ask(_: int) -> None:
            answer = client.post("/segment?model=toy-pointwise&overlap=0.5", content=SLOW.png, headers=HEADERS)
            check(labels_of(answer), SLOW, exact=True)

        with ThreadPoolExecutor(6) as threads:
            answers = [threads.submit(ask, i) for i in range(6)]
            until(lambda: scrape(second)["penumbra_inflight"] > 0)
            for process in [*psutil.Process(second.process.pid).children(), psutil.Process(second.process.pid)]:
                os.kill(process.pid, signal.SIGKILL)
            for answer in answers:
                answer.result()
        image = triton.InferInput("image", list(ASKED.pixels_HW3.shape), "UINT8")
        image.set_data_from_numpy(ASKED.pixels_HW3)
        with triton.InferenceServerClient(f"127.0.0.1:{grpc_port}") as rpc:
            check(rpc.infer("toy-pointwise", [image], client_timeout=60).as_numpy("labels"), ASKED, exact=True)
