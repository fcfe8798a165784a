"""A shadow: a new version of a model answers a share of the live requests beside the served one; nobody waits for it.

Whoever answers a request offers it here and goes on. One thread hands what is taken to the process of
`penumbra.serving.compare`, which runs in the system's idle class and is stopped while live windows wait or run.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from penumbra.models.card import Card
from penumbra.models.errors import BadArtifact, NotPromoted
from penumbra.serving.compare import Compared, Failed, Question, Reply
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.store import artifact_card
from penumbra.serving.promotion import Figures, check_figures, read_condition
from penumbra.serving.telemetry import Telemetry

log = logging.getLogger("penumbra")

MOST_WAITING = 2
"""Pictures that wait for the process; more would keep memory for a machine that is too busy."""
LOOK_S = 0.005
"""How often live work is looked for while the process works."""


@dataclass(slots=True)
class Candidate:
    """A candidate is a version in the shadow of a served one. card: as it was when it came; its hashes say what is
    measured. due: of requests, the next of which is taken at 1."""

    served: Path
    directory: Path
    card: Card
    due: float = 0.0
    figures: Figures = field(default_factory=Figures)

    def __str__(self) -> str:
        return f"{self.directory.parent.name} version {self.directory.name}"

    @property
    def has_changed(self) -> bool:
        """Whether its place holds another artifact by now, or none."""
        try:
            return artifact_card(self.directory) != self.card
        except BadArtifact:
            return True


class Shadow:
    """A shadow keeps the candidates, at most one of a model, and what they have shown. Any thread may call it."""

    def __init__(self, share: float, segmenter: Segmenter, telemetry: Telemetry) -> None:
        """share: of the live requests, above 0."""
        self._share, self._segmenter, self._telemetry = share, segmenter, telemetry
        self._lock = threading.Lock()
        self._candidates: dict[str, Candidate] = {}
        self._num_waiting = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shadow")
        """It outlives the process, which ends with the thread that started it."""
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._is_closed = False

    def consider(self, served: Path, newest: Path) -> None:
        """Put the newest version of a model in the shadow of the served one, unless it is that one. Raises BadArtifact
        where their answers cannot be compared."""
        name, known = served.parent.name, self._candidates.get(served.parent.name)
        if known and (known.served, known.directory) == (served, newest) and not known.has_changed:
            return
        self.forget(name)
        if newest == served:
            return
        candidate = Candidate(served, newest, artifact_card(newest))
        check_alike(artifact_card(served), candidate.card)
        with self._lock:
            self._candidates[name] = candidate
        self._telemetry.shadowed((name, newest.name))
        log.info("%s answers %g %% of the requests in the shadow of version %s", candidate, 100 * self._share,
                 served.name)  # fmt: skip
        self._thread.submit(self._work, candidate, Question(served, newest))

    def forget(self, model: str) -> None:
        """Give a model's candidate up, if it has one."""
        with self._lock:
            self._candidates.pop(model, None)
        self._thread.submit(self._end_if_unused)

    def offer(self, image: bytes | NDArray[Any], options: SegmentOptions, card: Card) -> None:
        """Take a request that was answered, or leave it. It returns at once; nothing of it is the caller's."""
        candidate = self._candidates.get(card.name)
        if candidate is None or candidate.served.name != str(card.version):
            return
        with self._lock:
            candidate.due += self._share
            if candidate.due < 1 - 1e-9:
                return
            candidate.due -= 1
            is_taken = self._num_waiting < MOST_WAITING
            self._num_waiting += is_taken
            candidate.figures.num_dropped += not is_taken
        if not is_taken:
            return self._telemetry.shadowed((card.name, candidate.directory.name), "dropped")
        with suppress(RuntimeError):  # the server is ending
            self._thread.submit(self._work, candidate, Question(candidate.served, candidate.directory, image, options))

    def check(self, model: str, conditions: Sequence[str]) -> Candidate:
        """Find the candidate of a model that meets all conditions. Raises NotPromoted, BadOption."""
        candidate = self._candidates.get(model)
        if candidate is None:
            raise NotPromoted(f"no version of {model[:60]!r} is in a shadow; export the next one into the store")
        with self._lock:
            check_figures(candidate.figures, [read_condition(text) for text in conditions], str(candidate))
        return candidate

    def describe(self) -> list[dict[str, str]]:
        """List the candidates as the model repository's index does."""
        with self._lock:
            return [
                {"name": name, "version": one.directory.name, "state": "UNAVAILABLE",
                 "reason": f"in the shadow of version {one.served.name}: {one.figures}"}
                for name, one in self._candidates.items()
            ]  # fmt: skip

    def _work(self, candidate: Candidate, question: Question) -> None:
        """Have a question answered, in the one thread."""
        name, version = candidate.directory.parts[-2:]
        try:
            reply = self._ask(question) if self._candidates.get(name) is candidate else None
        except Exception as error:  # whatever it is, the place is the next one's
            self._end_process()
            reply = Failed(f"there was no reply ({type(error).__name__})")
        with self._lock:
            self._num_waiting -= question.image is not None
            if self._candidates.get(name) is not candidate:  # it has gone, or the server is going
                return
            if isinstance(reply, Compared):
                candidate.figures.add(reply)
            candidate.figures.num_failed += isinstance(reply, Failed)
            if isinstance(reply, Failed) and reply.is_refused:
                del self._candidates[name]
        if isinstance(reply, Compared):
            self._telemetry.shadowed((name, version), "compared", reply)
        elif isinstance(reply, Failed):
            self._telemetry.shadowed((name, version), "failed")
            log.warning("%s failed in the shadow of version %s: %s", candidate, candidate.served.name, reply.why)
            if reply.is_refused:
                self._segmenter.refuse(candidate.directory, BadArtifact(reply.why))

    def _ask(self, question: Question) -> Reply:
        """Ask the process, which is stopped while there is live work. Raises OSError and EOFError where it ends."""
        if self._process is None or self._connection is None:
            self._connection, theirs = Pipe()
            code = f"from penumbra.serving.compare import main; main({theirs.fileno()})"
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
            self._process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[theirs.fileno()], env=environment)
            theirs.close()
        self._connection.send(question)
        is_stopped = was_stopped = False
        while not self._connection.poll(LOOK_S):
            if self._is_closed:
                raise EOFError
            if self._segmenter.scheduler.is_busy != is_stopped:
                is_stopped, was_stopped = not is_stopped, True
                self._process.send_signal(signal.SIGSTOP if is_stopped else signal.SIGCONT)
        self._process.send_signal(signal.SIGCONT)  # it may have replied just before it was stopped
        reply: Reply = self._connection.recv()
        if was_stopped and isinstance(reply, Compared) and reply.is_by_clock:
            return replace(reply, seconds=(0.0, 0.0))
        return reply

    def _end_if_unused(self) -> None:
        if not self._candidates:
            self._end_process()

    def _end_process(self) -> None:
        if self._process and self._connection:
            self._connection.close()
            self._process.kill()
            self._process.wait()
        self._process = self._connection = None

    def close(self) -> None:
        """Drop what is waiting and at work."""
        self._candidates, self._is_closed = {}, True
        self._thread.shutdown(cancel_futures=True)
        self._end_process()


def check_alike(served: Card, candidate: Card) -> None:
    """Raise BadArtifact where a label of one version means something else in the other."""
    names = [[one.name for one in card.classes] for card in (served, candidate)]
    if names[0] == names[1]:
        return
    what = f"{candidate.name} version {candidate.version}"
    if len(names[0]) != len(names[1]):
        raise BadArtifact(
            f"{what} has {len(names[1])} classes and version {served.version}, which is served, {len(names[0])}; "
            "export it under a name of its own"
        )
    k = next(k for k, pair in enumerate(zip(*names, strict=True)) if pair[0] != pair[1])
    raise BadArtifact(
        f"class {k} of {what} is {names[1][k]!r} and {names[0][k]!r} in version {served.version}, which is served; "
        "export it with the same classes in the same order, or under a name of its own"
    )
