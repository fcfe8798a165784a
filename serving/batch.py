"""Many images: a folder, a pattern or a bucket in, one answer per image out, here or on a Ray cluster.

Every answer is written under a name of its own and then given its own, so a run that is killed leaves whole answers,
and the next one makes those that are missing. Engines differ in where `answer` runs and in nothing else.
"""

import json
import os
import re
import secrets
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.core import has_magic
from fsspec.implementations.local import LocalFileSystem
from rich.console import Console
from rich.progress import Progress

from penumbra.models.errors import BadOption, PenumbraError
from penumbra.serving.engine.decode import open_image
from penumbra.serving.engine.options import Limits, check_options
from penumbra.serving.engine.raster import Raster
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.store import find_artifact, open_artifact
from penumbra.serving.render import read_wish, render

FORMATS = {
    "png": "image/png", "json": "application/json", "npz": "application/x-npz", "geojson": "application/geo+json",
    "tif": "image/tiff",
}  # fmt: skip
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
AT_ONCE = 4
"""Images that are read and written while others are computed; their windows share batches."""
MANIFEST = "penumbra-batch.json"
IN_MEMORY = Limits(windows=2**40, queue_samples=2**40)
"""Limits of images that are answered whole, AT_ONCE of them."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of every image: a model of a store, a format and options as text."""

    store: str
    model: str
    version: int
    format: str
    fields: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Task:
    """One image and where its answer goes, as URLs or paths."""

    source: str
    target: str


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a task: `made`, `kept` from an earlier run, or `failed` with the sentence why."""

    source: str
    target: str
    outcome: str
    error: str = ""


def files_of(url: str) -> tuple[Any, str]:
    """The file system of a URL or path, and the path in it. Raises BadOption where there is none such here."""
    try:
        files, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise BadOption(f"{url[:80]} cannot be reached ({error}); s3:// needs the package s3fs") from None
    return files, path


def find_tasks(source: str, output: str, extension: str) -> list[Task]:
    """The images of a folder (with those below it), a pattern or a file. Raises BadOption: none, or two of one name."""
    files, path = files_of(source)
    if has_magic(path):
        plain = re.split(r"[*?\[]", path)[0]
        found, base = files.glob(path), PurePosixPath(plain.rpartition("/")[0])
    elif files.isdir(path):
        found, base = files.find(path), PurePosixPath(path)
    else:
        found, base = [path] if files.exists(path) else [], PurePosixPath(path).parent
    images = sorted(name for name in found if PurePosixPath(name).suffix.lower() in SUFFIXES)
    if not images:
        raise BadOption(f"{source} has no images; names that end in {', '.join(SUFFIXES)} are looked for")
    names = [str(_relative(PurePosixPath(name), base).with_suffix(f".{extension}")) for name in images]
    twice, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise BadOption(f"{count} images would be answered in {twice}; give them different names or folders")
    return [
        Task(files.unstrip_protocol(image), f"{output.rstrip('/')}/{name}")
        for image, name in zip(images, names, strict=True)
    ]


def _relative(path: PurePosixPath, base: PurePosixPath) -> PurePosixPath:
    return path.relative_to(base) if path.is_relative_to(base) else PurePosixPath(path.name)


def claim(output: str, asked: Asked) -> None:
    """Mark the output as holding these answers. Raises BadOption where it holds answers to another question."""
    files, path = files_of(f"{output.rstrip('/')}/{MANIFEST}")
    question = json.dumps({**asdict(asked), "store": "", "fields": dict(asked.fields)}, sort_keys=True)
    if files.exists(path):
        if files.cat_file(path).decode() != question:
            raise BadOption(f"{output} holds answers to other options or of another model; name another output")
        return
    write_whole(f"{output.rstrip('/')}/{MANIFEST}", question.encode())


def write_whole(url: str, data: bytes) -> None:
    """Write a file so that it is there as a whole or not at all."""
    files, path = files_of(url)
    if not isinstance(files, LocalFileSystem):
        files.pipe_file(path, data)  # an object is put as one
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        part.write_bytes(data)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


class Answerer:
    """One process's engine for a batch. `answer` may be called from several threads."""

    def __init__(self, asked: Asked, *, threads: int | None = None) -> None:
        self._asked, self._media = asked, FORMATS[asked.format]
        self._options, self._style = read_wish(self._media, dict(asked.fields) | {"model": asked.model})
        self._segmenter = Segmenter(limits=IN_MEMORY, threads=threads)
        self._segmenter.load(find_artifact(Path(asked.store), asked.model, asked.version))

    def answer(self, task: Task) -> Done:
        """Answer one image, unless it is answered. A picture's fault is its own, and said."""
        files, path = files_of(task.target)
        if files.exists(path):
            return Done(task.source, task.target, "kept")
        try:
            source_files, source = files_of(task.source)
            image = open_image(source_files.cat_file(source), IN_MEMORY)
            pixels = image.load() if isinstance(image, Raster) else image
            prediction = self._segmenter.segment(pixels, self._options)
            write_whole(task.target, render(prediction, self._media, self._style))
        except (PenumbraError, OSError) as error:
            return Done(task.source, task.target, "failed", str(error))
        return Done(task.source, task.target, "made")

    def close(self) -> None:
        self._segmenter.close()


