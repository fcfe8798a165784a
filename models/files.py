"""Files that are written as a whole, under a name of their own until they are.

Their bytes are made in memory: on a full disk the libraries' own writers name no file, and torch's ends the process.
"""

import secrets
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


def write_whole(path: Path, data: bytes) -> None:
    """Put a file there as a whole or not at all; one that is there stays until then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with writing(path):
            part.write_bytes(data)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)
