"""Jobs: images that take longer than a caller waits. One runs at a time, in fair turns with the small requests.

A job is a directory, so that nothing of it is lost with the process or kept in memory:

    <jobs>/<id>/image      as it was sent, until there is a result
    <jobs>/<id>/job.json   what was asked, and how far it is
    <jobs>/<id>/spool/     the answer's finished rows (`penumbra.serving.spool`)
    <jobs>/<id>/result     the answer in its format

A server that starts finds what the last one left: jobs that were waiting or running go on where they were, with the
version of their model that they were taken for; an upload that never became a job is removed, a job whose `job.json`
cannot be read has failed, and one that has taken the server down with it several times is given up. What is no job's is
left alone.
"""

import logging
import math
import os
import secrets
import shutil
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from penumbra.models.errors import (
    BadArtifact,
    BadOption,
    Cancelled,
    DiskFull,
    JobUnfinished,
    NotReady,
    PenumbraError,
    QueueFull,
    UnknownJob,
    UnknownModel,
)
from penumbra.serving.engine.decode import open_image, read_header
from penumbra.serving.engine.options import SegmentOptions, Style
from penumbra.serving.engine.plan import check_long
from penumbra.serving.engine.request import Cancellation
from penumbra.serving.engine.segmenter import may_pass
from penumbra.serving.engine.store import find_artifact
from penumbra.serving.gateway import Gateway
from penumbra.serving.http.segment import answer_headers
from penumbra.serving.job import MAX_ATTEMPTS, Job, is_upload, save_job
from penumbra.serving.objects import Objects, send
from penumbra.serving.process import lock
from penumbra.serving.render import WITH_MEANS, WRITERS, parse_request, without_unseen
from penumbra.serving.settings import Settings
from penumbra.serving.spool import LONG, Spool, disk, spool_bytes
from penumbra.serving.telemetry import Request

log = logging.getLogger("penumbra")

PUT_OFF_S = 20.0
"""How long a job waits whose model is not in memory and cannot be loaded now."""
SWEEP_S = 30.0
"""How often finished jobs are looked at for their age."""
MOST_KEPT = 10_000
"""Finished jobs that are kept, of however small pictures: each takes memory and three inodes."""


