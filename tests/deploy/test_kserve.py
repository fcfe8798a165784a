"""The KServe manifests say what the server does: its flags, its ports, its paths, its protocols."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from penumbra.__main__ import main
from penumbra.serving.settings import Settings

FOLDER = Path(__file__).parents[2] / "deploy" / "kserve"
RUNTIMES, SERVICES = (
    list(yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text())) for name in ("runtimes", "services")
)
PORTS = {"v2": 8080, "grpc-v2": 8081}


def _only(items: list[Any]) -> Any:
    (item,) = items
    return item


@pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda runtime: runtime["metadata"]["name"])
def test_a_runtime_exposes_the_port_of_its_protocol(runtime: dict[str, Any]) -> None:
    container = _only(runtime["spec"]["containers"])
    assert container["command"][0] == "penumbra"
    verb = main.commands[container["command"][1]]
    context = verb.make_context("serve", list(container["args"]))
    assert {"v2": context.params["port"], "grpc-v2": context.params["grpc_port"]} == PORTS
    assert context.params["host"] == "0.0.0.0" and str(context.params["store"]) == "/mnt/models"
    protocol = _only(runtime["spec"]["protocolVersions"])
    assert _only(container["ports"])["containerPort"] == PORTS[protocol]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[probe].get("httpGet", {"port": 8080}) | {"grpc": container[probe].get("grpc", {"port": 8081})}
        assert asked["port"] == 8080 and asked["grpc"]["port"] == 8081
        assert asked.get("path", "/v2/health/ready") in ("/v2/health/ready", "/v2/health/live")


@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service["metadata"]["name"])
def test_a_service_asks_for_a_runtime_of_its_protocol_and_lets_it_finish(service: dict[str, Any]) -> None:
    predictor = service["spec"]["predictor"]
    model = predictor["model"]
    runtime = _only([one for one in RUNTIMES if one["metadata"]["name"] == model["runtime"]])
    assert runtime["spec"]["protocolVersions"] == [model["protocolVersion"]]
    assert model["modelFormat"]["name"] in [known["name"] for known in runtime["spec"]["supportedModelFormats"]]
    settings = Settings.model_fields
    assert predictor["terminationGracePeriodSeconds"] > settings["timeout_s"].default + settings["predrain_s"].default


def test_both_protocols_have_a_runtime_and_a_service() -> None:
    assert [_only(one["spec"]["protocolVersions"]) for one in RUNTIMES] == [*PORTS]
    assert [one["spec"]["predictor"]["model"]["protocolVersion"] for one in SERVICES] == [*PORTS]
