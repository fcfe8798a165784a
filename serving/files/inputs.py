"""Which images a batch answers: the files of a folder, a pattern or a bucket, and why the others are skipped."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from fsspec.core import has_magic
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from penumbra.models.errors import BadOption
from penumbra.serving.engine.decode import SUFFIXES
from penumbra.serving.files.receipts import FOLDER, files_of, read_receipts

MANIFEST = "penumbra-batch.json"
"""The file in an output that holds the question of its answers."""
SHOWN = 3
"""Skipped files in the sentence that says that there is no image."""


@dataclass(frozen=True, slots=True)
class Found:
    """The images of an INPUT and the files beside them, as URLs or paths. names: of the images, within INPUT."""

    images: list[str]
    names: list[PurePosixPath]
    skipped: dict[str, str]


def find_images(source: str) -> Found:
    """Look for images. What exists is a path, whatever signs are in it; what does not is a pattern.

    skipped: the reason by file: hidden, no image by its name, no file that can be read to an end, or an answer of an
    earlier batch, to whatever output below this input. Raises BadOption where no image is left.
    """
    files, base, found = _look(source)
    reasons = {path: reason for path, info in sorted(found.items()) for reason in _reason(files, base, path, info)}
    images = [path for path, reason in reasons.items() if not reason]
    answers = _answers_beside(files, images)
    reasons |= {path: "is an answer of a batch" for path in images if path in answers}
    skipped = {url_of(files, path): reason for path, reason in reasons.items() if reason}
    images = [path for path, reason in reasons.items() if not reason]
    if not images:
        some = "".join(f"{url} {reason}; " for url, reason in list(skipped.items())[:SHOWN])
        raise BadOption(f"{source} has no images; {some}names that end in {', '.join(SUFFIXES)} are looked for")
    return Found([url_of(files, path) for path in images], [_within(base, path) for path in images], skipped)


def url_of(files: Any, path: str) -> str:
    """What `files_of` takes apart; a local path stays one, because a URL gives some signs a meaning."""
    return path if isinstance(files, LocalFileSystem) else str(files.unstrip_protocol(path))


def canonical(url: str) -> str:
    """Give the one name of a file that is named through links, relative paths or URLs."""
    files, path = files_of(url)
    return os.path.realpath(path) if isinstance(files, LocalFileSystem) else url_of(files, path)


def _look(source: str) -> tuple[Any, PurePosixPath, dict[str, Any]]:
    """The file system, the folder that names are taken from, and what there is by path."""
    files, path = files_of(source)
    if files.isdir(path):
        return files, PurePosixPath(path), files.find(path, detail=True)
    if files.exists(path):
        return files, PurePosixPath(path).parent, {path: files.info(path)}
    base, pattern = _split(files, path)
    matches = re.compile(glob_translate(pattern)).match
    depth = None if "**" in pattern else pattern.count("/") + 1
    found = files.find(base, maxdepth=depth, withdirs=True, detail=True)
    plain = PurePosixPath(base)
    return files, plain, {name: info for name, info in found.items() if matches(str(_within(plain, name)))}


def _split(files: Any, path: str) -> tuple[str, str]:
    """A pattern's plain beginning, and the rest; a folder that is there as it is spelt is plain."""
    parts = path.split("/")
    plain = 1
    while plain < len(parts) and (not has_magic(parts[plain]) or files.isdir("/".join(parts[: plain + 1]))):
        plain += 1
    return "/".join(parts[:plain]) or "/", "/".join(parts[plain:])


def _reason(files: Any, base: PurePosixPath, path: str, info: dict[str, Any]) -> Iterator[str]:
    """Why a file is skipped, empty for an image; nothing at all for what batches keep for themselves."""
    name = _within(base, path)
    if FOLDER in name.parts or name.name == MANIFEST:
        return
    if any(part.startswith(".") for part in name.parts):
        yield "is hidden"
    elif info["type"] == "directory" or (
        isinstance(files, LocalFileSystem)
        and os.path.exists(path)
        and not os.path.isfile(path)  # a pipe would be waited for
    ):
        yield "is a folder, a link to one, or no file at all"
    else:
        yield "" if name.suffix.lower() in SUFFIXES else "is no image by its name"


def _answers_beside(files: Any, images: list[str]) -> set[str]:
    """The answers of all batches whose output is a folder that leads to one of the images."""
    folders = {
        parent for folder in {PurePosixPath(path).parent for path in images} for parent in (folder, *folder.parents)
    }
    return {
        str(folder / name) for folder in folders if str(folder) != "."
        for name in read_receipts(url_of(files, str(folder)))
    }  # fmt: skip


def _within(base: PurePosixPath, path: str) -> PurePosixPath:
    return PurePosixPath(path).relative_to(base)
