"""What can be said of the image and the compose file without building them; build-without-docker.sh does the rest."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from penumbra.serving.settings import Settings

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "deploy" / "docker"
LINES = re.sub(r"\\\n\s*", "", (DOCKER / "Dockerfile").read_text()).splitlines()
INSTRUCTIONS = [line.partition(" ")[::2] for line in LINES if line and not line.startswith("#")]
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())


def stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions by stage."""
    found: dict[str, list[tuple[str, str]]] = {"": []}
    for word, rest in INSTRUCTIONS:
        if word == "FROM":
            found[rest.split(" AS ")[1]] = []
        found[next(reversed(found))].append((word, rest))
    return found


def test_there_are_two_targets_and_the_cpu_is_the_default() -> None:
    assert list(stages())[-2:] == ["cuda", "cpu"]


def test_what_is_run_has_no_compiler_a_number_for_a_user_a_healthcheck_and_labels() -> None:
    runtime = stages()["runtime"]
    words = {word for word, _ in runtime}
    assert {"HEALTHCHECK", "LABEL", "STOPSIGNAL", "USER", "CMD", "EXPOSE"} <= words
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", dict(runtime)["USER"])
    for name in ("runtime", "cuda", "cpu"):
        assert not re.search(r"apt|pip|gcc", " ".join(rest for word, rest in stages()[name] if word == "RUN"))
    assert set(re.findall(r"opencontainers\.image\.(\w+)=", dict(runtime)["LABEL"])) == {
        "title", "description", "version", "revision",
    }  # fmt: skip


def test_the_commit_of_the_build_reaches_the_server() -> None:
    """Through the image's environment, from the same argument as its label."""
    runtime = stages()["runtime"]
    (environment,) = (rest for word, rest in runtime if word == "ENV")
    assert 'PENUMBRA_REVISION="${REVISION}"' in environment and ("ARG", 'REVISION=""') in runtime
    assert 'revision="${REVISION}"' in dict(runtime)["LABEL"]
    assert "REVISION" in COMPOSE["services"]["penumbra"]["build"]["args"]


def test_torch_is_the_pinned_one_and_everything_that_is_copied_is_sent() -> None:
    pin = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    text = (DOCKER / "Dockerfile").read_text()
    assert set(re.findall(r"torch==[\d.]+", text)) == {pin}
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        name
        for word, rest in INSTRUCTIONS
        if word == "COPY" and not rest.startswith("--")
        for name in rest.split()[:-1]
    }
    assert copied == sent and all((ROOT / name).exists() for name in sent)


def test_the_composed_server_is_closed_and_may_finish_its_work() -> None:
    server = COMPOSE["services"]["penumbra"]
    assert (
        server["read_only"] and server["cap_drop"] == ["ALL"] and server["security_opt"] == ["no-new-privileges:true"]
    )
    names = {name.removeprefix("PENUMBRA_").lower() for name in server["environment"]}
    assert names <= set(Settings.model_fields)
    timeout_s = float(server["environment"]["PENUMBRA_TIMEOUT_S"])
    assert (
        float(server["stop_grace_period"].removesuffix("s"))
        > Settings.model_fields["predrain_s"].default + 2 * timeout_s
    )


def test_composed_ports_are_of_this_machine_alone_images_are_pinned_and_mounts_are_there() -> None:
    for name, service in COMPOSE["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert name == "penumbra" or re.search(r":v?\d+\.\d+\.\d+$", service["image"])
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (DOCKER / source).resolve().exists()


def test_prometheus_scrapes_the_composed_server_and_grafana_asks_prometheus() -> None:
    scraped = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yaml").read_text())["scrape_configs"][0]
    assert scraped["static_configs"][0]["targets"] == ["penumbra:3000"] and "penumbra" in COMPOSE["services"]
    sources = ROOT / "deploy" / "grafana" / "provisioning"
    source = yaml.safe_load((sources / "datasources" / "prometheus.yaml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    dashboards = yaml.safe_load((sources / "dashboards" / "penumbra.yaml").read_text())["providers"][0]["options"][
        "path"
    ]
    assert any(volume.split(":")[1].startswith(dashboards) for volume in COMPOSE["services"]["grafana"]["volumes"])


@pytest.mark.parametrize("name", ["compose.yaml", "gpus.yaml"])
def test_the_schema_of_compose_takes_the_file_and_not_one_with_a_slip(name: str, tmp_path: Path) -> None:
    def is_taken(text: str) -> bool:
        (tmp_path / name).write_text(text)
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", tmp_path / name]
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0

    text = (DOCKER / name).read_text()
    assert is_taken(text)
    for right, wrong in (("cap_drop: [ALL]", "cap_dorp: [ALL]"), ("restart: unless-stopped", "restart: [always]")):
        assert right in text and not is_taken(text.replace(right, wrong))
    (tmp_path / name).write_text(text)
    if shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        environment = os.environ | {"GRAFANA_PASSWORD": "x" * 12, "STORE": "/store"}
        command = ["docker", "compose", "-f", tmp_path / name, "config", "-q"]
        subprocess.run(command, check=True, env=environment, timeout=60)


def places() -> Iterator[Any]:
    """Where the image runs: what its environment gets there, and which paths can be written to. The chart's is that of
    deploy/kubernetes."""
    folder = DOCKER.parent
    names = ("kubernetes/deployment.yaml", "kserve/runtimes.yaml")
    for pod in itertools.chain.from_iterable(yaml.safe_load_all((folder / name).read_text()) for name in names):
        spec = pod["spec"].get("template", pod)["spec"]
        container = spec["containers"][0]
        assert container["securityContext"]["readOnlyRootFilesystem"]
        environment = {item["name"]: item["value"] for item in container["env"]}
        mounts = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        yield pytest.param(environment, mounts, id=pod["metadata"]["name"])
    for name in ("compose", "gpus"):
        for service in yaml.safe_load((DOCKER / f"{name}.yaml").read_text())["services"].values():
            if service["image"].startswith("penumbra:"):
                mounts = {line.split(":")[1] for line in service["volumes"] if not line.endswith(":ro")}
                mounts |= {line.split(":")[0] for line in service["tmpfs"]}
                yield pytest.param(service["environment"], mounts, id=name)


@pytest.mark.parametrize(("environment", "mounts"), list(places()))
def test_whatever_is_written_lies_under_a_mount_wherever_the_image_runs(
    environment: dict[str, str], mounts: set[str]
) -> None:
    (image,) = (rest for word, rest in stages()["runtime"] if word == "ENV")
    known = {"TMPDIR": "/tmp"} | dict(pair.split("=", 1) for pair in image.split()) | environment
    for name in ("HOME", "TMPDIR", "PENUMBRA_JOBS"):
        assert any(Path(known[name]).is_relative_to(mount) for mount in mounts), f"{name} is {known[name]}"
