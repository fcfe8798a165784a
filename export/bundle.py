"""A checkpoint becomes an artifact: graphs, golden window, parity gate, card. All or nothing."""

import dataclasses
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from export.parity import check_parity, measure_parity
from export.torchscript import write_torchscript
from models.card import Card, ExportFacts, Parity, check_facts, dump_card
from models.checkpoint import load_checkpoint
from models.contract import Network
from models.errors import BadOption
from serving.engine.backend import load_backend
from serving.engine.noise import SeededNoise
from serving.engine.store import CARD, GOLDEN, open_artifact, sha256_of, versions

WRITERS = {"torchscript": write_torchscript}
GOLDEN_WINDOWS, GOLDEN_SAMPLES = 2, 3
WHOLE_IMAGE_EXAMPLE = (128, 160)
"""Golden size for models whose window is the whole image."""


def export_checkpoint(checkpoint: Path, store: Path, *, backend: str = "torchscript") -> Path:
    """Write the next version of the checkpoint's model into a store; returns its directory.

    Raises BadOption (unknown backend), BadCheckpoint, and ParityFailed, in which case nothing is written.
    """
    if backend not in WRITERS:
        raise BadOption(f"there is no backend {backend!r}; known are {', '.join(WRITERS)}")
    card, network = load_checkpoint(checkpoint)
    return export_network(network, card, store, backend=backend, source=sha256_of(checkpoint))


def export_network(
    network: Network, card: Card, store: Path, *, backend: str = "torchscript", source: str = ""
) -> Path:
    """As `export_checkpoint`, from a network in memory; source: sha256 of the file it came from, if any."""
    check_facts(card)
    card = dataclasses.replace(card, version=max(versions(store).get(card.name, [0])) + 1, export=None)
    network = network.eval().requires_grad_(False)
    place = store / card.name
    fresh = [folder for folder in (place, store) if not folder.exists()]
    place.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=place))
    try:
        _write(network, card, draft, backend=backend, source=source)
        for path in (draft, *draft.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)  # temporary files are private; servers have other users
        os.replace(draft, place / str(card.version))
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        for folder in fresh:
            if not any(folder.iterdir()):
                folder.rmdir()
    return place / str(card.version)


def verify_artifact(directory: Path) -> Parity:
    """Check hashes and card, run the golden window on this machine, and measure it against the checkpoint's logits."""
    artifact = open_artifact(directory)
    golden = artifact.golden
    parity = _measure(artifact.card, directory, golden.image_B3hw, golden.noise_SBL, golden.logits_SBKhw)
    check_parity(parity, artifact.card)
    return parity


def _write(network: Network, card: Card, draft: Path, *, backend: str, source: str) -> None:
    image_B3hw, noise_SBL = golden_input(card)
    with torch.inference_mode():
        logits_SBKhw = network(image_B3hw, noise_SBL)
    WRITERS[backend](network, image_B3hw, noise_SBL, draft)
    save_file(
        {"image_B3hw": image_B3hw, "noise_SBL": noise_SBL, "logits_SBKhw": logits_SBKhw.contiguous()}, draft / GOLDEN
    )
    names = sorted(path.name for path in draft.iterdir())
    files = {name: sha256_of(draft / name) for name in names}
    unproved = ExportFacts(backend, "fp32", torch.__version__, files, Parity(0, 0, 0, 0, 0), source)
    parity = _measure(dataclasses.replace(card, export=unproved), draft, image_B3hw, noise_SBL, logits_SBKhw)
    check_parity(parity, card)
    proved = dataclasses.replace(card, export=dataclasses.replace(unproved, parity=parity))
    (draft / CARD).write_text(dump_card(proved), "utf-8")


def _measure(card: Card, directory: Path, image_B3hw: Tensor, noise_SBL: Tensor, logits_SBKhw: Tensor) -> Parity:
    """Run the graphs one window, and where S is free one sample, at a time, other than they were traced; compare."""
    graphs = load_backend(card, directory, torch.device("cpu"))
    chunk = 1 if card.sampling.kind in ("latent", "dropout") else len(noise_SBL)
    windows = []
    for b in range(len(image_B3hw)):
        features = graphs.encode(image_B3hw[b : b + 1])
        samples = [graphs.decode(features, noise) for noise in torch.split(noise_SBL[:, b : b + 1], chunk)]
        windows.append(torch.cat(samples))
    got_SBKhw = torch.cat(windows, dim=1)
    return measure_parity(logits_SBKhw, got_SBKhw, card, height=image_B3hw.shape[2], width=image_B3hw.shape[3])


def golden_input(card: Card) -> tuple[Tensor, Tensor]:
    """A reproducible smooth picture with edges, normalised, B = 2, and noise by the card's law, S = 3 where free."""
    height, width = (card.window.height, card.window.width) if card.window.height else WHOLE_IMAGE_EXAMPLE
    rng = np.random.Generator(np.random.PCG64(0))
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    planes = []
    for _ in range(GOLDEN_WINDOWS * 3):
        fy, fx, phase, cut = (
            rng.uniform(0.005, 0.06),
            rng.uniform(0.005, 0.06),
            rng.uniform(0, 6.28),
            rng.uniform(0.2, 0.8),
        )
        planes.append(
            np.sin(fy * y + fx * x + phase) + np.where(x < cut * width, 0.5, -0.5) + rng.normal(0, 0.1, y.shape)
        )
    image_B3hw = torch.from_numpy(np.stack(planes).reshape(GOLDEN_WINDOWS, 3, height, width)).float()
    fixed = card.sampling.kind in ("members", "single")
    num_samples = card.sampling.default_samples if fixed else GOLDEN_SAMPLES
    noises = [SeededNoise(card.sampling, seed=b, num_samples=num_samples).draw(0) for b in range(GOLDEN_WINDOWS)]
    return image_B3hw, torch.from_numpy(np.stack(noises, axis=1))
