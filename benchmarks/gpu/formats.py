"""Formats side by side on the device, bf16 or what is nearest to it: windows of five samples, one and sixteen a batch.

Each format's export is measured by its own gate, and its graphs are recorded as CUDA graphs as well, where that works.
What is slow to build comes last.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.network import Subject, seconds
from benchmarks.gpu.sheet import NotHere, Sheet
from penumbra.export.bundle import find_writer
from penumbra.serving.engine.backends import Backend, load_backend
from penumbra.serving.engine.store import open_artifact

FORMATS, CAPTURED = ("torchscript", "onnx", "tensorrt", "tensorrt_rtx", "aot"), ("torchscript", "aot")
PRECISIONS = ("bf16", "fp16", "fp32")
"""The first that a format has."""
BATCHES, NUM_SAMPLES = (1, 16), 5
Call = Callable[[], Tensor]


def run(sheet: Sheet) -> None:
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        subjects = {"bf16": Subject(sheet, "bf16")}
        eager_ms = {}
        for num_windows in BATCHES[: 1 if sheet.quick else None]:
            call = call_of(subjects["bf16"], subjects["bf16"], num_windows)
            eager_ms[num_windows] = timed(sheet, "eager bf16", call, num_windows)
        for name in FORMATS[: 1 if sheet.quick else None]:
            with sheet.spared(name):
                precision = next(known for known in PRECISIONS if known in find_writer(name, "fp32").PRECISIONS)
                if precision not in subjects:
                    subjects[precision] = Subject(sheet, precision)
                compare(sheet, subjects[precision], name, Path(folder) / name, eager_ms)


def compare(sheet: Sheet, subject: Subject, name: str, store: Path, eager_ms: dict[int, float]) -> None:
    """Export one format, and note how near and how fast it is."""
    started = time.perf_counter()
    directory = subject.export(store, backend=name)
    what = f"{name} {subject.precision}"
    sheet.put(f"{what}: export, s", time.perf_counter() - started)
    card = open_artifact(directory).card
    assert card.export
    sheet.put(f"{what}: labels that flip, %", card.export.parity.label_flips_percent)
    graphs = load_backend(card, directory, sheet.device)
    if graphs.device.type != sheet.device.type:
        raise NotHere(f"{name} runs on the {graphs.device.type} here")
    calls = {num: call_of(graphs, subject, num) for num in eager_ms}
    for num_windows, call in calls.items():
        sheet.put(f"{what} B={num_windows}: times eager", eager_ms[num_windows] / timed(sheet, what, call, num_windows))
    if sheet.device.type != "cuda" or name not in CAPTURED:
        return
    answers = {num: call().clone() for num, call in calls.items()}
    graphs.capture(call() for call in calls.values())
    what += ", CUDA graph"
    for num_windows, call in calls.items():
        sheet.put(f"{what} B={num_windows}: times eager", eager_ms[num_windows] / timed(sheet, what, call, num_windows))
        sheet.put(f"{what} B={num_windows}: difference", float((answers[num_windows] - call()).abs().max()))


def call_of(graphs: Backend | Subject, subject: Subject, num_windows: int) -> Call:
    """A batch of windows on its way through the network."""
    image, noise = subject.image(num_windows), subject.noise(NUM_SAMPLES, num_windows)
    return lambda: graphs.decode(graphs.encode(image), noise)


def timed(sheet: Sheet, what: str, call: Call, num_windows: int) -> float:
    """Note windows per second; the milliseconds of a batch."""
    once_s = seconds(sheet, {what: call})[what]
    sheet.put(f"{what} B={num_windows}: windows/s", num_windows / once_s)
    return 1e3 * once_s
