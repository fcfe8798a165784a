"""What a step has found: on the disk, in one file of all steps, as soon as it is said."""

import json
import math
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.rounds import machine
from penumbra.models.errors import BadOption
from penumbra.models.files import write_whole
from penumbra.serving.engine.runtime import is_out_of_memory

Results = dict[str, Any]
DONE, FAILED, NOT_HERE, OUT_OF_TIME, RUNNING = "done", "failed", "not possible here", "ran out of time", "running"


class NotHere(Exception):
    """A step cannot be done on this machine; the sentence says why."""


class Failed(Exception):
    """What a step checks does not hold; the sentence says what, and no traceback says more."""


class OutOfTime(BaseException):
    """A step's time is up. Nothing that only guards against failures holds it up."""


class Sheet:
    """A sheet is one step's part of the file of results. It is written by the one process that runs the step.

    quick: shapes are small, to show that the step runs.
    """

    def __init__(self, path: Path, step: str, device: torch.device, *, quick: bool = False) -> None:
        self.path, self.step, self.device, self.quick = path, step, device, quick

    def put(self, name: str, value: float | str) -> None:
        """Note a figure, or a sentence."""
        print(f"  {name:66} {value:.4g}" if isinstance(value, float) else f"  {name:66} {value}", flush=True)
        self.note({name: value})

    def note(self, found: Results) -> None:
        """The same for several, without a line for each."""
        self._write("found", found)

    def bar(self, name: str, figure: float, *, at_least: float = -math.inf, at_most: float = math.inf) -> None:
        """Note a figure that is held against a bar."""
        bound = f">= {at_least:g}" if at_least > -math.inf else f"<= {at_most:g}"
        holds = at_least <= figure <= at_most
        print(f"  {name:66} {figure:.4g} ({bound}): {'yes' if holds else 'NO'}", flush=True)
        self._write("bars", {name: {"figure": figure, "bar": bound, "holds": holds}})

    def unmeasured(self, name: str, why: str) -> None:
        """Note a bar that could not be measured."""
        print(f"  {name:66} not measured: {why}", flush=True)
        self._write("bars", {name: {"why": why}})

    def state(self, state: str, **more: object) -> None:
        """Note how the step stands; one that begins forgets what it found before."""
        results = read(self.path)
        entry = {} if state == RUNNING else results["steps"].get(self.step, {})
        results["steps"][self.step] = entry | {"state": state} | more
        write(self.path, results)

    @contextmanager
    def spared(self, what: str) -> Iterator[None]:
        """Let one failure not end the step: it is noted, and memory is freed."""
        try:
            yield
        except (NotHere, BadOption) as error:  # a format's sentence about a library or a card that it lacks
            self.put(f"{what}: not here", str(error))
        except Exception as error:
            self.put(f"{what}: failed", "out of memory" if is_out_of_memory(error) else first_line(error))
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _write(self, group: str, named: Results) -> None:
        results = read(self.path)
        results["steps"].setdefault(self.step, {}).setdefault(group, {}).update(named)
        write(self.path, results)


def read(path: Path) -> Results:
    """Read the file of results; one that is not there yet has no steps."""
    return json.loads(path.read_text()) if path.exists() else {"steps": {}}  # type: ignore[no-any-return]


def write(path: Path, results: Results) -> None:
    """Replace the file at once: whoever reads it, or is cut off while writing, finds a whole one."""
    write_whole(path, f"{json.dumps(results, indent=2)}\n".encode())


def first_line(error: BaseException) -> str:
    """Put an exception into one line."""
    if isinstance(error, Failed):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def describe(device: torch.device) -> Results:
    """Say what is measured: the card, its driver and limits, the libraries, the machine and the day."""
    facts = machine() | {"date": date.today().isoformat(), "card": str(device)}
    if device.type != "cuda":
        return facts
    card = torch.cuda.get_device_properties(device)
    return facts | {
        "card": card.name, "memory GiB": round(card.total_memory / 2**30, 1),
        "multiprocessors": card.multi_processor_count,
        "compute capability": f"{card.major}.{card.minor}", "driver, clock, power": ask_driver(device),
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
    }  # fmt: skip


def ask_driver(device: torch.device) -> str:
    """Ask nvidia-smi for the driver's version, the highest clock and the power limit."""
    command = ["nvidia-smi", f"--id={device.index or 0}", "--query-gpu=driver_version,clocks.max.sm,power.limit"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run([*command, "--format=csv,noheader"], capture_output=True, text=True, timeout=30)
        return done.stdout.strip() or "unknown"
    return "unknown"
