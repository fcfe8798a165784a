"""The alerts and the dashboard ask for metrics that there are, in expressions that Prometheus understands."""

import json
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from penumbra.serving.telemetry import Telemetry

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"
DASHBOARD = json.loads((GRAFANA / "penumbra.json").read_text())
SUFFIXES = {"counter": ["_total"], "info": ["_info"], "histogram": ["_bucket", "_sum", "_count"]}
OF_PROMETHEUS = {"job", "instance", "le"}
"""Labels that scraping and histograms add."""
ALERTS = [
    rule for group in yaml.safe_load((PROMETHEUS / "rules.yaml").read_text())["groups"] for rule in group["rules"]
]
TARGETS = [target for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
EXPRESSIONS = [rule["expr"] for rule in ALERTS] + [target["expr"] for target in TARGETS]


def test_every_expression_reads_metrics_and_labels_that_there_are() -> None:
    telemetry = Telemetry()
    known = {"up": set[str]()}
    for family in telemetry.registry.collect():
        collector = telemetry.registry._names_to_collectors.get(family.name)
        labels = {"version", "commit"} if family.type == "info" else set(getattr(collector, "_labelnames", ()))
        known |= {family.name + suffix: labels for suffix in SUFFIXES.get(family.type, [""])}
    assert len(EXPRESSIONS) > 20
    for expression in EXPRESSIONS:
        names = re.findall(r"\b(?:up|penumbra_\w+|process_\w+)\b(?=[\[{)\s])", expression.replace('job="penumbra"', ""))
        assert names, expression
        labels = set().union(*(known[name] for name in names)) | OF_PROMETHEUS
        grouped = [label for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression) for label in group.split(", ")]
        matched = [
            label for inside in re.findall(r"{([^}]*)}", expression) for label in re.findall(r"(\w+)\s*=", inside)
        ]
        assert {*grouped, *matched} <= labels, expression


def lost(given: object, kept: object, path: str = "") -> Iterator[str]:
    """Where a document differs from what a reader kept of it; fields that the reader added are no difference."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for name, value in given.items():
            yield from lost(value, kept.get(name), f"{path}/{name}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for index, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(one, other, f"{path}/{index}")
    elif given != kept:
        yield f"{path}: {given!r} became {kept!r}"


def test_the_dashboard_is_whole_in_grafanas_own_schema() -> None:
    register_default_plugins()
    kept = json.loads(JSONEncoder().encode(Dashboard.from_json(DASHBOARD)))
    assert not list(lost(DASHBOARD, kept))
    assert list(lost(DASHBOARD | {"colour": "red"}, kept)) == ["/colour: 'red' became None"]


def test_the_dashboard_is_what_its_table_says() -> None:
    written = runpy.run_path(str(GRAFANA / "dashboard.py"))["text"]()
    assert written == (GRAFANA / "penumbra.json").read_text(), "`make manifests` writes it anew"


def test_the_panels_lie_beside_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(x + place["x"], y + place["y"]) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def promtool(*arguments: str | Path) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool, of Debian's package prometheus, is not installed")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120, cwd=PROMETHEUS)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("test", "rules", "rules_test.yaml")


def test_every_alert_is_tested_both_ways_and_documented() -> None:
    cases = [
        case for test in yaml.safe_load((PROMETHEUS / "rules_test.yaml").read_text())["tests"]
        for case in test["alert_rule_test"]
    ]  # fmt: skip
    names = {rule["alert"] for rule in ALERTS}
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == names
    documented = re.findall(
        r"^\| (Penumbra\w+) \|", (ROOT / "docs" / "operate" / "metrics.md").read_text(), re.MULTILINE
    )
    assert sorted(documented) == sorted(names)


def test_prometheus_understands_its_configuration_and_the_dashboards_expressions(tmp_path: Path) -> None:
    in_cluster = (PROMETHEUS / "kubernetes.yaml").read_text()
    named = tmp_path / "named.yaml"  # Debian's promtool knows no kubernetes_sd_configs
    named.write_text(
        in_cluster.replace("kubernetes_sd_configs: [{role: pod}]", "static_configs: [{targets: [a:3000]}]")
    )
    for path in ("prometheus.yaml", named):  # without the files of keys, which are not here
        promtool("check", "config", "--syntax-only", path)
    rules = [
        {"record": f"panel:{i}", "expr": re.sub(r"\$\w+", "5m", target["expr"])} for i, target in enumerate(TARGETS)
    ]
    panels = tmp_path / "panels.yaml"
    panels.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", panels)
