"""A job whose model left memory: it rests, says why, and goes on."""

import errno
from pathlib import Path

import numpy as np
import pytest

from penumbra.export.bundle import export_network
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
