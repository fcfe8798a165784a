"""Picture files in, files out: what `penumbra predict` writes and prints."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from models.errors import BadImage
from serving.engine.decode import decode_image
from serving.engine.options import SegmentOptions
from serving.engine.segmenter import Prediction, Segmenter
from serving.render import class_table, heat_picture, label_picture, npz_bytes, overlay

BRIGHTEST_PERCENTILE = 99.5
"""What of a map is drawn white; the few pixels above would leave the rest dark."""


def predict_file(
    segmenter: Segmenter, path: Path, options: SegmentOptions, output: Path
) -> tuple[Prediction, dict[str, str]]:
    """Segment one picture file and write `<stem>_*.png` and `<stem>_maps.npz` into `output`.

    Returns the prediction and the files by what they hold; a map's entry says which value is drawn white.
    Raises BadImage naming the file, and any other PenumbraError.
    """
    started = time.perf_counter()
    try:
        image_HW3 = decode_image(path.read_bytes(), segmenter.limits)
    except BadImage as error:
        raise BadImage(f"{path}: {error}") from None
    decode_ms = 1e3 * (time.perf_counter() - started)
    prediction = segmenter.segment(image_HW3, options)
    prediction = replace(prediction, timing_ms={"decode": decode_ms} | prediction.timing_ms)
    output.mkdir(parents=True, exist_ok=True)
    pictures = {"labels": (label_picture(prediction), ""), "overlay": (overlay(prediction, image_HW3), "")}
    for name, values in prediction.maps.items():
        top = 1.0 if name == "confidence" else max(float(np.percentile(values, BRIGHTEST_PERCENTILE)), 1e-3)
        unit = "" if name in ("confidence", "margin") else " nats"
        pictures[name] = heat_picture(values, top=top), f" (white is {top:.3g}{unit})"
    files = {}
    for name, (picture, note) in pictures.items():
        target = output / f"{path.stem}_{name}.png"
        picture.save(target)
        files[name] = f"{target}{note}"
    files["maps"] = str(output / f"{path.stem}_maps.npz")
    Path(files["maps"]).write_bytes(npz_bytes(prediction))
    return prediction, files


def describe_prediction(prediction: Prediction) -> dict[str, Any]:
    """A prediction's facts for `--json`."""
    return {
        "model": prediction.card.name, "version": prediction.card.version, "seed": prediction.seed,
        "samples": prediction.num_samples, "members": list(prediction.members), "warnings": list(prediction.warnings),
        "windows": prediction.num_windows, "size": list(prediction.labels_HW.shape),
        "timing_ms": prediction.timing_ms, "abstained": prediction.abstained, "classes": class_table(prediction),
    }  # fmt: skip


def report(prediction: Prediction, path: Path, files: dict[str, str]) -> None:
    """Print what a person wants to know: classes, uncertainty, time by phase, files."""
    console = Console()
    height, width = prediction.labels_HW.shape
    console.print(
        f"[bold]{path}[/] {width}x{height} by {prediction.card.name} version {prediction.card.version}, "
        f"{prediction.num_samples} samples, seed {prediction.seed}, {prediction.num_windows} windows"
    )
    if prediction.members:
        console.print(f"members: {', '.join(prediction.members)}")
    if prediction.abstained is not None:
        console.print(f"abstained from {100 * prediction.abstained:.1f} % of the pixels")
    for warning in prediction.warnings:
        console.print(f"[yellow]warning:[/] {warning}")
    table = Table("class", "share", "mean entropy", "mean mutual information", title_justify="left")
    for row in sorted(class_table(prediction), key=lambda row: -row["pixels"]):
        table.add_row(
            row["name"], f"{100 * row['share']:.1f} %", f"{row['mean_entropy']:.3f} nats",
            f"{row['mean_mutual_information']:.4f} nats",
        )  # fmt: skip
    console.print(table)
    console.print("time: " + ", ".join(f"{phase} {ms:.1f} ms" for phase, ms in prediction.timing_ms.items()))
    for name, file in files.items():
        console.print(f"{name}: {file}", soft_wrap=True)
