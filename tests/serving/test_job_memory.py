"""A job whose model left memory: it rests, says why, and goes on."""

import dataclasses
import errno
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from penumbra.export.bundle import export_network
from penumbra.models.errors import BadImage, TooLarge
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.jobs import Job
from tests.conftest import picture, toy_card
from tests.serving.server import until
from tests.serving.test_job_queue import MODEL, NPZ, ended, left, opened


def test_a_job_whose_model_does_not_come_back_to_memory_waits_and_goes_on(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> str:
        raise OSError(errno.EMFILE, "too many open files")

    export_network(*reversed(toy_card("pointwise")), tmp_path / "store")
    export_network(*reversed(toy_card("latent")), tmp_path / "store")
    monkeypatch.setattr("penumbra.serving.jobs.PUT_OFF_S", 0.3)
    left(tmp_path / "jobs", Job("patient", NPZ, {"model": MODEL, "version": "1"}, 1.0), rng)
    left(tmp_path / "jobs", Job("removed", NPZ, {"model": MODEL, "version": "1"}, 2.0), rng)
    with opened(tmp_path / "store", tmp_path / "jobs", model_bytes=1) as (jobs, gateway):
        image = picture(rng, 9, 9)
        assert gateway.segmenter.segment(image, SegmentOptions("toy-pointwise")).num_windows == 1  # the other leaves
        with monkeypatch.context() as patch:
            patch.setattr("penumbra.serving.engine.store.sha256_of", fail)
            jobs.start()
            for name in ("patient", "removed"):
                until(lambda name=name: "cannot be loaded again" in str(jobs.status(name)["error"]))
                assert jobs.status(name)["state"] == "queued" and (tmp_path / f"jobs/{name}/image").exists()
            jobs.remove("removed")
        assert ended(jobs, "patient")["state"] == "done"
        assert ended(jobs, "patient")["error"] is None and not (tmp_path / "jobs/removed").exists()


def test_a_job_of_an_older_version_that_cannot_be_loaded_just_now_waits(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise OSError(errno.EIO, "input/output error")

    for _ in range(2):
        export_network(*reversed(toy_card("latent")), tmp_path / "store")
    monkeypatch.setattr("penumbra.serving.jobs.PUT_OFF_S", 0.3)
    left(tmp_path / "jobs", Job("older", NPZ, {"model": MODEL, "version": "1"}, 1.0), rng)
    with opened(tmp_path / "store", tmp_path / "jobs") as (jobs, _):
        with monkeypatch.context() as patch:
            patch.setattr("penumbra.serving.engine.store.sha256_of", fail)
            jobs.start()
            until(lambda: "version 1 cannot be loaded at present" in str(jobs.status("older")["error"]))
            assert jobs.status("older")["state"] == "queued"
        assert ended(jobs, "older")["error"] is None


def test_masks_and_outlines_of_a_whole_answer_count_as_memory(tmp_path: Path, rng: np.random.Generator) -> None:
    export_network(*reversed(toy_card("latent")), tmp_path / "store")
    with opened(tmp_path / "store", tmp_path / "jobs") as (jobs, gateway):
        place, segmenter = jobs.begin(), gateway.segmenter
        Image.fromarray(picture(rng, 900, 900)).save(place / "image", "PNG")
        plan = segmenter.plan(900, 900, SegmentOptions(MODEL), limits=jobs._limits)
        least = plan.num_bytes(segmenter.cores.lanes, on_disk=True) + 900 * 900
        segmenter.limits = dataclasses.replace(segmenter.limits, memory_bytes=least)
        for media in ("application/json", "application/geo+json", "application/geopackage+sqlite3"):
            with pytest.raises(TooLarge, match="the limit of all together"):
                jobs.submit(place, media, {"model": MODEL})
        assert jobs.submit(place, "image/png", {"model": MODEL})["state"] == "queued"


def test_an_answer_whose_target_cannot_be_written_can_be_fetched(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: Path, url: str) -> None:
        raise BadImage(f"{url} cannot be written; the log says why")

    monkeypatch.setattr("penumbra.serving.jobs.send", fail)
    export_network(*reversed(toy_card("latent")), tmp_path / "store")
    left(tmp_path / "jobs", Job("sent", NPZ, {"model": MODEL, "version": "1"}, 1.0, target="s3://a/b.npz"), rng)
    with opened(tmp_path / "store", tmp_path / "jobs") as (jobs, _):
        jobs.start()
        told = ended(jobs, "sent")
        assert told["state"] == "failed" and told["result"] == "/jobs/sent/result"
        assert told["error"] == (
            "s3://a/b.npz cannot be written; the log says why; the answer itself is at /jobs/sent/result"
        )
        path, job = jobs.result("sent")
        assert "labels" in np.load(path) and job.headers["X-Penumbra-Version"] == "1"
