"""Penumbra beside other servers, and its windows beside MONAI's: one run, one machine, the same files and pictures.

    python -m benchmarks.peers                                   # all of it
    python -m benchmarks.peers --requests 5 --only penumbra --only litserve

docs/measure/peers.md says how each is set up and what the numbers mean. Figures go to benchmarks/results/peers.json
with a plot beside them. What is not installed is named and left out (`make .venv/peers` fetches it).
"""

import dataclasses
import io
import json
import random
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from benchmarks.overhead import pictures
from benchmarks.peers import plots
from benchmarks.peers.servers import NEEDS, SERVERS, Task
from benchmarks.peers.traffic import Slices, run_slice
from benchmarks.rounds import RESULTS, save
from penumbra.export.bundle import export_network
from penumbra.models.card import WindowSpec
from penumbra.models.checkpoint import load_checkpoint
from tests.serving.server import ROOT

ROUNDS = 2
MODELS = ("supervised-camvid", "np_semiseg-camvid")
"""One pass a window, and eight samples behind one encoder."""
UNIFORM = ((360, 480),)
RASTER_WINDOW = WindowSpec(512, 512)
BATCHES = (1, 4)
"""Windows per call that MONAI is tried with; the fastest counts."""
Figures = dict[str, Any]


@click.command()
@click.option(
    "--requests", default=5, show_default=True, help="Of each client in a slice; each size is asked for as often if 5."
)
@click.option("--side", default=4096, show_default=True, help="Of the large picture, in px.")
@click.option("--only", multiple=True, type=click.Choice([*SERVERS, "monai"]), help="These alone; repeatable.")
def main(requests: int, side: int, only: tuple[str, ...]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are ended too
    chosen = [name for name in [*SERVERS, "monai"] if not only or name in only]
    missing = [name for name in chosen if name in NEEDS and not NEEDS[name].exists()]
    for name in missing:
        click.echo(f"{name} is not installed and left out; make .venv/peers fetches it")
    present = [name for name in chosen if name not in missing]
    servers = [name for name in present if name in SERVERS]
    results: Figures = {"requests of a client in a slice": requests, "left out": missing}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for model in MODELS if servers else ():
                for kind, figures in measure_traffic(model, servers, Path(folder) / model, requests).items():
                    results[f"{model}, {kind}"] = figures
            if "monai" in present:
                results["one large picture in windows"] = measure_windows(Path(folder) / "raster", side)
    finally:  # what was measured is kept, whatever a later server met
        save("peers", results | against_best(results))
        plots.draw(results, RESULTS / "peers.png")


def measure_traffic(model: str, servers: list[str], folder: Path, requests: int) -> Figures:
    """Figures by kind of traffic and server; each kind with the servers that are set up for it."""
    made = {image.shape[:2]: jpeg for image, jpeg in pictures()}
    mixed, uniform = list(made.values()), [made[size] for size in UNIFORM]
    card, network = load_checkpoint(ROOT / f"models/zoo/{model}.safetensors")
    card = dataclasses.replace(card, name="peers")  # a store with a demo model would be filled with the others
    whole = dataclasses.replace(card, window=WindowSpec(0, 0))
    of_whole = Task(export_network(network, whole, folder / "whole/store"), True, folder / "whole")
    stitched = NEEDS["monai"].exists()
    of_windows = Task(export_network(network, card, folder / "windows/store"), not stitched, folder / "windows")
    kinds = {"mixed sizes, in windows": mixed, "one size": uniform} if stitched else {"one size": uniform}
    return take_turns(of_whole, servers, {"mixed sizes, run whole": mixed}, requests) | take_turns(
        of_windows, servers, kinds, requests
    )


def take_turns(task: Task, servers: list[str], kinds: dict[str, list[bytes]], requests: int) -> Figures:
    """All servers are up at once; slices of their traffic are in shuffled order. The first answers only warm up."""
    results: Figures = {}
    with ExitStack() as stack:
        connect = {}
        for name in servers:
            own = dataclasses.replace(task, folder=task.folder / name)
            own.folder.mkdir()
            try:
                connect[name] = stack.enter_context(SERVERS[name](own))
            except AssertionError as error:  # the others can still be measured
                click.echo(f"{name} did not start and is left out: {error}", err=True)
        servers = list(connect)
        for kind, jpegs in kinds.items():
            answers = {name: list(map(labels_of, map(connect[name](), jpegs))) for name in servers}
            slices = {name: Slices() for name in servers}
            for turn in range(ROUNDS):
                for name in random.Random(turn).sample(servers, len(servers)):
                    run_slice(connect[name], jpegs, slices[name], requests=requests)
            first = answers[servers[0]]
            results[kind] = {
                name: one.figures() | {"labels as the first server's": agreement(answers[name], first)}
                for name, one in slices.items()
            }
    return results


def labels_of(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def agreement(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """Share of equal labels over all pictures."""
    return float(np.mean(np.concatenate([(a == b).ravel() for a, b in zip(ours, theirs, strict=True)])))


def measure_windows(folder: Path, side: int) -> Figures:
    card, network = load_checkpoint(ROOT / f"models/zoo/{MODELS[0]}.safetensors")
    artifact = export_network(network, dataclasses.replace(card, window=RASTER_WINDOW), folder / "store")
    ours = one_side("penumbra", artifact, side, 0, folder)
    theirs = [one_side("monai", artifact, side, batch, folder) for batch in BATCHES]
    best = min(theirs, key=lambda one: one["total s"])
    labels = [np.load(folder / f"{name}.npy") for name in ("penumbra", "monai")]
    return {
        "side": side, "penumbra": ours, "monai": theirs,
        "penumbra's time over MONAI's best": ours["total s"] / best["total s"],
        "stitching over the network, penumbra (bar 0.16)": ours["total s"] / ours["moments s"] - 1,
        "stitching and moments over the network, penumbra": ours["total s"] / ours["network s"] - 1,
        "stitching over the network, MONAI's best": best["total s"] / best["network s"] - 1,
        "peak memory over MONAI's best (bar 0.2)": ours["peak MB"] / best["peak MB"],
        "labels that differ": float((labels[0] != labels[1]).mean()),
    }  # fmt: skip


def one_side(name: str, artifact: Path, side: int, batch: int, folder: Path) -> Figures:
    """In a process of its own. batch 0: as Penumbra chooses."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers.raster", name, artifact, side, batch]
    command.append(folder / f"{name}.npy")
    done = subprocess.run(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=600)
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def against_best(results: Figures) -> Figures:
    """Penumbra's throughput and latencies over the peer with the most requests per second, by kind of traffic."""
    ratios: Figures = {}
    for kind, by_server in results.items():
        if not isinstance(by_server, dict) or "penumbra" not in by_server or "requests/s" not in by_server["penumbra"]:
            continue
        ours, peers = by_server["penumbra"], {name: one for name, one in by_server.items() if name != "penumbra"}
        if peers:
            best = max(peers, key=lambda name: peers[name]["requests/s"])
            bar = "1.0" if kind.endswith("one size") else "1.5"
            ratios[f"{kind}: requests/s over the best peer's (bar {bar})"] = (
                ours["requests/s"] / peers[best]["requests/s"]
            )
            ratios[f"{kind}: p50 and p99 over the same peer's"] = [
                round(ours[which] / peers[best][which], 3) for which in ("p50 ms", "p99 ms")
            ]
            ratios[f"{kind}: best peer"] = best
    return ratios


if __name__ == "__main__":
    main()
