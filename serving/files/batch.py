"""Many images: a folder, a pattern or a bucket in, one answer per image out, here or on a Ray cluster.

Every answer is written under a name of its own and then given its own, so a run that is killed leaves whole answers,
and the next one makes those that are missing (`penumbra.serving.files.receipts`). A file that is no answer of the batch
is never replaced. Engines differ in where `answer` runs and in nothing else.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from penumbra.models.card import dump_card
from penumbra.models.errors import BadOption, reason_of
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.decode import open_image
from penumbra.serving.engine.options import SegmentOptions, check_options
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.store import find_artifact, open_artifact
from penumbra.serving.files.cluster import connect, in_turn
from penumbra.serving.files.inputs import MANIFEST, canonical, find_images
from penumbra.serving.files.predict import IN_MEMORY
from penumbra.serving.files.receipts import Receipts, files_of, put, stamp_of
from penumbra.serving.files.report import Result, progress_bar
from penumbra.serving.render import parse_request, render_with_notes

FORMATS = {
    "png": "image/png", "json": "application/json", "npz": "application/x-npz", "geojson": "application/geo+json",
    "tif": "image/tiff", "gpkg": "application/geopackage+sqlite3",
}  # fmt: skip
AT_ONCE = 4
"""Images that are read and written while others are computed; their windows share batches."""


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """What is asked of every image: a model of a store, whose card has this sum, a format and options as text."""

    store: str
    model: str
    version: int
    card: str
    format: str
    fields: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class BatchItem:
    """One image and where its answer goes, as URLs or paths."""

    source: str
    target: str


def find_items(source: str, output: str, extension: str) -> tuple[list[BatchItem], list[Result]]:
    """The images of a folder (with those below it), a pattern or a file, and what is skipped there.

    Raises BadOption: no images, two whose answers have one name, or an answer in the place of an image.
    """
    found = find_images(source)
    names = [str(name.with_suffix(f".{extension}")) for name in found.names]
    alike = defaultdict(list)
    for name in names:
        alike[name.casefold()].append(name)  # on many disks A.png is a.png
    for same in alike.values():
        if len(same) > 1 or MANIFEST in same:
            what = f"{len(same)} images would be answered in {same[-1]}" + ", the batch's own" * (MANIFEST in same)
            raise BadOption(f"{what}; give them different names or folders")
    items = [BatchItem(image, f"{output}/{name}") for image, name in zip(found.images, names, strict=True)]
    places = {canonical(item.source): item.source for item in items}
    for item in items:
        if there := places.get(canonical(item.target)):
            raise BadOption(
                f"the answer to {item.source} would take the place of the image {there}; name another OUTPUT"
            )
    return items, [Result(url, "skipped", reason) for url, reason in found.skipped.items()]


def claim(output: str, request: BatchRequest) -> None:
    """Mark the output as holding these answers. Raises BadOption where it holds answers to another question."""
    files, path = files_of(f"{output}/{MANIFEST}")
    question = json.dumps({**asdict(request), "store": "", "fields": dict(request.fields)}, sort_keys=True)
    if not files.lexists(path):
        put(f"{output}/{MANIFEST}", question.encode())
    elif files.cat_file(path) != question.encode():
        raise BadOption(f"{output} holds answers to other options or of another model; name another output")


def segment_url(segmenter: Segmenter, url: str, options: SegmentOptions) -> tuple[bytes, Prediction]:
    """Segment an image at a URL or path whole; returns its bytes too. Raises OSError and any PenumbraError."""
    files, path = files_of(url)
    data = files.cat_file(path)
    return data, segmenter.segment(open_image(data, IN_MEMORY, segmenter.reading(options)).load(), options)


class Answerer:
    """One process's engine for a batch. `answer` may be called from several threads."""

    def __init__(self, request: BatchRequest, output: str, *, threads: int | None = None) -> None:
        self._output, self._media = output, FORMATS[request.format]
        self._options, self._style = parse_request(self._media, dict(request.fields) | {"model": request.model})
        self._receipts = Receipts(output)
        self._segmenter = Segmenter(limits=IN_MEMORY, threads=threads)
        self._segmenter.load(find_artifact(Path(request.store), request.model, request.version))

    def answer(self, item: BatchItem) -> Result:
        """Answer one image, unless it is answered. Whatever goes wrong is that image's alone, and said."""
        try:
            return self._answer(item)
        except Exception as error:
            return Result(item.source, "failed", reason_of(error))

    def _answer(self, item: BatchItem) -> Result:
        name, kept = item.target.removeprefix(f"{self._output}/"), Result(item.source, "kept")
        if self._is_there(name, item.source):
            return kept
        stamp = stamp_of(item.source)
        data, prediction = segment_url(self._segmenter, item.source, self._options)
        answer, notes = render_with_notes(prediction, self._media, self._style)
        if self._is_there(name, item.source):  # by now
            return kept
        self._receipts.add(name, data, stamp, answer)
        put(item.target, answer)
        return Result(item.source, "made", warnings="\n".join(prediction.warnings + notes))

    def _is_there(self, name: str, source: str) -> bool:
        """Tell whether an image is answered. Raises BadOption where something else is in the answer's place."""
        files, path = files_of(f"{self._output}/{name}")
        if found := files.lexists(path):
            self._receipts.check(name, source)
        return bool(found)

    def close(self) -> None:
        self._segmenter.close()


