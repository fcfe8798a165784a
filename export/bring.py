"""Read networks as people have them: TorchScript and torch.export files, and modules that the user's own code builds.

ONNX files are read by `penumbra.export.onnx_program`, which needs a library more.
"""

import ast
import hashlib
import io
import pkgutil
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from penumbra.export.given import Facts, find_facts, input_of, size_of
from penumbra.export.golden import example_size
from penumbra.export.pickles import ZIP_START
from penumbra.export.weights import fill_from
from penumbra.models.card import Views
from penumbra.models.errors import BadCheckpoint, BadOption, first_line
from penumbra.models.plain.programs import Picked, load_program, read_pt2
from penumbra.serving.engine.store import sha256_of

WITHOUT_ARGMAX = "bring it without its argmax, so that it gives the logits that go into it"
UNFILLED = "no --weights are named, so the network has those that its code gave it"
RENAMED = (
    "; transformers renames tensors from version to version, which its own from_pretrained undoes: bring "
    "transformers:CLASS.from_pretrained(pretrained_model_name_or_path=FOLDER) without --weights"
)
ARCHIVES = {"torchscript": "torch.jit.save", "pt2": "torch.export.save"}
"""What writes such a file, which is a zip archive."""


@dataclass(frozen=True, slots=True)
class Given:
    """What the importer says: class names, `--input`, a module's weights, and which tensor of an ONNX graph to take.

    sampling: `dropout`, `none`, `views`, or dropout where there is some. views: those of a request that names none.
    module: one that is built already, and may be changed.
    """

    classes: str | None = None
    input: str | None = None
    weights: Path | None = None
    tensor: str | None = None
    sampling: str | None = None
    views: Views | None = None
    module: nn.Module | None = None


@dataclass(frozen=True, slots=True)
class Brought:
    """A program that was read, and what is known of it.

    run: the network as it was brought. in_batches: as it is exported. channels, height, width: what it takes alone;
    None where that is free or unknown. facts: what it says of its pictures and classes. without_argmax: what helps
    against an answer of class numbers. notes: sentences for whoever imports. left_out: names of tensors beside the
    network's.
    """

    form: str
    program: bytes
    origin: str
    run: Callable[[Tensor], Tensor]
    in_batches: Callable[[Tensor], Tensor]
    channels: int | None = None
    height: int | None = None
    width: int | None = None
    facts: Facts = field(default_factory=dict)
    without_argmax: str = WITHOUT_ARGMAX
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def read_torchscript(source: str) -> Brought:
    """Read a TorchScript program. It says nothing of its picture but what its first convolution takes."""
    program, origin = read_file(source, "torchscript")
    body = load_program("torchscript", program)
    return Brought("torchscript", program, origin, body, body, _channels_of(body))


