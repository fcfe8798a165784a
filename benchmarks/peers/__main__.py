"""Penumbra beside other servers, and its windows beside MONAI's: one run, one machine, the same files and pictures.

    python -m benchmarks.peers --pictures DIR                                # all of it
    python -m benchmarks.peers --requests 1 --minutes 0 --only penumbra --only litserve

Every server runs the same TorchScript file as its own guide says; then each runs the file that `penumbra tune` chose
here, and Penumbra its sizes too. docs/measure/peers.md says how each is set up and what the numbers mean. Figures go to
benchmarks/results/peers.json with a plot beside them; those of `--only` or `--model` are printed alone. What is not
installed is named and left out (`make .venv/peers` fetches it).
"""

import io
import json
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from benchmarks.overhead import pictures as made_pictures
from benchmarks.peers import plots
from benchmarks.peers.artifacts import Tuning, export, tune
from benchmarks.peers.servers import NEEDS, SERVERS, Server, Task, Up
from benchmarks.peers.traffic import Slices, run_slice
from benchmarks.rounds import RESULTS, save, show
from penumbra import options as shared
from penumbra.export.load import Load
from penumbra.models.card import WindowSpec
from tests.serving.server import ROOT

ROUNDS = 2
MODELS = ("supervised-camvid", "np_semiseg-camvid")
"""One pass a window, and eight samples behind one encoder."""
UNIFORM = ((360, 480),)
WHOLE, RASTER_WINDOW = WindowSpec(0, 0), WindowSpec(512, 512)
BATCHES, BUFFERS = (1, 2, 4, 8), (2, 8)
"""Windows per call that MONAI is tried with, then batches that it keeps before it blends them; the fastest counts."""
BARS: dict[str, tuple[float | None, float]] = {
    "supervised-camvid, mixed sizes, run whole": (1.1, 2.0),
    "supervised-camvid, mixed sizes, in windows": (None, 1.8),
    "supervised-camvid, one size": (1.05, 2.0),
    "np_semiseg-camvid, mixed sizes, run whole": (None, 2.8),
    "np_semiseg-camvid, mixed sizes, in windows": (None, 2.0),
    "np_semiseg-camvid, one size": (None, 2.5),
}
"""Over the best peer as its guide says: with the same file, and tuned."""
TUNED, TUNED_FILE = "penumbra, tuned", "tuned file"
Figures = dict[str, Any]
Entries = dict[str, tuple[Server, Task]]


@click.command()
@click.option(
    "--requests", default=5, show_default=True, help="Of each client in a slice; each size is asked for as often if 5."
)
@click.option("--side", default=4096, show_default=True, help="Of the large picture, in px.")
@click.option("--only", multiple=True, type=click.Choice([*SERVERS, "monai"]), help="These alone; repeatable.")
@click.option("--model", "models", multiple=True, type=click.Choice(MODELS), help="Of these alone; repeatable.")
@click.option("--minutes", default=5.0, show_default=True, help="For tuning each of the artifacts; 0 leaves it out.")
@shared.pictures("photographs that tuning is held on, in place of what is sent here")
def main(
    requests: int, side: int, only: tuple[str, ...], models: tuple[str, ...], minutes: float, pictures: list[Path]
) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are ended too
    chosen = [name for name in [*SERVERS, "monai"] if not only or name in only]
    missing = [name for name in chosen if name in NEEDS and not NEEDS[name].exists()]
    for name in missing:
        click.echo(f"{name} is not installed and left out; make .venv/peers fetches it")
    present = [name for name in chosen if name not in missing]
    servers, tuning = [name for name in present if name in SERVERS], Tuning(minutes, pictures)
    facts = {"requests of a client in a slice": requests, "left out": missing}
    results = Figures(facts)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for model in models or MODELS if servers else ():
                for kind, figures in measure_traffic(model, servers, Path(folder) / model, requests, tuning):
                    results[f"{model}, {kind}"] = figures
            if "monai" in present:
                results["one large picture in windows"] = measure_windows(Path(folder) / "raster", side, tuning)
    finally:  # what was measured is kept, whatever a later server met
        results |= against_best(results)
        if only or models or results == facts:
            show(results)
        else:
            save("peers", results)
            plots.draw(results, RESULTS / "peers.png")


