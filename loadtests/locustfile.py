"""Callers of a Penumbra server, good and bad. Black box: only what any client can see.

    locust -f loadtests/locustfile.py --host http://127.0.0.1:3000 --grpc 127.0.0.1:3001 [CLASS ...]

`--exact-model` is one whose labels are the brightest channels (the toy `pointwise`), so every answer is checked;
`--sampled-model` has a seed. A closed loop of users by default; `--arrivals R` adds an open one: R requests per second
that come whether or not the earlier ones were answered. A 429 is counted apart: refusing is no failure, a 5xx is.
"""

import io
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import gevent
import numpy as np
import tritonclient.grpc as triton
from gevent import socket
from gevent.pool import Group
from locust import FastHttpUser, User, between, constant, events, task
from tritonclient.utils import InferenceServerException

from loadtests.pictures import Picture, WrongAnswer, check, picture

NPZ = {"Accept": "application/x-npz", "Content-Type": "image/png"}
NUM_PICTURES = 8
REFUSED: Counter[str] = Counter()
"""429s by name of the request."""
FIRST: dict[int, bytes] = {}
"""The first answer of every seed, which all later ones must equal."""


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    parser.add_argument("--grpc", default="127.0.0.1:3001", help="host:port of gRPC")
    parser.add_argument("--exact-model", default="toy-pointwise")
    parser.add_argument("--sampled-model", default="toy-latent")
    parser.add_argument("--arrivals", type=float, default=2.0, help="per second, of the open loop")
    parser.add_argument("--summary", default="", help="write a JSON summary here")


class Http(FastHttpUser):
    """What the HTTP users share."""

    abstract = True
    wait_time = between(0.05, 0.3)

    def segment(self, name: str, asked: Picture, *, exact: bool = True, **options: object) -> bytes | None:
        """One checked answer's npz; None when it was refused or wrong."""
        parsed = self.environment.parsed_options
        chosen = parsed.exact_model if exact else parsed.sampled_model
        query = "&".join(f"{key}={value}" for key, value in {"model": chosen, **options}.items())
        with self.client.post(
            f"/segment?{query}", data=asked.png, headers=NPZ, name=name, catch_response=True
        ) as answer:
            if answer.status_code == 429 and answer.headers.get("Retry-After"):
                REFUSED[name] += 1
                answer.success()
            elif answer.status_code != 200:
                answer.failure(f"{answer.status_code}: {(answer.text or '')[:200]}")
            else:
                return _checked(answer, asked, exact=exact)
        return None


def _checked(answer: Any, asked: Picture, *, exact: bool) -> bytes | None:
    try:
        check(np.load(io.BytesIO(answer.content))["labels"], asked, exact=exact)
    except (WrongAnswer, ValueError, KeyError) as error:
        answer.failure(f"wrong: {error}")
        return None
    return bytes(answer.content)


class Small(Http):
    weight = 6

    @task
    def ask(self) -> None:
        self.segment("http small", picture("small", random.randrange(NUM_PICTURES)))


class Mixed(Http):
    weight = 3

    @task
    def ask(self) -> None:
        size = random.choice(("small", "small", "medium", "large"))
        self.segment(f"http mixed {size}", picture(size, random.randrange(NUM_PICTURES)))


class Large(Http):
    weight = 1

    @task
    def ask(self) -> None:
        self.segment("http large", picture("large", random.randrange(NUM_PICTURES)))


class SeededRepeat(Http):
    """The same seed is the same answer, whoever else asks."""

    weight = 2

    @task
    def ask(self) -> None:
        seed = random.randrange(4)
        body = self.segment("http seeded", picture("small", seed), exact=False, seed=seed, outputs="mutual_information")
        if body is not None and FIRST.setdefault(seed, body) != body:
            fire(self, "http seeded, compared", 0.0, WrongAnswer(f"seed {seed} has two answers"))


class BadInput(Http):
    """Every refusal has its status, and a sentence."""

    weight = 1
    CASES: tuple[tuple[str, int, str, dict[str, str], bytes], ...] = (
        ("no picture", 400, "/segment?model=toy-pointwise", NPZ, b"not a picture"),
        ("cut picture", 400, "/segment?model=toy-pointwise", NPZ, picture("small", 0).png[:900]),
        ("unknown option", 400, "/segment?model=toy-pointwise&sampels=3", NPZ, picture("small", 0).png),
        ("unknown model", 404, "/segment?model=nothing", NPZ, picture("small", 0).png),
        ("unknown format", 406, "/segment", NPZ | {"Accept": "video/mp4"}, picture("small", 0).png),
        ("unknown body", 415, "/segment", NPZ | {"Content-Type": "application/pickle"}, b"x"),
    )

    @task
    def ask(self) -> None:
        name, status, path, headers, body = random.choice(self.CASES)
        path = path.replace("toy-pointwise", self.environment.parsed_options.exact_model)
        with self.client.post(path, data=body, headers=headers, name=f"bad: {name}", catch_response=True) as answer:
            if answer.status_code != status or not json.loads(answer.content or b"{}").get("error"):
                answer.failure(f"{answer.status_code} instead of {status}: {(answer.text or '')[:200]}")
            else:
                answer.success()


