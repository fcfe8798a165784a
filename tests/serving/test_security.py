"""Keys, and what a hostile caller may try: nothing is answered, fetched, unpickled or told that should not be."""

import io
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import InferenceServerException

from penumbra.models.errors import BadOption, Forbidden, PenumbraError, Unauthenticated
from penumbra.serving import keys
from penumbra.serving.keys import OPEN_CALLS, OPEN_PATHS, Keys
from tests.conftest import picture
from tests.serving.http.asking import PNG
from tests.serving.server import ROOT, Server, serving

INFER, ADMIN, OTHER = "infer-key-0123456789", "admin-key-0123456789", "wrong-key-0123456789"
METRICS = "metrics-key-0123456789"
BEARERS = {
    "nobody": "", "wrong": f"Bearer {OTHER}", "metrics": f"Bearer {METRICS}", "infer": f"Bearer {INFER}",
    "admin": f"Bearer {ADMIN}",
}  # fmt: skip


@pytest.fixture(scope="module")
def keyed(toy_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("keyed")
    file = directory / "keys"
    file.write_text(f"# of the tests\n  # and more\ninfer:{INFER}\r\n\n")
    settings = {
        "api_keys": f"admin:{ADMIN} metrics@prom:{METRICS}",
        "api_keys_file": file,
        "cors_origins": "https://app.example http://localhost:8080",
        "model_control": True,
        "predrain_s": 0,
    }
    with serving(toy_store, directory, **settings) as started:
        yield started


V2_ROUTES = [
    ("GET", "/v2"), ("GET", "/v2/health/live"), ("GET", "/v2/health/ready"), ("GET", "/v2/models/stats"),
    ("GET", "/v2/models/toy-latent"), ("GET", "/v2/models/toy-latent/versions/1/config"),
    ("POST", "/v2/models/toy-latent/infer"), ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/unheard/load"), ("POST", "/v2/repository/models/unheard/unload"),
    ("POST", "/v2//repository/models/unheard/promote%0A"), ("POST", "/v2/repository/models/unheard/load%0A"),
    ("POST", "//v2/repository/models/a%0Ab/unload"),
]  # fmt: skip
OTHERS = [("GET", "/docs"), ("GET", "/nowhere"), ("POST", "/segment/"), ("PUT", "/predict"), ("OPTIONS", "/segment"),
          ("POST", "//healthz"), ("GET", "/healthz/"), ("GET", "/healthz/../models"), ("HEAD", "/models")]  # fmt: skip


def test_every_route_asks_for_a_key_of_the_right_scope_but_health(keyed: Server) -> None:
    with keyed.client() as client:
        document = client.get("/docs.json", headers={"Authorization": BEARERS["infer"]}).json()
        listed = [
            (method.upper(), re.sub(r"{\w+}", "x", path))
            for path in document["paths"]
            for method in document["paths"][path]
        ]
        for method, path in [*listed, *V2_ROUTES, *OTHERS]:
            url = httpx.URL(keyed.url).copy_with(raw_path=path.encode())
            for who, bearer in BEARERS.items():
                headers = {"Authorization": bearer} if bearer else {}
                answer = client.request(method, url, headers=headers)
                if path in OPEN_PATHS or who == "admin" or (who == "infer" and not re.search("load|promote", path)):
                    assert answer.status_code not in (401, 403), (method, path, who)
                elif who == "metrics" and path == "/metrics":
                    assert answer.status_code == 200
                elif who in ("infer", "metrics"):
                    assert answer.status_code == 403, (method, path, who)
                    assert method == "HEAD" or "is for keys of scope admin" in answer.json()["error"]
                else:
                    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer", (method, path)


def test_a_path_that_two_could_read_differently_is_refused_in_a_sentence(keyed: Server) -> None:
    with keyed.client() as client:
        for path in ("/v2//repository/models/toy-latent/unload%0A", "/models%0A", "/models/%C2%85"):
            url = httpx.URL(keyed.url).copy_with(raw_path=path.encode())
            answer = client.post(url, headers={"Authorization": BEARERS["admin"]})
            assert answer.status_code == 400 and "printable characters" in answer.json()["error"], path


SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
CALLS = [f"/{SERVICE.full_name}/{method.name}" for method in SERVICE.methods] + [
    f"/grpc.health.v1.Health/{method.name}" for method in health_pb2.DESCRIPTOR.services_by_name["Health"].methods
]
CALLS += ["/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", "/no.such.Service/Method"]


def status_of_call(channel: grpc.Channel, name: str, bearer: str) -> grpc.StatusCode:
    """How a call with one empty message ends; one that goes on after its first answer is OK."""
    call = channel.stream_stream(name, request_serializer=lambda data: data, response_deserializer=lambda data: data)
    metadata = [("authorization", bearer)] if bearer else []
    stream = call(iter([b""]), metadata=metadata, timeout=20)
    try:
        next(stream, None)
    except grpc.RpcError as error:
        return error.code()
    stream.cancel()
    return grpc.StatusCode.OK


def test_a_page_of_a_named_origin_may_ask_with_a_key_and_one_of_another_may_not(keyed: Server) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with keyed.client() as client:
        asked = client.options("/segment", headers={"Origin": "https://app.example", **asks})
        assert (asked.status_code, asked.headers["Access-Control-Allow-Origin"]) == (200, "https://app.example")
        other = client.options("/segment", headers={"Origin": "https://other.example", **asks})
        assert other.status_code == 400 and "Access-Control-Allow-Origin" not in other.headers
        answered = client.get("/models", headers={"Origin": "https://app.example", "Authorization": f"Bearer {INFER}"})
        assert answered.headers["Access-Control-Allow-Origin"] == "https://app.example"
        refused = client.get("/models", headers={"Origin": "http://localhost:8080"})  # and its page may read why
        assert refused.status_code == 401
        assert refused.headers["Access-Control-Allow-Origin"] == "http://localhost:8080"


def test_every_call_asks_for_a_key_of_the_right_scope_but_health(keyed: Server) -> None:
    status = grpc.StatusCode
    with grpc.insecure_channel(keyed.grpc_address) as channel:
        for name in CALLS:
            got = {who: status_of_call(channel, name, bearer) for who, bearer in BEARERS.items()}
            if name in OPEN_CALLS:
                assert set(got.values()) == {status.OK}, name
                continue
            assert got["nobody"] == got["wrong"] == status.UNAUTHENTICATED, name
            refused = (status.UNAUTHENTICATED, status.PERMISSION_DENIED)
            assert got["admin"] not in refused, name
            assert got["metrics"] == status.PERMISSION_DENIED
            if re.search("RepositoryModel(Unl|L)oad", name):
                assert got["infer"] == status.PERMISSION_DENIED
            else:
                assert got["infer"] not in refused, name


def test_with_a_key_both_protocols_answer_and_refusals_are_counted(keyed: Server, rng: np.random.Generator) -> None:
    tensor = triton.InferInput("image", [20, 20, 3], "UINT8")
    tensor.set_data_from_numpy(picture(rng, 20, 20))
    bearer = {"authorization": BEARERS["infer"]}
    with keyed.client() as client, triton.InferenceServerClient(keyed.grpc_address) as rpc:
        url, picture_headers = "/segment?model=toy-latent", {"Content-Type": "image/png"}
        before = client.get("/metrics", headers=bearer).text
        assert client.post(url, content=PNG, headers=picture_headers | bearer).status_code == 200
        assert rpc.infer("toy-latent", [tensor], headers=bearer, client_timeout=30).as_numpy("labels").shape == (20, 20)
        assert client.post(url, content=PNG, headers=picture_headers).status_code == 401
        with pytest.raises(InferenceServerException, match="wants an API key"):
            rpc.infer("toy-latent", [tensor], client_timeout=30)
        after = client.get("/metrics", headers=bearer).text
    counts = [re.findall(r'penumbra_rejected_total{reason="Unauthenticated"} (\d+)', page) for page in (before, after)]
    assert int(counts[1][0]) - int((counts[0] or ["0"])[0]) == 2
    log = keyed.log.read_text()
    assert "NO API KEYS" not in log and not any(key in log for key in (INFER, ADMIN, OTHER))


def test_a_server_without_keys_says_so_at_its_start(server: Server) -> None:
    assert "NO API KEYS ARE SET" in server.log.read_text()


@pytest.mark.parametrize(
    ("authorization", "path", "error"),
    [
        ("", "/segment", Unauthenticated),
        ("Bearer", "/segment", Unauthenticated),
        ("Bearer ", "/segment", Unauthenticated),
        (INFER, "/segment", Unauthenticated),
        (f"Basic {INFER}", "/segment", Unauthenticated),
        (f"Bearer {INFER[:-1]}", "/segment", Unauthenticated),
        (f"Bearer {INFER}x", "/segment", Unauthenticated),
        (f"Bearer {INFER.upper()}", "/segment", Unauthenticated),
        (f"Bearer infer:{INFER}", "/segment", Unauthenticated),
        ("Bearer \xff\udcff", "/segment", Unauthenticated),
        (f"Bearer {INFER}", "/v2/repository/models/m/load", Forbidden),
        (f"Bearer {INFER}", "/segment", None),
        (f"bearer  {INFER} ", "/segment", None),
        (f"Bearer {ADMIN}", "/v2/repository/models/m/unload", None),
        (f"Bearer {METRICS}", "/metrics", None),
        (f"Bearer {INFER}", "/metrics", None),
        (f"Bearer {METRICS}", "/segment", Forbidden),
        (f"Bearer {METRICS}", "/metrics/", Forbidden),
        (f"Bearer {METRICS}", "/v2/repository/models/m/load", Forbidden),
        ("", "/readyz", None),
    ],
)
def test_a_header_opens_what_its_key_is_for(authorization: str, path: str, error: type[PenumbraError] | None) -> None:
    ring = Keys(f"infer:{INFER} admin:{ADMIN} metrics:{METRICS}")
    if error is None:
        ring.check(path, authorization)
        return
    with pytest.raises(error) as refusal:
        ring.check(path, authorization)
    assert INFER not in str(refusal.value) and ADMIN not in str(refusal.value)


def test_the_bearer_of_a_key_has_its_name_or_else_its_scope_and_place() -> None:
    ring = Keys(f"infer@camera-7:{INFER} admin:{ADMIN} metrics:{METRICS} infer@second:{METRICS}")
    paths = {INFER: "/segment", ADMIN: "/segment", METRICS: "/metrics"}
    named = {key: ring.check(path, f"Bearer {key}") for key, path in paths.items()}
    assert named == {INFER: "camera-7", ADMIN: "admin-2", METRICS: "metrics-3"}
    assert ring.check("/segment", f"Bearer {METRICS}") == "second", "the entry that opens is the one that is named"
    assert ring.check("/readyz", "") == Keys("").check("/segment", "") == ""


@pytest.mark.parametrize(
    "text",
    [
        "infer",
        "infer:",
        "infer:short",
        f"root:{INFER}",
        INFER,
        f"infer:{INFER} admin:x",
        f"infer@:{INFER}",
        f"infer:{INFER}ü",
        f"infer@a/b:{INFER}",
        f"infer@{'n' * 65}:{INFER}",
        f"@a:{INFER}",
        f"infer=:{INFER}",
        f"infer=0/s:{INFER}",
        f"infer=10:{INFER}",
        f"infer=10/day:{INFER}",
        f"infer=10/s@name:{INFER}",
    ],
)
def test_keys_that_are_none_are_refused_without_being_shown(text: str) -> None:
    with pytest.raises(BadOption, match=r"entry \d of the API keys is none") as refusal:
        Keys(text)
    assert INFER not in str(refusal.value)


def test_a_file_without_keys_or_that_cannot_be_read_never_means_open(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("# none yet\n")
    with pytest.raises(BadOption, match="has no API keys"):
        Keys("", tmp_path / "empty")
    with pytest.raises(BadOption, match="cannot be read"):
        Keys("", tmp_path / "absent")
    assert not Keys("", None)


def test_every_key_is_compared_whatever_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr(keys.hmac, "compare_digest", compare)
    ring = Keys(f"infer:{INFER} admin:{ADMIN} infer:{OTHER}")
    for sent in (INFER, ADMIN, "x", "y" * 5000):
        compared.clear()
        try:
            ring.check("/segment", f"Bearer {sent}")
        except Unauthenticated:
            assert sent[0] in "xy"
        assert compared == [(32, 32)] * 3


# -- what is never done ---------------------------------------------------------------------------


def test_no_address_in_a_request_is_ever_called(server: Server, client: httpx.Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"
        text = triton.InferInput("image", [1], "BYTES")
        text.set_data_from_numpy(np.array([url.encode()], object))
        asked = [
            client.post("/segment?model=toy-latent", data={"image": url}),
            client.post("/segment?model=toy-latent", files={"image": (url, url.encode(), "text/uri-list")}),
            client.post("/segment?model=toy-latent", content=url, headers={"Content-Type": "image/png"}),
            client.post(f"/segment?model=toy-latent&image={url}", content=PNG, headers={"Content-Type": "image/png"}),
            client.post(f"/segment?model={url}", content=PNG, headers={"Content-Type": "image/png"}),
            client.post("/predict", json={"image": url, "model": "toy-latent"}),
            client.post("/predict", json={"image": {"url": url}, "model": "toy-latent"}),
            client.post("/predict", files={"image": ("x", url.encode(), "text/plain")}),
            client.post("/v2/models/toy-latent/infer", json={
                "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [url]}],
            }),
        ]  # fmt: skip
        assert {answer.status_code for answer in asked} <= {400, 404, 415}
        with triton.InferenceServerClient(server.grpc_address) as rpc, pytest.raises(InferenceServerException):
            rpc.infer("toy-latent", [text], client_timeout=30)
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


PICKLES = [
    "application/vnd.bentoml+pickle",
    "application/x-pickle",
    "application/python-pickle; v=5",
    "Application/Pickle",
]


@pytest.mark.parametrize("path", ["/predict", "/segment", "/v2/models/toy-latent/infer", "/jobs", "/nowhere"])
def test_a_pickle_is_415_wherever_it_is_sent(client: httpx.Client, path: str) -> None:
    for media in PICKLES:
        answer = client.post(path, content=b"\x80\x04.", headers={"Content-Type": media})
        assert answer.status_code == 415 and list(answer.json()) == ["error"]


def test_loading_a_store_and_answering_unpickles_nothing(toy_store: Path) -> None:
    code = f"""
import sys, pathlib, pickle, numpy as np
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.options import SegmentOptions
found = []
sys.addaudithook(lambda event, facts: found.append(facts) if event == "pickle.find_class" else None)
with Segmenter.open(pathlib.Path({str(toy_store)!r}), threads=1, device="cpu") as segmenter:
    segmenter.segment(np.zeros((20, 20, 3), np.uint8), SegmentOptions(model="toy-latent"))
print(len(found))
pickle.loads(pickle.dumps(pathlib.Path))
print(len(found))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stdout.split() == ["0", "1"], done.stderr


def test_no_refusal_tells_of_the_inside(server: Server, client: httpx.Client) -> None:
    broken = io.BytesIO()
    np.save(broken, np.zeros(3))
    told = [
        client.post("/segment", content=broken.getvalue(), headers={"Content-Type": "image/png"}),
        client.post("/segment?model=../../etc/passwd", content=PNG, headers={"Content-Type": "image/png"}),
        client.post("/segment?model=toy-latent&version=x", content=PNG, headers={"Content-Type": "image/png"}),
        client.post("/predict", json={"image": [[[1, 2, 3]]], "model": "toy-latent", "seed": 2**70}),
        client.post("/predict", content=b"\xff\xfe", headers={"Content-Type": "application/json"}),
        client.post("/v2/models/toy-latent/infer", content=b"\x00"),
        client.get("/models/..%2f..%2fetc"),
        client.get("/v2/models/%00"),
    ]
    inside = [str(ROOT), str(server.log.parent), "Traceback", "site-packages", 'File "', ".py:", '.py"', " at 0x"]
    for answer in told:
        assert 400 <= answer.status_code < 600
        assert not [word for word in inside if word in answer.text], answer.text
        assert isinstance(json.loads(answer.text)["error"], str)
