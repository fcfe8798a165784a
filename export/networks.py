"""Bring any network: a program as it is, or a module that the user's own code builds, becomes a plain checkpoint.

read the program -> what its pictures are -> run it on probes: what does it give? -> classes -> card -> file.
"""

import dataclasses
import importlib
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from penumbra.export.bring import Brought, Given, build_module, check_settled, read_program, read_torchscript
from penumbra.export.given import Facts, classes_of, facts_beside, input_of, read_facts, size_of
from penumbra.export.importer import IMPORTED, Imported
from penumbra.models.card import NAME, Card, Provenance, Readout, WindowSpec, dump_card, parse_card
from penumbra.models.checkpoint import SUFFIX, check_replaceable, save_checkpoint
from penumbra.models.errors import BadArtifact, BadCheckpoint, BadOption
from penumbra.models.plain.dropout import mask_dropouts
from penumbra.models.plain.net import PlainConfig, PlainNetwork, as_logits
from penumbra.models.plain.programs import read_pt2

SAMPLINGS = ("dropout", "views", "none")
FORMS = ("onnx", "torchscript", "pt2", "module")
ROUNDING = 1e-3
"""A sum of probabilities is 1 up to it, and a batch's answers are its windows' own, relative to the largest."""
ALONE = "one pass has no mutual information; --views flip has, and `penumbra ensemble` of several trainings"


def import_network(form: str, source: str, output: Path | None, given: Given) -> Imported:
    """Read a network, run it on probes, and write it to `output` with a card; None writes nothing.

    form: onnx, torchscript, pt2, or module, whose source is PACKAGE:BUILD. Raises BadOption and BadCheckpoint in one
    sentence: what the network is or gives cannot be served, or too little is said of it. Then nothing is written.
    """
    name = output.stem if output else checkpoint_name(source, given)
    if not NAME.fullmatch(name) or (output and output.suffix != SUFFIX):
        raise BadOption(f"the output is {output or name!s:.200}; a plain name that ends in {SUFFIX} is wanted")
    if output:
        files = [path for path in (Path(source), given.weights) if path and path.is_file()]
        check_replaceable(output, made_by=IMPORTED, sources=files)
    _check(form, given)
    said = read_facts(given.input) if given.input else {}
    beside = facts_beside(given.weights or Path(source))
    brought = _reader(form)(source, given, beside | said)
    facts = beside | brought.facts | said
    size = size_of(said if brought.height else facts, brought.height, brought.width)
    spec, unsaid = input_of(facts, brought.channels)
    kind, count, described = _try_out(brought, spec.num_bands, size)
    classes, unnamed = classes_of(given.classes, facts, count)
    network, cut = _make(brought, kind, count, _probes(spec.num_bands, size)[0], given.sampling)
    config = network.config
    card = Card(
        name=name, version=1, method="plain", config=dataclasses.asdict(config), classes=classes, input=spec,
        window=WindowSpec(*size), sampling=network.sampling, readout=Readout(align_corners=False),
        views=given.views or ("flip" if given.sampling == "views" else "none"),
        provenance=Provenance(recipe=f"{IMPORTED}{brought.origin}"),
    )  # fmt: skip
    try:
        card = parse_card(dump_card(card))
    except BadArtifact as error:
        raise BadOption(str(error)) from None
    if output:
        save_checkpoint(output, card, network)
    alone = card.num_members(card.sampling.default_samples) == 1
    warnings = (*unsaid, *unnamed, *[ALONE] * alone)
    return Imported(card, brought.left_out, warnings, notes=(*brought.notes, described, *cut))


def _check(form: str, given: Given) -> None:
    """Raise BadOption where an option belongs to another form."""
    if given.sampling not in (None, *SAMPLINGS):
        raise BadOption(f"sampling is {given.sampling!r}; {', '.join(SAMPLINGS)} is wanted")
    for option, owner in (("weights", "module"), ("tensor", "onnx")):
        if getattr(given, option) and form != owner:
            raise BadOption(f"--{option} belongs to {owner}, and the form is {form}; leave it out")


def _reader(form: str) -> Callable[[str, Given, Facts], Brought]:
    if form != "onnx":
        return {"torchscript": read_torchscript, "pt2": read_program, "module": build_module}[form]
    try:
        return importlib.import_module("penumbra.export.onnx_program").read_onnx  # type: ignore[no-any-return]
    except ModuleNotFoundError as error:
        raise BadOption(
            f"ONNX needs {error.name}, and it is not installed; pip install 'penumbra-serving[onnx]' helps"
        ) from None


def checkpoint_name(source: str, given: Given) -> str:
    """Name a checkpoint after its file, or the weights of a module."""
    stem = given.weights.stem if given.weights else Path(source.partition("(")[0].replace(":", ".")).stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:100]


