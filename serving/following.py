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
"""The time between two readings of files, each of which is made by somebody who needs the value."""


class Followed(Generic[T]):
    """The value that some files have now. Any thread may ask for it.

    Files that are bad, missing or half written leave the value that was read before, and the log says why, once. One
    value is kept for as long as what is read is equal to it.
    """

    def __init__(self, read: Callable[[], T], *files: Path) -> None:
        """read: makes the value of the files, and raises PenumbraError where they are bad, here too."""
        self._read, self._files = read, files
        self._value, self._fault, self._looked = read(), "", time.monotonic()

    def now(self) -> T:
        """Return the value of the files, as they were a second ago at the earliest."""
        moment = time.monotonic()
        if self._files and moment - self._looked >= LOOK_S:
            self._looked = moment
            names = " and ".join(map(str, self._files))
            try:
                value, fault = self._read(), ""
                if self._fault or value != self._value:
                    self._value = value
                    log.info("%s changed, and is in use as it is now", names)
            except PenumbraError as error:
                if (fault := str(error)) != self._fault:
                    log.error("%s cannot be used, and what was read before stays in use: %s", names, error)
            self._fault = fault
        return self._value
