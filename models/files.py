"""Files and directories that are written as a whole, under a name of their own until they are.

A file's bytes are made in memory: on a full disk the libraries' own writers name no file, and torch's ends the process.
"""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def writing(path: Path, draft: Path) -> Iterator[None]:
    """Let an OSError of the block name what was to be written where the system names nothing, or a draft's file."""
    try:
        yield
    except OSError as error:
        if error.filename is None or str(error.filename).startswith(str(draft)):
            error.filename, error.filename2 = str(path), None
        raise


@contextmanager
def drafted(folder: Path) -> Iterator[Path]:
    """Make a new directory in a folder, to be filled and then renamed.

    One that is not renamed is removed, and so is a folder that was made for it and is left empty.
    """
    fresh = [path for path in (folder, folder.parent) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder))
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        for path in fresh:
            if not any(path.iterdir()):
                path.rmdir()


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Make a new directory to be filled, which is put there as a whole and for everyone to read, or not at all."""
    with drafted(path.parent) as draft, writing(path, draft):
        yield draft
        draft.chmod(0o755)
        os.replace(draft, path)


def write_whole(path: Path, data: bytes) -> None:
    """Put a file there as a whole or not at all; one that is there stays until then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with writing(path, part):
            part.write_bytes(data)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)
