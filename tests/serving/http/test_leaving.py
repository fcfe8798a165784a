"""Callers who go away: what they asked for leaves the queue, and they are counted."""

import json
import socket

import httpx
import numpy as np
import pytest

from tests.conftest import picture
from tests.serving.http.asking import (
    PNG,
    ask,
    is_refused,
    metrics,
    png,
    total,
)
from tests.serving.server import Server, until

pytestmark = pytest.mark.usefixtures("still_answers")


LONG = {"model": "toy-latent", "samples": 64, "overlap": 0.5}
"""Options that make a picture of 500x500 px seconds of work, and nearly all that the queue holds."""


def connected(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def test_a_caller_who_goes_away_while_sending_is_cancelled_and_not_a_bad_picture(
    server: Server, client: httpx.Client
) -> None:
    before = metrics(client)
    head = (
        "POST /segment?model=toy-latent HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 999\r\n\r\n"
    )
    with connected(server) as caller:
        caller.sendall(head.encode() + PNG[:200])
    until(lambda: total(metrics(client), "cancelled_total") == total(before, "cancelled_total") + 1)
    assert total(metrics(client), "rejected_total") == total(before, "rejected_total")


def test_a_caller_who_goes_away_is_counted_and_frees_the_queue(
    server: Server, client: httpx.Client, rng: np.random.Generator
) -> None:
    before = metrics(client)
    body = png(picture(rng, 500, 500) // 64)
    query = "&".join(f"{name}={value}" for name, value in LONG.items())
    head = (
        f"POST /segment?{query} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with connected(server) as caller:
        caller.sendall(head.encode() + body)
        until(lambda: total(metrics(client), "queue_windows") > 0)
        refusal = ask(client, body, **LONG)
        is_refused(refusal, 429, "try again in")
        assert int(refusal.headers["retry-after"]) >= 1
    until(lambda: total(metrics(client), "cancelled_total") == total(before, "cancelled_total") + 1)
    until(lambda: total(metrics(client), "queue_windows") == 0)


@pytest.mark.slow  # its work is a quarter of a second, in which a busy machine may not have looked
def test_a_caller_of_bentomls_route_who_goes_away_is_counted_and_frees_the_queue(
    server: Server, client: httpx.Client, rng: np.random.Generator
) -> None:
    before = metrics(client)
    wish = {"image": (picture(rng, 300, 300) // 64).tolist(), "model": "toy-latent", "samples": 64}
    body = json.dumps(wish, separators=(",", ":")).encode()
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with connected(server) as caller:
        caller.sendall(head.encode() + body)
        until(lambda: total(metrics(client), "queue_windows") > 0)
    until(lambda: total(metrics(client), "cancelled_total") == total(before, "cancelled_total") + 1, bound_s=60)
    until(lambda: total(metrics(client), "queue_windows") == 0)
