"""An answer on disk: filled from the top, band by band, by as many processes as it takes to the end.

What is there when a process is killed is kept, and the next one goes on with the band after it. The bytes are those of
one run where both processes add samples in the same chunks (`Tuning.samples_per_call`), else equal to 1e-5. Memory is
that of one band, whatever the image's height.
"""

import errno
import hashlib
import json
import logging
import os
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from penumbra.models.card import Card, dump_card
from penumbra.models.errors import BadOption, DiskFull
from penumbra.serving.engine.answer import Prediction, collect
from penumbra.serving.engine.canvas import SUMS
from penumbra.serving.engine.kernels import FloatArray
from penumbra.serving.engine.options import Limits, SegmentOptions
from penumbra.serving.engine.raster import Raster
from penumbra.serving.engine.request import Progress, QueuedRequest, Run
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.uncertainty import NUM_COLUMNS, Band

log = logging.getLogger("penumbra.disk")

LONG = Limits(pixels=2**40, queue_samples=2**40, large_share=1)
"""Limits of work that is bounded by its disk."""
MARK = "spool.json"
"""File in a spool's directory that says what it is the spool of, and its files. No map has a dot in its name."""
DAMAGE = "damage.txt"
"""File in a spool's directory that says what of the image was damaged where it was read, a line each."""
SCRATCH = "writing.tif"
"""File in a spool's directory for whoever writes the answer in another form, who may put others beside it whose names
begin so."""


class RowFile:
    """A row file is an array [H, W] on disk, by slices of rows, which are written from the top and synced."""

    def __init__(self, path: Path, shape: tuple[int, int], dtype: type[np.generic]) -> None:
        self._path, self.shape, self.dtype = path, shape, np.dtype(dtype)
        self._row_bytes = shape[1] * self.dtype.itemsize

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        first, end, _ = rows.indices(self.shape[0])
        with self._path.open("rb") as file:
            file.seek(first * self._row_bytes)
            return np.fromfile(file, self.dtype, (end - first) * self.shape[1]).reshape(-1, self.shape[1])

    def __setitem__(self, rows: slice, values: NDArray[Any]) -> None:
        with self._path.open("r+b" if self._path.exists() else "wb") as file:
            file.seek(rows.start * self._row_bytes)
            file.write(np.ascontiguousarray(values, self.dtype).data)
            file.flush()
            os.fdatasync(file.fileno())

    @property
    def num_rows(self) -> int:
        """Count the whole rows that were written."""
        return self._path.stat().st_size // self._row_bytes if self._path.exists() else 0


class Spool:
    """A spool has the arrays of one answer in a directory. It is used by one thread at a time.

    source: what the image is, in a word that changes when it does.
    """

    def __init__(
        self, directory: Path, segmenter: Segmenter, image: Raster, options: SegmentOptions, *, source: str
    ) -> None:
        """Take over what the directory holds of the same answer, and remove what it holds of another.

        Raises BadOption where it holds something that no spool wrote.
        """
        self._segmenter, self._image, self._options = segmenter, image, options
        card = segmenter.find(options.model, options.version).card
        facts = f"{source} {options} {NUM_COLUMNS} {dump_card(card)} {image.place}"
        key = hashlib.sha256(facts.encode()).hexdigest()
        self._directory = directory
        if _key_in(directory) != key:
            with disk():
                directory.mkdir(parents=True, exist_ok=True)
                self._clear()
                names = ["labels", *options.maps(card), SUMS, DAMAGE]
                (directory / MARK).write_text(json.dumps({"key": key, "files": names}))
        size = (image.shape[0], image.shape[1])
        self._labels = RowFile(directory / "labels", size, np.uint8)
        self._sums = RowFile(directory / SUMS, (size[0], NUM_COLUMNS), np.int64)
        self._maps = {name: RowFile(directory / name, size, np.float32) for name in options.maps(card)}

    def remove(self) -> None:
        """Remove the spool's files, and the directory unless somebody has put something into it."""
        with suppress(OSError):
            self._clear()
            self._directory.rmdir()

    def _clear(self) -> None:
        for name in (*sorted(_own(self._directory)[1]), MARK):  # the mark last: it says whose the others are
            (self._directory / name).unlink(missing_ok=True)

    def fill(
        self, *, limits: Limits, cancelled: threading.Event, progress: Progress = lambda num_done, num_windows: None,
        run: Run = QueuedRequest.bands,
    ) -> Prediction:  # fmt: skip
        """Run what is missing. The prediction's arrays are `RowFile`s: they answer slices of rows, as all writers ask.

        run: what gives its bands. Raises any PenumbraError, DiskFull among them; what was done stays.
        """
        first_y = min(self._labels.num_rows, self._labels.shape[0] - 1)  # labels are written last
        request = self._segmenter.bands_from(first_y, self._image, self._options, limits=limits, cancelled=cancelled)
        labels_HW, maps = cast(NDArray[np.uint8], self._labels), cast(dict[str, FloatArray], self._maps)
        damage = self._directory / DAMAGE
        self._image.damage |= {*damage.read_text("utf-8").splitlines()} if first_y and damage.exists() else set()

        def noted(request: QueuedRequest, progress: Progress) -> Generator[Band]:
            """Keep what is known of damage before the rows that it is of."""
            kept = set(self._image.damage) if first_y else set[str]()
            for band in run(request, progress):
                if lines := sorted(self._image.damage - kept):
                    with damage.open("a", encoding="utf-8") as file:
                        file.writelines(f"{line}\n" for line in lines)
                        file.flush()
                        os.fdatasync(file.fileno())
                    kept |= {*lines}
                yield band

        with disk():
            return collect(request, labels_HW, maps, cast(NDArray[np.int64], self._sums), progress=progress, run=noted)


def _own(directory: Path) -> tuple[str, set[str]]:
    """Read what a directory is the spool of, and the names of the spool's files in it; empty where it is none yet."""
    try:
        names = {path.name for path in directory.iterdir()}
        facts = json.loads((directory / MARK).read_text())
        return str(facts["key"]), {name for name in names if name in facts["files"] or name.startswith(SCRATCH)}
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # an empty mark, too: the disk was full
        return "", set()


def _key_in(directory: Path) -> str:
    """Read what a directory is the spool of. Raises BadOption where it is, or holds, something else."""
    try:
        key, own = _own(directory)
        others = {path.name for path in directory.iterdir()} - own
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise BadOption(f"{directory} is in the way of unfinished work ({error.strerror}); move it away") from None
    if key or (MARK in others and not (directory / MARK).stat().st_size):
        others.remove(MARK)
    if others:
        raise BadOption(f"{directory} holds {min(others)}, which is not of this work; move it away")
    return key


@contextmanager
def disk() -> Iterator[None]:
    """Name what the disk refuses: a DiskFull in place of an OSError, for want of room or of leave."""
    try:
        yield
    except OSError as error:
        log.error("a file of an answer cannot be written: %s", error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFull("the disk is full; make room for the answer's files and start again") from error
        reason = error.strerror or "no reason given"
        raise DiskFull(f"a file of the answer cannot be written ({reason}); see to the place it is for") from error


def spool_bytes(height: int, width: int, options: SegmentOptions, card: Card) -> int:
    """Count the bytes of disk that an answer's arrays take."""
    return height * (width * (1 + 4 * len(options.maps(card))) + 8 * NUM_COLUMNS)