def _make(
    brought: Brought, kind: str, count: int, image_1Chw: Tensor, sampling: str | None
) -> tuple[PlainNetwork, tuple[str, ...]]:
    """Make the network, with the masks of its dropouts as noise where it has some that a mask can stand for.

    Raises BadOption where dropout is asked for and there is none; BadCheckpoint: with nothing dropped it has changed.
    """
    program, masks, notes = brought.program, tuple[tuple[int, float], ...](), tuple[str, ...]()
    if sampling == "dropout" and brought.form != "pt2":
        raise BadOption(f"sampling is 'dropout', and {brought.form} has none left; bring the module, or a .pt2 of it")
    if sampling in ("dropout", None) and brought.form == "pt2":
        try:
            masked = mask_dropouts(read_pt2(program), image_1Chw)
        except BadOption as error:
            if sampling:
                raise BadOption(f"sampling is 'dropout'; {error}") from None
            notes = (f"one pass: {error}",)
        else:
            buffer, own = io.BytesIO(), masked.sampling
            torch.export.save(masked.program, buffer)
            mean = "labels are of the mean of the samples; --sampling none keeps the network's own pass"
            program, masks, notes = buffer.getvalue(), own.masks, (mean, *masked.notes)
    network = PlainNetwork(PlainConfig(count, brought.form, len(program), kind, masks))  # type: ignore[arg-type]
    network.program.copy_(torch.frombuffer(bytearray(program), dtype=torch.uint8))
    if masks:
        with torch.inference_mode():
            kept = network(image_1Chw, torch.ones(1, 1, network.sampling.noise_length))[0]
            expected = as_logits(brought.run(image_1Chw), kind)
        if not (kept - expected).abs().max() <= ROUNDING * max(1.0, float(expected.abs().max())):
            raise BadCheckpoint(f"{brought.path} answers otherwise where its dropout is cut; add --sampling none")
    return network, notes


@torch.inference_mode()
def _try_out(brought: Brought, channels: int, size: tuple[int, int]) -> tuple[str, int, str]:
    """Run the program on probes: what it gives, of how many classes, and a sentence that says so.

    Raises BadCheckpoint: it does not run, gives something else than a map of classes, or other answers in a batch.
    """
    probes = _probes(channels, size)
    answers = [_run(brought, probe, size) for probe in probes]
    check_settled(answers[0], _run(brought, probes[0], size), brought.path)
    kind = _kind_of(answers, size, brought)
    together = _run(brought, torch.cat(probes[:2]), size, batch=True)
    difference = (together - torch.cat(answers[:2])).abs().max() if len(together) == 2 else torch.inf
    if not difference <= ROUNDING * max(1.0, float(together.abs().max())):
        raise BadCheckpoint(
            f"{brought.path} answers two windows at once otherwise than one by one; {brought.remedies['batch']}"
        )
    count = max(2, answers[0].shape[1])
    channel = f"one channel, a {kind}, which becomes two classes exactly" if answers[0].shape[1] == 1 else kind
    height, width = answers[0].shape[2:]
    return (
        kind,
        count,
        f"on probes it gives {channel} [B, {answers[0].shape[1]}, {height}, {width}] for {size[0]}x{size[1]} px",
    )


def _probes(channels: int, size: tuple[int, int]) -> list[Tensor]:
    """Draw pictures as normalisation leaves them: noise, large noise, and nothing at all."""
    generator = torch.Generator().manual_seed(0)
    noise_1Chw = torch.randn(1, channels, *size, generator=generator)
    return [noise_1Chw, 4 * torch.randn(1, channels, *size, generator=generator), torch.zeros_like(noise_1Chw)]


def _run(brought: Brought, image_BChw: Tensor, size: tuple[int, int], *, batch: bool = False) -> Tensor:
    try:
        answer: Tensor = (brought.in_batches if batch else brought.run)(image_BChw)
    except BadCheckpoint:
        raise
    except Exception as error:  # whatever a program raises
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        what = f"{len(image_BChw)} windows of {image_BChw.shape[1]} bands and {size[0]}x{size[1]} px"
        remedy = brought.remedies["batch"] if batch else "--input 'size=HEIGHTxWIDTH' gives it windows of another size"
        raise BadCheckpoint(f"{brought.path} cannot run on {what} ({reason[:200]}); {remedy}") from None
    return answer


def _kind_of(answers: Sequence[Tensor], size: tuple[int, int], brought: Brought) -> str:
    """Tell logits from probabilities. Raises BadCheckpoint with what to do where it is neither."""
    first, where = answers[0], brought.path
    shape = list(first.shape)
    values = torch.cat([answer.double().flatten() for answer in answers])
    whole = not first.is_floating_point() or (
        not bool((values == values[0]).all()) and bool((values == values.round()).all())
    )
    if first.dim() == 2:
        raise BadCheckpoint(f"{where} gives {shape}, one answer per picture: it is a classifier, and a network that "
                            "gives logits [B, K, h, w] is wanted")  # fmt: skip
    if whole:
        raise BadCheckpoint(f"{where} gives the numbers of classes ({first.dtype}, {shape}), which say nothing of how "
                            f"sure it is; {brought.remedies['argmax']}")  # fmt: skip
    if first.dim() != 4 or shape[2] == 0 or shape[3] == 0:
        raise BadCheckpoint(f"{where} gives {shape}; logits or probabilities [B, K, h, w] are wanted")
    if shape[3] < shape[1] and shape[1:3] == list(size):
        raise BadCheckpoint(f"{where} gives {shape}, classes last; bring it with its answer transposed to [B, K, h, w]")
    if not values.isfinite().all():
        raise BadCheckpoint(f"{where} gives values that are not finite; export it in float32, in eval mode")
    within = float(values.min()) >= 0 and float(values.max()) <= 1 + ROUNDING
    if shape[1] == 1:
        if within and bool((values == 1).all()):
            raise BadCheckpoint(
                f"{where} gives 1 everywhere: a softmax over one channel; bring it with a sigmoid, or with two channels"
            )
        return "sigmoid" if within else "sigmoid logit"
    sums = torch.cat([answer.double().sum(1).flatten() for answer in answers])
    if within and not bool(((sums - 1).abs() <= ROUNDING).all()):
        raise BadCheckpoint(f"{where} gives {shape[1]} sigmoids, of which several can be true at once; a pixel has one "
                            "class here, so bring each channel as a network of its own (--tensor), or logits of one "
                            "class each")  # fmt: skip
    return "probabilities" if within else "logits"
