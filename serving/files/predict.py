"""Picture files in, files out: what `penumbra predict` writes and prints."""

import io
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rich.console import Console
from rich.progress import Progress as Bar
from rich.table import Table

from penumbra.models.card import UNITLESS
from penumbra.models.errors import BadImage, BadOption
from penumbra.models.files import write_whole
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.bands import Progress
from penumbra.serving.engine.decode import open_image
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.raster import RASTER_FAULTS, Raster, gdal, open_raster
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.render import Style, render
from penumbra.serving.render.arrays import write_tiff
from penumbra.serving.render.pictures import write_heat
from penumbra.serving.render.tables import class_table, facts
from penumbra.serving.spool import LONG, SCRATCH, Spool, disk

BRIGHTEST_PERCENTILE = 99.5
"""What of a map is drawn white; the few pixels above would leave the rest dark."""

HEAD_BYTES = 1024
"""Bytes at either end of a file, where what wrote it says so."""
Identity = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one picture file: the prediction, its table of classes, and the files by what they hold."""

    path: Path
    prediction: Prediction
    classes: list[dict[str, Any]]
    files: dict[str, str]


def predict_files(
    segmenter: Segmenter, images: Sequence[Path], options: SegmentOptions, output: Path
) -> Iterator[tuple[Path, Outcome | Exception]]:  # fmt: skip
    """Segment picture files one by one. What goes wrong with one is its own, and stands in its outcome's place."""
    pictures = frozenset(map(identity, images))
    for path in images:
        try:
            with shown_progress(path.name) as progress:
                outcome: Outcome | Exception = predict_file(
                    segmenter, path, options, output, progress=progress, pictures=pictures
                )
        except Exception as error:
            outcome = error
        yield path, outcome


def predict_file(
    segmenter: Segmenter, path: Path, options: SegmentOptions, output: Path, *,
    progress: Progress | None = None, pictures: frozenset[Identity] = frozenset(),
) -> Outcome:  # fmt: skip
    """Segment one picture file and write `<stem>_*.png` and `<stem>_maps.npz`, for a raster `<stem>_*.tif`.

    A map's entry in `files` says which value is drawn white. pictures: all that are asked about; none of them is
    overwritten, nor any file that Penumbra has not written. Raises BadImage naming the file, and any PenumbraError.
    """
    try:
        if not path.is_file():  # a pipe would be waited for, and can be read only once
            raise BadImage("it is a pipe or a device; a file is wanted")
        raster = open_raster(path)
        maps = options.maps(segmenter.find(options.model, options.version).card)
        kinds = ("labels", "maps") if raster else ("labels", "overlay", *maps)
        files = {name: output / f"{path.stem}_{name}.{'tif' if raster else 'png'}" for name in kinds}
        files |= {} if raster else {"maps": output / f"{path.stem}_maps.npz"}
        check_replaceable(files.values(), pictures)
        if raster:
            return predict_raster(segmenter, path, raster, options, files, progress=progress)
        return predict_picture(segmenter, path, options, files)
    except BadImage as error:
        raise BadImage(f"{path}: {error}") from None


def identity(path: Path) -> Identity:
    """A file as its disk knows it, by whatever name."""
    about = path.stat()
    return about.st_dev, about.st_ino


def check_replaceable(targets: Iterable[Path], pictures: frozenset[Identity] = frozenset()) -> None:
    """Raises BadOption for a file that must not be overwritten: one of the pictures, or not written by Penumbra."""
    for target in filter(os.path.lexists, targets):
        if target.exists() and identity(target) in pictures:
            raise BadOption(
                f"{target} is one of the pictures, and an answer would take its place; name another directory"
            )
        if not is_ours(target):
            raise BadOption(
                f"{target} is in the way, and Penumbra did not write it; move it, or name another directory"
            )


def is_ours(path: Path) -> bool:
    """Whether Penumbra wrote a file: its PNGs and npz say so in their first and last bytes, its TIFFs in their tags."""
    try:
        if path.suffix == ".tif":
            with gdal(), rasterio.open(path) as dataset:
                return "PENUMBRA_MODEL" in dataset.tags()
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
            file.seek(max(0, path.stat().st_size - HEAD_BYTES))
            return b"Software\0Penumbra" in head or (head.startswith(b"PK") and file.read().endswith(b"Penumbra"))
    except RASTER_FAULTS:
        return False


