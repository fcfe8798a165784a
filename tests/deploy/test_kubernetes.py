"""The manifests fit Kubernetes' own schemas, and each other, the image and the settings."""

import copy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from penumbra.serving.keys import OPEN_PATHS
from penumbra.serving.settings import Settings
from penumbra.serving.telemetry import Telemetry

DEPLOY = Path(__file__).parents[2] / "deploy"
PLACE = DEPLOY / "kubernetes"
MANIFESTS = {path.name: yaml.safe_load(path.read_text()) for path in PLACE.glob("*.yaml") if "kustom" not in path.name}
KINDS = {manifest["kind"]: manifest for manifest in MANIFESTS.values()}
POD = KINDS["Deployment"]["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
LABELS = KINDS["Deployment"]["spec"]["template"]["metadata"]["labels"]
ENVIRONMENT = {item["name"]: item["value"] for item in CONTAINER["env"]}


def is_refused(manifest: dict[str, Any]) -> bool:
    try:
        kubernetes_validate.validate(manifest, "1.31", strict=True)
    except kubernetes_validate.ValidationError:
        return True
    return False


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_fits_the_schema_and_with_a_slip_it_does_not(name: str) -> None:
    manifest = MANIFESTS[name]
    assert not is_refused(manifest)
    slipped = copy.deepcopy(manifest)
    slipped["spec"]["replica"] = 2
    assert is_refused(slipped)


def test_kustomize_takes_every_manifest_and_patches_what_there_is() -> None:
    base = yaml.safe_load((PLACE / "kustomization.yaml").read_text())
    assert sorted(base["resources"]) == sorted(MANIFESTS)
    place = DEPLOY / "kubernetes-cuda"  # outside of the base, or kustomize sees a circle
    overlay = yaml.safe_load((place / "kustomization.yaml").read_text())
    assert (place / overlay["resources"][0]).resolve() == PLACE
    for patch in overlay["patches"]:
        target = next(
            m for m in MANIFESTS.values() if (m["kind"], m["metadata"]["name"]) == tuple(patch["target"].values())
        )
        for operation in yaml.safe_load(patch["patch"]):
            *way, last = operation["path"].split("/")[1:]
            for step in way:
                target = target[int(step) if step.isdigit() else step]
            assert (last in target) == (operation["op"] == "replace")
            target = KINDS["Deployment"]


def test_all_speak_of_the_same_pods_and_ports() -> None:
    assert KINDS["Deployment"]["spec"]["selector"]["matchLabels"] == LABELS
    assert KINDS["Service"]["spec"]["selector"] == LABELS
    assert KINDS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == LABELS
    assert KINDS["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == LABELS
    ports = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    assert ports == {"http": 3000, "grpc": 3001}
    assert {port["targetPort"] for port in KINDS["Service"]["spec"]["ports"]} == set(ports)
    assert {port["port"] for port in KINDS["NetworkPolicy"]["spec"]["ingress"][0]["ports"]} == set(ports)
    scaler = KINDS["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == KINDS["Deployment"]["metadata"]["name"]
    claims = {
        volume["persistentVolumeClaim"]["claimName"] for volume in POD["volumes"] if "persistentVolumeClaim" in volume
    }
    assert claims == {KINDS["PersistentVolumeClaim"]["metadata"]["name"]}


def test_the_autoscaler_looks_at_a_gauge_that_there_is_and_keeps_more_pods_than_may_go() -> None:
    scaler = KINDS["HorizontalPodAutoscaler"]["spec"]
    gauges = {family.name for family in Telemetry().registry.collect() if family.type == "gauge"}
    assert {metric["pods"]["metric"]["name"] for metric in scaler["metrics"]} == {"penumbra_queue_windows"} <= gauges
    assert scaler["minReplicas"] > KINDS["PodDisruptionBudget"]["spec"]["maxUnavailable"]
    assert "replicas" not in KINDS["Deployment"]["spec"], "it would fight the autoscaler"


def test_the_grace_period_is_longer_than_draining_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        assert name.removeprefix("PENUMBRA_").lower() in Settings.model_fields
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert POD["terminationGracePeriodSeconds"] > settings.predrain_s + 2 * settings.timeout_s
    readiness = CONTAINER["readinessProbe"]
    assert settings.predrain_s >= readiness["periodSeconds"] * readiness["failureThreshold"]


def test_probes_ask_open_paths_and_a_busy_server_is_not_killed() -> None:
    probes = {kind: CONTAINER[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")}
    paths = {kind: probe["httpGet"]["path"] for kind, probe in probes.items()}
    assert (
        paths == {"startup": "/readyz", "readiness": "/readyz", "liveness": "/livez"}
        and set(paths.values()) <= OPEN_PATHS
    )
    assert probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"] >= 120
    assert probes["liveness"]["periodSeconds"] * probes["liveness"]["failureThreshold"] >= 30


def test_the_pod_is_as_closed_as_the_image_allows() -> None:
    user = int((DEPLOY / "docker" / "Dockerfile").read_text().split("\nUSER ")[1].split(":")[0])
    assert POD["securityContext"]["runAsNonRoot"] and POD["securityContext"]["runAsUser"] == user > 0
    assert POD["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert POD["automountServiceAccountToken"] is False and KINDS["NetworkPolicy"]["spec"]["egress"] == []
    assert {"requests", "limits"} == CONTAINER["resources"].keys() and "memory" in CONTAINER["resources"]["limits"]
    mounts = {mount["mountPath"]: mount for mount in CONTAINER["volumeMounts"]}
    assert {mount["name"] for mount in mounts.values()} == {volume["name"] for volume in POD["volumes"]}
    assert [path for path, mount in mounts.items() if not mount.get("readOnly")] == ["/tmp", "/jobs"]
    assert ENVIRONMENT["PENUMBRA_API_KEYS_FILE"].startswith("/etc/penumbra/")
