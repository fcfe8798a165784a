"""Every published limit, by a server whose memory is watched: what is refused is also not kept or built up."""

import gzip
import io
import socket
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import repeat
from pathlib import Path

import grpc
import httpx
import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton
from PIL import Image
from tritonclient.grpc import service_pb2_grpc

from penumbra.models.errors import Cancelled, QueueFull, TooLarge
from penumbra.serving.room import Bodies
from tests.serving.http.asking import NPZ, PNG, ask, bomb, is_refused, png
from tests.serving.server import MEASURED, Server, serving, until

MIB = 2**20
BODY, JSON, HEAD, PIXELS, QUEUED = 4 * MIB, MIB // 2, 16_384, 1_000_000, 160
ROOM_MIB, ON_ITS_WAY_MIB = 64, 2
"""What the server may take beyond its size at rest: bodies and JSON within their limits, and a picture's maps; and for
each connection what arrived and was not looked at yet."""


class Memory:
    """Peak resident memory of a server's worker since it was at rest, and the way to put the peak back."""

    def __init__(self, server: Server) -> None:
        family = psutil.Process(server.process.pid).children(recursive=True)
        self._worker = max(family, key=lambda process: process.memory_info().rss)
        self._rest = self._worker.memory_info().rss

    def forget_peak(self) -> None:
        Path(f"/proc/{self._worker.pid}/clear_refs").write_text("5")

    @property
    def peak_mib(self) -> float:
        status = Path(f"/proc/{self._worker.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024 - self._rest / MIB


@pytest.fixture(scope="module")
def limited(toy_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Memory]]:
    settings = {
        "limit_body_bytes": BODY, "limit_json_bytes": JSON, "limit_head_bytes": HEAD, "limit_pixels": PIXELS,
        "limit_queue_samples": QUEUED, "predrain_s": 0, **MEASURED,
    }  # fmt: skip
    with serving(toy_store, tmp_path_factory.mktemp("limited"), **settings) as server:
        with server.client() as client:
            assert ask(client).status_code == 200
        yield server, Memory(server)