def measure_traffic(
    model: str, servers: list[str], folder: Path, requests: int, tuning: Tuning
) -> Iterator[tuple[str, Figures]]:
    """Yield each kind of traffic with its figures by server, of those servers that are set up for it."""
    made = {image.shape[:2]: jpeg for image, jpeg in made_pictures()}
    mixed, uniform = list(made.values()), [made[size] for size in UNIFORM]
    stitched = NEEDS["monai"].exists()
    in_windows = {"mixed sizes, in windows": mixed} if stitched else {}
    for window, is_whole, kinds in (
        (WHOLE, True, {"mixed sizes, run whole": mixed}),
        (None, not stitched, {**in_windows, "one size": uniform}),
    ):
        place = folder / ("windows" if window is None else "whole")
        artifact, checkpoint = export(model, window, place)
        entries: Entries = {name: (SERVERS[name], Task(artifact, is_whole, place / name)) for name in servers}
        if tuning.minutes:
            tuned = tune(artifact, checkpoint, tuning.photographs or written(mixed, place), tuning.minutes)
            for name in servers:
                called = TUNED if name == "penumbra" else f"{name}, {TUNED_FILE}"
                entries[called] = SERVERS[name], Task(tuned, is_whole, place / f"{name}-tuned")
        yield from take_turns(entries, kinds, requests)


def written(jpegs: list[bytes], folder: Path) -> list[Path]:
    paths = [folder / f"{i}.jpg" for i in range(len(jpegs))]
    for path, jpeg in zip(paths, jpegs, strict=True):
        path.write_bytes(jpeg)
    return paths


def take_turns(entries: Entries, kinds: dict[str, list[bytes]], requests: int) -> Iterator[tuple[str, Figures]]:
    """Yield figures by server of each kind. All servers are up at once; slices of their traffic are in shuffled order.

    The first answers, of one caller and of all at once, only warm up.
    """
    with ExitStack() as stack:
        up = dict[str, Up]()
        for name, (server, task) in entries.items():
            task.folder.mkdir()
            try:
                up[name] = stack.enter_context(server(task))
            except AssertionError as error:  # the others can still be measured
                click.echo(f"{name} did not start and is left out: {error}", err=True)
                continue
            stack.enter_context(up[name].asleep())
        for kind, jpegs in kinds.items():
            answers = first_answers(up, jpegs, entries)
            if not (names := list(answers)):
                continue
            slices = {name: Slices() for name in names}
            for turn in range(ROUNDS):
                for name in random.Random(turn).sample(names, len(names)):
                    with up[name].turn():
                        run_slice(up[name].connect, jpegs, slices[name], requests=requests)
            first = answers[names[0]]
            yield (
                kind,
                {
                    name: one.figures() | {"labels as the first server's": agreement(answers[name], first)}
                    for name, one in slices.items()
                },
            )


def first_answers(up: dict[str, Up], jpegs: list[bytes], entries: Entries) -> dict[str, list[np.ndarray]]:
    """Label maps of every server, which is asked by one caller and then by all; one that fails is left out, so that an
    hour of the others is not lost."""
    answers = {}
    for name, server in up.items():
        try:
            with server.turn():
                answered = list(map(labels_of, map(server.connect(), jpegs)))
                run_slice(server.connect, jpegs, Slices(), requests=1)
            answers[name] = answered
        except Exception as error:  # of whichever client
            click.echo(f"{name} is left out: {error}", err=True)
            log = entries[name][1].folder / "server.log"
            click.echo(log.read_text(errors="replace")[-2000:] if log.exists() else "", err=True)
    return answers


