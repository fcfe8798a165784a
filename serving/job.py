"""One job as it lies on the disk, in a directory of its own: `penumbra.serving.jobs` says what is in it."""

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from penumbra.serving.spool import disk

MAX_ATTEMPTS = 3
"""Processes that may end while at a job before it is to blame."""
UPLOAD = {"image", "job.part"}
"""What the directory of an upload may hold that has not become a job."""
State = Literal["queued", "running", "writing", "done", "failed"]


@dataclass(slots=True)
class Job:
    """One job, as `job.json` has it. Changed under the lock of `Jobs`, or by its thread while it runs.

    fields: the options as text. headers: what its result is sent with. finished: time of day, 0 before. error: why it
    failed, or why it waits again. target: an object that its result is copied to, or empty.
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
    target: str = ""


def save_job(place: Path, job: Job) -> None:
    """Write `job.json`, as a whole or not at all. Raises DiskFull."""
    with disk():
        (place / "job.part").write_text(json.dumps(asdict(job)))
        os.replace(place / "job.part", place / "job.json")


def is_upload(place: Path) -> bool:
    """Whether a directory is an upload that broke off, and nothing that somebody else keeps beside the jobs."""
    try:
        names = {path.name for path in place.iterdir()}
    except OSError:
        return False
    return names <= UPLOAD and re.fullmatch(r"[\w-]{22}", place.name) is not None
