"""What is said to the server and what follows from its answers, without saying how bytes travel.

An exchange is a generator: it yields calls, whose replies are sent into it, work that would hold up an event loop,
whose result is, and seconds to wait. `Client` and `AsyncClient` drive the same ones.
"""

import json
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from penumbra_client.answers import NPZ, Job, Model, Prediction, read_prediction
from penumbra_client.errors import Failed, PenumbraError, error_of
from penumbra_client.options import Picture, as_texts, body_of

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 5.0
"""Between two tries where the server does not say when to come again, and between two looks at a job: each is twice
as long as the one before."""
BUSY, AWAY = (429, 503), (0, 502, 504)
"""Statuses of a server that is full or not ready; of one that is not reached, or not by the proxy before it."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """One request. body: a path is sent piece by piece. target: a file for the body of an answer that is no refusal."""

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    body: bytes | Path | None = None
    target: Path | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer. status: 0 where the server cannot be reached, which content says then. headers: by names of any case.
    content: empty where it went into a file."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.content)


Work = Callable[[], object]
Exchange = Generator[Call | Work | float, Any, T]
Progress = Callable[[Job], object]
"""Is told how a job stands, each time that the server is asked."""


class Exchanges:
    """All exchanges with one server."""

    def __init__(self, patience_s: float) -> None:
        """patience_s: how long one call may wait in all for a server that is full, loading or, of a job, away."""
        self._patience_s = patience_s
        self._classes: dict[tuple[str, int], tuple[str, ...]] = {}

    def ask(self, call: Call) -> Exchange[Reply]:
        """Make a call, again where the server is full (429) or not ready (503), or, for a job, which outlasts its
        restart, away. Raises PenumbraError."""
        left_s, pause_s = self._patience_s, FIRST_PAUSE_S
        passing = (*BUSY, *AWAY) if call.method == "GET" and call.path.startswith("/jobs/") else BUSY
        while True:
            started = time.monotonic()
            reply: Reply = yield call
            if 200 <= reply.status < 300:
                return reply
            if reply.status in AWAY:  # nothing was heard, so the try was a wait too
                left_s -= time.monotonic() - started
            wait_s = retry_after(reply.headers)
            wait_s = pause_s if wait_s is None else max(wait_s, FIRST_PAUSE_S)
            if reply.status not in passing or wait_s > left_s:
                raise error_of(reply.status, _sentence(reply.content))
            yield wait_s
            left_s, pause_s = left_s - wait_s, min(2 * pause_s, LONGEST_PAUSE_S)

    def segment(self, picture: Picture, options: Mapping[str, Any]) -> Exchange[Prediction]:
        return (yield from self._read((yield from self.ask(_upload("/segment", picture, NPZ, options)))))

    def render(self, picture: Picture, media: str, options: Mapping[str, Any]) -> Exchange[bytes]:
        reply = yield from self.ask(_upload("/segment", picture, media, options))
        return reply.content

    def submit(self, picture: Picture, media: str, options: Mapping[str, Any]) -> Exchange[Job]:
        reply = yield from self.ask(_upload("/jobs", picture, media, options))
        return Job.of(reply.document)

    def job(self, name: str) -> Exchange[Job]:
        reply = yield from self.ask(Call("GET", f"/jobs/{name}"))
        return Job.of(reply.document)

    def wait(self, job: Job, progress: Progress) -> Exchange[Job]:
        pause_s = FIRST_PAUSE_S
        progress(job)
        while not job.is_over:
            yield pause_s
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            job = yield from self.job(job.id)
            progress(job)
        if job.state == "failed":
            raise Failed(f"the job failed: {job.error}")
        return job

    def result(self, job: Job) -> Exchange[Prediction]:
        if job.media_type != NPZ:
            raise ValueError(f"the job's answer is {job.media_type}; download it, or submit with {NPZ}")
        return (yield from self._read((yield from self.ask(Call("GET", f"/jobs/{job.id}/result")))))

    def download(self, job: Job, path: str | Path) -> Exchange[Path]:
        target = Path(path)
        yield from self.ask(Call("GET", f"/jobs/{job.id}/result", target=target))
        return target

    def remove(self, job: Job) -> Exchange[None]:
        yield from self.ask(Call("DELETE", f"/jobs/{job.id}"))

    def run_job(self, picture: Picture, progress: Progress, options: Mapping[str, Any]) -> Exchange[Prediction]:
        submitted = yield from self.submit(picture, NPZ, options)
        try:
            done = yield from self.wait(submitted, progress)
            prediction = yield from self.result(done)
        except PenumbraError as error:
            raise type(error)(f"job {submitted.id}: {error}", error.status) from error
        with suppress(PenumbraError):  # the answer is here, and what is left of the job expires
            yield from self.remove(done)
        return prediction

    def models(self) -> Exchange[list[Model]]:
        reply = yield from self.ask(Call("GET", "/models"))
        models = [Model.of(entry) for entry in reply.document["models"]]
        self._classes |= {(model.name, model.version): model.classes for model in models}
        return models

    def _read(self, reply: Reply) -> Exchange[Prediction]:
        """Read a prediction, and ask for its classes' names where they are not known yet."""
        prediction: Prediction = yield partial(read_prediction, reply.content, reply.headers, ())
        key = prediction.model, prediction.version
        if key not in self._classes:
            yield from self.models()
        return replace(prediction, classes=self._classes.get(key, ()))


def _upload(path: str, picture: Picture, media: str, options: Mapping[str, Any]) -> Call:
    body, kind = body_of(picture)
    return Call("POST", path, {"Content-Type": kind, "Accept": media}, as_texts(options), body)


def _sentence(content: bytes) -> str:
    """What a refusal says; of what no Penumbra server said (a proxy's page), its beginning."""
    try:
        return str(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError):
        return " ".join(content[:200].decode(errors="replace").split())


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Read the seconds to wait that a header Retry-After says, as a number or a date (RFC 9110); None without one."""
    text = headers.get("Retry-After", "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time()) if text else None
    except ValueError:
        return None
