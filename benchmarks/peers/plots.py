"""One picture of a run: requests per second and latencies by traffic, and the windows' time in parts."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = {"penumbra": "#3b2f6b", "bentoml": "#9aa5b1", "litserve": "#c9a66b", "triton": "#7fae7f"}


def draw(results: dict[str, Any], path: Path) -> None:
    """Writes a PNG. results: as `benchmarks.peers` keeps them; kinds of traffic that were not run are left out."""
    traffic = {kind: one for kind, one in results.items() if isinstance(one, dict) and _is_traffic(one)}
    windows = results.get("one large picture in windows")
    panels = 2 * bool(traffic) + bool(windows)
    if not panels:
        return
    figure = Figure((5.5 * panels, 0.9 + 0.75 * max(len(traffic), 3)), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    if traffic:
        _bars(axes.pop(0), traffic, "requests/s", title="requests per second (more is better)")
        _bars(axes.pop(0), traffic, "p50 ms", until="p99 ms", title="latency, p50 and p99 (thin), ms (less is better)")
    if windows:
        _windows(axes.pop(0), windows)
    figure.savefig(path, dpi=110)


def _is_traffic(one: dict[str, Any]) -> bool:
    return all(isinstance(figures, dict) and "requests/s" in figures for figures in one.values())


def _bars(axes: Axes, traffic: dict[str, Any], value: str, *, title: str, until: str = "") -> None:
    height = 0.8 / max(len(by_server) for by_server in traffic.values())
    for row, by_server in enumerate(traffic.values()):
        for place, (name, figures) in enumerate(by_server.items()):
            y, (server, _, tuned) = row + place * height, name.partition(", ")
            color = COLORS[server]
            label = name if row == 0 else None
            axes.barh(y, figures[value], height, color=color, hatch="///" * bool(tuned), edgecolor="white", label=label)
            if until:
                axes.barh(y, figures[until], height / 6, color=color)
    axes.set_yticks([row + 0.3 for row in range(len(traffic))], list(traffic), fontsize=8)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8)


def _windows(axes: Axes, windows: dict[str, Any]) -> None:
    rows = {}
    for name in ("penumbra", "penumbra, tuned"):
        if ours := windows.get(name):
            parts_s = ours["network s"], ours["moments s"], ours["total s"]
            rows[name] = [parts_s[0], parts_s[1] - parts_s[0], parts_s[2] - parts_s[1]]
    for name in ("monai", "monai, tuned file"):
        for side in windows.get(name, ()):
            label = f"{name}, {side['batch']} at a time" + f", buffer {side['buffer']}" * bool(side.get("buffer"))
            rows[label] = [side["network s"], 0, side["total s"] - side["network s"]]
    left = [0.0] * len(rows)
    parts = ("network", "probabilities and entropies", "stitching")
    for part, name, color in zip(range(3), parts, ("#9aa5b1", "#c9a66b", "#3b2f6b"), strict=True):
        widths = [row[part] for row in rows.values()]
        axes.barh(list(rows), widths, left=left, color=color, label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_title(f"{windows['side']}x{windows['side']} in windows, seconds", fontsize=9)
    axes.legend(fontsize=8)
