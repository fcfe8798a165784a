"""What a batch made, so that it tells its own answers from other files: a receipt for every answer.

    <output>/.penumbra-batch/<token>-<number>     {"deep/a.png": ["<image>@<stamp>", "<answer>"]}

Of both it has the size and a hash: of the image's bytes, and of the answer's end. The stamp is what the file system
knew of the image, so that one that did not change is not read again.

A receipt is written before its answer, so an answer without one is somebody else's file: it is neither counted as done
nor overwritten, and a file with one is no image to answer. Every process writes receipts of its own, in files of up to
PER_FILE, because an object of a bucket is put as a whole and nodes share no lock.
"""

import hashlib
import json
import os
import secrets
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import rasterio
from fsspec.implementations.local import LocalFileSystem

from penumbra.models.errors import BadOption
from penumbra.models.files import write_whole
from penumbra.serving.engine.raster import RASTER_FAULTS, gdal

FOLDER = ".penumbra-batch"
PER_FILE = 64
HEAD_BYTES = 8192
"""Bytes at either end of a file, where what wrote it says so."""
TAIL_BYTES = 2**16
"""Bytes of an answer's end that its fingerprint covers: a PNG and an npz have checksums of all they hold there."""
STAMPS = ("ETag", "etag", "LastModified", "last_modified", "updated", "mtime", "created")
"""Facts by which the file systems of fsspec say that a file was written anew."""
ITEM_MARK = b'"penumbra:model"'
PAGE_MARK = b'<meta name="generator" content="Penumbra">'

Identity = tuple[int, int]
"""A file as its disk knows it, by whatever name: the device and the number on it."""


def files_of(url: str) -> tuple[Any, str]:
    """The file system of a URL or path, and the path in it. Raises BadOption where there is none such here."""
    try:
        if "://" not in url:  # a path is a path, whatever signs are in it
            return fsspec.filesystem("file"), str(Path(url).expanduser().absolute())
        files, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise BadOption(
            f"{url[:80]} cannot be reached ({error}); s3:// needs the extra s3, gs:// gcsfs, az:// adlfs"
        ) from None
    return files, path


def put(url: str, data: bytes) -> None:
    """Write a file or an object so that it is there as a whole or not at all."""
    files, path = files_of(url)
    if not isinstance(files, LocalFileSystem):
        files.pipe_file(path, data)  # an object is put as one
        return
    write_whole(Path(path), data)


def fingerprint(data: bytes, size: int) -> str:
    """Give a file's size and the hash of its bytes. data: the file, or its end alone."""
    return f"{size}-{hashlib.sha256(data).hexdigest()[:32]}"


def fingerprint_of(url: str) -> str:
    """Give the fingerprint of a file at a URL by its end, which is all that is read."""
    files, path = files_of(url)
    size = files.size(path)
    return fingerprint(files.cat_file(path, start=max(0, size - TAIL_BYTES)), size)


def stamp_of(url: str) -> str:
    """Say what a file system knows of a file that changes when its bytes do; empty where that is nothing."""
    files, path = files_of(url)
    about = files.info(path)
    return " ".join(str(about[fact]) for fact in STAMPS if fact in about)


def is_of(image: str, url: str) -> bool:
    """Tell whether an image's receipt is of the file at a URL, which is read only if its stamp is another."""
    made_of, _, stamp = image.partition("@")
    if stamp == stamp_of(url) if stamp else made_of == fingerprint_of(url):  # without one, it is of the image's end
        return True
    files, path = files_of(url)
    data = files.cat_file(path)
    return made_of == fingerprint(data, len(data))


def read_receipts(output: str) -> dict[str, set[tuple[str, str]]]:
    """Read the receipts of an output by the answer's name: image and answer, as often as it was made."""
    files, folder = files_of(f"{output.rstrip('/')}/{FOLDER}")
    files.invalidate_cache()  # others write here
    found: dict[str, set[tuple[str, str]]] = {}
    if not files.isdir(folder):
        return found
    for data in files.cat_ranges(files.ls(folder, detail=False), None, None):  # `cat` takes names for patterns
        with suppress(ValueError, AttributeError, TypeError):  # no receipts: the file is somebody else's
            for name, (image, answer) in json.loads(data).items():
                found.setdefault(name, set()).add((image, answer))
    return found


class Receipts:
    """The receipts of one output, as one process reads and writes them. Methods may be called from any thread."""

    def __init__(self, output: str) -> None:
        self._output, self._known = output, read_receipts(output)
        self._lock = threading.Lock()
        self._token, self._number = secrets.token_hex(4), 0
        self._fresh: dict[str, tuple[str, str]] = {}

    def check(self, name: str, source: str) -> None:
        """Raises BadOption unless the file in an answer's place is this batch's answer to that image."""
        answer, images = fingerprint_of(f"{self._output}/{name}"), list[str]()
        for reads in (False, True):
            with self._lock:
                if reads:
                    self._known |= read_receipts(self._output)  # another process may have made it
                images = [image for image, made in self._known.get(name, ()) if made == answer]
            if any(is_of(image, source) for image in images):
                return
        whose = "the answer to another image, or to this one as it was" if images else "no answer of a batch"
        raise BadOption(f"{self._output}/{name} is there and {whose}; move it away, or name another OUTPUT")

    def add(self, name: str, image: bytes, stamp: str, answer: bytes) -> None:
        """Write an answer's receipt; the answer is to be written next. stamp: of the image before it was read."""
        with self._lock:
            if len(self._fresh) == PER_FILE:
                self._number, self._fresh = self._number + 1, {}
            made_of = f"{fingerprint(image, len(image))}@{stamp}"
            self._fresh[name] = made_of, fingerprint(answer[-TAIL_BYTES:], len(answer))
            put(f"{self._output}/{FOLDER}/{self._token}-{self._number}", json.dumps(self._fresh).encode())


def identity(path: Path) -> Identity:
    """A file as its disk knows it, by whatever name."""
    about = path.stat()
    return about.st_dev, about.st_ino


def check_replaceable(targets: Iterable[Path], pictures: frozenset[Identity] = frozenset()) -> None:
    """Raises BadOption for a file that must not be overwritten: one of the pictures, or not written by Penumbra."""
    for target in filter(os.path.lexists, targets):
        if target.exists() and identity(target) in pictures:
            raise BadOption(
                f"{target} is one of the pictures, and an answer would take its place; name another directory"
            )
        if not is_ours(target):
            raise BadOption(
                f"{target} is in the way, and Penumbra did not write it; move it, or name another directory"
            )


def is_ours(path: Path) -> bool:
    """Whether Penumbra wrote a file: PNGs, pages, npz, SVG and PDF say so at one of their ends, TIFFs in their tags."""
    if not path.is_file():  # a pipe would be waited for
        return False
    try:
        if path.suffix == ".tif":
            with gdal(), rasterio.open(path) as dataset:
                return "PENUMBRA_MODEL" in dataset.tags()
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
            file.seek(max(0, path.stat().st_size - HEAD_BYTES))
            tail = file.read()
            is_marked = any(
                mark in head for mark in (b"Software\0Penumbra", PAGE_MARK, ITEM_MARK, b"<dc:title>Penumbra</dc:title>")
            )
            is_marked |= b"/Creator (Penumbra)" in tail
            return is_marked or (head.startswith(b"PK") and tail.endswith((b"Penumbra", b'"Penumbra"}')))
    except RASTER_FAULTS:
        return False
