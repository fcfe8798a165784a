"""A checkpoint becomes an artifact: graphs, golden window, parity gate, card. All or nothing."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from penumbra.export.parity import Frame, check_parity, measure_frames, measure_parity, relative_error, worst_parity
from penumbra.models.card import Card, ExportFacts, Parity, Sampling, Views, dump_card, parse_card
from penumbra.models.checkpoint import load_checkpoint
from penumbra.models.contract import Features, Network, Prompt
from penumbra.models.errors import BadArtifact, BadOption, first_line
from penumbra.models.files import whole_directory
from penumbra.serving.engine.backends import BACKENDS, Backend, find_format, load_backend
from penumbra.serving.engine.decode import open_image
from penumbra.serving.engine.device import find_device
from penumbra.serving.engine.layout import Reading
from penumbra.serving.engine.noise import SeededNoise
from penumbra.serving.engine.options import Limits
from penumbra.serving.engine.store import (
    CARD,
    GOLDEN,
    Golden,
    Recorded,
    golden_tensors,
    next_version,
    open_artifact,
    sha256_of,
)
from penumbra.serving.engine.windows import cover, cut

GOLDEN_WINDOWS, GOLDEN_SAMPLES = 2, 3
WHOLE_IMAGE_EXAMPLE = (128, 160)
"""Golden size for models whose window is the whole image."""
NOT_MEASURED = Parity(0, 0, 0, 0, 0)
USUAL = "torchscript"


def export_checkpoint(
    checkpoint: Path, store: Path, *, backend: str | None = None, precision: str = "fp32", device: str = "cpu",
    frames: Sequence[Frame] = (), views: Views | None = None, pictures: Sequence[Path] = (),
) -> Path:  # fmt: skip
    """Write the next version of the checkpoint's model into a store; returns its directory.

    backend: by default torchscript, or what the network names first. device: where the graphs are to run. frames:
    labelled pictures, on which the gate is held as well. views: in which it is answered by default; what was calibrated
    in others is left out. pictures: what golden windows are cut from instead of being drawn.
    Raises BadOption (unknown backend, or one that is not installed or has not this precision), BadCheckpoint, and
    ParityFailed, in which case nothing is written.
    """
    find_writer(backend or USUAL, precision)
    card, network = load_checkpoint(checkpoint)
    if views not in (None, card.views):
        card = dataclasses.replace(card, views=views, calibration=None, novelty=None)
    facts = ExportFacts(backend or "", precision, torch.__version__, {}, NOT_MEASURED, sha256_of(checkpoint))
    return _export(network, dataclasses.replace(card, export=facts), store, find_device(device), frames, pictures)


def export_network(
    network: Network, card: Card, store: Path, *, backend: str | None = None, precision: str = "fp32",
    device: str = "cpu",
) -> Path:  # fmt: skip
    """Write the next version of a network in memory into a store, as `export_checkpoint` does."""
    facts = ExportFacts(backend or "", precision, torch.__version__, {}, NOT_MEASURED)
    return _export(network, dataclasses.replace(card, export=facts), store, find_device(device))


def find_writer(backend: str, precision: str) -> ModuleType:
    """Find the module that writes a format. Raises BadOption: unknown, not installed, or not in this precision."""
    writer = find_format("penumbra.export", backend)
    if precision not in writer.PRECISIONS:
        raise BadOption(f"{backend} is not exported in {precision!r}; it is in {', '.join(writer.PRECISIONS)}")
    return writer


def _export(
    network: Network, card: Card, store: Path, device: torch.device, frames: Sequence[Frame] = (),
    pictures: Sequence[Path] = (),
) -> Path:  # fmt: skip
    assert card.export
    formats, backend = network.formats or BACKENDS, card.export.backend or (network.formats or (USUAL,))[0]
    if backend not in formats:
        raise BadOption(f"{card.name} cannot be exported as {backend}; it can as {' and '.join(formats)}")
    card = dataclasses.replace(card, export=dataclasses.replace(card.export, backend=backend))
    parse_card(dump_card(card))
    card = dataclasses.replace(card, version=next_version(store, card.name))
    network = network.eval().requires_grad_(False)
    target = store / card.name / str(card.version)
    with whole_directory(target) as draft:
        try:
            _write(network, card, draft, device, frames, windows_of(pictures, card) if pictures else None)
        except BadArtifact as error:
            raise BadArtifact(str(error).replace(str(draft), str(target))) from None
        for path in draft.iterdir():
            path.chmod(0o755 if path.is_dir() else 0o644)  # temporary files are private; servers have other users
    return target


def verify_artifact(directory: Path, device: str = "cpu") -> Parity:
    """Check hashes and card, run the golden window on this machine, and measure it against the checkpoint's logits."""
    artifact = open_artifact(directory)
    graphs = load_backend(artifact.card, directory, find_device(device))
    parity = _measure(artifact.card, graphs, artifact.golden)
    check_parity(parity, artifact.card)
    return parity


