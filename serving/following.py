"""Values of files that a running server follows: its keys and its certificate are read again when the files change."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from penumbra.models.errors import PenumbraError

log = logging.getLogger("penumbra")
T = TypeVar("T")

LOOK_S = 1.0
"""The time between two looks at files, each of which is made by somebody who needs the value."""


class Followed(Generic[T]):
    """The value that some files have now. Any thread may ask for it.

    Files that are bad, missing or half written leave the value that was read before, and the log says why, once. They
    are tried again at every look: leave to read them, or a certificate's first day, is no change of theirs.
    """

    def __init__(self, read: Callable[[], T], *files: Path) -> None:
        """read: makes the value of the files, and raises PenumbraError where they are bad, here too."""
        self._read, self._files = read, files
        self._states, self._looked = self._look(), time.monotonic()
        self._value, self._fault = read(), ""

    def now(self) -> T:
        """Return the value of the files, as they were a second ago at the earliest."""
        moment = time.monotonic()
        if self._files and moment - self._looked >= LOOK_S:
            self._looked = moment
            before, self._states = self._states, self._look()
            if self._fault or self._states != before:
                self._read_again(is_changed=self._states != before)
        return self._value

    def _look(self) -> list[tuple[int, int, int] | None]:
        """Say of each file which it is, its size and when it or its rights changed; None where there is none."""
        found: list[tuple[int, int, int] | None] = []
        for file in self._files:
            try:
                state = file.stat()
                found.append((state.st_ino, state.st_size, state.st_ctime_ns))
            except OSError:
                found.append(None)
        return found

    def _read_again(self, *, is_changed: bool) -> None:
        names = " and ".join(map(str, self._files))
        try:
            self._value, self._fault = self._read(), ""
        except PenumbraError as error:
            if is_changed or str(error) != self._fault:
                log.error("%s changed, and what was read before stays in use: %s", names, error)
            self._fault = str(error)
        else:
            log.info("%s changed, and is in use as it is now", names)
