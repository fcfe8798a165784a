"""What a large picture's share of the turns (PENUMBRA_LARGE_SHARE) costs small ones, and what it is worth to itself.

    python -m benchmarks.shares [--model supervised-camvid] [--share 1 --share 4]

A server for each share, all on this machine; they take turns. 16 callers with pictures of mixed sizes each send one,
wait for its answer, send the next. Then one sends small pictures, alone and beside one of 20 megapixels.
"""

import dataclasses
import http.client
import io
import itertools
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import numpy as np
from PIL import Image

from benchmarks.overhead import SIZES, pictures
from benchmarks.peers.servers import Ask
from benchmarks.peers.traffic import CLIENTS, Slices, run_slice
from benchmarks.rounds import save
from loadtests.run import scrape
from penumbra.export.bundle import export_network
from penumbra.models.checkpoint import load_checkpoint
from penumbra.serving.engine.quota import num_cores
from penumbra.serving.engine.windows import count_windows
from tests.serving.server import ROOT, Server, serving, until

REQUESTS, ALONE = len(SIZES), 16
HUGE_WH = (5000, 4000)
NAME = "shared"
"""A store with a demo model's name would be filled with the others."""


def post(server: Server, jpeg: bytes) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=300)
    headers = {"Content-Type": "image/jpeg", "Accept": "image/png"}
    connection.request("POST", f"/segment?model={NAME}", jpeg, headers)
    return connection


def caller_of(server: Server) -> Callable[[], Ask]:
    def ask(jpeg: bytes) -> bytes:
        answer = post(server, jpeg).getresponse()
        body = answer.read()
        assert answer.status == 200, body
        return body

    return lambda: ask


def median_s(ask: Ask, jpeg: bytes) -> float:
    seconds = []
    for _ in range(ALONE):
        begun = time.perf_counter()
        ask(jpeg)
        seconds.append(time.perf_counter() - begun)
    return float(np.median(seconds))


def beside_a_huge_one(server: Server, small: bytes, huge: bytes) -> float:
    """Give the median time of a small picture beside a huge one, over that alone."""
    ask = caller_of(server)()
    alone_s = median_s(ask, small)
    at_work = post(server, huge)
    until(lambda: scrape(server)["penumbra_queue_windows"] > 0)
    beside_s = median_s(ask, small)
    assert scrape(server)["penumbra_queue_windows"] > 0, "it was at work all the time"
    at_work.close()
    until(lambda: scrape(server)["penumbra_queue_windows"] == 0)
    return beside_s / alone_s


def figures_of(slices: Slices, rounds: int) -> dict[str, Any]:
    """By size too: client i of a slice begins with picture i."""
    order = itertools.product(range(rounds), range(CLIENTS), range(REQUESTS))
    by_size: dict[int, list[float]] = {}
    for (_, client, turn), seconds in zip(order, slices.latencies_s, strict=True):
        by_size.setdefault((client + turn) % len(SIZES), []).append(seconds)
    medians_s = [round(float(np.median(by_size[size])), 3) for size in range(len(SIZES))]
    return slices.figures() | {"median s by size": medians_s}


@click.command()
@click.option("--model", default="supervised-camvid", show_default=True)
@click.option("--share", "shares", type=int, multiple=True, default=(1, 2, 4, 8), show_default=True)
@click.option("--rounds", default=3, show_default=True)
def main(model: str, shares: tuple[int, ...], rounds: int) -> None:
    card, network = load_checkpoint(ROOT / f"models/zoo/{model}.safetensors")
    jpegs, buffer = [jpeg for _, jpeg in pictures()], io.BytesIO()
    Image.open(io.BytesIO(jpegs[-1])).resize(HUGE_WH).save(buffer, "JPEG")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        artifact = export_network(network, dataclasses.replace(card, name=NAME), Path(folder) / "store")
        servers, slices = {}, {share: Slices() for share in shares}
        for share in shares:
            (place := Path(folder) / str(share)).mkdir()
            settings = {"threads": num_cores(), "large_share": share, "log_level": "WARNING", "predrain_s": 0}
            servers[share] = stack.enter_context(serving(artifact.parents[1], place, **settings))
        for _ in range(rounds):
            for share in shares:
                run_slice(caller_of(servers[share]), jpegs, slices[share], requests=REQUESTS)
        beside = {share: beside_a_huge_one(servers[share], jpegs[0], buffer.getvalue()) for share in shares}
    windows = [count_windows(*size, card.window) for size in SIZES]
    save("shares", {"model": model, "windows by size": windows} | {
        f"share {share}": figures_of(slices[share], rounds) | {"small beside huge over alone": round(beside[share], 2)}
        for share in shares
    })  # fmt: skip


if __name__ == "__main__":
    main()
