"""One job on the disk: what `job.json` holds, and whose directories are whose (`penumbra.serving.jobs`)."""

import fcntl
import json
import os
import re
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Literal

from pydantic import TypeAdapter

from penumbra.models.errors import BadArtifact
from penumbra.serving.spool import disk

UPLOAD = {"image", "job.part"}
"""What the directory of an upload may hold that has not become a job."""
State = Literal["queued", "running", "writing", "done", "failed"]


@dataclass(slots=True)
class Job:
    """One job, as `job.json` has it. Changed under the lock of `Jobs`, or by its thread while it runs.

    fields: the options as text. headers: what its result is sent with. finished: time of day, 0 before.
    """

    id: str
    media: str
    fields: dict[str, str]
    created: float
    state: State = "queued"
    finished: float = 0.0
    error: str = ""
    attempts: int = 0
    headers: dict[str, str] = field(default_factory=dict)


def save_job(place: Path, job: Job) -> None:
    """Write `job.json`, as a whole or not at all. Raises DiskFull."""
    with disk():
        (place / "job.part").write_text(json.dumps(asdict(job)))
        os.replace(place / "job.part", place / "job.json")


def read_job(place: Path) -> Job:
    """The job in a directory. Raises OSError and ValueError: unreadable, mistyped, or another directory's."""
    job = TypeAdapter(Job).validate_json((place / "job.json").read_bytes())
    if job.id != place.name:
        raise ValueError(f"it is the job {job.id!r}")
    return job


def is_upload(place: Path) -> bool:
    """Whether a directory is an upload that broke off, and nothing that somebody else keeps beside the jobs."""
    try:
        names = {path.name for path in place.iterdir()}
    except OSError:
        return False
    return not names or (names <= UPLOAD and re.fullmatch(r"[\w-]{22}", place.name) is not None)


def lock(directory: Path) -> IO[bytes]:
    """Make the directory this process's own for as long as the file is open. Raises BadArtifact."""
    with ExitStack() as undo:
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = undo.enter_context((directory / "lock").open("ab"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BadArtifact(
                f"jobs cannot be kept in {directory} ({error.strerror}); name a directory of this server alone in "
                "PENUMBRA_JOBS"
            ) from None
        undo.pop_all()
        return file
