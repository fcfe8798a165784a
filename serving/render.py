"""From a prediction to bytes: indexed PNG, JSON with run-length masks, npz; and pictures a person can look at."""

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pycocotools import mask as coco

from models.card import IGNORE, Card
from models.errors import NotAcceptable
from serving.engine.kernels import FloatArray
from serving.engine.segmenter import Prediction

PNG_LEVEL = 1
"""zlib level: 6, Pillow's default, takes five times as long for a third off the size."""
COLD, WARM, HOT = "#000004", "#b5367a", "#fcfdbf"
"""From certain to uncertain; dark, middle and light tone of the colour maps."""


def label_picture(prediction: Prediction) -> Image.Image:
    """Labels as a palette image in the model's colours; class ids are the pixel values."""
    picture = Image.fromarray(prediction.labels_HW).convert("L")
    picture.putpalette(palette(prediction.card))
    return picture


def palette(card: Card) -> bytes:
    """768 bytes: the classes' colours by id; all other ids, and the ignore label, are black."""
    colors = np.zeros((256, 3), np.uint8)
    colors[: card.num_classes] = [c.color for c in card.classes]
    colors[IGNORE] = 0
    return colors.tobytes()


def overlay(prediction: Prediction, image_HW3: NDArray[np.uint8], *, opacity: float = 0.55) -> Image.Image:
    """The labels' colours over the image."""
    return Image.blend(Image.fromarray(image_HW3), label_picture(prediction).convert("RGB"), opacity)


def heat_picture(values_HW: FloatArray, *, top: float) -> Image.Image:
    """A map as colours from dark (0) to light (`top` and above)."""
    grey = np.clip(values_HW * (255 / top), 0, 255).astype(np.uint8)
    return ImageOps.colorize(Image.fromarray(grey), black=COLD, mid=WARM, white=HOT)


def png_bytes(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def class_table(prediction: Prediction) -> list[dict[str, Any]]:
    """Per class that occurs: id, name, pixels, share of the image, and the mean of each map over its pixels."""
    labels = prediction.labels_HW.ravel()
    pixels = np.bincount(labels, minlength=prediction.card.num_classes)
    sums = {name: np.bincount(labels, values.ravel(), len(pixels)) for name, values in prediction.maps.items()}
    return [
        {"id": k, "name": info.name, "pixels": int(pixels[k]), "share": float(pixels[k] / labels.size)}
        | {f"mean_{name}": float(total[k] / pixels[k]) for name, total in sums.items()}
        for k, info in enumerate(prediction.card.classes)
        if pixels[k]
    ]


def run_length(mask_HW: NDArray[np.bool_]) -> dict[str, Any]:
    """A mask in COCO's compressed run-length form: column-major, size is [height, width]."""
    encoded = coco.encode(np.asfortranarray(mask_HW, np.uint8))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")}


def json_bytes(prediction: Prediction) -> bytes:
    classes = [row | {"rle": run_length(prediction.labels_HW == row["id"])} for row in class_table(prediction)]
    document = {
        "model": prediction.card.name,
        "version": prediction.card.version,
        "seed": prediction.seed,
        "samples": prediction.num_samples,
        "members": list(prediction.members),
        "windows": prediction.num_windows,
        "size": list(prediction.labels_HW.shape),
        "units": "nats",
        "timing_ms": {phase: round(ms, 3) for phase, ms in prediction.timing_ms.items()},
        "warnings": list(prediction.warnings),
        "abstained": prediction.abstained,
        "classes": classes,
    }
    return json.dumps(document, allow_nan=False).encode()


def npz_bytes(prediction: Prediction) -> bytes:
    """`labels` uint8 and the maps float32 [H, W], uncompressed: noisy maps do not shrink, and this is fast."""
    buffer = io.BytesIO()
    np.savez(buffer, labels=prediction.labels_HW, **prediction.maps)  # type: ignore[arg-type]
    return buffer.getvalue()


WRITERS: dict[str, Callable[[Prediction], bytes]] = {
    "application/json": json_bytes,
    "image/png": lambda prediction: png_bytes(label_picture(prediction)),
    "application/x-npz": npz_bytes,
}
"""Answer formats by media type; the first is the answer to `*/*`."""


def choose_format(accept: str) -> str:
    """The offered media type with the highest quality in an Accept header (RFC 9110); ties go to our order.

    Raises NotAcceptable naming what is on offer.
    """
    ranges = [_media_range(part) for part in accept.split(",") if part.strip()] or [("*/*", 1.0)]
    best = max(WRITERS, key=lambda media: _quality(media, ranges))
    if _quality(best, ranges) <= 0:
        raise NotAcceptable(f"Accept is {accept[:80]!r}; on offer are {', '.join(WRITERS)}")
    return best


def _media_range(text: str) -> tuple[str, float]:
    media, *parameters = (part.strip().lower() for part in text.split(";"))
    quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
    try:
        return media, min(max(float(quality), 0.0), 1.0)
    except ValueError:
        return media, 0.0


def _quality(media: str, ranges: list[tuple[str, float]]) -> float:
    """Quality of the most specific range that matches."""
    for pattern in (media, media.partition("/")[0] + "/*", "*/*"):
        matching = [quality for name, quality in ranges if name == pattern]
        if matching:
            return max(matching)
    return 0.0
