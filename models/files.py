"""Files that are written as a whole, under a name of their own until they are.

Their bytes are made in memory: on a full disk the libraries' own writers name no file, and torch's ends the process.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Let an OSError of the block name what was to be written; the system names a file that nobody knows, or none."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
