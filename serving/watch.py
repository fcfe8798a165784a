"""A running server's look at its store: newest versions that appear there are served, without a restart."""

import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from penumbra.models.errors import BadArtifact
from penumbra.serving.engine.store import PROMOTED, versions

if TYPE_CHECKING:  # what loads needs torch, and a sentence of the command line does not
    from penumbra.serving.oip.protocol import Inference

log = logging.getLogger("penumbra")

Contents = dict[str, tuple[Path, frozenset[tuple[str, int, int]]]]
"""Name of a model -> the directory of its newest version; names, sizes and times of change of the files in it."""


def look(store: Path) -> Contents:
    """What a store has now. Raises OSError where it cannot be read."""
    newest = {name: store / name / str(numbers[-1]) for name, numbers in versions(store).items()}
    return {name: (directory, _states(directory)) for name, directory in newest.items()}


def _states(directory: Path) -> frozenset[tuple[str, int, int]]:
    """Empty where a file cannot be read or is a link to nothing: whatever loads that one model says so."""
    try:
        states = [(path.name, path.stat()) for path in (*directory.iterdir(), *directory.parent.glob(PROMOTED))]
    except OSError:
        return frozenset()
    return frozenset((name, state.st_size, state.st_mtime_ns) for name, state in states)


def how_to_serve(name: str) -> str:
    """What to do with an artifact that was just written, in a sentence."""
    return (
        "next: a server on this store serves it when it starts again, by itself if it has PENUMBRA_WATCH_STORE_S, or "
        f"after POST /v2/repository/models/{name}/load if it has PENUMBRA_MODEL_CONTROL"
    )


class StoreWatch:
    """The thread that looks every few seconds.

    Nothing is taken away: a model that vanishes from the store is still served, and so is the version before one that
    is refused. One that a caller has unloaded comes back with its next version.
    """

    def __init__(self, store: Path, before: Contents, *, every_s: float, inference: "Inference") -> None:
        """before: what the store had when the server began to load it. every_s: 0 is never. inference: what loads."""
        self._store, self._every_s, self._inference = store, every_s, inference
        self._segmenter = inference.gateway.segmenter
        self._taken, self._last = dict(before), before
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="watch", daemon=True)

    def start(self) -> None:
        if self._every_s:
            self._thread.start()

    def close(self) -> None:
        """Let a load that has begun finish."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def check(self) -> None:
        """Look once. What has changed since the last look may still be being copied, and waits for the next."""
        found = look(self._store)
        for name, contents in found.items():
            if contents != self._taken.get(name) and contents == self._last.get(name) and not self._stop.is_set():
                self._taken[name] = contents
                self._take(name, contents[0])
        for name in self._taken.keys() - found.keys():
            del self._taken[name]
            self._segmenter.accept(name)
        self._last = found

    def _take(self, name: str, directory: Path) -> None:
        from penumbra.serving.telemetry import audited  # the command line, which asks `how_to_serve`, can do without

        try:
            with audited("load", name, by="watch") as line:
                line["version"] = self._inference.load_newest(name, self._store).result()
        except BadArtifact:  # it is named where models are listed, and in the log
            pass
        except Exception as error:
            log.error("%s failed while it was loaded", directory, exc_info=error)
            self._segmenter.refuse(directory, BadArtifact(f"{directory} cannot be loaded; the server's log says why"))

    def _loop(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                self.check()
            except OSError as error:
                log.error("the store %s cannot be read (%s); what is served stays", self._store, error.strerror)
