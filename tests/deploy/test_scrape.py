"""Prometheus, as deploy/ configures it, reads the metrics of a server with keys, and can do nothing else there."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.serving.server import ROOT, Server, serving

DEPLOY = ROOT / "deploy"
GUIDE = (ROOT / "docs" / "operate" / "deploy.md").read_text()
INFER, METRICS = "infer-key-0123456789", "metrics-key-0123456789"


def read(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text())


@pytest.fixture(scope="module")
def keyed(toy_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose file of keys has the form that the guide gives it."""
    (form,) = set(re.findall(r"printf '(infer.*)' ", GUIDE))
    directory = tmp_path_factory.mktemp("scraped")
    (directory / "keys").write_text(form.replace("\\n", "\n") % (INFER, METRICS))
    with serving(toy_store, directory, api_keys_file=directory / "keys", predrain_s=0) as started:
        yield started


def composed() -> dict[str, Any]:
    """The job of the compose file's Prometheus, whose key is at the place that the job looks at."""
    (job,) = read("prometheus/prometheus.yaml")["scrape_configs"]
    compose = read("docker/compose.yaml")
    services = compose["services"]
    place = Path(job["authorization"]["credentials_file"])
    assert place.parent == Path("/run/secrets") and place.name in services["prometheus"]["secrets"]
    source = f"deploy/docker/{compose['secrets'][place.name]['file']}"
    keys = Path(services["penumbra"]["environment"]["PENUMBRA_API_KEYS_FILE"])
    assert keys.parent == Path("/run/secrets") and keys.name in services["penumbra"]["secrets"]
    for made in (source, f"deploy/docker/{compose['secrets'][keys.name]['file']}"):
        assert f"> {made}\n" in GUIDE and made in (ROOT / ".gitignore").read_text().splitlines()
    return job


def in_cluster() -> dict[str, Any]:
    """The job for a Prometheus that finds the pods itself and has the guide's secret."""
    (job,) = read("prometheus/kubernetes.yaml")["scrape_configs"]
    secret, key = Path(job["authorization"]["credentials_file"]).parts[-2:]
    assert f"secret generic {secret} --from-file={key}=metrics-key" in GUIDE.replace("etc/", "")
    return job


def by_operator() -> dict[str, Any]:
    """The job that the operator makes of the ServiceMonitor."""
    monitor, service = read("kubernetes/operator/servicemonitor.yaml"), read("kubernetes/service.yaml")
    (endpoint,) = monitor["spec"]["endpoints"]
    credentials = endpoint["authorization"]["credentials"]
    assert monitor["spec"]["selector"]["matchLabels"] == service["metadata"]["labels"]
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    assert f"secret generic {credentials['name']} --from-file={credentials['key']}=metrics-key" in GUIDE
    return {
        "job_name": service["metadata"]["labels"][monitor["spec"]["jobLabel"]], "metrics_path": endpoint["path"],
        "authorization": endpoint["authorization"],
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("job_of", [composed, in_cluster, by_operator])
def test_prometheus_scrapes_a_server_with_keys_by_the_job_that_deploy_has(keyed: Server, job_of: Any) -> None:
    job = job_of()
    assert job["job_name"] == "penumbra", "the alerts ask for this job"
    headers = {"Authorization": f"{job['authorization'].get('type', 'Bearer')} {METRICS}"}
    url = f"{job.get('scheme', 'http')}://{keyed.url.removeprefix('http://')}"
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        scraped = client.get(job.get("metrics_path", "/metrics"), headers=headers)
        assert scraped.status_code == 200 and "penumbra_build_info" in scraped.text
        assert client.get("/metrics").status_code == 401
        assert client.get("/models", headers=headers).status_code == 403


def test_no_pod_invites_a_prometheus_that_has_no_key() -> None:
    template = read("kubernetes/deployment.yaml")["spec"]["template"]
    assert "PENUMBRA_API_KEYS_FILE" in str(template)
    assert "prometheus.io/scrape" not in template["metadata"].get("annotations", {})


def test_there_is_one_name_of_the_image_and_its_tags_are_the_targets() -> None:
    places = [*DEPLOY.rglob("*"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "Makefile"]
    text = "\n".join(path.read_text() for path in places if path.is_file())
    targets = re.findall(r"^FROM runtime AS (\w+)$", (DEPLOY / "docker" / "Dockerfile").read_text(), re.MULTILINE)
    named = re.findall(r"([\w./-]*penumbra[\w-]*:[a-z0-9][\w.-]*)", text)
    images = [name for name in named if not re.search(r":(\d{4,5}|model)$", name)]  # hosts' ports, a field of STAC
    assert set(images) == {f"penumbra:{target}" for target in targets} and len(images) >= 9
