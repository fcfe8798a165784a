"""How fast the network runs by batch and samples, and how much of a request's time is not the network.

The served graphs (TorchScript, bf16) and the eager network take turns. The bars come first, then the rest of the table,
as far as the time goes.
"""

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.network import Rates, Subject, rates, seconds, wait
from benchmarks.gpu.sheet import Sheet
from penumbra.serving.engine.backends import Backend, load_backend
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.store import open_artifact

PRECISION = "bf16"
WINDOWS, SAMPLES, MOST = (16, 1, 4, 64, 8, 32, 2), (5, 20, 1, 50, 10, 2), 800
"""The table, most telling first; products of windows and samples above MOST are left out."""
ENCODE_BAR, SAMPLES_BAR, REST_BAR = 0.6, 1.3, 0.1
PICTURE, MANY = (1024, 2048), 20
FLYING, BATCHES, MOST_KERNELS = 4, 12, 12


def run(sheet: Sheet) -> None:
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        ceiling = rates(sheet, torch.bfloat16)
        subject = Subject(sheet, PRECISION)
        directory = subject.export(Path(folder))
        graphs = load_backend(open_artifact(directory).card, directory, sheet.device)
        windows = (2, 1) if sheet.quick else WINDOWS
        encode(sheet, subject, graphs, windows[0], ceiling)
        samples(sheet, Path(folder))
        with sheet.spared("whole picture"):
            whole(sheet, subject, graphs, directory)
        with sheet.spared("copies"):
            copies(sheet, subject, windows[0])
        for num_windows in windows:
            with sheet.spared(f"B={num_windows}"):
                if num_windows != windows[0]:
                    encode(sheet, subject, graphs, num_windows, ceiling)
                decode(sheet, subject, graphs, num_windows, ceiling)


def encode(sheet: Sheet, subject: Subject, graphs: Backend, num_windows: int, ceiling: Rates) -> None:
    """Note windows per second, and for the first of the table the share of the matrix rate."""
    image = subject.image(num_windows)
    taken = seconds(sheet, {
        "served": lambda: graphs.encode(image), "eager": lambda: subject.encode(image),
    })  # fmt: skip
    floor_s = subject.floor_s("encode", num_windows, image.nbytes, ceiling)
    for name, once_s in taken.items():
        sheet.put(f"encode B={num_windows}, {name}, windows/s", num_windows / once_s)
        sheet.put(f"encode B={num_windows}, {name}, share of the floor", floor_s / once_s)
    if num_windows == (2 if sheet.quick else WINDOWS[0]):
        rate = subject.flop["encode"] * num_windows / min(taken.values())
        sheet.bar(
            f"encode at B = {num_windows}: share of the matrix rate", rate / ceiling.flops_per_s, at_least=ENCODE_BAR
        )


def decode(sheet: Sheet, subject: Subject, graphs: Backend, num_windows: int, ceiling: Rates) -> None:
    """Note samples per second by S."""
    image = subject.image(num_windows)
    features, eager = graphs.encode(image), subject.encode(image)
    moved = sum(x.nbytes for x in eager)
    for num_samples in [S for S in ((3, 1) if sheet.quick else SAMPLES) if S * num_windows <= MOST]:
        noise, what = subject.noise(num_samples, num_windows), f"decode B={num_windows} S={num_samples}"
        with sheet.spared(what):
            taken = seconds(sheet, {
                "served": partial(graphs.decode, features, noise), "eager": partial(subject.decode, eager, noise),
            })  # fmt: skip
            floor_s = subject.floor_s("decode", num_windows * num_samples, moved, ceiling)
            for name, once_s in taken.items():
                sheet.put(f"{what}, {name}, samples/s", num_windows * num_samples / once_s)
                sheet.put(f"{what}, {name}, share of the floor", floor_s / once_s)


def samples(sheet: Sheet, folder: Path) -> None:
    """Hold many samples of our own head against one: of the network's time, and of a whole picture's."""
    subject = Subject(sheet, PRECISION, head="film")
    directory = subject.export(folder)
    graphs = load_backend(open_artifact(directory).card, directory, sheet.device)
    image = subject.image(2 if sheet.quick else WINDOWS[0])
    noises = {num: subject.noise(num, len(image)) for num in (1, MANY)}
    taken = seconds(sheet, {
        str(num): lambda noise=noise: graphs.decode(graphs.encode(image), noise) for num, noise in noises.items()
    })  # fmt: skip
    sheet.bar(f"own head, T = {MANY} over T = 1: the network", taken[str(MANY)] / taken["1"], at_most=SAMPLES_BAR)
    with Segmenter(device=str(sheet.device), tuning=Tuning(len(image), MANY)) as segmenter:
        segmenter.load(directory)
        pixels = picture(sheet)
        taken = seconds(sheet, {
            str(num): lambda num=num: segmenter.segment(pixels, SegmentOptions(samples=num)) for num in (1, MANY)
        })  # fmt: skip
    sheet.bar(f"own head, T = {MANY} over T = 1: a whole picture", taken[str(MANY)] / taken["1"], at_most=SAMPLES_BAR)


