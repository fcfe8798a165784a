"""Read networks as people have them: ONNX, TorchScript and torch.export files, and modules that user's code builds."""

import ast
import importlib
import io
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from penumbra.export.given import Facts, find_facts, input_of, size_of
from penumbra.export.weights import fill_from
from penumbra.models.card import Views
from penumbra.models.errors import BadCheckpoint, BadOption
from penumbra.models.plain.programs import Picked, load_program, read_pt2
from penumbra.serving.engine.store import sha256_of

ALIKE = 1e-4
"""Relative: how far a program may be from the module that it was made of."""
REMEDIES = {
    "argmax": "bring it without its argmax, so that it gives the logits that go into it",
    "batch": "export it with a batch axis that is free (dynamic_shapes={0: Dim.DYNAMIC})",
}


@dataclass(frozen=True, slots=True)
class Given:
    """What the importer says: class names, `--input`, a module's weights, and which tensor of an ONNX graph to take.

    sampling: `dropout`, `none`, `views`, or dropout where there is some. views: those of a request that names none.
    """

    classes: str | None = None
    input: str | None = None
    weights: Path | None = None
    tensor: str | None = None
    sampling: str | None = None
    views: Views | None = None


@dataclass(frozen=True, slots=True)
class Brought:
    """A program that was read, and what is known of it.

    run, in_batches: as it was brought, and as it is exported. channels, height, width: what it takes alone; None where
    that is free or unknown. facts: what it says of its pictures and classes. remedies: what helps against an answer of
    class numbers, and against a batch axis of fixed size. notes: sentences for whoever imports.
    """

    form: str
    program: bytes
    path: str | Path
    origin: str
    run: Callable[[Tensor], Tensor]
    in_batches: Callable[[Tensor], Tensor]
    channels: int | None = None
    height: int | None = None
    width: int | None = None
    facts: Facts = field(default_factory=dict)
    remedies: Mapping[str, str] = field(default_factory=lambda: REMEDIES)
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def read_torchscript(source: str, given: Given, _: Facts) -> Brought:
    """Read a TorchScript program. It says nothing of its picture but what its first convolution takes."""
    program, origin = read_file(source, "torchscript")
    body = load_of("torchscript", program, source)
    first = next((weight for weight in body.parameters() if weight.dim() == 4), None)
    return Brought(
        "torchscript", program, Path(source), origin, body, body, first.shape[1] if first is not None else None
    )


