"""What is sent: a picture as a body, and options as text."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypedDict, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@runtime_checkable
class Savable(Protocol):
    """An image that can write itself, as Pillow's can."""

    def save(self, fp: Any, format: str | None = ..., **parameters: Any) -> None: ...


Picture = str | Path | bytes | NDArray[Any] | Savable
"""The path of a file, a file's bytes, values [H, W, bands] of the model's type (uint8 RGB), or an image of Pillow."""


class Options(TypedDict, total=False):
    """The options of `POST /segment`, as its OpenAPI document has them; what is left out is the model's default."""

    model: str
    version: int
    samples: int
    seed: int
    overlap: float
    outputs: str | Sequence[str]
    scale: float | str
    bands: str | Sequence[str | int]
    boxes: str | Sequence[Sequence[float | str]]
    tags: str | Sequence[str | int]
    views: str
    alpha: float
    max_risk: float
    max_class_risk: float
    deadline_ms: float
    anytime: bool
    priority: int
    picture: str
    levels: int
    min_pixels: int


def as_texts(options: Mapping[str, Any]) -> dict[str, str]:
    """Write options as a query has them; those that are None are left out."""
    return {name: _text(value) for name, value in options.items() if value is not None}


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        plain = [_plain(one) for one in value]
        is_flat = all(isinstance(one, str | int) and "," not in str(one) and str(one)[:1] != "[" for one in plain)
        return ",".join(map(str, plain)) if is_flat else json.dumps(plain)
    return json.dumps(_plain(value))


def _plain(value: object) -> Any:
    """Turn numbers and rows of numpy into Python's."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def body_of(picture: Picture) -> tuple[bytes | Path, str]:
    """Give a request's body, a path where it is to be read piece by piece, and its media type."""
    if isinstance(picture, str | Path):
        return Path(picture), "application/octet-stream"
    if isinstance(picture, bytes):
        return picture, "application/octet-stream"
    buffer = io.BytesIO()
    if isinstance(picture, Savable):
        image: Any = picture
        if getattr(image, "mode", "") in ("CMYK", "YCbCr", "HSV", "LAB"):  # which PNG has not
            image = image.convert("RGB")
        image.save(buffer, format="PNG")
        return buffer.getvalue(), "image/png"
    np.save(buffer, np.ascontiguousarray(picture), allow_pickle=False)
    return buffer.getvalue(), "application/x-npy"
