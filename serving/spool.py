"""An answer on disk: filled from the top, band by band, by as many processes as it takes to the end.

What is there when a process is killed is kept, and the next one goes on with the band after it. The bytes are those of
one run where both processes add samples in the same chunks (`Tuning.samples_per_call`), else equal to 1e-5. Memory is
that of one band, whatever the image's height.
"""

import errno
import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from penumbra.models.card import dump_card
from penumbra.models.errors import DiskFull
from penumbra.serving.engine.answer import Arrays, Prediction, collect
from penumbra.serving.engine.bands import BandStream
from penumbra.serving.engine.kernels import FloatArray
from penumbra.serving.engine.options import Limits, SegmentOptions
from penumbra.serving.engine.raster import Pixels
from penumbra.serving.engine.segmenter import Segmenter

log = logging.getLogger("penumbra")

LONG = Limits(pixels=2**40, windows=2**40)
"""Limits of work that is bounded by its disk."""


class RowFile:
    """An array [H, W] in a file, by slices of rows. Rows are written from the top and are on the disk afterwards."""

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
        """Whole rows that were written."""
        return self._path.stat().st_size // self._row_bytes if self._path.exists() else 0


class Spool:
    """The arrays of one answer in a directory. Used by one thread at a time.

    source: what the image is, in a word that changes when it does.
    """

    def __init__(
        self, directory: Path, segmenter: Segmenter, image: Pixels, options: SegmentOptions, *, source: str
    ) -> None:
        """Takes over what the directory holds of the same answer, and removes what it holds of another."""
        self._segmenter, self._image, self._options = segmenter, image, options
        card = segmenter.find(options.model, options.version).card
        key = hashlib.sha256(f"{source} {options} {dump_card(card)}".encode()).hexdigest()
        mark = directory / "key.txt"  # no map has a dot in its name
        if not mark.exists() or mark.read_text() != key:
            shutil.rmtree(directory, ignore_errors=True)
            with disk():
                directory.mkdir(parents=True)
                mark.write_text(key)
        size = (image.shape[0], image.shape[1])
        self._labels = RowFile(directory / "labels", size, np.uint8)
        self._maps = {name: RowFile(directory / name, size, np.float32) for name in options.maps}

    def fill(self, *, limits: Limits, cancelled: threading.Event, watch: Callable[[BandStream], object]) -> Prediction:
        """Run what is missing. The prediction's arrays are `RowFile`s: they answer slices of rows, as all writers ask.

        watch: is shown the stream before it runs, for its progress. Raises any PenumbraError, DiskFull among them; what
        was done stays.
        """
        done = min(self._labels.num_rows, self._labels.shape[0] - 1)  # labels are written last
        stream = self._segmenter.bands_from(done, self._image, self._options, limits=limits, cancelled=cancelled)
        watch(stream)
        labels_HW, maps = cast(NDArray[np.uint8], self._labels), cast(dict[str, FloatArray], self._maps)
        with disk():
            return collect(stream, self._options, Arrays(labels_HW, maps))


class disk:
    """Names what the disk refuses: a DiskFull in place of an OSError, for want of room or of leave."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            log.error("a file of an answer cannot be written: %s", error)
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            what = "the disk is full" if full else f"a file cannot be written ({error.strerror or 'no reason given'})"
            raise DiskFull(f"{what}; make room for the answer's files and start again") from None


def spool_bytes(height: int, width: int, options: SegmentOptions) -> int:
    """Disk that an answer's arrays take."""
    return height * width * (1 + 4 * len(options.maps))
