"""Bring any network: a program as it is, or a module that the user's own code builds, becomes a plain checkpoint.

read the program -> what its pictures are -> run it on probes: what does it give? -> classes -> card -> file.
"""

import dataclasses
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penumbra.export.bring import Brought, Given, build_module, read_program, read_torchscript
from penumbra.export.given import Facts, classes_of, facts_beside, input_of, read_facts, size_of
from penumbra.export.golden import example_size
from penumbra.export.importer import IMPORTED, Imported
from penumbra.models.card import Card, Provenance, Readout, WindowSpec, dump_card, parse_card
from penumbra.models.checkpoint import check_output, save_checkpoint
from penumbra.models.errors import BadArtifact, BadCheckpoint, BadOption, first_line
from penumbra.models.inputs import InputSpec, failures_of_input
from penumbra.models.plain.dropout import mask_dropouts
from penumbra.models.plain.net import PlainConfig, PlainNetwork, as_logits
from penumbra.models.plain.programs import read_pt2

SAMPLINGS = ("dropout", "views", "none")
FORMS = ("onnx", "torchscript", "pt2", "module")
ROUNDING = 1e-3
"""A sum of probabilities is 1 up to it, and answers are the same, relative to the largest."""
FREE_BATCH = (
    "export it with a batch axis that is free: dynamic_shapes={0: Dim.DYNAMIC} of torch.export, "
    "dynamic_axes={'image': {0: 'B'}} of torch.onnx"
)
OTHER_SIZE = "--input 'size=HEIGHTxWIDTH' gives it windows of a size that it takes"
ODD_SIZE = (101, 67)
"""A picture's, which no network's strides divide."""
ALONE = "one pass has no mutual information; --views flip has, and `penumbra ensemble` of several trainings"
MEAN = "labels are of the mean of the samples; --sampling none keeps the network's own pass"


def import_network(form: str, source: str, output: Path | None, given: Given) -> Imported:
    """Read a network, run it on probes, and write it to `output` with a card; None writes nothing.

    form: onnx, torchscript, pt2, or module, whose source is PACKAGE:BUILD. Raises BadOption and BadCheckpoint in one
    sentence: what the network is or gives cannot be served, or too little is said of it. Then nothing is written.
    """
    if output:
        sources = [path for path in (Path(source), given.weights) if path and path.is_file()]
        check_output(output, made_by=IMPORTED, sources=sources)
    if given.sampling not in (None, *SAMPLINGS):
        raise BadOption(f"sampling is {given.sampling!r}; {', '.join(SAMPLINGS)} is wanted")
    for option, owner in (("weights", "module"), ("tensor", "onnx")):
        if getattr(given, option) and form != owner:
            raise BadOption(f"--{option} belongs to {owner}, and the form is {form}; leave it out")
    try:
        imported, network = _import(form, source, output.stem if output else checkpoint_name(source, given), given)
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{source}: {error}") from None
    except BadArtifact as error:
        raise BadOption(str(error)) from None
    if output:
        save_checkpoint(output, imported.card, network)
    return imported


def checkpoint_name(source: str, given: Given) -> str:
    """Name a checkpoint after its file, or the weights of a module."""
    stem = given.weights.stem if given.weights else Path(source.partition("(")[0].replace(":", ".")).stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:100]


