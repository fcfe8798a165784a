"""Rates of keys, and files of keys that change under a running server: the same over HTTP and gRPC."""

import os
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from penumbra.models.errors import BadOption, Forbidden, RateExceeded, Unauthenticated
from penumbra.serving import following, keys
from penumbra.serving.keys import OPEN_PATHS, STREAM, Keys
from tests.serving.server import Server, serving, until

FAST, SLOW, ADMIN = "fast-key-0123456789", "slow-key-0123456789", "admin-key-0123456789"
LATER = "later-key-0123456789"
TEXT = f"infer@fast:{FAST}\ninfer@slow=3/h:{SLOW}\nadmin@boss:{ADMIN}\n"


class Clock:
    """What `time.monotonic` says in a module."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(keys, "time", made)
    monkeypatch.setattr(following, "time", made)
    return made


def ask(ring: Keys, key: str, path: str = "/segment") -> str:
    return ring.check(path, f"Bearer {key}")


def num_admitted(ring: Keys, key: str) -> int:
    """How many requests come through at once, and what the next is told."""
    for number in range(1000):
        try:
            ask(ring, key)
        except RateExceeded:
            return number
    return 1000


@pytest.mark.parametrize(("rate", "requests", "within_s"), [("5/s", 5, 1), ("12/min", 12, 60), ("1/h", 1, 3600)])
def test_so_many_requests_may_come_at_once_and_then_one_in_each_part_of_the_time(
    clock: Clock, rate: str, requests: int, within_s: int
) -> None:
    ring = Keys(f"infer@camera={rate}:{FAST} infer:{LATER}")
    assert num_admitted(ring, FAST) == requests
    clock.now_s += 1.01 * within_s / requests
    assert num_admitted(ring, FAST) == 1
    clock.now_s += 0.5 * within_s / requests
    assert num_admitted(ring, FAST) == 0
    clock.now_s += 3 * within_s
    assert num_admitted(ring, FAST) == requests, "no more than the rate is saved up"
    assert num_admitted(ring, LATER) == 1000, "a key without a rate has none"


def test_in_the_time_that_a_refusal_names_the_next_request_comes_through(clock: Clock) -> None:
    ring = Keys(f"infer@camera=7/min:{FAST}")
    num_admitted(ring, FAST)
    with pytest.raises(RateExceeded, match="the key camera may make 7 requests in 60 s, and has") as refusal:
        ask(ring, FAST)
    assert refusal.value.caller == "camera" and refusal.value.headers == {"Retry-After": "9"}
    clock.now_s += refusal.value.retry_after_s
    assert ask(ring, FAST) == "camera"


def test_what_is_refused_or_open_to_all_costs_nothing(clock: Clock) -> None:
    ring = Keys(f"infer@camera=2/h:{FAST}")
    for _ in range(5):
        with pytest.raises(Forbidden) as refusal:
            ask(ring, FAST, "/v2/repository/models/m/load")
        assert refusal.value.caller == "camera"
        for path in OPEN_PATHS:
            ask(ring, FAST, path)
    assert num_admitted(ring, FAST) == 2


def test_a_file_of_keys_is_followed_and_one_that_turns_bad_changes_nothing(
    clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"infer@camera=2/h:{FAST}\n")
    ring = Keys("", file)
    assert ask(ring, FAST) == "camera"
    file.write_text(f"infer@camera=2/h:{FAST}\ninfer@new:{LATER}\n")
    with pytest.raises(Unauthenticated):
        ask(ring, LATER)
    clock.now_s += following.LOOK_S
    assert ask(ring, LATER) == "new"
    assert num_admitted(ring, FAST) == 1, "the rate goes on where it was"
    for bad in (f"infer:{FAST[:9]}", "# none\n", None):
        caplog.clear()
        file.unlink() if bad is None else file.write_text(bad)
        clock.now_s += following.LOOK_S
        assert ask(ring, LATER) == ask(ring, LATER) == "new"
        (line,) = caplog.messages
        assert "what was read before stays in use" in line and FAST[:9] not in line
        clock.now_s += following.LOOK_S
        assert ask(ring, LATER) == "new" and len(caplog.messages) == 1, "it is said once"
    file.write_text(f"infer@other:{SLOW}\n")
    clock.now_s += following.LOOK_S
    assert ask(ring, SLOW) == "other"
    with pytest.raises(Unauthenticated):
        ask(ring, LATER)


def test_what_failed_is_read_again_though_no_file_changes(
    clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As when a certificate's first day comes, or somebody may read it at last."""
    outcomes: list[int | str] = [1, "it may not be read", "it may not be read", "it is not valid yet", 2, 2]

    def read() -> int:
        outcome = outcomes.pop(0)
        if isinstance(outcome, str):
            raise BadOption(outcome)
        return outcome

    (tmp_path / "file").write_text("a")
    followed = following.Followed(read, tmp_path / "file")
    (tmp_path / "file").write_text("ab")
    seen = []
    for _ in range(5):
        clock.now_s += following.LOOK_S
        seen += [followed.now(), followed.now()]
    assert seen == [1, 1, 1, 1, 1, 1, 2, 2, 2, 2] and not outcomes
    assert [line.rpartition(": ")[2] for line in caplog.messages if "stays" in line] == [
        "it may not be read", "it is not valid yet",
    ], "the same is said once"  # fmt: skip