def whole(sheet: Sheet, subject: Subject, graphs: Backend, directory: Path) -> None:
    """Hold a picture's whole way against the network alone on as many windows, in the same batches.

    That is one caller's, who waits. Of several pictures at a time the steps of one go beside the network of another.
    """
    pixels = picture(sheet)
    size, num_samples = 2 if sheet.quick else WINDOWS[0], subject.card.sampling.default_samples
    with Segmenter(device=str(sheet.device), tuning=Tuning(size, num_samples)) as segmenter:
        segmenter.load(directory)
        num_windows = segmenter.segment(pixels, SegmentOptions()).num_windows
        batches = [size] * (num_windows // size) + [num_windows % size] * (num_windows % size > 0)
        calls = [(subject.image(num), subject.noise(num_samples, num)) for num in batches]

        def network() -> None:
            for image, noise in calls:
                graphs.decode(graphs.encode(image), noise)
            wait(sheet.device)  # a caller waits for its answer as well

        def one(_: int = 0) -> None:
            segmenter.segment(pixels, SegmentOptions())

        with ThreadPoolExecutor(FLYING) as callers:
            variants = {"whole": one, "network": network, "flying": lambda: list(callers.map(one, range(2 * FLYING)))}
            taken = seconds(sheet, variants, rounds=15)
        timing_ms = segmenter.segment(pixels, SegmentOptions()).timing_ms
        with sheet.spared("kernels"):
            kernels(sheet, one)
    with Segmenter(device=str(sheet.device), tuning=Tuning(size, num_samples, cuda_graphs=True)) as segmenter:
        segmenter.load(directory)
        captured_s = seconds(sheet, {"": lambda: segmenter.segment(pixels, SegmentOptions())}, rounds=15)[""]
    height, width = pixels.shape[:2]
    sheet.put(f"a picture of {width}x{height}, {num_windows} windows, {num_samples} samples, ms", 1e3 * taken["whole"])
    sheet.put("of it the network, ms", 1e3 * taken["network"])
    sheet.put("the same picture with CUDA graphs, ms", 1e3 * captured_s)
    sheet.bar(f"what is not the network, of a picture of {width}x{height}", 1 - taken["network"] / taken["whole"],
              at_most=REST_BAR)  # fmt: skip
    sheet.put(f"the same of {FLYING} pictures at a time", 1 - 2 * FLYING * taken["network"] / taken["flying"])
    for phase, ms in timing_ms.items():
        sheet.put(f"a picture of {width}x{height}, {phase}, ms", float(ms))


def kernels(sheet: Sheet, work: Callable[[], object]) -> None:
    """Note what the device runs of a piece of work, longest first, and how much of the time it runs anything."""
    is_gpu = sheet.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    with profile(activities=kinds) as profiled:
        started = time.perf_counter()
        work()
        wait(sheet.device)
        took_us = 1e6 * (time.perf_counter() - started)
    kind = DeviceType.CUDA if is_gpu else DeviceType.CPU
    ran = [
        (event.self_device_time_total if is_gpu else event.self_cpu_time_total, event.count, event.key)
        for event in profiled.key_averages() if event.device_type == kind
    ]  # fmt: skip
    sheet.put("launches and copies of a whole picture", sum(count for _, count, _ in ran))
    sheet.put("share of its time in which they run, under the profiler", sum(us for us, *_ in ran) / took_us)
    for us, count, name in sorted(ran, reverse=True)[:MOST_KERNELS]:
        sheet.put(f"kernel {name[:56]}", f"{us / 1e3:.3f} ms, {count} times")


def picture(sheet: Sheet) -> np.ndarray:
    size = (100, 150) if sheet.quick else PICTURE
    return np.random.Generator(np.random.PCG64(0)).integers(0, 256, (*size, 3), dtype=np.uint8)


def copies(sheet: Sheet, subject: Subject, num_windows: int) -> None:
    """Pictures up from pageable and from pinned memory, and in turn with the network or beside it."""
    if sheet.device.type != "cuda":
        return sheet.put("copies", "not measured: the device is the CPU")
    shape = num_windows, subject.size, subject.size, 3
    hosts = [torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(BATCHES)]
    pinned = [host.pin_memory() for host in hosts]
    kinds = {"pageable": hosts[0], "pinned": pinned[0]}
    taken = seconds(sheet, {
        kind: partial(host.to, sheet.device, non_blocking=True) for kind, host in kinds.items()
    })  # fmt: skip
    for kind, once_s in taken.items():
        sheet.put(f"copy up from {kind} memory, GB/s", hosts[0].nbytes / once_s / 1e9)
    compute, copier = torch.cuda.current_stream(sheet.device), torch.cuda.Stream(sheet.device)

    def in_turn() -> None:
        for host in pinned:
            subject.encode(host.to(sheet.device, non_blocking=True).permute(0, 3, 1, 2))

    def beside() -> None:
        for host in pinned:
            with torch.cuda.stream(copier):
                image = host.to(sheet.device, non_blocking=True)
            compute.wait_stream(copier)
            image.record_stream(compute)
            subject.encode(image.permute(0, 3, 1, 2))

    for name, once_s in seconds(sheet, {"in turn with": in_turn, "beside": beside}).items():
        sheet.put(f"windows/s, copied {name} the network", BATCHES * num_windows / once_s)
