"""Picture files in, files out: what `penumbra predict` writes and prints."""

import io
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from penumbra.models.errors import BadImage, BadOption
from penumbra.models.files import write_whole
from penumbra.serving.engine.decode import open_image
from penumbra.serving.engine.options import Limits, SegmentOptions, Style
from penumbra.serving.engine.raster import Raster, open_raster
from penumbra.serving.engine.request import Progress, QueuedRequest, Run
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.files.cluster import Spread
from penumbra.serving.files.receipts import Identity, check_replaceable, identity
from penumbra.serving.files.report import Outcome, shown_progress
from penumbra.serving.objects import local
from penumbra.serving.render import render
from penumbra.serving.render.arrays import write_tiff
from penumbra.serving.render.pictures import write_heat
from penumbra.serving.render.stac import answer_item
from penumbra.serving.render.tables import class_table
from penumbra.serving.spool import LONG, SCRATCH, Spool, disk

IN_MEMORY = Limits(queue_samples=2**40)
"""Limits of images that are answered whole where nobody else waits: few at a time, however many windows they have."""
BRIGHTEST_PERCENTILE = 99.5
"""What of a map is drawn white; the few pixels above would leave the rest dark."""


def predict_files(
    segmenter: Segmenter, images: Sequence[Path | str], options: SegmentOptions, output: Path, *,
    spread: Spread | None = None,
) -> Iterator[tuple[Path | str, Outcome | Exception]]:  # fmt: skip
    """Segment picture files and URLs one by one. What goes wrong with one stands in its outcome's place."""
    pictures = frozenset(identity(path) for path in images if isinstance(path, Path))
    for image in images:
        try:
            if spread and isinstance(image, str):
                raise BadOption(
                    "its copy lies on this machine alone; put it where all nodes read, or leave --engine out"
                )
            with local(image) as path, shown_progress(path.name) as progress:
                found = predict_file(
                    segmenter, path, options, output, progress=progress, pictures=pictures, spread=spread
                )
            outcome: Outcome | Exception = replace(found, path=image)
        except Exception as error:
            outcome = error
        yield image, outcome


def predict_file(
    segmenter: Segmenter, path: Path, options: SegmentOptions, output: Path, *,
    progress: Progress = lambda num_done, num_windows: None,
    pictures: frozenset[Identity] = frozenset(), spread: Spread | None = None,
) -> Outcome:  # fmt: skip
    """Segment one picture file and write `<stem>_*.png` and `<stem>_maps.npz`, of a raster `<stem>_*.tif` and an item.

    A map's entry in `files` says which value is drawn white. pictures: all that are asked about; none of them is
    overwritten, nor any file that Penumbra has not written. spread: where a raster's bands are made, if not here.
    Raises any PenumbraError.
    """
    if not path.is_file():  # a pipe would be waited for, and can be read only once
        raise BadImage("it is a pipe or a device; a file is wanted")
    raster = open_raster(path, segmenter.reading(options))
    if spread and not raster:
        raise BadImage("it is no TIFF, and is held in memory whole; take the engine local")
    maps = options.maps(segmenter.find(options.model, options.version).card)
    kinds = ("labels", "maps") if raster else ("labels", "overlay", *maps)
    files = {name: output / f"{path.stem}_{name}.{'tif' if raster else 'png'}" for name in kinds}
    files |= {"item": output / f"{path.stem}_item.json"} if raster else {"maps": output / f"{path.stem}_maps.npz"}
    check_replaceable(files.values(), pictures)
    if raster:
        run = spread(segmenter, path, options) if spread else QueuedRequest.bands
        return predict_raster(segmenter, path, raster, options, files, progress=progress, run=run)
    return predict_picture(segmenter, path, options, files)


def predict_picture(segmenter: Segmenter, path: Path, options: SegmentOptions, files: dict[str, Path]) -> Outcome:
    """Segment a picture in memory, and write pictures to look at."""
    started = time.perf_counter()
    image = open_image(path, segmenter.limits, segmenter.reading(options))
    decode_ms = 1e3 * (time.perf_counter() - started)
    prediction = segmenter.segment(image, options)
    prediction = replace(prediction, timing_ms={"decode": decode_ms} | prediction.timing_ms)
    described = {}
    for name, target in files.items():
        described[name], buffer = str(target), io.BytesIO()
        if name in prediction.maps:
            values = prediction.maps[name]
            measured = values[~np.isnan(values)] if prediction.num_void else values
            ends = (
                np.percentile(measured, (100 - BRIGHTEST_PERCENTILE, BRIGHTEST_PERCENTILE)) if measured.size else (0, 0)
            )
            dark = min(float(ends[0]), 0.0)  # below 0 are only a model's own maps
            top = 1.0 if name == "confidence" else max(float(ends[1]), dark + 1e-3)
            unit = prediction.card.unit_of(name)
            write_heat(values - np.float32(dark), buffer, top=top - dark)
            said = f"dark is {dark:.3g}, white {top:.3g}" if dark else f"white is {top:.3g}"
            described[name] += f" ({said}{' ' if unit == 'nats' else '; ' * bool(unit)}{unit})"
        elif name == "maps":
            buffer.write(render(prediction, "application/x-npz", Style()))
        else:
            buffer.write(render(prediction, "image/png", Style(name)))
        _put(target, buffer.getvalue())
    return Outcome(path, prediction, class_table(prediction), described)


def _put(target: Path, data: bytes) -> None:
    """Write a file, unless somebody has put one in its place since it was looked at."""
    check_replaceable([target])
    with disk():
        write_whole(target, data)


def predict_raster(
    segmenter: Segmenter, path: Path, raster: Raster, options: SegmentOptions, files: dict[str, Path], *,
    progress: Progress, run: Run,
) -> Outcome:  # fmt: skip
    """Segment a raster of any size in bands, into `<stem>_labels.tif` and `<stem>_maps.tif`, which lie where it does,
    and `<stem>_item.json`, which describes them.

    What is done is kept in `<stem>.partial` until all is; a run that was killed goes on from there.
    """
    partial = files["labels"].with_name(f"{path.stem}.partial")
    about = path.stat()
    spool = Spool(partial, segmenter, raster, options, source=f"{path.name} {about.st_size} {about.st_mtime_ns}")
    prediction = spool.fill(limits=LONG, cancelled=threading.Event(), progress=progress, run=run)
    started = time.perf_counter()
    for name, bands in (("labels", ("labels",)), ("maps", tuple(prediction.maps))):
        with disk():
            with (partial / SCRATCH).open("wb") as file:
                write_tiff(prediction, file, bands=bands)
            check_replaceable([files[name]])
            os.replace(partial / SCRATCH, files[name])
    folder, tiffs = files["item"].parent, {name: files[name].name for name in ("labels", "maps")}
    model = segmenter.residency.directory(segmenter.find(prediction.card.name, prediction.card.version))
    _put(files["item"], answer_item(prediction, path.stem, tiffs, os.path.relpath(model, folder)))
    classes = class_table(prediction)
    prediction.timing_ms["write"] = 1e3 * (time.perf_counter() - started)
    spool.remove()
    return Outcome(path, prediction, classes, {name: str(target) for name, target in files.items()})
