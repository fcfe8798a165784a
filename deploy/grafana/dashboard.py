"""Write penumbra.json, the dashboard for Grafana, from the table of its panels.

python3 deploy/grafana/dashboard.py    (by `make manifests`)
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

WIDTH, HEIGHT = 24, 8
"""Columns of the grid, and rows of a panel on it."""
PICKED = 'job=~"$job",instance=~"$instance"'
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
LEGEND = {"displayMode": "list", "placement": "bottom", "showLegend": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {"legend": LEGEND, "tooltip": {"mode": "multi", "sort": "desc"}},
    "heatmap": {
        "calculate": False, "yAxis": {"axisPlacement": "left"},
        "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
    },
    "table": {},
}  # fmt: skip
TARGETS: dict[str, dict[str, Any]] = {
    "timeseries": {},
    "heatmap": {"format": "heatmap"},
    "table": {"format": "table", "instant": True},
}
"""What a panel's kind asks of Grafana, and its expressions of Prometheus."""
STACKED: dict[str, Any] = {"custom": {"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 30}}


def picked(metric: str, more: str = "") -> str:
    return f"{metric}{{{PICKED}{more}}}"


def rate(metric: str, more: str = "", *, by: str = "", of: str = "rate") -> str:
    grouped = f"sum by ({by}) " if by else "sum"
    return f"{grouped}({of}({picked(f'penumbra_{metric}', more)}[$__rate_interval]))"


def increase(metric: str, by: str) -> str:
    return rate(metric, by=by, of="increase")


def mean(metric: str, by: str = "model") -> str:
    return f"{rate(f'{metric}_sum', by=by)} / {rate(f'{metric}_count', by=by)}"


def quantile(share: float) -> str:
    answered = rate("request_seconds_bucket", ',status="200",protocol!="job"', by="le")
    return f"histogram_quantile({share}, {answered})"


class Panel(NamedTuple):
    """One panel. expressions: by their legends. number: what links to the panel name; it stays."""

    number: int
    title: str
    description: str
    unit: str
    expressions: dict[str, str]
    kind: str = "timeseries"
    is_stacked: bool = False


STRANGE = rate("novelty_bucket", ',le="0.95"', by="model")
ROWS: dict[tuple[int, str], list[list[Panel]]] = {
    (1, "Requests"): [[
        Panel(2, "Requests by status", "499: the caller went away; 429: refused at the door.", "reqps",
              {"{{status}}": rate("request_seconds_count", by="status")}, is_stacked=True),
        Panel(3, "Time of answered requests", "Quantiles over all models and protocols.", "s",
              {f"p{round(100 * share)}": quantile(share) for share in (0.5, 0.9, 0.99)}),
        Panel(4, "Refused and failed, by reason", "Kinds of error; cancelled: the caller went away.", "reqps",
              {"{{reason}}": rate("rejected_total", by="reason"), "cancelled": rate("cancelled_total")}),
    ]],
    (5, "Where the time goes"): [[
        Panel(6, "Mean time by phase", "run overlaps with stitch and read_out, so the sum may exceed the request.",
              "s", {"{{phase}}": mean("phase_seconds", by="phase")}),
        Panel(7, "Queue and requests at work", "Windows accepted and not yet answered; the autoscaler looks at them.",
              "short", {"windows {{instance}}": f"sum by (instance) ({picked('penumbra_queue_windows')})",
                        "requests {{instance}}": f"sum by (instance) ({picked('penumbra_inflight')})"}),
        Panel(8, "Work done", "Windows, and windows x samples, run per second.", "short",
              {f"{what} {{{{model}}}}": rate(f"{what}_total", by="model") for what in ("windows", "samples")}),
    ], [
        Panel(9, "Windows per batch", "Mean over the batches of a model.", "short",
              {"{{model}}": mean("batch_windows")}),
        Panel(10, "Share of a batch's capacity used",
              "1 means that batches are full: a larger batch or another replica may help.", "percentunit",
              {"{{model}}": mean("batch_fill_ratio")}),
        Panel(11, "Batches that did not fit", "Run again in halves.", "short",
              {"{{model}} {{instance}}": increase("oom_total", by="instance, model")}),
    ]],
    (12, "What the answers say"): [[
        Panel(13, "Mean entropy of answers", "Nats. Drift of the pictures shows here first.", "none",
              {"{{model}}": mean("entropy_mean")}),
        Panel(14, "Answers by mean entropy", "Answers per bucket of nats.", "none",
              {"{{le}}": increase("entropy_mean_bucket", by="le")}, "heatmap"),
        Panel(15, "Share of pixels withheld", "Mean over answers with max_risk.", "percentunit",
              {"{{model}}": mean("abstain_ratio")}),
    ], [
        Panel(20, "Expected error of answers", "Mean share of the pixels that is wrong, as far as the models can tell.",
              "percentunit", {"{{model}}": mean("expected_error")}),
        Panel(21, "Strange pictures", "Share of the answers with a novelty above 0.95; a twentieth where pictures are "
              "like the reference.", "percentunit",
              {"{{model}}": f"1 - {STRANGE} / {rate('novelty_count', by='model')}"}),
        Panel(22, "Answers by novelty", "Answers per bucket of the share of reference pictures that were less strange.",
              "none", {"{{le}}": increase("novelty_bucket", by="le")}, "heatmap"),
    ]],
    (16, "Processes"): [[
        Panel(17, "Resident memory", "Of the worker process.", "bytes",
              {"{{instance}}": picked("process_resident_memory_bytes")}),
        Panel(18, "Cores in use", "Of the worker process.", "short",
              {"{{instance}}": f"rate({picked('process_cpu_seconds_total')}[$__rate_interval])"}),
        Panel(19, "Version and start of models", "Time to open, check and warm up each model.", "s",
              {"{{model}} {{instance}}": f"max by (model, instance) ({picked('penumbra_model_load_seconds')})",
               "version {{version}} {{instance}}": f"max by (version, instance) ({picked('penumbra_build_info')})"},
              "table"),
    ], [
        Panel(23, "Models in memory", "Bytes of their files; bounded by PENUMBRA_MODEL_MB.", "bytes",
              {"{{instance}}": picked("penumbra_model_bytes")}),
        Panel(24, "Models loaded and evicted", "After the start: by PENUMBRA_MODEL_MB, and new versions.", "short",
              {"{{model}} loaded": increase("model_loads_total", by="model"),
               "{{model}} evicted": increase("model_evictions_total", by="model")}),
    ]],
}  # fmt: skip
"""Panels under their headings, line by line."""


def variable(name: str) -> dict[str, Any]:
    """A choice of values of a label, all of them at first."""
    among = "" if name == "job" else '{job=~"$job"}'
    query = f"label_values(penumbra_build_info{among}, {name})"
    return {
        "name": name, "type": "query", "label": name, "datasource": SOURCE, "query": {"query": query, "refId": name},
        "refresh": 2, "includeAll": True, "multi": True, "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }  # fmt: skip


def panels() -> Iterator[dict[str, Any]]:
    """Lay the panels out as Grafana has them."""
    y = 0
    for (number, title), lines in ROWS.items():
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "panels": [],
               "gridPos": {"h": 1, "w": WIDTH, "x": 0, "y": y}}  # fmt: skip
        y += 1
        for line in lines:
            width = WIDTH // len(line)
            for place, panel in enumerate(line):
                bounds = {"unit": panel.unit, "min": 0} | ({"max": 1} if panel.unit == "percentunit" else {})
                yield {
                    "id": panel.number, "type": panel.kind, "title": panel.title, "description": panel.description,
                    "datasource": SOURCE, "gridPos": {"h": HEIGHT, "w": width, "x": place * width, "y": y},
                    "targets": [
                        {"refId": name, "datasource": SOURCE, "expr": expression, "legendFormat": legend}
                        | TARGETS[panel.kind]
                        for name, (legend, expression) in zip("ABC", panel.expressions.items(), strict=False)
                    ],
                    "fieldConfig": {"defaults": bounds | (STACKED if panel.is_stacked else {}), "overrides": []},
                    "options": OPTIONS[panel.kind],
                }  # fmt: skip
            y += HEIGHT


def text() -> str:
    """Write the dashboard with a line for each panel."""
    about = {
        "uid": "penumbra", "title": "Penumbra",
        "description": "Requests, where their time goes, and how unsure the answers are.", "tags": ["penumbra"],
        "schemaVersion": 39, "version": 1, "editable": True, "graphTooltip": 1, "refresh": "30s",
        "timezone": "browser", "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [
            {"name": "datasource", "type": "datasource", "label": "data source", "query": "prometheus"},
            variable("job"), variable("instance"),
        ]},
        "annotations": {"list": []},
    }  # fmt: skip
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in about.items()]
    drawn = ",\n  ".join(map(json.dumps, panels()))
    return "{\n" + ",\n".join([*lines, f' "panels": [\n  {drawn}\n ]']) + "\n}\n"


if __name__ == "__main__":
    Path(__file__).with_name("penumbra.json").write_text(text())