def _write(
    network: Network, card: Card, draft: Path, device: torch.device, frames: Sequence[Frame], windows: Tensor | None
) -> None:
    facts, golden = card.export, ask(network, card, windows)
    assert facts
    writer = find_writer(facts.backend, facts.precision)
    try:
        stand_in = writer.write(network, card, golden, draft, precision=facts.precision, device=device)
    except RuntimeError as error:  # of torch's tracers and exporters
        raise BadOption(
            f"{card.name} cannot be written as {facts.backend} ({first_line(error)}); try another --backend"
        ) from None
    (draft / GOLDEN).write_bytes(save(golden_tensors(golden)))
    files = {path.name: sha256_of(path) for path in sorted(draft.iterdir())}
    built_for = find_format("penumbra.serving.engine.backends", facts.backend).target(device)
    card = dataclasses.replace(card, export=dataclasses.replace(facts, files=files, built_for=built_for))
    graphs = stand_in or load_backend(card, draft, device)
    parity = _measure(card, graphs, golden)
    if frames:
        seen = measure_frames(network, graphs, card, frames)
        worst = worst_parity((parity, seen))
        parity = dataclasses.replace(worst, miou_change=seen.miou_change, num_frames=seen.num_frames)
    check_parity(parity, card)
    facts = dataclasses.replace(
        facts, files=files, built_for=built_for, parity=parity, measured="graph" if stand_in else "files"
    )
    (draft / CARD).write_text(dump_card(dataclasses.replace(card, export=facts)), "utf-8")


def ask(network: Network, card: Card, windows_BChw: Tensor | None = None) -> Golden:
    """Record the network's own answers to the golden windows: B = 2, by the card's sampling, S = 3 where S is free."""
    image_B3hw = golden_image(card) if windows_BChw is None else windows_BChw
    with torch.inference_mode():
        features = network.encode(image_B3hw)
        plain = _answer(network, features, card.sampling)
        extras_BEhw = features[-1] if card.extra_maps else None
        if card.prompt.kind == "none":
            return Golden(image_B3hw, plain, extras_BEhw=extras_BEhw)
        prompt = golden_prompt(card, image_B3hw)
        prompted = _answer(network, network.take_prompt(image_B3hw, features, prompt), card.sampling_with(prompt=True))
        return Golden(image_B3hw, plain, prompt, prompted, extras_BEhw)


def _answer(network: Network, features: Features, sampling: Sampling) -> Recorded:
    fixed = sampling.kind in ("members", "single")
    num_samples = sampling.default_samples if fixed else GOLDEN_SAMPLES
    noises = [SeededNoise(sampling, seed=b, num_samples=num_samples).draw(0) for b in range(GOLDEN_WINDOWS)]
    noise_SBL = torch.from_numpy(np.stack(noises, axis=1))
    return Recorded(noise_SBL, network.decode(features, noise_SBL))


def _measure(card: Card, graphs: Backend, golden: Golden) -> Parity:
    """Run the graphs on the golden windows one by one, and on all in one batch; each figure is the worst.

    Neither is how they were traced: where S is free, samples go one at a time. One engine (OpenVINO 2026.4) has been
    seen to be right for one window and wrong for two.
    """
    num_windows = len(golden.image_B3hw)
    return worst_parity([_measure_in(batch, card, graphs, golden) for batch in sorted({1, num_windows})])


