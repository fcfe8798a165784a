"""A checkpoint becomes an artifact: graphs, golden window, parity gate, card. All or nothing."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save
from torch import Tensor

from penumbra.export.golden import ask, windows_of
from penumbra.export.parity import Frame, check_parity, measure_frames, measure_parity, relative_error, worst_parity
from penumbra.models.card import Card, ExportFacts, Parity, Sampling, Views, dump_card, parse_card
from penumbra.models.checkpoint import load_checkpoint
from penumbra.models.contract import Features, Network
from penumbra.models.errors import BadArtifact, BadOption, first_line
from penumbra.models.files import drafted, writing
from penumbra.serving.engine.backends import BACKENDS, Backend, find_format, import_with_extra, load_backend
from penumbra.serving.engine.device import find_device, name_hardware
from penumbra.serving.engine.quota import num_cores
from penumbra.serving.engine.store import (
    GOLDEN,
    Golden,
    Recorded,
    golden_tensors,
    next_version,
    open_artifact,
    put_version,
    sha256_of,
)

NOT_MEASURED = Parity(0, 0, 0, 0, 0)
USUAL = "torchscript"
SEARCH_S = 240.0
"""Most seconds in which int8 tries layers alone: where that is too short for all, it tries neighbours together."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What an export is for and measured on, as `export_checkpoint` has it."""

    device: torch.device
    frames: Sequence[Frame] = ()
    pictures: Sequence[Path] = ()
    search_s: float = SEARCH_S


def export_checkpoint(
    checkpoint: Path, store: Path, *, backend: str | None = None, precision: str = "fp32", device: str = "cpu",
    frames: Sequence[Frame] = (), views: Views | None = None, pictures: Sequence[Path] = (), search_s: float = SEARCH_S,
) -> Path:  # fmt: skip
    """Write the next version of the checkpoint's model into a store; returns its directory.

    backend: by default torchscript, or what the network names first. device: where the graphs are to run. frames:
    labelled pictures, on which the gate is held as well. views: in which it is answered by default; what was calibrated
    in others is left out. pictures: what golden windows are cut from instead of being drawn; int8 needs some, and
    search_s is the time in which it tries layers alone.
    Raises BadOption (unknown backend, or one that is not installed or has not this precision), BadCheckpoint, and
    ParityFailed, in which case nothing is written.
    """
    find_writer(backend or USUAL, precision)
    card, network = load_checkpoint(checkpoint)
    if views not in (None, card.views):
        card = dataclasses.replace(card, views=views, calibration=None, novelty=None)
    facts = ExportFacts(backend or "", precision, torch.__version__, {}, NOT_MEASURED, sha256_of(checkpoint))
    card = dataclasses.replace(card, export=facts)
    return _export(network, card, store, ExportOptions(find_device(device), frames, pictures, search_s))


def export_network(
    network: Network, card: Card, store: Path, *, backend: str | None = None, precision: str = "fp32",
    device: str = "cpu", pictures: Sequence[Path] = (),
) -> Path:  # fmt: skip
    """Write the next version of a network in memory into a store, as `export_checkpoint` does."""
    facts = ExportFacts(backend or "", precision, torch.__version__, {}, NOT_MEASURED)
    options = ExportOptions(find_device(device), pictures=pictures)
    return _export(network, dataclasses.replace(card, export=facts), store, options)


def find_writer(backend: str, precision: str) -> ModuleType:
    """Find the module that writes a format. Raises BadOption: unknown, not installed, or not in this precision."""
    writer = find_format("penumbra.export", backend)
    if precision not in writer.PRECISIONS:
        raise BadOption(f"{backend} is not exported in {precision!r}; it is in {', '.join(writer.PRECISIONS)}")
    return writer