def run_here(request: BatchRequest, output: str, items: Sequence[BatchItem]) -> Iterator[Result]:
    """Answer images in this process; yields what became of them in their order."""
    with closing(Answerer(request, output)) as answerer, ThreadPoolExecutor(AT_ONCE) as threads:
        yield from threads.map(answerer.answer, items)


def run_on_ray(request: BatchRequest, output: str, items: Sequence[BatchItem]) -> Iterator[Result]:
    """Answer images on the cluster that RAY_ADDRESS names, or one of this machine; each engine takes one processor.

    Nodes read the same store, images and output. What a node had not finished when it was lost is done by another; what
    it had is kept, so nothing is done twice. Raises BadOption where Ray is not installed.
    """
    size = 2 * AT_ONCE
    asked = ((request, output, items[i : i + size]) for i in range(0, len(items), size))
    yield from in_turn(connect(), answer_items, asked)


def answer_items(request: BatchRequest, output: str, items: Sequence[BatchItem]) -> list[Result]:
    """Answer images on a node."""
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return [*threads.map(_answerer(request, output).answer, items)]


@lru_cache(maxsize=1)
def _answerer(request: BatchRequest, output: str) -> Answerer:
    """Load the engine once in each of a node's processes, for many images; one that answers another question after
    this keeps both until it ends."""
    return Answerer(request, output, threads=1)


ENGINES = {"local": run_here, "ray": run_on_ray}


def parse_batch(store: Path, model: str, kind: str, fields: Mapping[str, str]) -> BatchRequest:
    """The question, with every word of it checked. Raises BadOption and UnknownModel."""
    if kind not in FORMATS:
        raise BadOption(f"format is {kind[:40]!r}; {', '.join(FORMATS)} are possible")
    card = open_artifact(find_artifact(store, model)).card
    options, _ = parse_request(FORMATS[kind], fields)
    check_options(options, card, IN_MEMORY)
    digest = hashlib.sha256(dump_card(card).encode()).hexdigest()
    return BatchRequest(str(store.resolve()), card.name, card.version, digest, kind, tuple(fields.items()))


def run_batch(request: BatchRequest, source: str, output: str, *, engine: str) -> tuple[dict[str, int], list[Result]]:
    """Answer all images with a progress bar; returns how many went how, and those with something to say."""
    output = output.rstrip("/") if "://" in output else str(Path(output).resolve())
    items, reported = find_items(source, output, request.format)
    claim(output, request)
    counts = {"made": 0, "kept": 0, "failed": 0, "skipped": len(reported)}
    with progress_bar() as bar:
        work = ENGINES[engine](request, output, items)
        for result in bar.track(work, total=len(items), description=request.model):
            counts[result.outcome] += 1
            if result.error or result.warnings:
                reported.append(result)
    return counts, reported