def _import(form: str, source: str, name: str, given: Given) -> tuple[Imported, PlainNetwork]:
    """Make card and network, and sentences on both; what is refused does not say of which source."""
    said, (beside, read) = read_facts(given.input or ""), facts_beside(given.weights or Path(source))
    brought = _read(form, source, given, beside | said)
    facts = beside | brought.facts | said
    height, width = size_of(said if brought.height else facts, brought.height, brought.width)
    spec, unsaid = input_of(facts, brought.channels)
    for sentence in (sentence for sentence, is_so in failures_of_input(spec).items() if is_so):
        raise BadOption(f"--input: {sentence}")
    probes = _probes(spec, *(seen := example_size(height, width)))
    kind, (_, channels, *sides) = _try_out(brought, probes)
    others = [] if height else _probes(spec, *ODD_SIZE)[:1]
    classes, unnamed = classes_of(given.classes, facts, max(2, channels))
    program, masks, cut = _cut(brought, probes[0], given.sampling)
    config = PlainConfig(len(classes), brought.form, len(program), kind, masks)  # type: ignore[arg-type]
    network = PlainNetwork(config)
    network.program.copy_(torch.frombuffer(bytearray(program), dtype=torch.uint8))
    _check_kept(network, brought, (probes[0], *others))
    card = Card(
        name=name, version=1, method="plain", config=dataclasses.asdict(config), classes=classes, input=spec,
        window=WindowSpec(height, width), sampling=network.sampling, readout=Readout(align_corners=False),
        views=given.views or ("flip" if given.sampling == "views" else "none"),
        provenance=Provenance(recipe=f"{IMPORTED}{brought.origin}"),
    )  # fmt: skip
    card = parse_card(dump_card(card))  # checked
    low, high, *_ = (info.name for info in classes)
    two = f"one channel, a {kind} of {high}, which becomes two classes exactly ({low} where it is low)"
    found = two if channels == 1 else kind
    found = f"on probes it gives {found} [B, {channels}, {sides[0]}, {sides[1]}] for {seen[0]}x{seen[1]} px"
    alone = (ALONE,) if card.num_members(card.sampling.default_samples) == 1 else ()
    notes = (*read, *brought.notes, found, *cut)
    return Imported(card, brought.left_out, (*unsaid, *unnamed, *alone), notes=notes), network


def _read(form: str, source: str, given: Given, facts: Facts) -> Brought:
    if form == "module":
        return build_module(source, given, facts)
    if form == "onnx":
        from penumbra.export.onnx_program import read_onnx  # needs a library that the others do not

        return read_onnx(source, given.tensor)
    return read_torchscript(source) if form == "torchscript" else read_program(source)


def _cut(brought: Brought, image_1Chw: Tensor, sampling: str | None) -> tuple[bytes, Any, tuple[str, ...]]:
    """Make an input of the program's dropout where masks can stand for it; returns a program, its masks, and sentences.

    Raises BadOption where dropout is asked for and there is none.
    """
    if sampling == "dropout" and brought.form != "pt2":
        raise BadOption(f"sampling is 'dropout', and {brought.form} has none left; bring the module, or a .pt2 of it")
    if sampling in ("views", "none") or brought.form != "pt2":
        return brought.program, (), ()
    try:
        masked = mask_dropouts(read_pt2(brought.program), image_1Chw)
    except BadOption as error:
        if sampling:
            raise BadOption(f"sampling is 'dropout'; {error}") from None
        return brought.program, (), (f"one pass: {error}",)
    buffer = io.BytesIO()
    torch.export.save(masked.program, buffer)
    return buffer.getvalue(), masked.sampling.masks, (MEAN, *masked.notes)


@torch.inference_mode()
def _check_kept(network: PlainNetwork, brought: Brought, probes: Sequence[Tensor]) -> None:
    """Raise BadCheckpoint where what is kept answers otherwise than what was brought, or not at a probe's size."""
    noise_11L = torch.ones(1, 1, network.sampling.noise_length)
    for probe in probes:
        expected = as_logits(_run(brought.run, probe, OTHER_SIZE), network.config.output)
        if not _is_same(_run(lambda image_1Chw: network(image_1Chw, noise_11L)[0], probe, OTHER_SIZE), expected):
            masked = "it answers otherwise where its dropout is cut; add --sampling none"
            raise BadCheckpoint(masked if network.config.masks else f"its program is of one size alone; {OTHER_SIZE}")