@pytest.fixture(scope="module")
def keyed(toy_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("rated")
    file = directory / "keys"
    file.write_text(TEXT)
    with serving(toy_store, directory, api_keys_file=file, model_control=True, predrain_s=0) as started:
        yield started


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def log_has(server: Server, *parts: str) -> None:
    """Wait until one line of the log has all parts."""
    until(lambda: any(all(part in line for part in parts) for line in server.log.read_text().splitlines()), bound_s=30)


def test_a_server_refuses_over_both_protocols_and_its_log_has_the_name_alone(keyed: Server) -> None:
    status = grpc.StatusCode
    with keyed.client() as client, grpc.insecure_channel(keyed.grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert client.get("/models", headers=bearer(SLOW)).status_code == 200
        load = client.post("/v2/repository/models/toy-latent/load", headers=bearer(SLOW))
        assert load.status_code == 403 and "scope admin" in load.json()["error"]

        def requests() -> Iterator[pb.ModelInferRequest]:
            for _ in range(3):
                yield pb.ModelInferRequest(model_name="unheard")

        metadata = [("authorization", f"Bearer {SLOW}")]
        told = [answer.error_message for answer in stub.ModelStreamInfer(requests(), metadata=metadata, timeout=30)]
        assert ["no model" in sentence for sentence in told] == [True, True, False], told
        assert told[2].startswith("the key slow may make 3 requests in 3600 s")
        answer = client.get("/models", headers=bearer(SLOW))
        assert answer.status_code == 429 and 1 <= int(answer.headers["Retry-After"]) <= 1200
        with pytest.raises(grpc.RpcError) as refused:
            stub.ServerMetadata(pb.ServerMetadataRequest(), metadata=metadata, timeout=30)
        assert refused.value.code() == status.RESOURCE_EXHAUSTED
        trailing = {entry.key: entry.value for entry in refused.value.trailing_metadata()}
        assert 1 <= int(trailing["retry-after"]) <= 1200 and trailing["x-request-id"]
        with pytest.raises(grpc.RpcError) as refused:
            stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="x"), metadata=metadata, timeout=30)
        assert refused.value.code() == status.PERMISSION_DENIED
        assert client.get("/models", headers=bearer(FAST)).status_code == 200
        counted = client.get("/metrics", headers=bearer(FAST)).text
        assert 'penumbra_rejected_total{reason="RateExceeded"} 3.0' in counted
    log_has(keyed, "status=429", "path=/models", "error=RateExceeded", "key=slow")
    log_has(keyed, "status=403", "path=/v2/repository/models/toy-latent/load", "key=slow")
    log_has(keyed, "status=429", "ServerMetadata", "key=slow")
    assert not any(key in keyed.log.read_text() for key in (FAST, SLOW, ADMIN))


def test_a_key_that_is_taken_out_of_the_file_is_refused_soon_and_a_new_one_let_in(keyed: Server) -> None:
    file, stub_of = keyed.log.parent / "keys", service_pb2_grpc.GRPCInferenceServiceStub
    with keyed.client() as client, grpc.insecure_channel(keyed.grpc_address) as channel:

        def code(key: str) -> int:
            return client.get("/models", headers=bearer(key)).status_code

        assert (code(FAST), code(LATER)) == (200, 401)
        beside = file.with_suffix(".new")
        beside.write_text(f"infer@later:{LATER}\n")
        os.replace(beside, file)
        until(lambda: code(LATER) == 200, bound_s=30)
        assert code(FAST) == 401
        with pytest.raises(grpc.RpcError) as refused:
            stub_of(channel).ServerMetadata(
                pb.ServerMetadataRequest(), metadata=[("authorization", f"Bearer {FAST}")], timeout=30
            )
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        file.write_text("")
        kept = "keys cannot be used, and what was read before stays in use"
        until(lambda: code(LATER) == 200 and kept in keyed.log.read_text(), bound_s=30)
        assert (code(LATER), httpx.get(f"{keyed.url}/models", trust_env=False).status_code) == (200, 401)
        file.write_text(TEXT)
        until(lambda: code(FAST) == 200, bound_s=30)


def test_the_call_of_many_requests_is_one_of_the_protocol() -> None:
    assert STREAM.rsplit("/", 1)[1] in {
        method.name for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods
    }
