"""Objects of stores such as S3: copied to and from files in pieces, and which of them a server may touch at all.

Each kind of store needs its library of fsspec (`s3fs`, `gcsfs`, `adlfs`), and finds its credentials and address in its
own environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, ...).
"""

import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from penumbra.models.errors import BadImage, BadOption, DiskFull, PenumbraError, TooLarge
from penumbra.serving.files.receipts import files_of

log = logging.getLogger("penumbra")

STRANGE = re.compile(r"[\\?#*\[\]\x00-\x20\x7f]|::|/\.{0,2}(/|$)")
"""What no name of an object may have after its scheme: patterns, versions, chains of file systems, ways upward."""


class Objects:
    """The objects under prefixes, and no other: whatever else a URL says, it is never opened."""

    def __init__(self, prefixes: str) -> None:
        """Raises BadOption where the library of a prefix is not installed."""
        self._prefixes = tuple(prefixes.split())
        for prefix in self._prefixes:
            files_of(prefix)

    def check(self, name: str, url: str) -> None:
        """Raises BadOption for a URL that is not one object under one of the prefixes. name: of the option."""
        is_plain = not STRANGE.search(url.partition("://")[2])
        if not (is_plain and url.startswith(self._prefixes) and url not in self._prefixes):
            raise BadOption(
                f"{name} is {url[:80]!r}; objects under the prefixes of PENUMBRA_OBJECT_PREFIXES can be named, and no "
                "other URL is ever opened"
            )

    def check_target(self, url: str) -> None:
        """Raises BadOption for a URL that is not allowed, or where there is an object already."""
        self.check("target", url)
        with _said(url, "looked for"):
            files, path = files_of(url)
            files.invalidate_cache()
            if files.exists(path):
                raise BadOption(f"target is {url[:80]!r}, where there is an object already; name another one")


def fetch(url: str, file: Path, *, limit_bytes: int | None = None) -> None:
    """Copy an object into a file, whose time is the object's: a spool of it can go on. Raises PenumbraError."""
    with _said(url, "read"):
        files, path = files_of(url)
        files.invalidate_cache()
        about = files.info(path)
        num_bytes, free = about["size"], shutil.disk_usage(file.parent).free
        if about["type"] != "file":
            raise BadImage(f"{url[:80]} is no object; name one")
        if limit_bytes is not None and num_bytes > limit_bytes:
            raise TooLarge(f"{url[:80]} has {num_bytes:,} bytes and the limit is {limit_bytes:,}; compress it better")
        if num_bytes > free:
            raise DiskFull(f"{url[:80]} has {num_bytes:,} bytes and {free:,} are free in {file.parent}; make room")
        files.get_file(path, str(file))
        written_s = files.modified(path).timestamp()
    os.utime(file, (written_s, written_s))


def send(file: Path, url: str) -> None:
    """Copy a file into an object, which is there as a whole or not at all. Raises PenumbraError."""
    with _said(url, "written"):
        files, path = files_of(url)
        files.put_file(str(file), path)


@contextmanager
def local(image: Path | str) -> Iterator[Path]:
    """Give a file of an image: itself, or for a URL a copy for as long as it is needed. Raises PenumbraError."""
    if isinstance(image, Path):
        yield image
        return
    with TemporaryDirectory(prefix="penumbra-") as folder:
        copy = Path(folder) / PurePosixPath(image).name
        fetch(image, copy)
        yield copy


@contextmanager
def _said(url: str, what: str) -> Iterator[None]:
    """Make a sentence of what a store's library raises, which is of its own kind in each."""
    try:
        yield
    except PenumbraError:
        raise
    except FileNotFoundError:
        raise BadImage(f"there is no {url[:80]}; name an object that is there") from None
    except PermissionError:
        raise BadImage(f"{url[:80]} may not be {what} by this machine's credentials; grant it") from None
    except Exception as error:
        log.error("%s cannot be %s: %s", url, what, error)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"the disk was full before {url[:80]} was {what}; make room") from None
        raise BadImage(f"{url[:80]} cannot be {what}; the log says why") from None
