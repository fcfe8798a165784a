"""The jobs of a directory without a server: who waits, what is found there at a start, and what no job may break."""

import asyncio
import dataclasses
import json
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.applications import Starlette

from penumbra.export.bundle import export_network
from penumbra.models.errors import BadImage, BadOption, DiskFull, QueueFull, TooLarge, UnknownJob
from penumbra.serving.engine.options import Limits
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.gateway import Gateway
from penumbra.serving.http.jobs import routes
from penumbra.serving.jobs import Job, Jobs
from penumbra.serving.oip.protocol import Inference
from penumbra.serving.settings import Settings
from penumbra.serving.telemetry import Telemetry
from tests.conftest import FIXED, picture, toy_card
from tests.serving.http.asking import PNG
from tests.serving.server import until

NPZ, MODEL = "application/x-npz", "toy-latent"
WAIT_S = 30
"""Bound of a wait, reached only when something is wrong."""


@contextmanager
def opened(
    store: Path, directory: Path, *, waiting: int = 5, keep_s: float = 3600, model_bytes: int = 0
) -> Iterator[tuple[Jobs, Gateway]]:
    """The jobs of a directory beside a ready gateway; not yet running."""
    with Segmenter.open(store, threads=1, tuning=FIXED, limits=Limits(model_bytes=model_bytes)) as segmenter:
        gateway = Gateway(segmenter, Telemetry(), limit_requests=1, timeout_s=60)
        gateway.state = "ready"
        settings = Settings(jobs=directory, store=store, limit_job_pixels=10**6, limit_jobs=waiting, job_keep_s=keep_s)
        jobs = Jobs(settings, gateway)
        try:
            yield jobs, gateway
        finally:
            jobs.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in three versions."""
    place = tmp_path_factory.mktemp("versions")
    card, network = toy_card("latent")
    for _ in range(3):
        export_network(network, card, place)
    return place


def left(directory: Path, job: Job, rng: np.random.Generator) -> Job:
    """A job as another server left it."""
    (directory / job.id).mkdir(parents=True)
    Image.fromarray(picture(rng, 9, 9)).save(directory / job.id / "image", "PNG")
    (directory / job.id / "job.json").write_text(json.dumps(dataclasses.asdict(job)))
    return job


def ended(jobs: Jobs, name: str) -> dict[str, object]:
    until(lambda: jobs.status(name)["finished"])
    return jobs.status(name)


def test_uploads_that_are_under_way_count_as_waiting(store: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """Fifty callers at once where two may wait: two are let in, whatever they send and however slowly."""
    with opened(store, tmp_path, waiting=2) as (jobs, _), ThreadPoolExecutor(50) as threads:

        def begun(_: int) -> Path | None:
            try:
                return jobs.begin()
            except QueueFull:
                return None

        places = [place for place in threads.map(begun, range(50)) if place]
        assert len(places) == 2
        Image.fromarray(picture(rng, 9, 9)).save(places[0] / "image", "PNG")
        job = jobs.submit(places[0], NPZ, {"model": MODEL})
        assert begun(0) is None, "an upload that became a job waits still"
        jobs.abandon(places[0])
        assert (tmp_path / job["id"] / "image").exists(), "a job is no upload any longer"
        jobs.abandon(places[1])
        assert not places[1].exists()
        place = begun(0)
        assert place is not None and begun(0) is None
        jobs.remove(job["id"])
        assert begun(0) is not None, "a job that is removed while it waits makes room"


def test_a_full_disk_while_a_job_is_accepted_is_told_and_leaves_nothing(
    store: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    with opened(store, tmp_path, waiting=1) as (jobs, _):
        place = jobs.begin()
        Image.fromarray(picture(rng, 9, 9)).save(place / "image", "PNG")
        (place / "job.part").symlink_to("/dev/full")
        with pytest.raises(DiskFull, match="the disk is full"):
            jobs.submit(place, NPZ, {"model": MODEL})
        jobs.abandon(place)
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
        jobs.begin()


def test_the_seconds_of_a_request_for_a_job_are_those_after_its_upload(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, late_s = time.perf_counter, [0.0]

    async def upload() -> AsyncIterator[bytes]:
        yield PNG
        late_s[0] += 1000

    with opened(store, tmp_path) as (jobs, gateway):
        monkeypatch.setattr(time, "perf_counter", lambda: clock() + late_s[0])
        assert asyncio.run(posted(jobs, gateway, upload())) == 202
        labels = {"model": "", "protocol": "http", "status": "200"}
        seconds = gateway.telemetry.registry.get_sample_value("penumbra_request_seconds_sum", labels)
        assert seconds is not None and seconds < 1000 == late_s[0]


async def posted(jobs: Jobs, gateway: Gateway, body: AsyncIterator[bytes] | bytes) -> int:
    transport, headers = httpx.ASGITransport(Starlette(routes=routes(jobs, gateway.telemetry))), {"Accept": NPZ}
    async with httpx.AsyncClient(transport=transport, base_url="http://penumbra") as client:
        headers["Content-Type"] = "image/png"
        return (await client.post(f"/jobs?model={MODEL}", content=body, headers=headers)).status_code


def test_whoever_asks_for_a_job_waits_for_no_removal_of_another(
    store: Path, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files go in a thread, which holds no lock meanwhile: those of old results and of uploads that became no job."""
    begun, go_on, threads = threading.Event(), threading.Event(), set()

    def slowly(*_: object, **__: object) -> None:
        threads.add(threading.current_thread())
        begun.set()
        assert go_on.wait(WAIT_S)

    left(tmp_path, Job("old", NPZ, {"model": MODEL}, 1.0, "done", finished=time.time() - 20), rng)
    left(tmp_path, Job("waiting", NPZ, {"model": MODEL}, 1.0), rng)
    with opened(store, tmp_path, keep_s=10) as (jobs, gateway), ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(shutil, "rmtree", slowly)
        beginning = pool.submit(jobs.begin)
        assert begun.wait(WAIT_S)
        assert pool.submit(jobs.status, "waiting").result(WAIT_S)["state"] == "queued"
        go_on.set()
        beginning.result(WAIT_S)
        threads.clear()
        with pytest.raises(BadImage):
            asyncio.run(posted(jobs, gateway, b"no picture"))
        assert threads and threading.current_thread() not in threads