def _export(network: Network, card: Card, store: Path, options: ExportOptions) -> Path:
    assert card.export
    formats, backend = network.formats or BACKENDS, card.export.backend or (network.formats or (USUAL,))[0]
    if backend not in formats:
        raise BadOption(f"{card.name} cannot be exported as {backend}; it can as {' and '.join(formats)}")
    card = dataclasses.replace(card, export=dataclasses.replace(card.export, backend=backend))
    parse_card(dump_card(card))
    network = network.eval().requires_grad_(False)
    target = store / card.name / str(next_version(store, card.name))  # another one may be written meanwhile
    with drafted(target.parent) as draft, writing(target, draft):
        try:
            facts = _write(network, card, draft, options)
        except BadArtifact as error:
            raise BadArtifact(str(error).replace(str(draft), str(target))) from None
        return put_version(draft, store, dataclasses.replace(card, export=facts))


def verify_artifact(
    directory: Path, device: str = "", sizes: tuple[int, int] | None = None, threads: int = 0
) -> Parity:
    """Check hashes and card, run the golden window on this machine, and measure it against the checkpoint's logits.

    device: by default a GPU where there is one, as a server takes it. sizes: windows and samples a call in which it is
    measured too, by default those that it was tuned to on this machine. threads: of the server; 0 is one per core.
    Raises BadArtifact, ParityFailed.
    """
    artifact = open_artifact(directory)
    card, golden = artifact.card, artifact.golden
    graphs = load_backend(card, directory, find_device(device))
    here = name_hardware(find_device(device)), threads or num_cores()  # as `Segmenter.is_tuned_here` has it
    if not sizes and card.tuned and (card.tuned.processor, card.tuned.threads) == here:
        sizes = card.tuned.windows_per_batch, card.tuned.samples_per_call
    parity = _measure(card, graphs, golden)
    if sizes:
        parity = worst_parity((parity, _measure_in(*sizes, card, graphs, _repeated(golden, sizes, card))))
    check_parity(parity, artifact.card)
    return parity


def _write(network: Network, card: Card, draft: Path, options: ExportOptions) -> ExportFacts:
    """Write all but the card, and return what it is to say of the export."""
    assert card.export
    facts, device, pictures, proofs = card.export, options.device, options.pictures, list[Golden]()
    if facts.precision == "int8":
        int8 = import_with_extra("penumbra.export.int8", "int8")
        pictures, others = int8.split(pictures, card, device)
    golden = ask(network, card, windows_of(pictures, card) if pictures else None)
    if facts.precision == "int8" and len(more_BChw := int8.windows_beside(golden.image_B3hw, pictures, card)):
        proofs.append(ask(network, card, more_BChw))
    writer = find_writer(facts.backend, facts.precision)
    example = golden if card.window.height else ask(network, card)  # drawn: sizes that are left open are about its own
    try:
        stand_in = writer.write(network, card, example, draft, precision=facts.precision, device=device)
    except RuntimeError as error:  # of torch's tracers and exporters
        raise BadOption(
            f"{card.name} cannot be written as {facts.backend} ({first_line(error)}); try another --backend"
        ) from None
    (draft / GOLDEN).write_bytes(save(golden_tensors(golden)))
    built_for = find_format("penumbra.serving.engine.backends", facts.backend).target(device)
    facts = dataclasses.replace(facts, built_for=built_for, measured="graph" if stand_in else "files")
    card = dataclasses.replace(card, export=facts)

    def measure(proofs: Sequence[Golden] = (), frames: Sequence[Frame] = ()) -> Parity:
        graphs = stand_in or load_backend(card, draft, device)
        return _measure_all(network, card, graphs, (golden, *proofs), frames)

    if facts.precision == "int8":
        quantiser = int8.Quantiser(network, card, draft, windows_of(others, card, int8.RANGE_WINDOWS))
        prove = partial(measure, proofs, options.frames)
        kept = tuple(quantiser.choose(measure, prove, search_s=options.search_s))
        facts = dataclasses.replace(facts, num_int8=len(quantiser.layers) - len(kept), kept=kept)
    parity = measure(proofs, options.frames)
    check_parity(parity, card)
    files = {path.name: sha256_of(path) for path in sorted(draft.iterdir())}
    return dataclasses.replace(facts, files=files, parity=parity)