def read_program(source: str) -> Brought:
    """Read a program of torch.export, which says what picture it takes."""
    program, origin = read_file(source, "pt2")
    body = load_program("pt2", program)
    exported = read_pt2(program)
    names = exported.graph_signature.user_inputs
    values = [node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder" and node.name in names]
    if len(values) != 1 or values[0].dim() != 4:
        inputs = ", ".join(map(str, names))
        raise BadCheckpoint(f"it takes {len(names)} inputs ({inputs}); one picture [B, C, h, w] is wanted")
    channels, height, width = (side if isinstance(side, int) else None for side in values[0].shape[1:])
    return Brought("pt2", program, origin, body, body, channels, height, width)


def build_module(source: str, given: Given, said: Facts) -> Brought:
    """Build a module by the user's own code, fill it, and keep it as a program of torch.export.

    source: PACKAGE:BUILD, a function or class, with keyword arguments where it takes some: `nets:UNet(classes=3)`.
    """
    network = (_call(source) if given.module is None else given.module).eval().requires_grad_(False)
    weights = given.weights
    try:
        left_out, notes = fill_from(network, weights) if weights else ((), (UNFILLED,))
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{error}{RENAMED * type(network).__module__.startswith('transformers.')}") from None
    origin = f"{source}; {weights.name}, sha256 {sha256_of(weights)}" if weights else source
    facts, channels = _facts_of(network), _channels_of(network)
    height, width = size_of(facts | said, None, None)
    picked, num_bands = Picked(network).eval(), input_of(facts | said, channels)[0].num_bands
    example = torch.zeros(2, num_bands, *example_size(height, width))
    program = _export(picked, example, free=(0,) if height else (0, 2, 3))
    return Brought(
        "pt2", program, f"{origin}, pt2", picked, load_program("pt2", program), channels, height, width, facts,
        notes=notes, left_out=left_out,
    )  # fmt: skip


def _export(network: nn.Module, image_BChw: Tensor, *, free: Sequence[int]) -> bytes:
    """Make a program of a module. No trace stands in where that fails: it would keep one way of every branch.

    free: axes of the picture that may have any length.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of an exporter in motion; what comes out is compared with the module
        try:
            exported = torch.export.export(network, (image_BChw,), dynamic_shapes=(dict.fromkeys(free, Dim.DYNAMIC),))
            torch.export.save(exported, buffer)
        except Exception as error:  # of many kinds, the user's code among them
            raise BadCheckpoint(
                f"torch.export cannot take it on pictures {list(image_BChw.shape)} ({first_line(error)}); leave out "
                "what chooses its way by pixels, or bring a trace that you have checked: penumbra import torchscript"
            ) from None
    return buffer.getvalue()


def _call(source: str) -> nn.Module:
    """Call PACKAGE:BUILD; what it raises is told in one sentence."""
    package, _, call = source.partition(":")
    try:
        tree = ast.parse(call, mode="eval").body
        made = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
        keywords = {str(word.arg): ast.literal_eval(word.value) for word in made.keywords}
        if made.args:
            raise ValueError
    except (SyntaxError, ValueError):
        raise BadOption(f"the module is {source!r}; PACKAGE:BUILD or PACKAGE:BUILD(name=value) is wanted") from None
    sys.path.insert(0, "")
    try:
        found = pkgutil.resolve_name(f"{package}:{ast.unparse(made.func)}")
        network = found if isinstance(found, nn.Module) else found(**keywords)
    except Exception as error:  # the user's code
        raise BadOption(f"{source} cannot be built: {type(error).__name__}: {first_line(error)}") from None
    finally:
        sys.path.remove("")
    if not isinstance(network, nn.Module):
        raise BadOption(f"{source} gives {type(network).__name__}; a torch.nn.Module is wanted")
    return network


def _channels_of(network: nn.Module) -> int | None:
    """Find how many channels the first convolution takes."""
    return next((weight.shape[1] for weight in network.parameters() if weight.dim() == 4), None)


def _facts_of(network: nn.Module) -> Facts:
    """Read what the networks of transformers, timm and smp say of themselves."""
    found: Facts = {}
    encoder = getattr(network, "encoder", None)
    for holder in (getattr(encoder, "model", None), encoder, getattr(network, "backbone", None), network):
        for name in ("config", "default_cfg", "pretrained_cfg"):
            value = getattr(holder, name, None)
            content: Any = getattr(value, "to_dict", lambda value=value: value)()
            found |= find_facts(content if name == "config" else {name: content})
    return {fact: value for fact, value in found.items() if fact not in ("dtype", "size")}


def read_file(source: str, form: str) -> tuple[bytes, str]:
    """Read a program's bytes, and say where they come from."""
    path = Path(source)
    try:
        program = path.read_bytes()
        if form in ARCHIVES and not program.startswith(ZIP_START):
            raise BadCheckpoint(f"it is no archive; a file that {ARCHIVES[form]} wrote is wanted")
        return program, f"{path.name}, {form}, sha256 {hashlib.sha256(program).hexdigest()}"
    except OSError as error:
        raise BadOption(f"{path} cannot be read ({error.strerror}); a file of {form} is wanted") from None