def labels_of(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def agreement(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """Share of equal labels over all pictures."""
    return float(np.mean(np.concatenate([(a == b).ravel() for a, b in zip(ours, theirs, strict=True)])))


def measure_windows(folder: Path, side: int, tuning: Tuning) -> Figures:
    artifact, checkpoint = export(MODELS[0], RASTER_WINDOW, folder)
    ours, theirs = one_side("penumbra", artifact, side, folder), best_of_monai(artifact, side, folder)
    best = min(theirs, key=lambda one: one["total s"])
    labels = [np.load(folder / f"{name}.npy") for name in ("penumbra", "monai")]
    figures: Figures = {
        "side": side, "penumbra": ours, "monai": theirs,
        "penumbra's time over MONAI's best": ours["total s"] / best["total s"],
        "stitching over the network, penumbra (bar 0.16)": ours["total s"] / ours["moments s"] - 1,
        "stitching and moments over the network, penumbra": ours["total s"] / ours["network s"] - 1,
        "stitching over the network, MONAI's best": best["total s"] / best["network s"] - 1,
        "peak memory over MONAI's best (bar 0.2)": ours["peak MB"] / best["peak MB"],
        "labels that differ": float((labels[0] != labels[1]).mean()),
    }  # fmt: skip
    if not tuning.minutes:
        return figures
    tuned = tune(artifact, checkpoint, tuning.enlarged(folder), tuning.minutes, Load("latency"))
    ours, theirs = one_side("penumbra", tuned, side, folder), best_of_monai(tuned, side, folder)
    of_file = min(theirs, key=lambda one: one["total s"])
    return figures | {
        TUNED: ours, f"monai, {TUNED_FILE}": theirs,
        "tuned: time over MONAI's best (bar 0.5)": ours["total s"] / best["total s"],
        "tuned: peak memory over MONAI's best (bar 0.13)": ours["peak MB"] / best["peak MB"],
        "tuned: time over MONAI's best with the same file": ours["total s"] / of_file["total s"],
        "tuned: labels that differ": float((labels[0] != np.load(folder / "penumbra.npy")).mean()),
    }  # fmt: skip


def best_of_monai(artifact: Path, side: int, folder: Path) -> list[Figures]:
    """MONAI with every size of batch, and with the fastest of them every buffer."""
    tried = [one_side("monai", artifact, side, folder, batch=batch) for batch in BATCHES]
    batch = min(tried, key=lambda one: one["total s"])["batch"]
    return tried + [one_side("monai", artifact, side, folder, batch=batch, buffer=buffer) for buffer in BUFFERS]


def one_side(name: str, artifact: Path, side: int, folder: Path, *, batch: int = 0, buffer: int = 0) -> Figures:
    """In a process of its own. batch 0: as Penumbra chooses, or as it was tuned."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers.raster", name, artifact, side, batch, buffer]
    command.append(folder / f"{name}.npy")
    done = subprocess.run(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=600)
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def against_best(results: Figures) -> Figures:
    """Penumbra's throughput and latencies over the peer with the most requests per second, by kind of traffic: with one
    file for all, tuned against peers as their guides say, and all with the tuned file."""
    ratios: Figures = {}
    for kind, by_server in results.items():
        if not isinstance(by_server, dict) or "requests/s" not in by_server.get("penumbra", {}):
            continue
        peers = {name: one for name, one in by_server.items() if not name.startswith("penumbra")}
        guided = {name: one for name, one in peers.items() if TUNED_FILE not in name}
        with_file = {name: one for name, one in peers.items() if TUNED_FILE in name}
        same, tuned = BARS.get(kind, (None, None))
        for what, ours, others, bar in (
            ("same file", by_server["penumbra"], guided, same),
            ("tuned", by_server.get(TUNED), guided, tuned),
            ("tuned, and peers with that file", by_server.get(TUNED), with_file, None),
        ):
            if ours and others:
                best = max(others, key=lambda name: others[name]["requests/s"])
                bounded = f" (bar {bar})" if bar else ""
                rate = ours["requests/s"] / others[best]["requests/s"]
                latencies = [round(ours[which] / others[best][which], 3) for which in ("p50 ms", "p99 ms")]
                ratios[f"{kind}: {what}, requests/s over {best}, the best{bounded}"] = rate
                ratios[f"{kind}: {what}, p50 and p99 over {best}"] = latencies
    return ratios


if __name__ == "__main__":
    main()