class Jobs:
    """The jobs in a directory, and the thread that runs them. Methods may be called from any thread."""

    def __init__(self, settings: Settings, gateway: Gateway) -> None:
        """Raises BadArtifact where the directory cannot be used, or another server uses it."""
        self.settings, self._gateway, self._directory = settings, gateway, settings.jobs
        self.objects = Objects(settings.object_prefixes)
        self._limits = replace(
            LONG, pixels=settings.limit_job_pixels, samples=gateway.segmenter.limits.samples,
            window_pixels=gateway.segmenter.limits.window_pixels, probability_bytes=0,
            memory_bytes=gateway.segmenter.limits.memory_bytes,
        )  # fmt: skip
        self._lock_file = lock(settings.jobs)
        self._changed = threading.Condition()
        self._closing = False
        self._jobs: dict[str, Job] = {}
        self._uploads: set[Path] = set()
        """Places that `begin` gave and that are no jobs yet; they count as waiting."""
        self._resting: dict[str, float] = {}
        """Until when jobs wait whose model is not in memory and cannot be loaded now."""
        self._progress = (0, 0)
        """Windows of the job that runs: how many are done, and all."""
        self._cancelled = Cancellation()
        """Set to end the job that runs."""
        self._recover()
        self._thread = threading.Thread(target=self._loop, name="jobs", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._gateway.vital.append(self._thread.is_alive)

    def begin(self) -> Path:
        """A directory for an upload, whose name is the id; `submit` or `abandon` is called with it.

        Raises NotReady, QueueFull and DiskFull.
        """
        if not self._gateway.is_ready:
            state = "without a working engine" if self._gateway.state == "ready" else self._gateway.state
            raise NotReady(f"the server is {state} and takes no new jobs; ask another replica")
        place = self._directory / secrets.token_urlsafe(16)  # 22 letters, as `is_upload` expects
        self._expire()
        with self._changed:
            waiting = len(self._uploads) + sum(not job.finished for job in self._jobs.values())
            if waiting >= self.settings.limit_jobs:
                full = f"{waiting} jobs are waiting and the limit is {self.settings.limit_jobs}; try again in 60 s"
                raise QueueFull(full, retry_after_s=60)
            self._uploads.add(place)
        try:
            with disk():
                place.mkdir()
        except DiskFull:
            self.abandon(place)
            raise
        return place

    def abandon(self, place: Path) -> None:
        """Forget an upload, unless it became a job after all."""
        with self._changed:
            if place not in self._uploads:
                return
            self._uploads.discard(place)
        shutil.rmtree(place, ignore_errors=True)

    def check(self, media: str, fields: Mapping[str, str]) -> tuple[SegmentOptions, Style]:
        """What a job is to compute and show. Raises BadOption for options that no job takes."""
        options, style = parse_request(media, fields)
        check_long(options)
        return options, style

    def submit(self, place: Path, media: str, fields: Mapping[str, str], target: str = "") -> dict[str, Any]:
        """Make a job of an upload `place/image`. Raises whatever `POST /segment` refuses, and DiskFull."""
        options, style = self.check(media, fields)
        segmenter = self._gateway.segmenter
        with read_header(place / "image", self._limits, segmenter.reading(options)) as header:
            plan = segmenter.plan(*header.size, options, limits=self._limits, place=header.place)
        # Masks and outlines are made of all labels at once, in two bytes a pixel.
        segmenter.check_memory(plan, on_disk=True, more=2 * math.prod(header.size) if media in WITH_MEANS else 0)
        card = plan.card
        copies = 4 if media == "image/tiff" else 2  # the rows, and the result of them; of TIFF also tiles and overviews
        needed = copies * spool_bytes(*header.size, without_unseen(options, media, style), card)
        with disk():
            free = shutil.disk_usage(self._directory).free
        if needed > free:
            raise DiskFull(
                f"the job needs {needed:,} bytes of disk and {free:,} are free; ask for fewer maps, or delete old jobs"
            )
        fields = dict(fields) | {"model": card.name, "version": str(card.version)}
        job = Job(place.name, media, fields, created=time.time(), target=target)
        save_job(self._directory / job.id, job)
        with self._changed:
            if place not in self._uploads:
                raise Cancelled("the caller went away before the job was accepted")
            if target and any(other.target == target and not other.finished for other in self._jobs.values()):
                raise BadOption(f"target is {target[:80]!r}, which another job will write; name another one")
            self._uploads.discard(place)
            self._jobs[job.id] = job
            self._changed.notify_all()
        return self.status(job.id)

    def status(self, name: str) -> dict[str, Any]:
        """How a job stands. Raises UnknownJob."""
        with self._changed:
            job = self._find(name)
            done, total = self._progress if job.state in ("running", "writing") else (0, 0)
        percent = 100.0 if job.state == "done" else 100 * done / total if total else 0.0
        return {
            "id": job.id, "state": job.state, "percent": round(percent, 1), "windows_done": done, "windows": total,
            "media_type": job.media, "options": job.fields, "error": job.error or None, "created": job.created,
            "finished": job.finished or None,
            "expires": job.finished + self.settings.job_keep_s if job.finished else None,
            "target": job.target or None, "url": f"/jobs/{job.id}",
            "result": f"/jobs/{job.id}/result" if job.state == "done" or self._is_kept(job) else None,
        }  # fmt: skip

    def result(self, name: str) -> tuple[Path, Job]:
        """The finished answer's file, also of a job whose target could not be written. Raises UnknownJob, and
        JobUnfinished."""
        with self._changed:
            job = self._find(name)
        if job.state != "done" and not self._is_kept(job):
            why = f"failed: {job.error}" if job.state == "failed" else f"is {job.state}; ask /jobs/{job.id} how far"
            raise JobUnfinished(f"the job has no result; it {why}")
        path = self._directory / job.id / "result"
        if not path.is_file():
            raise UnknownJob("the job's result was removed from the server's disk; send it again")
        return path, job

    def _is_kept(self, job: Job) -> bool:
        """Whether a job failed after its answer was written, where that was to be copied."""
        return job.state == "failed" and bool(job.headers) and (self._directory / job.id / "result").is_file()

    def remove(self, name: str) -> None:
        """Forget a job and its files; one that runs leaves the engine at once. Raises UnknownJob."""
        with self._changed:
            job = self._jobs.pop(self._find(name).id)
            if job.state in ("running", "writing"):
                self._cancelled.set()  # its thread removes the files
                return
        shutil.rmtree(self._directory / job.id, ignore_errors=True)

    def close(self) -> None:
        """Interrupt what runs; the next server goes on with it."""
        with self._changed:
            self._closing = True
            self._cancelled.set()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self._lock_file.close()

    def _find(self, name: str) -> Job:
        job = self._jobs.get(name)
        if job is None or self._is_old(job):
            raise UnknownJob(f"there is no job {name[:40]!r}; results are kept for {self.settings.job_keep_s:g} s")
        return job

    def _loop(self) -> None:
        while job := self._next():
            error = ""
            try:
                with self._gateway.telemetry.track("job") as tracked, disk():
                    tracked.model = job.fields["model"]
                    self._run(job, tracked)
            except Cancelled:
                if self._interrupted(job):
                    return
            except NotReady as shortage:
                if self._put_off(job, str(shortage)):
                    continue
            except PenumbraError as refusal:
                error = str(refusal)
            except BaseException:  # whatever it is, it is this job's: the next ones need this thread
                log.exception("a job failed unexpectedly")
                error = "the server failed on this job; its log says why"
            self._finish(job, error)

    def _put_off(self, job: Job, why: str) -> bool:
        """Let a job wait whose model left memory and did not come back, which may pass, unless it was removed. What is
        done of it stays, and others go on."""
        with self._changed:
            if job.id not in self._jobs:
                return False
            job.state, job.error = "queued", why
            job.attempts -= 1
            self._resting[job.id] = time.monotonic() + PUT_OFF_S
            with suppress(DiskFull):
                save_job(self._directory / job.id, job)
        return True

    def _interrupted(self, job: Job) -> bool:
        """Whether a job that was cancelled is to go on in the next server, which is not its fault."""
        with self._changed:
            if job.id not in self._jobs:
                return False
        job.attempts -= 1
        with suppress(DiskFull):
            save_job(self._directory / job.id, job)
        return True

    def _next(self) -> Job | None:
        """The oldest waiting job, once there is one; None when the server closes. Removes what is too old meanwhile."""
        while True:
            self._expire()
            with self._changed:
                if self._closing:
                    return None
                waiting = [job for job in self._jobs.values() if job.state == "queued" and not self._rests(job)]
                if waiting:
                    self._progress, self._cancelled = (0, 0), Cancellation()
                    job = min(waiting, key=lambda job: job.created)
                    job.state = "running"
                    return job
                self._changed.wait(min(SWEEP_S, PUT_OFF_S))

    def _rests(self, job: Job) -> bool:
        return self._resting.get(job.id, 0.0) > time.monotonic()

    def _run(self, job: Job, request: Request) -> None:
        place = self._directory / job.id
        job.attempts += 1
        job.error = ""
        save_job(place, job)
        options, style = parse_request(job.media, job.fields)
        options = without_unseen(options, job.media, style)
        with ExitStack() as held:
            self._load(options, held)
            image = open_image(place / "image", self._limits, self._gateway.segmenter.reading(options))
            spool = Spool(place / "spool", self._gateway.segmenter, image, options, source=job.id)
            prediction = spool.fill(limits=self._limits, cancelled=self._cancelled, progress=self._note)
        request.answered(prediction, prediction.timing_ms)
        job.state = "writing"
        with (place / "writing").open("wb") as file:
            note = WRITERS[job.media](prediction, style, file)
        if self._cancelled.is_set():
            raise Cancelled("the job was cancelled")
        os.replace(place / "writing", place / "result")
        job.headers = answer_headers(replace(prediction, warnings=prediction.warnings + ((note,) if note else ())))
        self._gateway.telemetry.answered(prediction, {})  # its phases, of hours, would hide those of others
        if job.target:
            try:
                send(place / "result", job.target)
            except PenumbraError as error:
                raise type(error)(f"{error}; the answer itself is at /jobs/{job.id}/result") from None

    def _load(self, options: SegmentOptions, held: ExitStack) -> None:
        """Keep a job's version in memory, and only for the job where a newer one had taken its place."""
        segmenter, model, version = self._gateway.segmenter, options.model, options.version
        with self._gateway.lending:
            with suppress(UnknownModel):
                segmenter.find(model, version)
                return
            assert model and version, "submit has written both"
            served = max((card.version for card in segmenter.cards() if card.name == model), default=version)
            taken_for = f"{model} version {version}, which the job was taken for,"
            if served < version:  # who names no version would be answered by this one
                raise UnknownModel(f"{taken_for} was taken back; send it again")
            try:
                segmenter.load(find_artifact(self.settings.store, model, version))
            except (UnknownModel, BadArtifact) as error:  # of which the places are none of the caller's business
                log.error("a job's model cannot be loaded: %s", error)
                if may_pass(error):
                    raise NotReady(f"{model} version {version} cannot be loaded at present") from None
                raise UnknownModel(f"{taken_for} can be loaded no more; send it again") from None
            self._gateway.lent.add((model, version))
            held.callback(self._gateway.give_back, model, version)

    def _note(self, num_done: int, num_windows: int) -> None:
        self._progress = (num_done, num_windows)

    def _finish(self, job: Job, error: str) -> None:
        """Keep what is asked for from now on: the result, and how it went; of a job that was removed nothing."""
        place = self._directory / job.id
        ended = replace(job, state="failed" if error else "done", error=error, finished=time.time())
        shutil.rmtree(place / "spool", ignore_errors=True)
        with suppress(DiskFull, OSError):  # then the next server finds it unfinished, with its image, and tries again
            save_job(place, ended)
            for name in ("image", "writing"):
                (place / name).unlink(missing_ok=True)
        with self._changed:  # whoever reads that it is done can have it
            if job.id in self._jobs:
                self._jobs[job.id] = ended
                return
        shutil.rmtree(place, ignore_errors=True)

    def _is_old(self, job: Job) -> bool:
        return 0 < job.finished < time.time() - self.settings.job_keep_s

    def _expire(self) -> None:
        """Remove finished jobs that are too old or too many; their files outside of the lock: the loop takes it."""
        with self._changed:
            finished = sorted((job for job in self._jobs.values() if job.finished), key=lambda job: -job.finished)
            over = [job for job in finished[:MOST_KEPT] if self._is_old(job)] + finished[MOST_KEPT:]
            for job in over:
                del self._jobs[job.id]
        for job in over:
            shutil.rmtree(self._directory / job.id, ignore_errors=True)

    def _recover(self) -> None:
        for place in [path for path in self._directory.iterdir() if path.is_dir() and not path.is_symlink()]:
            if os.path.exists(place / "job.json"):  # False, too, of a directory that may not be read
                self._restore(place)
            elif is_upload(place):
                shutil.rmtree(place, ignore_errors=True)
            else:
                log.warning("%s is no job, and left alone", place)

    def _restore(self, place: Path) -> None:
        try:
            job, error = TypeAdapter(Job).validate_json((place / "job.json").read_bytes()), ""
            if job.id != place.name:
                raise ValueError(f"it is the job {job.id!r}")
        except (OSError, ValueError) as fault:
            log.error("the job %s cannot be read: %s", place.name, fault)
            job = Job(place.name, "", {}, created=time.time())
            error = "the server cannot read what it had kept of this job; send it again"
        if not job.finished and job.attempts >= MAX_ATTEMPTS:
            error = f"the server ended {job.attempts} times while it worked on this job"
        self._jobs[job.id] = job
        if error:
            self._finish(job, error)
        elif not job.finished:
            job.state = "queued"
