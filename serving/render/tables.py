"""An answer in JSON: facts, a table of classes, and their masks as run lengths."""

import json
from typing import Any, BinaryIO

import numpy as np
from pycocotools import mask as coco

from penumbra.serving.engine.answer import Prediction
from penumbra.serving.render.pictures import blocks


def class_table(prediction: Prediction) -> list[dict[str, Any]]:
    """List for each class that occurs id, name, pixels, their share of those measured, the error expected there, and
    every map's mean."""
    height, width = prediction.labels_HW.shape
    num_measured = height * width - prediction.num_void
    pixels = np.zeros(256, np.int64)
    sums = {name: np.zeros(256) for name in prediction.maps}
    for rows in blocks(height):
        labels = prediction.labels_HW[rows].ravel()
        pixels += np.bincount(labels, minlength=256)
        for name, total in sums.items():
            total += np.bincount(labels, prediction.maps[name][rows].ravel(), 256)
    return [
        {"id": k, "name": info.name, "pixels": int(pixels[k]), "share": float(pixels[k] / num_measured)}
        | means_of({name: float(total[k] / pixels[k]) for name, total in sums.items()})
        for k, info in enumerate(prediction.card.classes)
        if pixels[k]
    ]


def means_of(means: dict[str, float]) -> dict[str, float]:
    """Name the means of maps over a class or a region, and the error expected there where the confidence is known."""
    expected = {"expected_error": max(0.0, 1 - means["confidence"])} if "confidence" in means else {}
    return expected | {f"mean_{name}": mean for name, mean in means.items()}


def write_json(prediction: Prediction, file: BinaryIO) -> None:
    """Write the facts, and per class its row of the table and its mask in COCO's compressed run-length form."""
    height, width = prediction.labels_HW.shape
    labels_WH = np.empty((width, height), np.uint8)
    for rows in blocks(height):
        labels_WH[:, rows] = prediction.labels_HW[rows].T
    classes = class_table(prediction)
    for row in classes:
        encoded = coco.encode((labels_WH == row["id"]).view(np.uint8).T)  # it goes by columns
        row["rle"] = {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")}
    file.write(json.dumps(prediction.facts | {"classes": classes}, allow_nan=False).encode())