def _measure_in(batch: int, card: Card, graphs: Backend, golden: Golden) -> Parity:
    """Measure in batches of so many windows; of two answers (without and with a prompt) each figure is the worst."""
    plain, prompted, extras = [], [], []
    for first in range(0, len(golden.image_B3hw), batch):
        windows = slice(first, first + batch)
        image_B3hw = golden.image_B3hw[windows]
        features = graphs.encode(image_B3hw)
        plain.append(_decode_apart(graphs, features, golden.plain.noise_SBL[:, windows], card.sampling))
        extras.append(features[-1].cpu())
        if golden.prompted:
            features = graphs.take_prompt(image_B3hw, features, tuple(p[windows] for p in golden.prompt))
            sampling = card.sampling_with(prompt=True)
            prompted.append(_decode_apart(graphs, features, golden.prompted.noise_SBL[:, windows], sampling))
    height, width = golden.image_B3hw.shape[2:]
    worst = worst_parity([
        measure_parity(answer.logits_SBKhw, torch.cat(exported, dim=1), card, height=height, width=width)
        for answer, exported in ((golden.plain, plain), (golden.prompted, prompted)) if answer
    ])  # fmt: skip
    if golden.extras_BEhw is None:
        return worst
    return dataclasses.replace(worst, extras_relative=relative_error(golden.extras_BEhw, torch.cat(extras)))


def _decode_apart(graphs: Backend, features: Features, noise_SBL: Tensor, sampling: Sampling) -> Tensor:
    chunk = 1 if sampling.is_stochastic else len(noise_SBL)
    return torch.cat([graphs.decode(features, noise).cpu() for noise in torch.split(noise_SBL, chunk)])


def example_size(height: int, width: int) -> tuple[int, int]:
    """Give the size of windows, or where these are whole pictures that of one."""
    return (height, width) if height else WHOLE_IMAGE_EXAMPLE


def golden_image(card: Card) -> Tensor:
    """Draw a reproducible smooth picture with edges, normalised, B = 2."""
    height, width = example_size(card.window.height, card.window.width)
    rng = np.random.Generator(np.random.PCG64(0))
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    planes = []
    for _ in range(GOLDEN_WINDOWS * card.input.num_bands):
        fy, fx, phase, cut = (rng.uniform(*limits) for limits in ((0.005, 0.06), (0.005, 0.06), (0, 6.28), (0.2, 0.8)))
        edge = np.where(x < cut * width, 0.5, -0.5)
        planes.append(np.sin(fy * y + fx * x + phase) + edge + rng.normal(0, 0.1, y.shape))
    return torch.from_numpy(np.stack(planes).reshape(GOLDEN_WINDOWS, -1, height, width)).float()


def windows_of(pictures: Sequence[Path], card: Card) -> Tensor:
    """Cut golden windows out of pictures: the first of the first, and the last of the last. Raises BadOption."""
    if not card.window.height:
        raise BadOption(f"{card.name} sees pictures whole; its golden windows are drawn, so leave the pictures out")
    windows = []
    for path, place in ((pictures[0], 0), (pictures[-1], -1)):
        image = open_image(path, Limits(), Reading(card.input)).load()
        plan = cover(*image.shape[:2], card.window)
        windows.append(cut(image, list(plan)[place], plan, spec=card.window, norm=card.input).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(windows))


def golden_prompt(card: Card, image_B3hw: Tensor) -> Prompt:
    """Make a prompt for the golden windows: two overlapping boxes, or two tags, of the first classes to be named."""
    named = [k for k in range(card.num_classes) if k != card.prompt.background][:2]
    num_windows, _, height, width = image_B3hw.shape
    if card.prompt.kind == "tags":
        tags_BK = torch.zeros(num_windows, card.num_classes)
        tags_BK[:, named] = 1
        return (tags_BK,)
    boxes_BKhw = torch.zeros(num_windows, card.num_classes, height, width)
    boxes_BKhw[:, named[0], : height // 2, : width // 2] = 1
    boxes_BKhw[:, named[-1], height // 3 :, width // 3 :] = 1
    return (boxes_BKhw,) if card.prompt.alpha is None else (boxes_BKhw, torch.full((num_windows,), card.prompt.alpha))