def read_program(source: str, given: Given, _: Facts) -> Brought:
    """Read a program of torch.export, which says what picture it takes."""
    program, origin = read_file(source, "pt2")
    body = load_of("pt2", program, source)
    exported = read_pt2(program)
    names = exported.graph_signature.user_inputs
    values = [node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder" and node.name in names]
    if len(values) != 1 or values[0].dim() != 4:
        raise BadCheckpoint(
            f"{source} takes {len(names)} inputs ({', '.join(map(str, names))}); one picture [B, C, h, w] is wanted"
        )
    channels, height, width = (side if isinstance(side, int) else None for side in values[0].shape[1:])
    return Brought("pt2", program, Path(source), origin, body, body, channels, height, width)


def build_module(source: str, given: Given, said: Facts) -> Brought:
    """Build a module by the user's own code, fill it, and keep it as a program of torch.export, or else of TorchScript.

    source: PACKAGE:BUILD, a function or class, with keyword arguments where it takes some: `nets:UNet(classes=3)`.
    """
    network = _call(source).eval().requires_grad_(False)
    left_out, notes = fill_from(network, given.weights) if given.weights else ((), (
        "no --weights are named, so the network has those that its code gave it",))  # fmt: skip
    facts = _facts_of(network)
    first = next((weight for weight in network.parameters() if weight.dim() == 4), None)
    channels = first.shape[1] if first is not None else None
    spec, _ = input_of(facts | said, channels)
    height, width = size_of(facts | said, None, None)
    chosen = Picked(network).eval()
    example = torch.randn(2, spec.num_bands, height, width, generator=torch.Generator().manual_seed(0))
    try:
        chosen(example)
    except Exception as error:  # the user's code
        raise BadCheckpoint(f"{source} fails on pictures {list(example.shape)}: {_first_line(error)}") from None
    form, program, note = _keep(chosen, example)
    body = load_of(form, program, source)
    expected, kept = chosen(example), body(example)
    check_settled(expected, chosen(example), source)
    if not (expected - kept).abs().max() <= ALIKE * max(1.0, float(expected.abs().max())):
        raise BadCheckpoint(f"{source} answers otherwise than the {form} program made of it; export it yourself")
    weights = f"; {given.weights.name}, sha256 {sha256_of(given.weights)}" if given.weights else ""
    return Brought(
        form, program, source, f"{source}, {form}{weights}", body, body, channels, height, width, facts,
        notes=(*notes, *note), left_out=left_out,
    )  # fmt: skip


def _keep(network: nn.Module, example: Tensor) -> tuple[str, bytes, tuple[str, ...]]:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of exporters in motion; what comes out is compared with the module
        try:
            exported = torch.export.export(network, (example,), dynamic_shapes=({0: Dim.DYNAMIC},))
            torch.export.save(exported, buffer)
            return "pt2", buffer.getvalue(), ()
        except Exception as error:  # of many kinds
            buffer, reason = io.BytesIO(), _first_line(error)
        torch.jit.save(torch.jit.trace(network, (example,), check_trace=False), buffer)  # type: ignore[no-untyped-call]
    return "torchscript", buffer.getvalue(), (f"torch.export cannot take it ({reason}), so TorchScript is kept",)


def _call(source: str) -> nn.Module:
    """Call PACKAGE:BUILD; what it raises is told in one sentence."""
    package, colon, call = source.partition(":")
    try:
        tree = ast.parse(call, mode="eval").body
        keywords = {str(k.arg): ast.literal_eval(k.value) for k in tree.keywords} if isinstance(tree, ast.Call) else {}
        name = ast.unparse(tree.func if isinstance(tree, ast.Call) else tree)
    except (SyntaxError, ValueError):
        colon = ""
    if not colon or (isinstance(tree, ast.Call) and tree.args):
        raise BadOption(f"the module is {source!r}; PACKAGE:BUILD or PACKAGE:BUILD(name=value) is wanted")
    sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(package)
        for part in name.split("."):
            found = getattr(found, part)
        network = found if isinstance(found, nn.Module) else found(**keywords)
    except Exception as error:  # the user's code
        raise BadOption(f"{source} cannot be built: {type(error).__name__}: {_first_line(error)}") from None
    finally:
        sys.path.remove("")
    if not isinstance(network, nn.Module):
        raise BadOption(f"{source} gives {type(network).__name__}; a torch.nn.Module is wanted")
    return network


def _facts_of(network: nn.Module) -> Facts:
    """Read what the networks of transformers, timm and smp say of themselves."""
    found: Facts = {}
    for holder in (getattr(network, "encoder", None), getattr(network, "backbone", None), network):
        for name in ("config", "default_cfg", "pretrained_cfg"):
            value = getattr(holder, name, None)
            content: Any = getattr(value, "to_dict", lambda value=value: value)()
            found |= find_facts(content if name == "config" else {name: content})
    return {fact: value for fact, value in found.items() if fact not in ("dtype", "size")}


def check_settled(first: Tensor, again: Tensor, source: str | Path) -> None:
    """Raise BadCheckpoint where a network answers one picture in two ways."""
    if not torch.equal(first.nan_to_num(), again.nan_to_num()):
        raise BadCheckpoint(
            f"{source} answers otherwise each time it is asked, so it is random in eval mode too; a dropout "
            "that is one of training alone, as nn.Dropout or F.dropout(x, p, self.training), becomes samples"
        )


def load_of(form: str, program: bytes, source: str) -> nn.Module:
    try:
        return load_program(form, program).requires_grad_(False)
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{source}: {error}") from None


def read_file(source: str, form: str) -> tuple[bytes, str]:
    path = Path(source)
    try:
        return path.read_bytes(), f"{path.name}, {form}, sha256 {sha256_of(path)}"
    except OSError as error:
        raise BadOption(f"{path} cannot be read ({error.strerror}); a file of {form} is wanted") from None


def _first_line(error: Exception) -> str:
    return next((line.strip()[:200] for line in str(error).splitlines() if line.strip()), type(error).__name__)
