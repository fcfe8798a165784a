"""The audit lines: who loaded or unloaded what, and how it ended."""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from penumbra.export.bundle import export_network
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.store import find_artifact, find_promoted
from penumbra.serving.gateway import Gateway
from penumbra.serving.oip.protocol import Inference
from penumbra.serving.shadow import Shadow
from penumbra.serving.telemetry import Telemetry
from penumbra.serving.watch import StoreWatch, look
from tests.conftest import FIXED
from tests.serving.in_process import in_process
from tests.serving.server import serving, until
from tests.toys import toy_card

INFER, ADMIN, REQUEST = "infer-key-0123456789", "admin-key-0123456789", "audited-1"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    card, network = toy_card("latent")
    export_network(network, card, tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def fields(caplog: pytest.LogCaptureFixture) -> Iterator[list[dict[str, Any]]]:
    """The fields of all audit lines that come."""
    found: list[dict[str, Any]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.fields)  # type: ignore[attr-defined]

    handler, logger = Keep(), logging.getLogger("penumbra.audit")
    caplog.set_level("INFO", "penumbra.audit")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def test_what_is_loaded_and_unloaded_has_one_line_each_with_its_outcome(
    store: Path, tmp_path: Path, fields: list[dict[str, Any]]
) -> None:
    with in_process(store, tmp_path, model_control=True) as client:
        assert fields == [{"audit": "load", "model": "toy-latent", "version": 1, "by": "start", "outcome": "done"}]
        fields.clear()
        client.headers["x-request-id"] = REQUEST
        for verb, model in (("unload", "toy-latent"), ("load", "toy-latent"), ("load", "no model")):
            client.post(f"/v2/repository/models/{model}/{verb}")
    caller = {"by": "anybody", "request_id": REQUEST}
    assert fields == [
        {"audit": "unload", "model": "toy-latent", "outcome": "done", **caller},
        {"audit": "load", "model": "toy-latent", "version": 1, "outcome": "done", **caller},
        {"audit": "load", "model": "no?model", "outcome": "BadArtifact", **caller},
    ]


def test_where_control_is_off_the_attempt_has_its_line_too(
    store: Path, tmp_path: Path, fields: list[dict[str, Any]]
) -> None:
    with in_process(store, tmp_path) as client:
        fields.clear()
        assert client.post("/v2/repository/models/toy-latent/unload").status_code == 403
    (line,) = fields
    assert (line["audit"], line["model"], line["outcome"]) == ("unload", "toy-latent", "Restricted")


def held(find: Callable[[Path, str], Path]) -> tuple[Callable[[Path, str], Path], threading.Event, threading.Event]:
    """The same, which sets the first event when it begins, and goes on after the second."""
    began, go_on = threading.Event(), threading.Event()

    def find_slowly(store: Path, name: str) -> Path:
        began.set()
        assert go_on.wait(60)
        return find(store, name)

    return find_slowly, began, go_on


def inference_of(store: Path, find: Callable[[Path, str], Path]) -> Inference:
    segmenter = Segmenter.open(store, threads=1, tuning=FIXED)
    return Inference(Gateway(segmenter, Telemetry(), limit_requests=1, timeout_s=60), store=store, find=find)


def test_a_load_whose_caller_gives_up_has_its_line_when_it_has_ended_or_was_not_begun(
    store: Path, fields: list[dict[str, Any]]
) -> None:
    find_slowly, began, go_on = held(find_artifact)

    async def scenario() -> None:
        asked = [asyncio.create_task(inference.load("toy-latent")) for _ in range(2)]
        assert await asyncio.to_thread(began.wait, 60)
        for one in asked:
            one.cancel()
        await asyncio.wait(asked)
        assert [line["outcome"] for line in fields] == ["Cancelled"], "it was not begun"
        go_on.set()
        await asyncio.wrap_future(inference.load_newest("toy-latent", store))

    inference = inference_of(store, find_slowly)
    asyncio.run(scenario())
    inference.gateway.close()
    assert fields[1:] == [{"audit": "load", "model": "toy-latent", "version": 1, "outcome": "done", "by": "anybody"}]


def test_an_unload_is_done_after_the_load_that_was_asked_for_before_it_and_the_shadow_forgets_the_model(
    store: Path, fields: list[dict[str, Any]]
) -> None:
    find_slowly, began, go_on = held(find_promoted)

    async def scenario() -> None:
        loading = asyncio.create_task(inference.load("toy-latent"))
        assert await asyncio.to_thread(began.wait, 60)
        unloading = asyncio.create_task(inference.unload("toy-latent"))
        await asyncio.sleep(0)  # it is asked for
        go_on.set()
        await asyncio.gather(loading, unloading)

    find_promoted(store, "toy-latent")
    inference = inference_of(store, find_slowly)
    gateway = inference.gateway
    gateway.shadow = Shadow(0.5, gateway.segmenter, gateway.telemetry)
    card, network = toy_card("latent")
    export_network(network, card, store)
    gateway.segmenter.unload("toy-latent")
    asyncio.run(scenario())
    assert not gateway.segmenter.cards() and not gateway.shadow.describe()
    gateway.close()
    assert [line["audit"] for line in fields] == ["load", "unload"]


def test_the_watch_names_the_version_that_is_served_where_the_newest_is_not(
    store: Path, fields: list[dict[str, Any]]
) -> None:
    find_promoted(store, "toy-latent")
    inference = inference_of(store, find_promoted)
    watch = StoreWatch(store, look(store), every_s=3600, inference=inference)
    card, network = toy_card("latent")
    export_network(network, card, store)
    for _ in range(2):
        watch.check()
    inference.gateway.close()
    assert fields == [{"audit": "load", "model": "toy-latent", "version": 1, "outcome": "done", "by": "watch"}]


def test_a_server_names_the_key_of_who_asked_over_both_protocols_and_itself(store: Path, tmp_path: Path) -> None:
    keys = f"infer@camera:{INFER} admin@boss:{ADMIN}"
    settings = {"api_keys": keys, "model_control": True, "watch_store_s": 0.2, "log_level": "ERROR", "predrain_s": 0}
    with serving(store, tmp_path, **settings) as server:

        def has(line: str) -> bool:
            return any(line in known for known in server.log.read_text().splitlines())

        admin = {"Authorization": f"Bearer {ADMIN}"}
        httpx.post(f"{server.url}/v2/repository/models/toy-latent/unload", headers=admin, trust_env=False)
        until(
            lambda: has("[penumbra.audit] audit=unload model=toy-latent outcome=done by=boss request_id="), bound_s=30
        )
        with triton.InferenceServerClient(server.grpc_address) as rpc:
            rpc.load_model("toy-latent", headers={"authorization": f"Bearer {ADMIN}"}, client_timeout=60)
            with pytest.raises(InferenceServerException, match="scope admin"):
                rpc.unload_model("toy-latent", headers={"authorization": f"Bearer {INFER}"}, client_timeout=60)
        until(lambda: has("audit=load model=toy-latent version=1 outcome=done by=boss request_id="), bound_s=30)
        card, network = toy_card("latent")
        export_network(network, card, store)
        until(lambda: has("audit=load model=toy-latent version=2 outcome=done by=watch"), bound_s=60)
        log = server.log.read_text()
        assert "audit=load model=toy-latent version=1 outcome=done by=start" in log
        assert "by=camera" not in log and ADMIN not in log
