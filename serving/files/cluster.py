"""One raster over many machines: bands of rows as tasks of Ray, for `penumbra predict --engine ray`.

This process plans, hands out parts of the raster from its top to its bottom, and puts the rows that come back into its
spool in their order, so that one that is killed goes on where it was. Nodes read artifact and raster by the same paths.
A part that a lost node had is done again by another; nothing is written anywhere but here. A task returns all of its
answer at once: one that streams may never end for its reader after a node was lost (Ray's issues 39109 and 64695).
"""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

from penumbra.models.errors import BadOption, ModelFault, first_line
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.raster import Raster, open_raster
from penumbra.serving.engine.request import Progress, QueuedRequest, Run
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.uncertainty import Band
from penumbra.serving.engine.windows import WindowPlan
from penumbra.serving.spool import LONG

RETRIES = 10
"""How often a task whose node is lost is begun again; one that ends every process that takes it must come to an end."""
PARTS_PER_CORE = 4
"""Parts of a raster for every core of the cluster, so that the last ones end nearly together."""
ROWS_PER_REPEAT = 4
"""Least rows of windows in a part for each row that its first rows need of the part above, and that runs twice."""
PIXELS_PER_PART = 2**24
"""Most pixels of a part, but for those least rows: a node's process holds its labels and maps, some 20 bytes each."""
AHEAD = 2
"""Tasks per core that are under way or done and not yet written: what they hold lies in the cluster's memory."""

T = TypeVar("T")
Spread = Callable[[Segmenter, Path, SegmentOptions], Run]
"""Says of a raster's path and options where its bands are made."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a node opens by itself.

    tuning: of the process that planned, so that samples are added in the same chunks.
    """

    artifact: Path
    raster: Path
    options: SegmentOptions
    tuning: Tuning


def import_ray() -> Any:
    """Give Ray's module. Raises BadOption where it is not installed."""
    try:
        import ray
    except ImportError:
        raise BadOption(
            "the engine ray needs Ray; pip install 'penumbra-serving[ray]', or take the engine local"
        ) from None
    return ray


def connect() -> Any:
    """Give Ray, connected to the cluster that RAY_ADDRESS names or to one of this machine. Raises BadOption."""
    ray = import_ray()
    if not ray.is_initialized():
        try:
            ray.init()
        except ConnectionError as error:
            raise BadOption(f"Ray cannot be had ({error}); see to RAY_ADDRESS, or take the engine local") from None
    return ray


def on_ray(artifact: Path) -> Spread:
    """Make bands on a Ray cluster, with the artifact in this directory, which all nodes have.

    The cluster is connected to at the first raster. Raises BadOption.
    """
    import_ray()

    def spread(segmenter: Segmenter, path: Path, options: SegmentOptions) -> Run:
        connect()
        runtime = segmenter.find(options.model, options.version)
        tuning = Tuning(runtime.windows_per_batch, runtime.samples_per_call)
        work = Work(artifact.resolve(), path.resolve(), options, tuning)
        return lambda request, progress: run_parts(work, request, progress)

    return spread


def run_parts(work: Work, request: QueuedRequest, progress: Progress) -> Generator[Band]:
    """Yield the bands of a request as the parts of its raster come back, from the top. Raises any PenumbraError."""
    ray = connect()
    windows = request.plan.windows
    parts = parts_of(windows, windows.rows_above(request.first_y), num_parts=PARTS_PER_CORE * _cores(ray))
    progress(request.first_window, windows.num_windows)
    for band, withheld, damage in in_turn(ray, answer_part, ((work, *rows) for rows in parts)):
        request.withheld |= withheld
        request.image_HWC.damage |= damage
        end = band.y0 + len(band.labels)
        progress(windows.num_windows * end // windows.size[0], windows.num_windows)
        yield band


def in_turn(ray: Any, answer: Callable[..., list[T]], asked: Iterator[tuple[Any, ...]]) -> Generator[T]:
    """Yield what a function answers to each of its arguments in turn, on a processor each, with some of them under way
    for every core of a cluster. None is left when this ends. Raises what it raised, and ModelFault where its process
    was lost each time."""
    waiting, running = deque(asked), deque[Any]()
    task = ray.remote(num_cpus=1, max_retries=RETRIES)(answer)
    try:
        while waiting or running:
            while waiting and len(running) < AHEAD * _cores(ray):  # nodes come and go
                running.append(task.remote(*waiting.popleft()))
            yield from ray.get(running[0])
            running.popleft()
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise ModelFault(f"the cluster lost each process that took a part of the work: {first_line(error)}") from None
    finally:
        for left in running:
            ray.cancel(left, force=True)  # an interrupt within a process may keep what others wait for


def _cores(ray: Any) -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def parts_of(windows: WindowPlan, y: int, *, num_parts: int) -> Iterator[tuple[int, int]]:
    """Cut the answer's rows from y on, where a band begins, into parts of whole bands: first row, and the row after the
    last."""
    starts = sorted({windows.rows_above(max(y0, 0)) for y0 in windows.starts_y})
    middle = len(windows.starts_y) // 2
    repeats = middle - windows.row_before(max(windows.starts_y[middle], 0))
    starts = [start for start in starts if start >= y]
    most = PIXELS_PER_PART * len(windows.starts_y) // math.prod(windows.size)
    step = max(1, ROWS_PER_REPEAT * repeats, min(most, -(-len(starts) // num_parts)))
    firsts = starts[::step]
    return zip(firsts, [*firsts[1:], windows.size[0]], strict=True)


def answer_part(work: Work, y: int, end: int) -> list[tuple[Band, set[int], set[str]]]:
    """Answer a part on a node: its bands, each with the part's classes withheld altogether and its image's damage."""
    segmenter, image = _open(work)
    request = segmenter.bands_from(y, image, work.options, limits=LONG, cancelled=Event())
    request.withheld.clear()  # what may lie above the part is for others to tell
    made = list[tuple[Band, set[int], set[str]]]()
    with closing(request.bands()) as bands:
        for band in bands:
            made.append((replace(band, void_hW=None), request.withheld, image.damage))
            if band.y0 + len(band.labels) >= end:
                break
    return made


@lru_cache(maxsize=1)
def _open(work: Work) -> tuple[Segmenter, Raster]:
    """Open a raster once in each of a node's processes, which take many parts of it."""
    segmenter = _engine(work.artifact, work.tuning)
    image = open_raster(work.raster, segmenter.reading(work.options))
    assert image is not None, "the process that planned has opened it as a raster"
    return segmenter, image


@lru_cache(maxsize=1)
def _engine(artifact: Path, tuning: Tuning) -> Segmenter:
    """Load a model once for all rasters: an engine that is left for another would keep its threads and weights."""
    segmenter = Segmenter(threads=1, tuning=tuning)
    segmenter.load(artifact)
    return segmenter