def run_here(asked: Asked, tasks: Sequence[Task]) -> Iterator[Done]:
    """In this process, as they finish in order."""
    answerer = Answerer(asked)
    try:
        with ThreadPoolExecutor(AT_ONCE) as threads:
            yield from threads.map(answerer.answer, tasks)
    finally:
        answerer.close()


class RayAnswerer:
    """An actor of Ray Data: blocks of tasks in, what became of them out."""

    def __init__(self, asked: Asked, threads: int) -> None:
        self._answerer = Answerer(asked, threads=threads)
        self._threads = ThreadPoolExecutor(AT_ONCE)

    def __call__(self, block: Mapping[str, Any]) -> dict[str, list[str]]:
        tasks = [
            Task(str(source), str(target)) for source, target in zip(block["source"], block["target"], strict=True)
        ]
        done = [asdict(one) for one in self._threads.map(self._answerer.answer, tasks)]
        return {name: [one[name] for one in done] for name in ("source", "target", "outcome", "error")}


def run_on_ray(asked: Asked, tasks: Sequence[Task], *, cpus: int = 1) -> Iterator[Done]:
    """On the cluster that RAY_ADDRESS names, or one of this machine; `cpus` of it per engine.

    Nodes read the same store, images and output. What a node had not finished when it was lost is done by another; what
    it had is kept, so nothing is done twice. Raises BadOption where Ray is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise BadOption(
            "the engine ray needs Ray; pip install 'penumbra-serving[ray]', or take the engine local"
        ) from None
    ray.init(ignore_reinit_error=True)
    engines = max(1, int(ray.cluster_resources().get("CPU", 1)) // (cpus + 1))  # one more for Ray's own tasks
    blocks = min(len(tasks), 4 * engines)
    answers = ray.data.from_items([asdict(task) for task in tasks], override_num_blocks=blocks).map_batches(
        RayAnswerer, fn_constructor_args=(asked, cpus), batch_size=2 * AT_ONCE, num_cpus=cpus,
        concurrency=(1, engines), max_restarts=-1, max_task_retries=-1,
    )  # fmt: skip
    for row in answers.iter_rows():
        yield Done(**row)


ENGINES = {"local": run_here, "ray": run_on_ray}


def ask(store: Path, model: str, kind: str, fields: Mapping[str, str]) -> Asked:
    """The question, with every word of it checked. Raises BadOption and UnknownModel."""
    if kind not in FORMATS:
        raise BadOption(f"format is {kind[:40]!r}; {', '.join(FORMATS)} are possible")
    card = open_artifact(find_artifact(store, model)).card
    options, _ = read_wish(FORMATS[kind], fields)
    check_options(options, card, IN_MEMORY)
    return Asked(str(store.resolve()), card.name, card.version, kind, dict(fields))


def run_batch(asked: Asked, source: str, output: str, *, engine: str) -> tuple[dict[str, int], list[Done]]:
    """Do all tasks with a progress bar; returns how many went how, and those that failed."""
    output = output if "://" in output else str(Path(output).resolve())
    tasks = find_tasks(source, output, asked.format)
    claim(output, asked)
    counts = {"made": 0, "kept": 0, "failed": 0}
    failures = []
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        for done in bar.track(ENGINES[engine](asked, tasks), total=len(tasks), description=asked.model):
            counts[done.outcome] += 1
            if done.error:
                failures.append(done)
    return counts, failures
