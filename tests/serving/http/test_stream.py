"""Answers line by line: the same rows as of any other form, each before the next is there."""

import base64
import io
import json

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.conftest import picture
from tests.serving.http.asking import PNG, ask, is_refused, metrics, png, total
from tests.serving.server import Server, until

LINES = "application/x-ndjson"
pytestmark = pytest.mark.usefixtures("still_answers")


def grey(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def joined(lines: list[dict[str, object]], find: object) -> np.ndarray:
    rows = [line for line in lines if "y0" in line]
    assert [line["y0"] for line in rows] == np.cumsum([0, *(line["rows"] for line in rows)])[:-1].tolist()  # type: ignore[list-item]
    return np.concatenate([find(line) for line in rows])  # type: ignore[operator]


def test_lines_hold_the_rows_of_the_answer_as_they_become_final(client: httpx.Client, rng: np.random.Generator) -> None:
    options = {"model": "toy-latent", "samples": 3, "seed": 5, "outputs": "entropy,confidence"}
    body = png(picture(rng, 300, 90))
    whole = np.load(io.BytesIO(ask(client, body, accept="application/x-npz", **options).content))
    response = ask(client, body, accept=LINES, **options)
    assert response.headers["content-type"] == LINES
    lines = [json.loads(line) for line in response.iter_lines()]
    assert lines[0] == {"windows_done": 0, "windows": lines[0]["windows"]}
    assert sum("y0" in line for line in lines) > 2, "several bands"
    np.testing.assert_array_equal(joined(lines, lambda line: grey(line["labels"])), whole["labels"])
    for name, most in (("entropy", np.log(3)), ("confidence", 1)):
        values = joined(
            lines, lambda line, name=name: grey(line["maps"][name]["png"]) / 65535 * line["maps"][name]["white"]
        )
        np.testing.assert_allclose(values, whole[name], atol=most / 65535)
    facts = ask(client, body, accept="application/json", **options).json()
    assert lines[-1]["scores"] == facts["scores"] and lines[-1]["samples"] == 3 and lines[-1]["size"] == [300, 90]


def test_what_is_known_before_the_first_line_has_its_status(client: httpx.Client) -> None:
    is_refused(ask(client, PNG, accept=LINES, model="nobody"), 404, "nobody")
    is_refused(ask(client, PNG, accept=LINES, samples=0), 400, "samples")
    is_refused(ask(client, b"no picture", accept=LINES), 400, "image")


def test_what_goes_wrong_later_is_the_last_line(client: httpx.Client, rng: np.random.Generator) -> None:
    body = png(picture(rng, 500, 500) // 64)
    options = {"model": "toy-latent", "samples": 64, "overlap": 0.5, "deadline_ms": 300}
    response = ask(client, body, accept=LINES, **options)
    last = response.json() if response.status_code == 504 else json.loads(response.text.splitlines()[-1])
    assert "deadline" in last["error"]


def test_a_caller_who_leaves_between_lines_frees_the_queue(server: Server, rng: np.random.Generator) -> None:
    body = png(picture(rng, 500, 500) // 64)
    options = {"model": "toy-latent", "samples": 64, "overlap": 0.5}
    asked = {"Content-Type": "image/png", "Accept": LINES}
    with server.client() as client:
        before = metrics(client)
        with client.stream("POST", "/segment", params=options, content=body, headers=asked) as response:
            lines = response.iter_lines()  # kept: a caller leaves when the lines are let go
            assert next(lines).startswith('{"windows_done":0')
            until(lambda: total(metrics(client), "queue_windows") > 0)  # the line was sent before they were queued
        until(lambda: total(metrics(client), "cancelled_total") == total(before, "cancelled_total") + 1)
        until(lambda: total(metrics(client), "queue_windows") == 0 and total(metrics(client), "inflight") == 0)