def _measure_all(
    network: Network, card: Card, graphs: Backend, goldens: Sequence[Golden], frames: Sequence[Frame]
) -> Parity:
    """Measure on recorded calls and on frames; each figure is the worst."""
    parity = worst_parity([_measure(card, graphs, golden) for golden in goldens])
    if not frames:
        return parity
    seen = measure_frames(network, graphs, card, frames)
    worst = worst_parity((parity, seen))
    return dataclasses.replace(worst, miou_change=seen.miou_change, num_frames=seen.num_frames)


def _measure(card: Card, graphs: Backend, golden: Golden) -> Parity:
    """Run the graphs on the golden windows one by one, and on all in one batch; each figure is the worst.

    Neither is how they were traced: where S is free, samples go one at a time. One engine (OpenVINO 2026.4) has been
    seen to be right for one window and wrong for two.
    """
    num_windows = len(golden.image_B3hw)
    return worst_parity([_measure_in(batch, 1, card, graphs, golden) for batch in sorted({1, num_windows})])


def _repeated(golden: Golden, sizes: tuple[int, int], card: Card) -> Golden:
    """Repeat golden windows, and samples where S is free, until there are so many of them."""
    windows, samples = sizes
    at_B = _in_turns(len(golden.image_B3hw), windows)

    def more(answer: Recorded, sampling: Sampling) -> Recorded:
        at_S = _in_turns(len(answer.noise_SBL), samples if sampling.is_stochastic else 1)
        return Recorded(answer.noise_SBL[at_S][:, at_B], answer.logits_SBKhw[at_S][:, at_B])

    return Golden(
        golden.image_B3hw[at_B],
        more(golden.plain, card.sampling),
        golden.prompt and tuple(one[at_B] for one in golden.prompt),
        golden.prompted and more(golden.prompted, card.sampling_with(prompt=True)),
        None if golden.extras_BEhw is None else golden.extras_BEhw[at_B],
    )


def _in_turns(num: int, least: int) -> Tensor:
    return torch.arange(max(num, least)) % num


def _measure_in(batch: int, chunk: int, card: Card, graphs: Backend, golden: Golden) -> Parity:
    """Measure in batches of so many windows and samples; of two answers (without and with a prompt) each figure is the
    worst."""
    plain, prompted, extras = [], [], []
    for first in range(0, len(golden.image_B3hw), batch):
        windows = slice(first, first + batch)
        image_B3hw = golden.image_B3hw[windows]
        features = graphs.encode(image_B3hw)
        plain.append(_decode_apart(graphs, features, golden.plain.noise_SBL[:, windows], chunk, card.sampling))
        extras.append(features[-1].cpu())
        if golden.prompted:
            features = graphs.take_prompt(image_B3hw, features, tuple(p[windows] for p in golden.prompt))
            sampling = card.sampling_with(prompt=True)
            prompted.append(_decode_apart(graphs, features, golden.prompted.noise_SBL[:, windows], chunk, sampling))
    height, width = golden.image_B3hw.shape[2:]
    worst = worst_parity([
        measure_parity(answer.logits_SBKhw, torch.cat(exported, dim=1), card, height=height, width=width)
        for answer, exported in ((golden.plain, plain), (golden.prompted, prompted)) if answer
    ])  # fmt: skip
    if golden.extras_BEhw is None:
        return worst
    return dataclasses.replace(worst, extras_relative=relative_error(golden.extras_BEhw, torch.cat(extras)))


def _decode_apart(graphs: Backend, features: Features, noise_SBL: Tensor, chunk: int, sampling: Sampling) -> Tensor:
    chunk = chunk if sampling.is_stochastic else len(noise_SBL)
    return torch.cat([graphs.decode(features, noise).cpu() for noise in torch.split(noise_SBL, chunk)])
