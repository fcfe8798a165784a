"""Callers for the tests of reliability: what each was answered, and after how long. An answer that is wrong raises."""

import asyncio
import io
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import httpx
import numpy as np
from PIL import Image

from loadtests.pictures import Picture, check
from tests.serving.server import Server

LOST = 0
"""In place of a status: the connection broke before there was one."""
HEADERS = {"Content-Type": "image/png", "Accept": "image/png"}
CALLER_S = 120
"""How long a caller waits; reached only when an answer is missing."""
Ask = Callable[[], Awaitable["Outcome"]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """began: by `perf_counter`. retry_after: the header of that name."""

    status: int
    began: float
    seconds: float
    retry_after: str = ""


class Callers:
    """Many callers of `POST /segment` with one picture, in one event loop. Use as an async context."""

    def __init__(self, server: Server, asked: Picture, **options: object) -> None:
        self._asked, self._options = asked, {"model": "toy-pointwise"} | options
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
        self._client = httpx.AsyncClient(base_url=server.url, timeout=CALLER_S, trust_env=False, limits=limits)

    async def __aenter__(self) -> "Callers":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def ask(self) -> Outcome:
        """One request. Raises WrongAnswer."""
        began = time.perf_counter()
        try:
            answer = await self._client.post("/segment", content=self._asked.png, params=self._options, headers=HEADERS)
        except httpx.TransportError:
            return Outcome(LOST, began, time.perf_counter() - began)
        seconds = time.perf_counter() - began
        if answer.status_code == 200:
            check(np.asarray(Image.open(io.BytesIO(answer.content))), self._asked, exact=True)
        return Outcome(answer.status_code, began, seconds, answer.headers.get("Retry-After", ""))


async def closed_loop(ask: Ask, *, users: int, until: Callable[[], bool]) -> list[Outcome]:
    """Users who ask again as soon as they have an answer, until a condition holds."""
    outcomes: list[Outcome] = []

    async def user() -> None:
        while not until():
            outcomes.append(await ask())

    await asyncio.gather(*(user() for _ in range(users)))
    return outcomes


async def open_loop(ask: Ask, *, per_s: float, seconds: float) -> tuple[list[Outcome], float]:
    """Poisson arrivals, which do not wait for answers; those of the last arrivals are waited for.

    Returns also by how many seconds the latest arrival was late: callers who are held up ask all at once, and what they
    wait for is not the server.
    """
    chance, asked, late_s, end = random.Random(7), [], 0.0, time.perf_counter() + seconds
    due = time.perf_counter()
    while due < end:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        late_s = max(late_s, time.perf_counter() - due)
        asked.append(asyncio.ensure_future(ask()))
        due += chance.expovariate(per_s)
    return list(await asyncio.gather(*asked)), late_s


def within(seconds: float) -> Callable[[], bool]:
    """A condition that holds from then on."""
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() > end


def percentile(outcomes: list[Outcome], share: float) -> float:
    return float(np.percentile([outcome.seconds for outcome in outcomes], share))