@torch.inference_mode()
def _try_out(brought: Brought, probes: Sequence[Tensor]) -> tuple[str, list[int]]:
    """Run the program on probes: find what it gives, and the shape of that.

    Raises BadCheckpoint: it does not run, gives something else than a map of classes, or other answers in a batch.
    """
    answers = [_run(brought.run, probe, OTHER_SIZE) for probe in probes]
    if not torch.equal(answers[0].nan_to_num(), _run(brought.run, probes[0], OTHER_SIZE).nan_to_num()):
        raise BadCheckpoint("it answers otherwise each time it is asked, so it is random in eval mode too; a dropout "
                            "that is one of training alone, as nn.Dropout or F.dropout(x, p, self.training), becomes "
                            "samples")  # fmt: skip
    kind = _kind_of(answers, list(probes[0].shape), brought.without_argmax)
    batch = torch.cat([*probes[:-NUM_FLAT]])  # of the others a network that standardises each gives noise of rounding
    if not _is_same(_run(brought.in_batches, batch, FREE_BATCH), torch.cat(answers[:-NUM_FLAT])):
        raise BadCheckpoint(f"its {brought.form} program answers several windows at once otherwise than it does one by "
                            f"one; {FREE_BATCH}")  # fmt: skip
    return kind, list(answers[0].shape)


NUM_FLAT = 2
"""Probes that have one value throughout a band, the last ones."""


def _probes(spec: InputSpec, height: int, width: int) -> list[Tensor]:
    """Draw pictures as normalisation leaves them: noise of the values that they have, large noise, zeros, and of every
    band the least and the largest value."""
    generator = torch.Generator().manual_seed(0)
    noise, large = (torch.randn(1, spec.num_bands, height, width, generator=generator) for _ in range(2))
    least, most = (torch.tensor(ends)[:, None, None].expand_as(noise) for ends in spec.extent)
    return [least + (most - least) * noise.sigmoid(), 4 * large, torch.zeros_like(noise), least, most]


def _is_same(answer: Tensor, expected: Tensor) -> bool:
    """Tell whether two answers are one, up to rounding."""
    return answer.shape == expected.shape and bool(
        (answer - expected).abs().max() <= ROUNDING * max(1.0, float(expected.abs().max()))
    )


def _run(program: Callable[[Tensor], Tensor], image_BChw: Tensor, remedy: str) -> Tensor:
    try:
        return program(image_BChw)
    except BadCheckpoint:
        raise
    except Exception as error:  # whatever a program raises
        num, bands, height, width = image_BChw.shape
        what = f"{num} windows of {bands} bands and {height}x{width} px"
        raise BadCheckpoint(f"it cannot run on {what} ({first_line(error)}); {remedy}") from None


def _kind_of(answers: Sequence[Tensor], picture: list[int], without_argmax: str) -> str:
    """Tell logits from probabilities. Raises BadCheckpoint with what to do where it is neither."""
    shape, dtype = list(answers[0].shape), answers[0].dtype
    values = torch.cat([answer.double().flatten() for answer in answers])
    least, most = map(float, values.aminmax()) if len(values) else (0.0, 0.0)
    are_whole = least < most and bool((values == values.round()).all())
    is_map, are_shares = len(shape) == 4 and 0 not in shape, least >= 0 and most <= 1 + ROUNDING
    channels = shape[1] if is_map else 0
    refusals = {
        f"it gives {shape}, one answer per picture: it is a classifier, and a network that gives logits [B, K, h, w] "
        "is wanted": len(shape) == 2,
        f"it gives the numbers of classes ({dtype}, {shape}), which say nothing of how sure it is; {without_argmax}":
            not dtype.is_floating_point or are_whole,
        f"it gives {shape}; logits or probabilities [B, K, h, w] are wanted": not is_map,
        f"it gives {shape}, classes last; bring it with its answer transposed to [B, K, h, w]":
            is_map and shape[1:3] == picture[2:] and shape[3] < shape[1],
        "it gives values that are not finite; export it in float32, in eval mode": not bool(values.isfinite().all()),
        "it gives 1 everywhere: a softmax over one channel; bring it with a sigmoid, or with two channels":
            channels == 1 and least == 1 == most,
        f"it gives {channels} sigmoids, of which several can be true at once; a pixel has one class here, so bring "
        "each channel as a network of its own (--tensor), or logits of one class each":
            channels > 1 and are_shares and any((answer.sum(1) - 1).abs().max() > ROUNDING for answer in answers),
    }  # fmt: skip
    for sentence, is_so in refusals.items():
        if is_so:
            raise BadCheckpoint(sentence)
    if channels == 1:
        return "sigmoid" if are_shares else "sigmoid logit"
    return "probabilities" if are_shares else "logits"
