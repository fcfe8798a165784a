"""Draw the pictures of an evaluation, each by one function from measured values to a figure."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from penumbra.models.card import IGNORE, Card
from penumbra.serving.render.pictures import STRIPE_PX, STRIPES, paint
from penumbra.training.corruptions import SEVERITIES
from penumbra.training.evaluation.answers import Answer
from penumbra.training.evaluation.figures import PATCH_PX, STEPS, UNCERTAINTIES

DPI = 120
FORMATS: dict[str, dict[str, str | None]] = {
    "png": {"Software": "Penumbra"},
    "svg": {"Creator": "Penumbra", "Date": None},
    "pdf": {"Creator": "Penumbra", "CreationDate": None},
}
"""What is written, and what says in a file that it is ours."""
Shown = Sequence[tuple[str, Answer]]
"""Frames for the contact sheet: a title and the answer."""


def draw_all(document: dict[str, Any], card: Card, shown: Shown, folder: Path) -> None:
    """Write every picture there is something for in an evaluation's document, in all formats."""
    folder.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Callable[[], Figure]] = {
        "reliability": lambda: reliability_diagram(document),
        "risk_coverage": lambda: risk_coverage(document),
        "confusion": lambda: confusion_matrix(document, card),
        "contact_sheet": lambda: contact_sheet(shown, card),
    }
    if document["curves"]["pavpu"]:
        drawings["pavpu"] = lambda: patch_curves(document)
    if document["against_samples"]:
        drawings["samples"] = lambda: against_samples(document)
    if "shift" in document:
        drawings["shift"] = lambda: shifts(document)
    for name, draw in drawings.items():
        figure = draw()
        for suffix, metadata in FORMATS.items():
            figure.savefig(folder / f"{name}.{suffix}", dpi=DPI, metadata=metadata)


def title_of(document: dict[str, Any]) -> str:
    """Say which model was measured on what."""
    return (
        f"{document['model']} v{document['version']}, {document['set']} {document['split']}, "
        f"{document['frames']} frames, S = {document['samples']}"
    )