def test_only_so_many_finished_jobs_are_kept_and_the_oldest_go(
    store: Path, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penumbra.serving.jobs.MOST_KEPT", 2)
    now = time.time()
    for age_s in range(4):
        left(tmp_path, Job(str(age_s), NPZ, {"model": MODEL}, 1.0, "done", finished=now - age_s), rng)
    with opened(store, tmp_path) as (jobs, _):
        kept = {jobs.begin().name, "0", "1", "lock"}
        assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_job_whose_end_could_not_be_written_is_tried_again_by_the_next_server(
    store: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    left(tmp_path, Job("full", NPZ, {"model": MODEL}, 1.0), rng)
    _a_full_disk(tmp_path / "full")
    with opened(store, tmp_path) as (jobs, _):
        jobs.start()
        assert "disk is full" in str(ended(jobs, "full")["error"])
    (tmp_path / "full" / "job.part").unlink()
    with opened(store, tmp_path) as (jobs, _):
        jobs.start()
        assert ended(jobs, "full")["state"] == "done"


def test_two_jobs_that_wait_cannot_have_one_target(store: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    with opened(store, tmp_path) as (jobs, _):
        places = [jobs.begin() for _ in range(3)]
        for place in places:
            Image.fromarray(picture(rng, 9, 9)).save(place / "image", "PNG")
        first = jobs.submit(places[0], NPZ, {"model": MODEL}, "s3://places/a.npz")
        with pytest.raises(BadOption, match=r"'s3://places/a.npz', which another job will write; name another"):
            jobs.submit(places[1], NPZ, {"model": MODEL}, "s3://places/a.npz")
        jobs.submit(places[1], NPZ, {"model": MODEL}, "s3://places/b.npz")
        jobs.remove(first["id"])
        jobs.submit(places[2], NPZ, {"model": MODEL}, "s3://places/a.npz")


@pytest.mark.parametrize("option", [{"deadline_ms": "5"}, {"anytime": "true"}, {"outputs": "probabilities"}])
def test_what_no_job_takes_is_refused_before_the_body_and_after(
    store: Path, tmp_path: Path, rng: np.random.Generator, option: dict[str, str]
) -> None:
    with opened(store, tmp_path) as (jobs, _):
        place = jobs.begin()
        Image.fromarray(picture(rng, 9, 9)).save(place / "image", "PNG")
        for refusing in (lambda: jobs.check(NPZ, option), lambda: jobs.submit(place, NPZ, option | {"model": MODEL})):
            with pytest.raises(BadOption, match="answered at once"):
                refusing()


def _a_directory(place: Path) -> None:
    (place / "image").unlink()
    (place / "image" / "deep").mkdir(parents=True)


def _no_model(place: Path) -> None:
    (place / "job.json").write_text(json.dumps(dataclasses.asdict(Job(place.name, NPZ, {}, 1.0))))


def _another_format(place: Path) -> None:
    (place / "job.json").write_text(json.dumps(dataclasses.asdict(Job(place.name, "text/odd", {"model": MODEL}, 1.0))))


def _a_full_disk(place: Path) -> None:
    (place / "job.part").symlink_to("/dev/full")


@pytest.mark.parametrize("broken", [_a_directory, _no_model, _another_format, _a_full_disk])
def test_whatever_one_job_runs_into_the_next_one_is_done(
    store: Path, tmp_path: Path, rng: np.random.Generator, broken: Callable[[Path], None]
) -> None:
    left(tmp_path, Job("first", NPZ, {"model": MODEL}, 1.0), rng)
    left(tmp_path, Job("second", NPZ, {"model": MODEL}, 2.0), rng)
    broken(tmp_path / "first")
    with opened(store, tmp_path) as (jobs, gateway):
        jobs.start()
        assert ended(jobs, "second")["state"] == "done"
        assert ended(jobs, "first")["state"] == "failed" and gateway.is_ready


def test_without_its_thread_of_jobs_a_server_is_neither_ready_nor_alive(store: Path, tmp_path: Path) -> None:
    with opened(store, tmp_path) as (jobs, gateway):
        jobs.start()
        assert gateway.is_ready and gateway.is_alive
        jobs.close()
        assert not gateway.is_ready and not gateway.is_alive


def test_a_job_is_answered_by_the_version_that_it_was_taken_for(
    store: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Also where newer ones took its place while it waited, and none of them is kept in memory for it afterwards."""
    for version in (1, 2, 3):
        left(tmp_path, Job(f"of-{version}", NPZ, {"model": MODEL, "version": str(version)}, float(version)), rng)
    with opened(store, tmp_path) as (jobs, gateway):
        assert [card.version for card in gateway.segmenter.cards()] == [3]
        jobs.start()
        for version in (1, 2, 3):
            assert ended(jobs, f"of-{version}")["error"] is None
            assert jobs.result(f"of-{version}")[1].headers["X-Penumbra-Version"] == str(version)
        assert [card.version for card in gateway.segmenter.cards()] == [3]
        gateway.segmenter.load(store / MODEL / "2")
        gateway.segmenter.load(store / MODEL / "1")
        assert [card.version for card in gateway.segmenter.cards()] == [1, 2, 3], "one that is named is there"


def test_a_job_of_a_version_that_was_taken_back_fails_and_leaves_the_served_one(
    store: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    left(tmp_path, Job("newer", NPZ, {"model": MODEL, "version": "2"}, 1.0), rng)
    with opened(store, tmp_path) as (jobs, gateway):
        gateway.segmenter.load(store / MODEL / "1")
        gateway.segmenter.unload(MODEL, 3)
        jobs.start()
        assert "version 2, which the job was taken for, was taken back" in str(ended(jobs, "newer")["error"])
        assert [card.version for card in gateway.segmenter.cards()] == [1]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"id": "bad"}', '{"id": "bad", "created": "soon"}', "\xff"])
def test_a_job_that_cannot_be_read_has_failed_and_says_so(
    store: Path, tmp_path: Path, rng: np.random.Generator, text: str
) -> None:
    left(tmp_path, Job("bad", NPZ, {"model": MODEL}, 1.0), rng)
    (tmp_path / "bad" / "job.json").write_text(text, "latin-1")
    left(tmp_path, Job("good", NPZ, {"model": MODEL}, 2.0), rng)
    (tmp_path / "good").rename(tmp_path / "other")
    left(tmp_path, Job("good", NPZ, {"model": MODEL}, 2.0), rng)
    for _ in range(2):  # the next server says the same
        with opened(store, tmp_path) as (jobs, _):
            jobs.start()
            for name in ("bad", "other"):  # the other is another's job under its name
                told = jobs.status(name)
                assert told["state"] == "failed" and "send it again" in str(told["error"])
            assert ended(jobs, "good")["state"] == "done"


def test_a_directory_that_holds_no_job_is_left_alone(store: Path, tmp_path: Path) -> None:
    for name in ("photos", "A" * 22, "B" * 22, "to come"):
        (tmp_path / name).mkdir()
    (tmp_path / "photos" / "image").write_bytes(b"a picture of somebody's")
    (tmp_path / ("A" * 22) / "image").write_bytes(b"an upload that broke off")
    (tmp_path / ("B" * 22) / "thesis.txt").write_text("somebody's")
    (tmp_path / "lock").write_text("somebody's")
    with opened(store, tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {"photos", "B" * 22, "to come", "lock"}
    assert (tmp_path / "lock").read_text() == "somebody's"


def test_a_directory_that_may_not_be_read_keeps_no_server_from_its_start(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lost+found").mkdir()
    stat = os.stat

    def denied(path: object, **options: object) -> os.stat_result:
        if str(path).endswith("lost+found/job.json"):
            raise PermissionError(13, "Permission denied", path)
        return stat(path, **options)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(os, "stat", denied)
    with opened(store, tmp_path):
        assert (tmp_path / "lost+found").is_dir()


def test_a_job_whose_canvas_is_too_large_is_refused_at_the_door(
    store: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    with opened(store, tmp_path) as (jobs, gateway):
        place = jobs.begin()
        Image.fromarray(picture(rng, 900, 900)).save(place / "image", "PNG")
        gateway.segmenter.limits = dataclasses.replace(gateway.segmenter.limits, memory_bytes=2**22)
        with pytest.raises(TooLarge, match="run it at a smaller scale"):
            jobs.submit(place, NPZ, {"model": MODEL, "scale": "20"})
        assert jobs.submit(place, NPZ, {"model": MODEL})["state"] == "queued", "its own pixels are on the disk"


@pytest.mark.parametrize("moment", ["it runs", "it has just been loaded for it"])
def test_a_version_that_is_loaded_while_a_job_has_it_stays(
    store: Path, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    left(tmp_path, Job("waits", NPZ, {"model": MODEL, "version": "3"}, 1.0), rng)
    with opened(store, tmp_path) as (jobs, gateway):
        gateway.segmenter.unload(MODEL)
        inference, asked, loaded = Inference(gateway, store=store), list[threading.Thread](), list[int]()
        whole, name = (jobs, "_note") if moment == "it runs" else (gateway.segmenter, "load")
        before = getattr(whole, name)

        def ask_for_it(*given: object) -> None:
            before(*given)
            if not asked:
                asked.append(threading.Thread(target=lambda: loaded.append(inference._load(MODEL, store))))
                asked[0].start()
                asked[0].join(30 if moment == "it runs" else 0.2)  # a load waits for the one that is under way

        monkeypatch.setattr(whole, name, ask_for_it)
        jobs.start()
        assert ended(jobs, "waits")["state"] == "done"
        asked[0].join(30)
        assert loaded == [3]
        page = gateway.telemetry.page("")[0].decode()
        assert f'penumbra_entropy_mean_count{{model="{MODEL}"}} 1.0' in page and "phase_seconds_count{" not in page
        until(lambda: not jobs._cancelled.is_set())
        assert [card.version for card in gateway.segmenter.cards()] == [3]


def test_a_result_whose_time_is_over_is_gone_also_while_a_job_runs(
    store: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    """The thread is busy, here not even begun; a waiting job has no such time."""
    left(tmp_path, Job("old", NPZ, {"model": MODEL}, 1.0, "done", finished=time.time() - 20), rng)
    left(tmp_path, Job("waiting", NPZ, {"model": MODEL}, 1.0), rng)
    with opened(store, tmp_path, keep_s=10) as (jobs, _):
        with pytest.raises(UnknownJob, match="kept for 10 s"):
            jobs.status("old")
        assert jobs.status("waiting")["state"] == "queued"
        jobs.begin()
        assert not (tmp_path / "old").exists() and (tmp_path / "waiting").exists()


def test_a_job_whose_version_is_gone_fails_without_the_places_of_this_machine(
    store: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    copied = tmp_path / "store"
    shutil.copytree(store, copied)
    left(tmp_path / "jobs", Job("gone", NPZ, {"model": MODEL, "version": "1"}, 1.0), rng)
    left(tmp_path / "jobs", Job("broken", NPZ, {"model": MODEL, "version": "2"}, 2.0), rng)
    with opened(copied, tmp_path / "jobs") as (jobs, _):
        shutil.rmtree(copied / MODEL / "1")
        (copied / MODEL / "2" / "golden.safetensors").write_bytes(b"")
        jobs.start()
        for name, version in (("gone", 1), ("broken", 2)):
            told = str(ended(jobs, name)["error"])
            assert f"{MODEL} version {version}, which the job was taken for, can be loaded no more" in told
            assert str(tmp_path) not in told


def test_a_result_that_somebody_removed_from_the_disk_is_404_in_a_sentence(
    store: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    """As what cleans places for temporary files does."""
    left(tmp_path, Job("done", NPZ, {"model": MODEL}, 1.0, "done", finished=time.time()), rng)
    with opened(store, tmp_path) as (jobs, _), pytest.raises(UnknownJob, match="removed from the server's disk"):
        jobs.result("done")
