"""How tests ask the HTTP surface for a picture that they know the answer of, and what its answers hold."""

import io
import struct
import zlib
from typing import Any

import httpx
import numpy as np
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import picture

JSON, PICTURE, NPZ = "application/json", "image/png", "application/x-npz"


def png(image_HW3: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HW3).save(buffer, "PNG")
    return buffer.getvalue()


IMAGE = picture(np.random.Generator(np.random.PCG64(5)), 45, 70)
PNG = png(IMAGE)
LABELS = IMAGE.argmax(-1)
CLEAR = np.diff(np.sort(IMAGE.astype(int), axis=-1))[:, :, -1] > 0
"""Where one channel is the brightest: elsewhere rounding decides."""


def ask(client: httpx.Client, data: bytes = PNG, *, accept: str = "*/*", **options: object) -> httpx.Response:
    headers = {"Content-Type": "image/png", "Accept": accept}
    return client.post("/segment", content=data, headers=headers, params={"model": "toy-pointwise"} | options)  # type: ignore[arg-type]


def is_refused(response: httpx.Response, status: int, *words: str) -> str:
    """The refusal's sentence, once its status and form are right."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    sentence = str(body["error"])
    assert "Traceback" not in sentence and "\n" not in sentence and 10 < len(sentence) < 400
    for word in words:
        assert word in sentence
    return sentence


def labels_of(response: httpx.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    return np.asarray(Image.open(io.BytesIO(response.content)))


def arrays_of(response: httpx.Response) -> dict[str, np.ndarray]:
    assert response.status_code == 200, response.text
    return dict(np.load(io.BytesIO(response.content)))


def bomb(side: int) -> bytes:
    """A PNG whose header promises side x side pixels, and none of them."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def metrics(client: httpx.Client) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def total(samples: dict[Any, float], name: str, **labels: str) -> float:
    return sum(
        v for (n, have), v in samples.items() if n == f"penumbra_{name}" and labels.items() <= dict(have).items()
    )