def picture_bytes(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def deep_text(size: int) -> bytes:
    """A PNG with a text chunk that inflates to `size` bytes."""
    kind, body = b"iTXt", b"a\0\x01\0\0\0" + zlib.compress(bytes(size), 1)
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return PNG[:33] + chunk + PNG[33:]


JSON_HEADERS = {"Content-Type": "application/json"}
FORM = {"Content-Type": "multipart/form-data; boundary=b"}
FIELD = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n'
INFER = "/v2/models/toy-latent/infer"
NESTED = b'{"inputs":' + b"[" * 400_000
ZEROS = bytes(128 * MIB)
LISTS = b'{"image":[' + b"[]," * MIB


def form_with(part: bytes) -> bytes:
    return b"--b\r\n" + part + b"\r\n\r\nx\r\n--b--\r\n"


SEGMENT = "/segment?model=toy-latent"
PICTURE = {"Content-Type": "image/png"}
OPENING = b'{"inputs":[' + b"[]," * MIB
HEADED = {"Inference-Header-Content-Length": str(3 * MIB)}
NAMED = b'Content-Disposition: form-data; name="%s"'
DEEP_BOXES = NAMED % b"boxes" + b"\r\n\r\n" + b"[" * 60_000
REFUSED: dict[str, tuple[str, dict[str, str], Callable[[], object], int, str]] = {
    "a body by its declared length": (SEGMENT, PICTURE, lambda: bytes(128 * MIB), 413, f"{BODY:,}"),
    "a body as it comes": (SEGMENT, PICTURE, lambda: repeat(bytes(MIB), 128), 413, f"{BODY:,}"),
    "a form as it comes": (SEGMENT, FORM, lambda: repeat(FIELD * 10_000, 200), 413, f"{BODY:,}"),
    "pixels by the header": (SEGMENT, PICTURE, lambda: bomb(30_000), 413, f"{PIXELS:,}"),
    "pixels of a real picture": (SEGMENT, PICTURE, lambda: picture_bytes(6000, 6000), 413, f"{PIXELS:,}"),
    "windows": (SEGMENT + "&overlap=0.9", PICTURE, lambda: picture_bytes(900, 900), 413, f"is {QUEUED}; lower"),
    "samples": (SEGMENT + "&samples=999999999", PICTURE, lambda: PNG, 400, "1 to 64"),
    "json of /predict": ("/predict", JSON_HEADERS, lambda: LISTS[: JSON + 1], 413, f"{JSON:,}"),
    "json of /v2": (INFER, JSON_HEADERS, lambda: OPENING, 413, f"{JSON:,}"),
    "json of /v2 before tensors": (INFER, HEADED, lambda: OPENING, 413, f"{JSON:,}"),
    "json that inflates": (INFER, {"Content-Encoding": "gzip"}, lambda: gzip.compress(OPENING, 1), 413, f"{JSON:,}"),
    "zeros that inflate": (INFER, {"Content-Encoding": "deflate"}, lambda: zlib.compress(ZEROS, 1), 413, f"{BODY:,}"),
    "depth of json in /v2": (INFER, JSON_HEADERS, lambda: NESTED, 400, ""),
    "depth of json in an option": (SEGMENT, FORM, lambda: form_with(DEEP_BOXES), 400, ""),
    "fields of a form": (SEGMENT, FORM, lambda: FIELD * 70_000 + b"--b--\r\n", 400, "16"),
    "size of a field": (SEGMENT, FORM, lambda: FIELD.replace(b"x\r", b"x" * MIB + b"\r") + b"--b--\r\n", 400, ""),
    "headers of a part": (SEGMENT, FORM, lambda: form_with(b"x: y\r\n" * 500_000), 400, ""),
    "a part's name": (SEGMENT, FORM, lambda: form_with(NAMED % (b"a" * 3 * MIB)), 400, ""),
    "one header": (SEGMENT, {"X": "a" * HEAD}, lambda: PNG, 431, f"{HEAD:,}"),
    "many headers": (SEGMENT, {f"X-{i}": "a" for i in range(4000)}, lambda: PNG, 431, f"{HEAD:,}"),
    "the line": ("/segment?outputs=" + "a" * HEAD, {}, lambda: PNG, 431, f"{HEAD:,}"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_over_a_limit_is_refused_and_takes_no_memory(limited: tuple[Server, Memory], what: str) -> None:
    server, memory = limited
    path, headers, make, status, word = REFUSED[what]
    content = make()
    memory.forget_peak()
    with server.client() as client:
        try:
            response = client.post(path, content=content, headers=headers)  # type: ignore[arg-type]
        except httpx.WriteError:
            assert status == 413  # refused and closed while it was still being sent
        else:
            is_refused(response, status, word)
        assert memory.peak_mib < ROOM_MIB
        assert ask(client).status_code == 200


def test_text_that_inflates_in_a_picture_is_dropped_as_it_is(limited: tuple[Server, Memory]) -> None:
    server, memory = limited
    memory.forget_peak()
    with server.client() as client:
        answer = client.post(SEGMENT, headers=PICTURE, content=deep_text(128 * MIB))
    assert answer.status_code == 200, answer.text
    assert memory.peak_mib < ROOM_MIB


def test_depth_and_size_of_json_are_bounded_in_the_typed_route_too(limited: tuple[Server, Memory]) -> None:
    server, memory = limited
    memory.forget_peak()
    with server.client() as client:
        answer = client.post("/predict", content=b'{"image":' + b"[" * 400_000, headers=JSON_HEADERS)
        assert answer.status_code == 400 and isinstance(answer.json()["error"], str)
        answer = client.post("/predict", content=LISTS[: JSON - 4] + b"[]]}", headers=JSON_HEADERS)
        assert answer.status_code == 400
    assert memory.peak_mib < ROOM_MIB


def test_headers_without_an_end_take_no_memory(limited: tuple[Server, Memory]) -> None:
    server, memory = limited
    memory.forget_peak()
    host, port = server.url.removeprefix("http://").split(":")
    with closing(socket.create_connection((host, int(port)), timeout=30)) as connection, suppress(OSError):
        connection.sendall(b"GET /readyz HTTP/1.1\r\nX: ")
        for _ in range(128):
            connection.sendall(b"a" * MIB)
        pytest.fail("128 MiB of a header were taken")
    assert memory.peak_mib < ROOM_MIB
    with server.client() as client:
        assert ask(client).status_code == 200


def test_messages_and_metadata_of_grpc_are_bounded(limited: tuple[Server, Memory]) -> None:
    server, memory = limited
    large, small = (triton.service_pb2.ModelInferRequest(model_name="toy-latent") for _ in range(2))
    large.raw_input_contents.append(bytes(64 * MIB))
    memory.forget_peak()
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(server.grpc_address, options=options) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for request, metadata in ((large, ()), (small, (("x", "a" * MIB),))):
            with pytest.raises(grpc.RpcError) as refused:
                stub.ModelInfer(request, metadata=metadata, timeout=30)
            assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    tensor = triton.InferInput("image", [1001, 1000, 3], "UINT8")
    tensor.set_data_from_numpy(np.zeros((1001, 1000, 3), np.uint8))
    with triton.InferenceServerClient(server.grpc_address) as rpc, pytest.raises(Exception, match=f"{PIXELS:,}"):
        rpc.infer("toy-latent", [tensor], client_timeout=30)
    assert memory.peak_mib < ROOM_MIB


@pytest.mark.slow
def test_messages_of_grpc_and_what_unpacks_count_among_the_bodies(toy_store: Path, tmp_path: Path) -> None:
    settings = {"limit_body_bytes": BODY, "limit_bodies_bytes": MIB, "predrain_s": 0}
    tensors = [triton.InferInput("image", [side, side, 3], "UINT8") for side in (700, 20)]
    for tensor in tensors:
        tensor.set_data_from_numpy(np.zeros(tensor.shape(), np.uint8))
    answers: list[object] = []
    with (
        serving(toy_store, tmp_path, **settings) as server,
        server.client() as client,
        triton.InferenceServerClient(server.grpc_address) as rpc,
    ):
        with pytest.raises(Exception, match="the body takes 1,470,") as refused:
            rpc.infer("toy-latent", [tensors[0]], client_timeout=30)
        assert refused.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
        assert rpc.infer("toy-latent", [tensors[1]], client_timeout=30).as_numpy("labels").shape == (20, 20)
        rpc.start_stream(lambda result, error: answers.append(error or result), stream_timeout=60)
        for tensor in tensors:
            rpc.async_stream_infer("toy-latent", [tensor])
        until(lambda: len(answers) == 2)
        assert "the limit of all bodies together" in str(answers[0]) and not isinstance(answers[1], Exception)
        packed = gzip.compress(bytes(2 * MIB))
        answer = client.post("/v2/models/toy-latent/infer", content=packed, headers={"Content-Encoding": "gzip"})
        is_refused(answer, 413, "the limit of all bodies together", f"{MIB:,}")
        assert ask(client).status_code == 200


def test_a_body_waits_for_others_and_is_refused_where_waiting_does_not_help() -> None:
    bodies = Bodies(100)
    with bodies.room() as take:
        take(60)
        with bodies.room() as other:
            with pytest.raises(QueueFull, match="have 60 bytes, this one needs 41 more and the limit is 100"):
                other(41)
            with pytest.raises(TooLarge, match="takes 101 bytes and the limit of all bodies together is 100; send a"):
                other(101)
    with pytest.raises(Cancelled):
        take(1)
    with bodies.room() as later:
        later(100)


@contextmanager
def unread(address: str) -> Iterator[tuple[str, threading.Event]]:
    """A way to a server on which nothing comes back until the event is set, but for the first kilobytes."""
    go, (host, _, port) = threading.Event(), address.rpartition(":")

    def pump(source: socket.socket, target: socket.socket, *, num_free: float) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                target.sendall(data)
                num_free -= len(data)
                assert num_free > 0 or go.wait(60)

    with closing(socket.create_server(("127.0.0.1", 0))) as listening, ThreadPoolExecutor(2) as pumps:
        pumped = socket.create_connection((host, int(port)))
        pumped.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**18)  # the system's buffers are not to hold it all

        def accept() -> None:
            with suppress(OSError), closing(listening.accept()[0]) as caller:
                pumps.submit(pump, pumped, caller, num_free=8192)
                pump(caller, pumped, num_free=2**40)
                pumped.shutdown(socket.SHUT_RDWR)

        pumps.submit(accept)
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}", go
        finally:
            go.set()
            for one in (pumped, listening):  # wakes whoever waits in it, which closing does not
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            pumped.close()


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_an_answer_counts_among_the_bodies_until_its_caller_has_taken_it(
    protocol: str, toy_store: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    image = rng.integers(0, 255, (1200, 1200, 3), dtype=np.uint8)
    tensor = triton.InferInput("image", list(image.shape), "UINT8")
    tensor.set_data_from_numpy(image)

    def ask_much(address: str) -> int:
        if protocol == "grpc":
            with triton.InferenceServerClient(address) as rpc:
                return rpc.infer("toy-pointwise", [tensor], client_timeout=90).as_numpy("entropy").size
        with httpx.Client(base_url=f"http://{address}", timeout=90, trust_env=False) as client:
            return len(ask(client, png(image), accept=NPZ).content)

    settings = {"limit_body_bytes": 6 * MIB, "limit_bodies_bytes": 8 * MIB, "predrain_s": 0}
    with serving(toy_store, tmp_path, **settings) as server, server.client() as client:
        address = server.grpc_address if protocol == "grpc" else server.url.removeprefix("http://")
        with unread(address) as (way, go), ThreadPoolExecutor(1) as caller:
            answer = caller.submit(ask_much, way)
            until(lambda: ask(client).status_code == 429)
            assert not answer.done()
            go.set()
            assert answer.result(60) >= 1200 * 1200
        until(lambda: ask(client).status_code == 200)


@pytest.mark.slow
def test_bodies_of_many_slow_callers_take_no_more_memory_together_than_their_limit(
    toy_store: Path, tmp_path: Path
) -> None:
    held, num_callers = 24 * MIB, 64
    settings = {"limit_body_bytes": BODY, "limit_bodies_bytes": held, "predrain_s": 0, **MEASURED}
    with (
        serving(toy_store, tmp_path, **settings) as server,
        server.client() as client,
        ExitStack() as callers,
        ThreadPoolExecutor(num_callers) as threads,
    ):
        assert ask(client).status_code == 200
        memory = Memory(server)
        memory.forget_peak()
        host, port = server.url.removeprefix("http://").split(":")

        def send_most_of_a_body(_: int) -> socket.socket:
            caller = callers.enter_context(closing(socket.create_connection((host, int(port)), timeout=30)))
            head = f"POST {SEGMENT} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {BODY}\r\n\r\n"
            with suppress(OSError):  # refused while sending
                caller.sendall(head.encode() + bytes(BODY - 1))
            return caller

        refused = 0
        for caller in threads.map(send_most_of_a_body, range(num_callers)):
            caller.settimeout(0.5)
            with suppress(OSError):
                refused += b"429 Too Many Requests" in (said := caller.recv(65536)) and b"retry-after" in said.lower()
        bound_mib = held / MIB + ROOM_MIB + ON_ITS_WAY_MIB * num_callers
        assert refused > 0 and memory.peak_mib < bound_mib < BODY * num_callers / MIB
        callers.close()
        until(lambda: ask(client).status_code == 200)
