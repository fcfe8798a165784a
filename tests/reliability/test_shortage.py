"""A server that gets no more memory, or no more disk: the refusals of the system itself, not of a stand-in."""

import io
import resource
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from loadtests.pictures import check, picture
from loadtests.run import scrape
from penumbra.export.bundle import export_network
from penumbra.models.card import WindowSpec
from penumbra.serving.engine.scheduler import Scheduler
from penumbra.serving.engine.throughput import Cores
from tests.reliability.load import HEADERS
from tests.reliability.test_crash import worker_of
from tests.serving.engine.stepped import runtime, work
from tests.serving.server import MEASURED, serving, until
from tests.toys import toy_card

pytestmark = pytest.mark.slow
BATCH, SAMPLES, WINDOW = 16, 16, WindowSpec(512, 512)
SPARE = 600 * 2**20
"""Address space for the logits of some windows, which are 48 MiB for each, but not for a batch of 15; a new thread's
heap takes up to 128 MiB of it."""
FILE_BYTES = 400_000
"""Less than a map of the picture that is asked for, more than the server's log."""


@contextmanager
def limited(process: psutil.Process, kind: int, soft: int) -> Iterator[None]:
    before = process.rlimit(kind)
    process.rlimit(kind, (soft, before[1]))
    yield
    process.rlimit(kind, before)


def labels_of(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.asarray(Image.open(io.BytesIO(answer.content)))


def test_a_batch_for_which_there_is_no_memory_is_halved_and_answered(tmp_path: Path) -> None:
    card, network = toy_card("latent", window=WINDOW)
    export_network(network, card, tmp_path / "store")
    fixed = {"windows_per_batch": BATCH, "samples_per_call": SAMPLES, "predrain_s": 0}
    with serving(tmp_path / "store", tmp_path, **fixed) as server, server.client() as client:

        def ask() -> np.ndarray:
            asked = {"samples": SAMPLES, "seed": 3}
            return labels_of(client.post("/segment", content=picture("large", 6).png, headers=HEADERS, params=asked))

        worker = worker_of(server)
        with limited(worker, resource.RLIMIT_AS, worker.memory_info().vms + SPARE):
            short = ask()
        halved = scrape(server)["penumbra_oom_total"]
        print(f"{halved:g} batches were halved")
        assert halved > 0
        assert np.array_equal(short, ask()), "with enough memory the answer is the same"
        assert worker_of(server).pid == worker.pid


def test_the_halves_of_a_batch_run_without_the_arrays_of_the_whole() -> None:
    """They would be kept by the exception that told of the shortage."""
    kept: list[weakref.ref[np.ndarray]] = []

    def run(values: list[int]) -> None:
        assert all(array() is None for array in kept)
        of_batch = np.zeros(len(values))
        kept.append(weakref.ref(of_batch))
        if len(values) > 1:
            raise MemoryError

    model = runtime(windows_per_batch=8, before=run)
    with (
        closing(Scheduler(queue_samples=100, cores=Cores(1))) as scheduler,
        scheduler.submit(work(scheduler, model, 8)) as request,
    ):
        assert len(list(request.finished())) == 8
    assert len(kept) > 8, "the batch did not fit"


def test_a_disk_that_is_full_fails_what_needs_it_and_nothing_else(store: Path, tmp_path: Path) -> None:
    jobs = tmp_path / "jobs"
    asked = picture("medium", 7)
    grain = np.random.default_rng(7).integers(0, 255, (512, 512, 3), dtype=np.uint8)
    upload = io.BytesIO()
    Image.fromarray(grain).save(upload, "PNG")
    assert len(upload.getvalue()) > FILE_BYTES > len(asked.png)
    with serving(store, tmp_path, predrain_s=0, jobs=jobs, **MEASURED) as server, server.client() as client:

        def send(content: bytes) -> httpx.Response:
            headers = HEADERS | {"Accept": "application/x-npz"}
            return client.post("/jobs?model=toy-pointwise", content=content, headers=headers)

        def ended(answer: httpx.Response) -> dict[str, str]:
            assert answer.status_code == 202, answer.text
            until(lambda: client.get(answer.json()["url"]).json()["finished"])
            told: dict[str, str] = client.get(answer.json()["url"]).json()
            return told

        with limited(worker_of(server), resource.RLIMIT_FSIZE, FILE_BYTES):
            refused = send(upload.getvalue())
            assert refused.status_code == 507 and "the disk is full" in refused.json()["error"]
            failed = ended(send(asked.png))
            assert failed["state"] == "failed" and "the disk is full" in failed["error"]
            with ThreadPoolExecutor(4) as threads:
                path = "/segment?model=toy-pointwise"
                for answer in threads.map(lambda _: client.post(path, content=asked.png, headers=HEADERS), range(8)):
                    check(labels_of(answer), asked, exact=True)
            left = [path for path in jobs.rglob("*") if path.is_file() and path.name not in ("lock", "job.json")]
            assert left == [], "what a failed job had written is removed"
        assert ended(send(asked.png))["state"] == "done"