def reliability_diagram(document: dict[str, Any]) -> Figure:
    """Draw accuracy against confidence, and how many pixels have it."""
    pixels, confidence, right = (np.array(row) for row in document["curves"]["reliability"].values())
    figures, filled = document["figures"], pixels > 0
    figure = Figure((5.2, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    edges = np.linspace(0, 1, len(pixels) + 1)
    accuracy, mean = (row[filled] / pixels[filled] for row in (right, confidence))
    top.bar(edges[:-1][filled], accuracy, np.diff(edges)[filled], align="edge", color="#7aa6d8", edgecolor="white")
    top.plot(mean, accuracy, "o", color="#1f3f66", markersize=4, label="mean of each step")
    top.plot([0, 1], [0, 1], "--", color="grey", linewidth=1, label="perfect")
    top.set(ylabel="accuracy", ylim=(0, 1), xlim=(0, 1), title=title_of(document))
    top.title.set_fontsize(9)
    ece = f"ECE {figures['cal/ECE']:.4f}{_interval(document, 'cal/ECE')}\naECE {figures['cal/aECE']:.4f}"
    top.text(0.03, 0.8, ece, transform=top.transAxes)
    top.legend(loc="lower right", fontsize=8)
    bottom.bar(edges[:-1], pixels / pixels.sum(), np.diff(edges), align="edge", color="#b0b0b0", edgecolor="white")
    bottom.set(xlabel="confidence", ylabel="share of pixels", yscale="log")
    return figure


def risk_coverage(document: dict[str, Any]) -> Figure:
    """Draw the share of wrong pixels among those answered, by each score, beside a perfect score and a random one."""
    figure = Figure((6, 4.5), layout="constrained")
    axes, figures = figure.subplots(), document["figures"]
    for name, risks in document["curves"]["risk"].items():
        key = "sc/AURC" if name == "confidence" else f"sc/AURC/{name}"
        label = f"{name.replace('_', ' ')} (AURC {figures[key]:.4f}{_interval(document, key)})"
        axes.plot(STEPS, risks, label=label)
    error = 1 - figures["seg/pixAcc"]
    perfect = np.maximum(STEPS - (1 - error), 0) / np.maximum(STEPS, 1e-9)
    axes.plot(STEPS, perfect, "--", color="grey", linewidth=1, label="perfect ranking")
    axes.axhline(error, color="grey", linewidth=1, linestyle=":", label="random ranking")
    axes.set(xlabel="coverage: share of pixels answered", ylabel="risk: share of these wrong", xlim=(0, 1))
    axes.set_ylim(bottom=0)
    axes.set_title(title_of(document), fontsize=9)
    axes.legend(fontsize=8)
    return figure


def patch_curves(document: dict[str, Any]) -> Figure:
    """Draw PAvPU and its two conditional parts against the threshold, by uncertainty (rows) and patch size (lines)."""
    parts = {
        "pavpu": "PAvPU",
        "accurate_if_certain": "p(accurate | certain)",
        "uncertain_if_inaccurate": "p(uncertain | inaccurate)",
    }
    curves = document["curves"]["pavpu"]
    names = list(dict.fromkeys(key.partition("/")[0] for key in curves))
    figure = Figure((11, 3 * len(names)), layout="constrained")
    grid = figure.subplots(len(names), len(parts), sharey="col", squeeze=False)
    for row, name in zip(grid, names, strict=True):
        high = max(curve["thresholds"][-1] for key, curve in curves.items() if key.startswith(name))
        for axes, (part, title) in zip(row, parts.items(), strict=True):
            for size in PATCH_PX:
                if curve := curves.get(f"{name}/{size}"):
                    axes.plot(curve["thresholds"], np.array(curve[part], float), label=f"{size} px")
            axes.set(xlabel=f"threshold on {name.replace('_', ' ')}, nats", title=title)
            axes.set_xscale("function", functions=(np.cbrt, lambda x: x**3))  # most patches are near 0
            ticks = high * np.array((0, 0.01, 0.1, 0.3, 0.6, 1))
            axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
            axes.set_xlim(0, high)
        row[0].legend(title="patch", fontsize=8)
    figure.suptitle(title_of(document), fontsize=10)
    return figure


def against_samples(document: dict[str, Any]) -> Figure:
    """Draw quality and cost against the number of samples."""
    rows = document["against_samples"]
    counts = [row["samples"] for row in rows]
    panels = {
        "mIoU": ("seg/mIoU",),
        "NLL, nats": ("seg/NLL",),
        "ECE": ("cal/ECE",),
        "AUROC for wrong pixels": ("err/AUROC/entropy", "err/AUROC/mutual_information"),
        "time, multiple of S = 1": ("time_ratio",),
    }
    figure = Figure((14, 3.2), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name in names:
            label = name.rpartition("/")[2].replace("_", " ")
            axes.plot(counts, np.array([row[name] for row in rows], float), "o-", markersize=4, label=label)
        axes.set(xscale="log", xlabel="samples S", xticks=counts, xticklabels=counts)
        axes.set_ylim(bottom=0.5 if "AUROC" in title else 0)  # cut off, a small gain would look like a large one
        axes.set_title(title, fontsize=10)
        axes.minorticks_off()
        if len(names) > 1:
            axes.legend(fontsize=8)
    axes.plot(counts, counts, "--", color="grey", linewidth=1, label="proportional")
    axes.set(yscale="log", yticks=counts, yticklabels=counts)
    axes.autoscale(axis="y")  # a logarithm has no 0 to begin at
    axes.minorticks_off()
    axes.legend(fontsize=8)
    figure.suptitle(f"{document['model']} v{document['version']} against its samples", fontsize=10)
    return figure


def shifts(document: dict[str, Any]) -> Figure:
    """Draw accuracy and calibration of every corruption by its severity, 0 being clean, with 95 % intervals."""
    variants = document["shift"]["variants"]
    kinds = list(dict.fromkeys(name.removesuffix("-1") for name in variants if name.endswith("-1")))
    figure = Figure((3 * len(kinds) / 2, 7), layout="constrained")
    grid = figure.subplots(4, len(kinds) // 2, sharey="row", squeeze=False)
    for i, kind in enumerate(kinds):
        rows = [variants["clean"], *(variants[f"{kind}-{severity}"] for severity in SEVERITIES)]
        for axes, key in zip(grid[2 * (i % 2) : 2 * (i % 2) + 2, i // 2], ("seg/mIoU", "cal/ECE"), strict=True):
            values = np.array([row["figures"][key] for row in rows], float)
            ends = np.array([row["intervals"].get(key, (np.nan, np.nan)) for row in rows]).T
            bars = np.maximum([values - ends[0], ends[1] - values], 0)
            axes.errorbar((0, *SEVERITIES), values, bars, fmt="o-", markersize=4, capsize=3)
            axes.set(ylabel=key.partition("/")[2], xticks=(0, *SEVERITIES))
            seen = ", seen in training" if kind in document["shift"]["seen"] else ""
            axes.set_title(kind.replace("_", " ") + seen, fontsize=9)
    for axes in grid.ravel():  # once all of a row is drawn, for its axes share their range
        axes.set_ylim(bottom=0)
    figure.suptitle(f"{title_of(document)}: severity of corruptions", fontsize=10)
    return figure


def _interval(document: dict[str, Any], key: str) -> str:
    interval = document["intervals"].get(key)
    return " [{:.4f}, {:.4f}]".format(*interval) if interval else ""


def confusion_matrix(document: dict[str, Any], card: Card) -> Figure:
    """Draw where each true class goes, in percent of its pixels."""
    counts_KK = np.array(document["curves"]["confusion"], float)
    percent_KK = 100 * counts_KK / np.maximum(counts_KK.sum(1, keepdims=True), 1)
    names, size = [info.name for info in card.classes], 3 + 0.45 * card.num_classes
    figure = Figure((size + 0.8, size), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(percent_KK, cmap="Blues", vmin=0, vmax=100)
    for truth, row in enumerate(percent_KK):
        for guess, percent in enumerate(row):
            if percent >= 0.5:
                color = "white" if percent > 55 else "black"
                axes.text(guess, truth, f"{percent:.0f}", ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(title_of(document), fontsize=9)
    figure.colorbar(picture, label="% of the true class", shrink=0.8)
    return figure


def contact_sheet(shown: Shown, card: Card) -> Figure:
    """Draw rows of frames: image, truth, answer, error, entropy, and mutual information where there is one."""
    names = [name for name in UNCERTAINTIES if name in shown[0][1].maps]
    columns = 4 + len(names)
    figure = Figure((2.5 * columns, 2 * len(shown) + 0.6), layout="constrained")
    grid = figure.subplots(len(shown), columns, squeeze=False)
    for row, (title, answer) in zip(grid, shown, strict=True):
        row[0].imshow(answer.image_HW3)
        row[0].set_title(f"{title}\naccuracy {100 * answer.accuracy:.1f} %", fontsize=8)
        _labels(row[1], answer.truth_HW, card, title="truth")
        _labels(row[2], np.where(answer.known_HW, answer.labels_HW, IGNORE), card, title="answer where labelled")
        errors_HW = np.where(answer.known_HW, answer.wrong_HW, 0.5)
        row[3].imshow(errors_HW, cmap=ListedColormap(["#10161d", "#707070", "#ff5a36"]), vmin=0, vmax=1)
        row[3].set_title("wrong (orange), void (grey)", fontsize=8)
        for axes, name in zip(row[4:], names, strict=True):
            top = max(float(np.nanpercentile(np.append(answer.maps[name], 0), 99.5)), 1e-3)  # all may be void
            picture = axes.imshow(answer.maps[name], cmap="magma", vmin=0, vmax=top)
            axes.set_title(f"{name.replace('_', ' ')}, nats", fontsize=8)
            figure.colorbar(picture, ax=axes, shrink=0.75).ax.tick_params(labelsize=7)
        for axes in row:
            axes.axis("off")
    legend = [Patch(color="#{:02x}{:02x}{:02x}".format(*info.color), label=info.name) for info in card.classes]
    legend.append(Patch(facecolor="white", edgecolor="black", hatch="////", label="no label"))
    figure.legend(handles=legend, loc="outside lower center", ncols=min(len(legend), 14), fontsize=8)
    return figure


def _labels(axes: Axes, labels_HW: Any, card: Card, *, title: str) -> None:
    axes.imshow(paint(labels_HW, card, stripe_px=max(STRIPE_PX, max(labels_HW.shape) // STRIPES)))
    axes.set_title(title, fontsize=8)
