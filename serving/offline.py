"""Picture files in, files out: what `penumbra predict` writes and prints."""

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from penumbra.models.errors import BadImage
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.bands import BandStream
from penumbra.serving.engine.decode import open_image
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.raster import Raster, open_raster
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.render import Style, render
from penumbra.serving.render.arrays import write_tiff
from penumbra.serving.render.pictures import heat_picture
from penumbra.serving.render.tables import class_table
from penumbra.serving.spool import LONG, Spool, disk

BRIGHTEST_PERCENTILE = 99.5
"""What of a map is drawn white; the few pixels above would leave the rest dark."""

Watch = Callable[[BandStream], object]
"""Is shown the work before it runs, for its progress."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one picture file: the prediction, its table of classes, and the files by what they hold."""

    path: Path
    prediction: Prediction
    classes: list[dict[str, Any]]
    files: dict[str, str]


def predict_file(
    segmenter: Segmenter, path: Path, options: SegmentOptions, output: Path, *, watch: Watch = lambda _: None
) -> Outcome:
    """Segment one picture file and write `<stem>_*.png` and `<stem>_maps.npz`, for a raster `<stem>_*.tif`.

    A map's entry in `files` says which value is drawn white. Raises BadImage naming the file, and any PenumbraError.
    """
    try:
        raster = open_raster(path)
        if raster:
            return predict_raster(segmenter, path, raster, options, output, watch=watch)
        return predict_picture(segmenter, path, options, output)
    except BadImage as error:
        raise BadImage(f"{path}: {error}") from None


def predict_picture(segmenter: Segmenter, path: Path, options: SegmentOptions, output: Path) -> Outcome:
    """In memory, with pictures to look at."""
    started = time.perf_counter()
    image = open_image(path, segmenter.limits)
    decode_ms = 1e3 * (time.perf_counter() - started)
    prediction = segmenter.segment(image, options)
    prediction = replace(prediction, timing_ms={"decode": decode_ms} | prediction.timing_ms)
    output.mkdir(parents=True, exist_ok=True)
    files = {}
    for name in ("labels", "overlay"):
        target = output / f"{path.stem}_{name}.png"
        target.write_bytes(render(prediction, "image/png", Style(name)))
        files[name] = str(target)
    for name, values in prediction.maps.items():
        top = 1.0 if name == "confidence" else max(float(np.percentile(values, BRIGHTEST_PERCENTILE)), 1e-3)
        unit = "" if name in ("confidence", "margin") else " nats"
        target = output / f"{path.stem}_{name}.png"
        heat_picture(values, top=top).save(target)
        files[name] = f"{target} (white is {top:.3g}{unit})"
    files["maps"] = str(output / f"{path.stem}_maps.npz")
    Path(files["maps"]).write_bytes(render(prediction, "application/x-npz", Style()))
    return Outcome(path, prediction, class_table(prediction), files)


def predict_raster(
    segmenter: Segmenter, path: Path, raster: Raster, options: SegmentOptions, output: Path, *, watch: Watch
) -> Outcome:
    """In bands, of any size: `<stem>_labels.tif` and `<stem>_maps.tif`, which lie where the raster does.

    What is done is kept in `<stem>.partial` until all is; a run that was killed goes on from there.
    """
    partial = output / f"{path.stem}.partial"
    about = path.stat()
    spool = Spool(partial, segmenter, raster, options, source=f"{path.name} {about.st_size} {about.st_mtime_ns}")
    prediction = spool.fill(limits=LONG, cancelled=threading.Event(), watch=watch)
    started = time.perf_counter()
    files = {}
    for name, bands in (("labels", ("labels",)), ("maps", tuple(prediction.maps))):
        target = output / f"{path.stem}_{name}.tif"
        with disk():
            with (partial / "writing.tif").open("wb") as file:
                write_tiff(prediction, file, bands=bands)
            os.replace(partial / "writing.tif", target)
        files[name] = str(target)
    classes = class_table(prediction)
    prediction.timing_ms["write"] = 1e3 * (time.perf_counter() - started)
    shutil.rmtree(partial)
    return Outcome(path, prediction, classes, files)


def describe_outcome(outcome: Outcome) -> dict[str, Any]:
    """An outcome's facts for `--json`."""
    prediction = outcome.prediction
    return {
        "model": prediction.card.name, "version": prediction.card.version, "seed": prediction.seed,
        "samples": prediction.num_samples, "members": list(prediction.members), "warnings": list(prediction.warnings),
        "windows": prediction.num_windows, "size": list(prediction.labels_HW.shape),
        "timing_ms": prediction.timing_ms, "abstained": prediction.abstained, "classes": outcome.classes,
        "image": str(outcome.path), "files": outcome.files,
    }  # fmt: skip


@contextmanager
def watched(title: str) -> Iterator[Watch]:
    """A progress bar on stderr, where that is a terminal, while long work runs; short work shows none."""
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:

        def watch(stream: BandStream) -> None:
            task = bar.add_task(title, total=stream.work.plan.num_windows)
            stream.each = lambda: bar.update(task, completed=stream.num_done)

        yield watch


def report(outcome: Outcome) -> None:
    """Print what a person wants to know: classes, uncertainty, time by phase, files."""
    console, prediction = Console(), outcome.prediction
    height, width = prediction.labels_HW.shape
    console.print(
        f"[bold]{outcome.path}[/] {width}x{height} by {prediction.card.name} version {prediction.card.version}, "
        f"{prediction.num_samples} samples, seed {prediction.seed}, {prediction.num_windows} windows"
    )
    if prediction.members:
        console.print(f"members: {', '.join(prediction.members)}")
    if prediction.abstained is not None:
        console.print(f"abstained from {100 * prediction.abstained:.1f} % of the pixels")
    for warning in prediction.warnings:
        console.print(f"[yellow]warning:[/] {warning}")
    table = Table("class", "share", "mean entropy", "mean mutual information", title_justify="left")
    for row in sorted(outcome.classes, key=lambda row: -row["pixels"]):
        table.add_row(
            row["name"], f"{100 * row['share']:.1f} %", f"{row['mean_entropy']:.3f} nats",
            f"{row['mean_mutual_information']:.4f} nats",
        )  # fmt: skip
    console.print(table)
    console.print("time: " + ", ".join(f"{phase} {ms:.1f} ms" for phase, ms in prediction.timing_ms.items()))
    for name, file in outcome.files.items():
        console.print(f"{name}: {file}", soft_wrap=True)
