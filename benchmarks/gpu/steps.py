"""The steps, most valuable first, each with the time it may take. Together they take no more than ten minutes."""

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.sheet import Results, Sheet

ROOT = Path(__file__).parents[2]
PRODUCT = ("models/**/*.py", "export/**/*.py", "serving/**/*.py", "serving/**/*.c")


@dataclass(frozen=True, slots=True)
class Step:
    """A step is a module with `run(sheet)`, and the tests that it runs.

    about: what it shows, in half a sentence. budget_s: the time it may take, its process' start included; what earlier
    steps have left over is its own as well. few: the tests of a quick run, as `pytest -k` takes them.
    """

    name: str
    about: str
    budget_s: float
    tests: tuple[str, ...] = ()
    few: str = ""

    def run(self, sheet: Sheet) -> None:
        """Do it here and now."""
        if self.tests:
            importlib.import_module("benchmarks.gpu.checks").run(sheet, self.tests, self.few)
        else:
            importlib.import_module(f"benchmarks.gpu.{self.name}").run(sheet)

    def key(self, card: str, *, quick: bool) -> Results:
        """Say what a result holds for: the product's sources and the step's own, the card and torch."""
        own = self.tests or (f"benchmarks/gpu/{self.name}.py",)
        return {"sources": digest((*PRODUCT, *own)), "card": card, "torch": torch.__version__, "quick": quick}


STEPS = (
    Step(
        "pipeline", "every network answers on the GPU as on the CPU", 150, ("tests/gpu/test_pipeline.py",),
        few="film or boxed or prototype",
    ),
    Step("kernels", "operators give there what they give here", 70, ("tests/gpu/test_operators.py",), few="chunks"),
    Step("speed", "windows and samples per second, and the bars", 120),
    Step("server", "the share of time that the GPU works under load", 70),
    Step("formats", "formats side by side", 110),
    Step("shortage", "a batch that does not fit is halved", 20, ("tests/gpu/test_shortage.py",), few="shortage"),
    Step(
        "tensorrt", "engines of TensorRT, or why there are none", 60, ("tests/gpu/test_tensorrt.py",),
        few="published and fp16",
    ),
)  # fmt: skip


def digest(globs: tuple[str, ...]) -> str:
    """Hash files under the root by their paths and contents; a folder stands for the Python files in it."""
    paths = {
        path for glob in globs for path in ([ROOT / glob] if (ROOT / glob).is_file() else ROOT.glob(as_glob(glob)))
    }
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def as_glob(place: str) -> str:
    return f"{place}/**/*.py" if (ROOT / place).is_dir() else place