class Cancelling(User):
    """Goes away at any moment: while sending, waiting or receiving."""

    weight = 1
    wait_time = between(0.1, 0.5)

    @task
    def ask(self) -> None:
        host, _, port = (self.host or "").rpartition("//")[2].partition(":")
        body, model = picture("medium", 0).png, self.environment.parsed_options.exact_model
        head = f"POST /segment?model={model} HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/png\r\n"
        started, error = time.perf_counter(), None
        try:
            with socket.create_connection((host, int(port or 80)), timeout=10) as caller:
                caller.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
                caller.sendall(body[: random.choice((len(body) // 2, len(body)))])
                gevent.sleep(random.uniform(0, 0.2))
        except OSError as failed:
            error = failed
        fire(self, "http cancelled", started, error)


class Grpc(User):
    """The Open Inference Protocol as NVIDIA's client speaks it. Calls run in threads: gRPC's own do not yield."""

    weight = 3
    wait_time = between(0.05, 0.3)

    def on_start(self) -> None:
        self.client = triton.InferenceServerClient(self.environment.parsed_options.grpc)

    def on_stop(self) -> None:
        self.client.close()

    @task
    def ask(self) -> None:
        asked = picture(random.choice(("small", "small", "medium")), random.randrange(NUM_PICTURES))
        started, error = time.perf_counter(), None
        try:
            gevent.get_hub().threadpool.apply(self._infer, (asked,))
        except InferenceServerException as failed:
            if "RESOURCE_EXHAUSTED" in str(failed.status()):
                REFUSED["grpc"] += 1
            else:
                error = failed
        except WrongAnswer as wrong:
            error = wrong
        fire(self, "grpc", started, error)

    def _infer(self, asked: Picture) -> None:
        image = triton.InferInput("image", list(asked.pixels_HW3.shape), "UINT8")
        image.set_data_from_numpy(asked.pixels_HW3)
        answer = self.client.infer(self.environment.parsed_options.exact_model, [image], client_timeout=120)
        check(answer.as_numpy("labels"), asked, exact=True)


class OpenLoop(Http):
    """Arrivals as a Poisson process: they do not wait for answers, so a slow server is met with as many."""

    fixed_count = 1
    wait_time = constant(0)

    def on_start(self) -> None:
        self.unanswered = Group()

    def on_stop(self) -> None:
        self.unanswered.join()

    @task
    def arrive(self) -> None:
        gevent.sleep(random.expovariate(self.environment.parsed_options.arrivals))
        self.unanswered.spawn(self.segment, "http open loop", picture("small", random.randrange(NUM_PICTURES)))


def fire(user: User, name: str, started: float, error: Exception | None) -> None:
    """Report what is not sent through locust's own client."""
    elapsed_ms = 1e3 * (time.perf_counter() - started) if started else 0.0
    user.environment.events.request.fire(
        request_type="", name=name, response_time=elapsed_ms, response_length=0, exception=error, context={}
    )


@events.user_error.add_listener
def report_dead_caller(user_instance: User, exception: Exception, **_: object) -> None:
    """A caller that dies of its own fault asks nothing more; a run with fewer callers than were wanted is none."""
    fire(user_instance, f"{type(user_instance).__name__} died", 0.0, exception)


@events.quitting.add_listener
def summarise(environment: Any, **_: object) -> None:
    """Write the summary; one failed request fails the run, and so does a run without any."""
    total = environment.stats.total
    environment.process_exit_code = int(total.num_failures > 0 or total.num_requests == 0)
    if not environment.parsed_options.summary:
        return
    document = {
        "requests": total.num_requests, "failures": total.num_failures, "refused": dict(REFUSED),
        "requests_per_s": round(total.total_rps, 2),
        "errors": [f"{e.name}: {e.error} ({e.occurrences}x)" for e in environment.stats.errors.values()],
        "by_name": {
            entry.name: {
                "requests": entry.num_requests, "failures": entry.num_failures,
                **{f"p{share:g}_ms": entry.get_response_time_percentile(share / 100) for share in (50, 95, 99)},
                "max_ms": round(entry.max_response_time, 1),
            }
            for entry in environment.stats.entries.values()
        },
    }  # fmt: skip
    Path(environment.parsed_options.summary).write_text(json.dumps(document, indent=2) + "\n")
