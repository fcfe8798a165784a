"""What `penumbra predict` and `penumbra batch` tell a person: how far they are, and what became of each picture."""

import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress as Bar
from rich.table import Table

from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.request import Progress

NAMED = 20
"""Skipped files, or those with a warning, that are named for a reason; a data set has as many text files as images."""
OWN_MEAN = re.compile(r" \(its mean [^)]*\)")
"""What a warning of strangeness says of one picture alone; the rest is the same for many."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a picture, a file or a URL: its prediction, its table of classes, and the files by their kind."""

    path: Path | str
    prediction: Prediction
    classes: list[dict[str, Any]]
    files: dict[str, str]


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a picture of a batch: `made`, `kept` from an earlier run, or `failed` with the sentence why.

    A file that is no picture is `skipped`, with the reason. warnings: of an answer that was made, one a line.
    """

    source: str
    outcome: str
    error: str = ""
    warnings: str = ""


def progress_bar() -> Bar:
    """A bar on stderr, where that is a terminal."""
    return Bar(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


@contextmanager
def shown_progress(title: str) -> Iterator[Progress]:
    """The progress bar while long work runs; short work shows none."""
    with progress_bar() as bar:
        task = bar.add_task(title, total=None, visible=False)
        yield lambda num_done, num_windows: bar.update(task, completed=num_done, total=num_windows, visible=True)


def outcome_facts(outcome: Outcome) -> dict[str, Any]:
    """An outcome's facts for `--json`."""
    return outcome.prediction.facts | {"classes": outcome.classes, "image": str(outcome.path), "files": outcome.files}


def report(outcome: Outcome) -> None:
    """Print what a person wants to know: classes, uncertainty, time by phase, files."""
    console, prediction = Console(markup=False, emoji=False), outcome.prediction  # names may have any sign
    height, width = prediction.labels_HW.shape
    in_views = f" in the views {prediction.views}" * (prediction.views != "none")
    console.print(
        f"{outcome.path} {width}x{height} by {prediction.card.name} version {prediction.card.version}, "
        f"{prediction.num_samples} samples{in_views}, seed {prediction.seed}, {prediction.num_windows} windows",
        style="bold",
    )
    if prediction.members:
        console.print(f"members: {', '.join(prediction.members)}")
    if prediction.abstained is not None:
        console.print(f"abstained from {100 * prediction.abstained:.1f} % of the pixels")
    if prediction.num_void:
        console.print(f"{100 * prediction.num_void / (height * width):.1f} % of the pixels hold no measurement")
    for name, score in prediction.shares.items():
        console.print(f"{name.replace('_', ' ')} {100 * score:.1f} %")
    for warning in prediction.warnings:
        console.print(f"warning: {warning}", style="yellow")
    means = {"mean_entropy": 3, "mean_mutual_information": 4}
    digits = {name: count for name, count in means.items() if name.removeprefix("mean_") in prediction.maps}
    table = Table("class", "share", *(name.replace("_", " ") for name in digits), title_justify="left")
    for row in sorted(outcome.classes, key=lambda row: -row["pixels"]):
        nats = (f"{row[name]:.{count}f} nats" for name, count in digits.items())
        table.add_row(row["name"], f"{100 * row['share']:.1f} %", *nats)
    console.print(table)
    console.print("time: " + ", ".join(f"{phase} {ms:.1f} ms" for phase, ms in prediction.timing_ms.items()))
    for name, file in outcome.files.items():
        console.print(f"{name}: {file}", soft_wrap=True)


def summarise(reported: Sequence[Result]) -> Iterator[str]:
    """Lines about what failed, each with its sentence, and what was skipped or has a warning, by reason."""
    reasons = defaultdict(list)
    for result in reported:
        if result.outcome == "failed":
            yield f"{result.source}: {result.error}"
        elif result.error:
            reasons[f"skipped {{}}, of which each {result.error}"].append(result.source)
        for warning in result.warnings.splitlines():
            reasons[f"warning of {{}}: {OWN_MEAN.sub('', warning)}"].append(result.source)
    for reason, names in reasons.items():
        rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        yield f"{reason.replace('{}', str(len(names)), 1)}: {', '.join(names[:NAMED])}{rest}"
