"""The chart: Helm takes it, what it renders fits the schemas, and deploy/kubernetes is what it renders by default."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from penumbra.serving.keys import OPEN_PATHS
from penumbra.serving.settings import Settings

ROOT = Path(__file__).parents[2]
CHART, PLAIN = ROOT / "deploy" / "helm" / "penumbra", ROOT / "deploy" / "kubernetes"
CHARTS = ROOT / ".venv" / "charts"
"""What `make .venv/charts` installs."""
INIT, IMAGE = ("store.kind=init", "store.image.reference=registry.example/models:3"), (
    "store.kind=image", "store.image.reference=registry.example/models:3",
)  # fmt: skip
TLS = ("tls.secret=penumbra-tls", "monitor.enabled=true")
VARIANTS: list[tuple[str, ...]] = [
    (), ("monitor.enabled=true", "monitor.labels.release=prometheus"), ("autoscaler.kind=keda",),
    ("autoscaler.kind=none", "autoscaler.min=3"), INIT, IMAGE, ("store.claim.name=shared",), TLS,
    ("store.claim.storageClass=nfs", "image.pullPolicy=Always", "image.pullSecrets[0].name=pull"),
    ("gpus=1", "image.tag=cuda", "nodeSelector.gpu=yes", "tolerations[0].operator=Exists"),
    ("keys.secret=", "network.policy=false", "monitor.enabled=true"), ("settings.WATCH_STORE_S=30", "jobs.size=5Gi"),
]  # fmt: skip
VERSIONS = ("1.31", "1.33", "1.37")


def program(name: str) -> str:
    found = shutil.which(name, path=f"{CHARTS}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed; `make .venv/charts` brings it")
    return found


def helm(verb: str, *arguments: str, values: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    options = itertools.chain.from_iterable(("--set", value) for value in values)
    command = [program("helm"), verb, *arguments, str(CHART), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def rendered(*values: str, name: str = "segment") -> dict[str, dict[str, Any]]:
    """Manifests by kind."""
    done = helm("template", name, "--namespace", "vision", values=values)
    assert done.returncode == 0, done.stderr
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all(done.stdout) if manifest}


def operators() -> dict[str, Any]:
    """Models of the kinds of two operators; they pass over what they do not know, so nothing may be lost in them."""
    if not (CHARTS / "cloudcoil").is_dir():
        pytest.skip("the operators' models are not installed; `make .venv/charts` brings them")
    if str(CHARTS) not in sys.path:
        sys.path.append(str(CHARTS))
    from cloudcoil.models.keda import v1alpha1
    from cloudcoil.models.prometheus_operator import v1

    return {"ScaledObject": v1alpha1.ScaledObject, "ServiceMonitor": v1.ServiceMonitor}


def fits(manifest: dict[str, Any], version: str) -> bool:
    """Whether a manifest is one of its kind, with no field that the kind has not."""
    if model := operators().get(manifest["kind"]):
        read = model.model_validate(manifest).model_dump(mode="json", by_alias=True, exclude_unset=True)
        return bool(read == manifest)
    try:
        kubernetes_validate.validate(manifest, version, strict=True)
    except kubernetes_validate.ValidationError:
        return False
    return True


@pytest.mark.parametrize("values", VARIANTS, ids=lambda values: ",".join(values) or "default")
def test_helm_takes_the_chart_and_what_it_renders_fits_the_schemas(values: tuple[str, ...]) -> None:
    linted = helm("lint", "--strict", values=values)
    assert linted.returncode == 0, linted.stdout + linted.stderr
    for kind, manifest in rendered(*values).items():
        assert manifest["metadata"]["name"].startswith("segment")
        for version in VERSIONS:
            assert fits(manifest, version), (kind, version)
        assert not fits(manifest | {"spec": manifest["spec"] | {"slip": 1}}, "1.33"), kind


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("store.kind=disk", "store"), ("replicas=3", "replicas"), ("settings.PENUMBRA_JOBS=a", "PENUMBRA_JOBS"),
        ("autoscaler.kind=cpu", "autoscaler"), ("gpus=-1", "gpus"), ("store.kind=image", "store.image.reference"),
    ],
)  # fmt: skip
def test_a_value_that_is_none_is_refused_by_name(value: str, named: str) -> None:
    refused = helm("template", "segment", values=(value,))
    assert refused.returncode != 0 and named in refused.stderr, refused.stderr


def test_the_plain_manifests_are_what_the_chart_renders(tmp_path: Path) -> None:
    done = helm("template", "penumbra", "--output-dir", str(tmp_path), values=("monitor.enabled=true",))
    assert done.returncode == 0, done.stderr
    made = {path.name: path.read_text() for path in (tmp_path / "penumbra" / "templates").iterdir()}
    there = {path.name: path.read_text() for path in PLAIN.glob("*.yaml") if path.name != "kustomization.yaml"}
    there["monitor.yaml"] = (PLAIN / "operator" / "servicemonitor.yaml").read_text()
    assert made == there, "`make manifests` writes them anew"


@pytest.mark.parametrize("folder", ["kubernetes", "kubernetes-cuda"])
def test_kustomize_builds_what_kubectl_would_apply(folder: str) -> None:
    command = [program("kubectl"), "kustomize", str(ROOT / "deploy" / folder)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert built.returncode == 0, built.stderr
    manifests = {manifest["kind"]: manifest for manifest in yaml.safe_load_all(built.stdout)}
    container = manifests["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    is_cuda = folder.endswith("cuda")
    assert container["image"] == ("penumbra:cuda" if is_cuda else "penumbra:cpu")
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) is is_cuda
    assert all(fits(manifest, "1.33") for manifest in manifests.values())


def pod_of(*values: str) -> dict[str, Any]:
    pod: dict[str, Any] = rendered(*values)["Deployment"]["spec"]["template"]["spec"]
    return pod


def test_with_tls_the_server_the_probes_and_prometheus_use_it() -> None:
    manifests = rendered(*TLS)
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {item["name"]: item["value"] for item in container["env"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert Path(environment["PENUMBRA_TLS_CERT"]) == Path(mounts["tls"], "tls.crt")
    assert Path(environment["PENUMBRA_TLS_KEY"]) == Path(mounts["tls"], "tls.key")
    probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    assert {probe["scheme"] for probe in probes} == {"HTTPS"} and {probe["path"] for probe in probes} <= OPEN_PATHS
    (endpoint,) = manifests["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["scheme"] == "https" and endpoint["tlsConfig"]["serverName"] == "segment.vision.svc"
    assert "h2c" not in str(manifests["Service"])


def test_the_store_comes_from_where_it_is_said_and_no_claim_is_made_for_others() -> None:
    assert rendered()["PersistentVolumeClaim"]["metadata"]["name"] == "segment-store"
    for values, volume in (
        (INIT, {"name": "store", "emptyDir": {}}),
        (IMAGE, {"name": "store", "image": {"reference": "registry.example/models:3"}}),
        (("store.claim.name=a",), {"name": "store", "persistentVolumeClaim": {"claimName": "a", "readOnly": True}}),
    ):  # fmt: skip
        manifests = rendered(*values)
        pod = manifests["Deployment"]["spec"]["template"]["spec"]
        assert pod["volumes"][0] == volume and "PersistentVolumeClaim" not in manifests
        assert ("initContainers" in pod) is (values is INIT)
    (init,) = pod_of(*INIT)["initContainers"]
    assert init["securityContext"] == pod_of()["containers"][0]["securityContext"]


def test_settings_are_ones_of_the_server_and_the_grace_period_follows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pod = pod_of("settings.TIMEOUT_S=200", "settings.PREDRAIN_S=10", "settings.WATCH_STORE_S=30")
    for item in pod["containers"][0]["env"]:
        assert item["name"].removeprefix("PENUMBRA_").lower() in Settings.model_fields
        monkeypatch.setenv(item["name"], item["value"])
    settings = Settings()
    assert (settings.timeout_s, settings.watch_store_s) == (200, 30)
    assert pod["terminationGracePeriodSeconds"] > settings.predrain_s + 2 * settings.timeout_s
    fractions = pod_of("settings.TIMEOUT_S=90.5", "settings.PREDRAIN_S=2.5")
    assert fractions["terminationGracePeriodSeconds"] > 2.5 + 2 * 90.5


def test_numbers_of_a_values_file_reach_the_server_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text("settings: {LIMIT_MEMORY_BYTES: 4294967296, PREDRAIN_S: 0.5, TIMEOUT_S: 90}")
    done = helm("template", "segment", "--values", str(tmp_path / "values.yaml"))
    assert done.returncode == 0, done.stderr
    manifests = {one["kind"]: one for one in yaml.safe_load_all(done.stdout) if one}
    environment = {
        item["name"]: item["value"]
        for item in manifests["Deployment"]["spec"]["template"]["spec"]["containers"][0]["env"]
    }
    assert environment["PENUMBRA_LIMIT_MEMORY_BYTES"] == "4294967296"
    assert (environment["PENUMBRA_PREDRAIN_S"], environment["PENUMBRA_TIMEOUT_S"]) == ("0.5", "90")


def test_two_releases_in_one_namespace_have_pods_of_their_own() -> None:
    one, other = rendered(name="one"), rendered(name="other")
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert one[kind]["spec"]["selector"] != other[kind]["spec"]["selector"]
    assert {manifest["metadata"]["name"] for manifest in one.values()}.isdisjoint(
        manifest["metadata"]["name"] for manifest in other.values()
    )


def test_keda_asks_prometheus_for_the_pods_of_this_release() -> None:
    manifests = rendered("autoscaler.kind=keda")
    (trigger,) = manifests["ScaledObject"]["spec"]["triggers"]
    assert 'penumbra_queue_windows{namespace="vision", pod=~"segment-' in trigger["metadata"]["query"]
    pods = re.search('pod=~"(.+?)"', trigger["metadata"]["query"])
    assert pods and re.fullmatch(pods[1], "segment-7f8d9c-abcde") and not re.fullmatch(pods[1], "segment-gpu-7f8d9c-ab")
    assert "HorizontalPodAutoscaler" not in manifests and "replicas" not in manifests["Deployment"]["spec"]
    assert rendered("autoscaler.kind=none", "autoscaler.min=3")["Deployment"]["spec"]["replicas"] == 3
