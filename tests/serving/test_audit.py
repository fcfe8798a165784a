"""The audit lines: who loaded or unloaded what, and how it ended."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from penumbra.export.bundle import export_network
from penumbra.models.toy.cards import toy_card
from tests.serving.in_process import in_process
from tests.serving.server import serving, until

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
