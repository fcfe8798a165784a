"""Run steps one after the other, each in a process of its own: one that fails, hangs or spoils the GPU spoils no other.

The process itself ends when its time is up, and notes why; one that does not is ended from here.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import torch

from benchmarks.gpu.sheet import (
    DONE,
    FAILED,
    NOT_HERE,
    OUT_OF_TIME,
    RUNNING,
    Failed,
    NotHere,
    OutOfTime,
    Results,
    Sheet,
    first_line,
    read,
)
from benchmarks.gpu.steps import ROOT, Step

GRACE_S = 15
"""For a step that was told that its time is up: a server that it started drains."""
LEAST_S = 10
"""A step is not begun with less: it would find nothing."""


def run_all(
    steps: Sequence[Step], path: Path, device: str, card: str, *, budget_s: float, quick: bool = False,
    again: bool = False,
) -> None:  # fmt: skip
    """Run what has no result yet for these sources and this card, in order, until the budget is spent."""
    end = time.time() + budget_s
    todo = [step for step in steps if again or not has_result(read(path), step, step.key(card, quick=quick))]
    for step in steps:
        if step not in todo:
            print(f"{step.name}: the result is there; --again measures it again")
    for i, step in enumerate(todo):
        left_s = end - time.time()
        limit_s = min(left_s, max(step.budget_s, left_s - sum(later.budget_s for later in todo[i + 1 :])))
        key = step.key(card, quick=quick)
        if limit_s < LEAST_S:
            if read(path)["steps"].get(step.name, {}).get("key") != key:
                sheet = Sheet(path, step.name, torch.device(device))
                sheet.state(RUNNING)
                sheet.state(OUT_OF_TIME, why="the whole run's time was up", key=key)
            continue
        print(f"{step.name}: {step.about}; up to {limit_s:.0f} s", flush=True)
        run_apart(step, Sheet(path, step.name, torch.device(device), quick=quick), key, limit_s=limit_s)


def has_result(results: Results, step: Step, key: Results) -> bool:
    """Tell whether a step is done for these sources and this card; one that failed is tried again."""
    entry = results["steps"].get(step.name, {})
    return entry.get("state") == DONE and entry.get("key") == key


def run_apart(step: Step, sheet: Sheet, key: Results, *, limit_s: float) -> None:
    """Run a step in a process of its own, and note how it ended."""
    started = time.time()
    sheet.state(RUNNING, key=key)
    command = [
        sys.executable, "-m", "benchmarks.gpu", "--here", step.name, "--until", str(started + limit_s),
        "--device", str(sheet.device), "--output", str(sheet.path),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [*command, *(["--quick"] * sheet.quick)], cwd=ROOT, env=environment, start_new_session=True
    )
    try:
        code = process.wait(limit_s + GRACE_S)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        end(process)
    seconds = round(time.time() - started, 1)
    if code is None:
        sheet.state(OUT_OF_TIME, why=f"it did not end {GRACE_S} s after its {limit_s:.0f} s", seconds=seconds)
    elif read(sheet.path)["steps"][step.name]["state"] == RUNNING:
        sheet.state(FAILED, why=f"its process ended with {code}", seconds=seconds)
    else:
        sheet.state(read(sheet.path)["steps"][step.name]["state"], seconds=seconds)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a step's process, and those that it started in its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def run_here(step: Step, sheet: Sheet, *, until: float) -> None:
    """Run a step in this process, until the clock says `until`, and note how it ended."""
    limit_s = until - time.time()
    logging.basicConfig(format="  %(message)s")
    logging.getLogger("penumbra").setLevel(logging.INFO)
    if sheet.quick:
        torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, time_is_up)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(limit_s, 0.1))
        step.run(sheet)
    except NotHere as error:
        sheet.state(NOT_HERE, why=str(error))
    except OutOfTime:
        sheet.state(OUT_OF_TIME, why=f"it was cut off after {limit_s:.0f} s")
    except Exception as error:  # whatever it is, the next step is still to be run
        sheet.state(FAILED, why=first_line(error))
        if not isinstance(error, Failed):
            raise
    else:
        sheet.state(DONE)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def time_is_up(_: int, __: FrameType | None) -> None:
    raise OutOfTime