def predict_picture(
    segmenter: Segmenter, path: Path, options: SegmentOptions, files: dict[str, Path]
) -> Outcome:  # fmt: skip
    """Segment a picture in memory, and write pictures to look at."""
    started = time.perf_counter()
    image = open_image(path, segmenter.limits)
    decode_ms = 1e3 * (time.perf_counter() - started)
    prediction = segmenter.segment(image, options)
    prediction = replace(prediction, timing_ms={"decode": decode_ms} | prediction.timing_ms)
    described = {}
    for name, target in files.items():
        described[name], buffer = str(target), io.BytesIO()
        if name in prediction.maps:
            values = prediction.maps[name]
            measured = values[~np.isnan(values)] if prediction.num_void else values
            brightest = float(np.percentile(measured, BRIGHTEST_PERCENTILE)) if measured.size else 0.0
            top = 1.0 if name == "confidence" else max(brightest, 1e-3)
            own = {extra.name: f"; {extra.unit}" for extra in prediction.card.extra_maps}
            unit = own.get(name, "" if name in UNITLESS else " nats")
            write_heat(values, buffer, top=top)
            described[name] += f" (white is {top:.3g}{unit})"
        elif name == "maps":
            buffer.write(render(prediction, "application/x-npz", Style()))
        else:
            buffer.write(render(prediction, "image/png", Style(name)))
        with disk():
            write_whole(target, buffer.getvalue())
    return Outcome(path, prediction, class_table(prediction), described)


def predict_raster(
    segmenter: Segmenter, path: Path, raster: Raster, options: SegmentOptions, files: dict[str, Path], *,
    progress: Progress | None,
) -> Outcome:  # fmt: skip
    """Segment a raster of any size in bands, into `<stem>_labels.tif` and `<stem>_maps.tif`, which lie where it does.

    What is done is kept in `<stem>.partial` until all is; a run that was killed goes on from there.
    """
    partial = files["labels"].with_name(f"{path.stem}.partial")
    about = path.stat()
    spool = Spool(partial, segmenter, raster, options, source=f"{path.name} {about.st_size} {about.st_mtime_ns}")
    prediction = spool.fill(limits=LONG, cancelled=threading.Event(), progress=progress)
    started = time.perf_counter()
    for name, bands in (("labels", ("labels",)), ("maps", tuple(prediction.maps))):
        with disk():
            with (partial / SCRATCH).open("wb") as file:
                write_tiff(prediction, file, bands=bands)
            os.replace(partial / SCRATCH, files[name])
    classes = class_table(prediction)
    prediction.timing_ms["write"] = 1e3 * (time.perf_counter() - started)
    spool.remove()
    return Outcome(path, prediction, classes, {name: str(target) for name, target in files.items()})


def describe_outcome(outcome: Outcome) -> dict[str, Any]:
    """An outcome's facts for `--json`."""
    return facts(outcome.prediction) | {
        "classes": outcome.classes, "image": str(outcome.path), "files": outcome.files,
    }  # fmt: skip


@contextmanager
def shown_progress(title: str) -> Iterator[Progress]:
    """A progress bar on stderr, where that is a terminal, while long work runs; short work shows none."""
    with Bar(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(title, total=None, visible=False)
        yield lambda num_done, num_windows: bar.update(task, completed=num_done, total=num_windows, visible=True)


def report(outcome: Outcome) -> None:
    """Print what a person wants to know: classes, uncertainty, time by phase, files."""
    console, prediction = Console(markup=False, emoji=False), outcome.prediction  # names may have any sign
    height, width = prediction.labels_HW.shape
    console.print(
        f"{outcome.path} {width}x{height} by {prediction.card.name} version {prediction.card.version}, "
        f"{prediction.num_samples} samples, seed {prediction.seed}, {prediction.num_windows} windows",
        style="bold",
    )
    if prediction.members:
        console.print(f"members: {', '.join(prediction.members)}")
    if prediction.abstained is not None:
        console.print(f"abstained from {100 * prediction.abstained:.1f} % of the pixels")
    if prediction.num_void:
        console.print(f"{100 * prediction.num_void / (height * width):.1f} % of the pixels hold no measurement")
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
