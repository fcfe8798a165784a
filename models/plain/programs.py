"""Load a program from its bytes, as a module from image_BChw to its answer. No pickle in it may run code.

An ONNX graph is data. TorchScript and torch.export's programs are code, of torch's operators alone, so they are loaded
where networks are imported and exported, and never by a server.
"""

import io
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from penumbra.models.errors import BadCheckpoint, first_line
from penumbra.models.plain.cut import make_traceable, partition

PREFERRED = ("logits", "out")
"""Names that transformers' and torchvision's networks give their answer beside others."""
FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
FOREIGN = re.compile(r"(custom_obj_|opaque_obj_|aotinductor/|\.so$)")
"""Entries of a .pt2 archive that are objects of classes of their own, or machine code."""
EXPRESSION = re.compile(rb'"expr_str"\s*:\s*"((?:[^"\\]|\\.)*)"')
ARITHMETIC = re.compile(rb"(?!.*(__|\b[a-z]\w*\s*\())[\w\s+\-*/(),<>=']*")
"""Sizes in a .pt2 archive are expressions of sympy, which are evaluated where it is read: no function is called there,
and no attribute taken."""
CALLED = ("_operator", "math", "torch")
"""Modules of the functions that a program may call on sizes, beside torch's operators."""


def load_program(form: str, program: bytes) -> nn.Module:
    """Load a program of a form. Raises BadCheckpoint: it does not load; ModuleNotFoundError: ONNX needs onnxruntime."""
    readers = {"onnx": Onnx, "torchscript": _load_torchscript, "pt2": _load_pt2}
    try:
        return readers[form](program).requires_grad_(False)
    except (BadCheckpoint, ModuleNotFoundError):
        raise
    except Exception as error:  # libraries fail in their own ways
        raise BadCheckpoint(f"the {form} program cannot be loaded: {first_line(error)}") from None


class Onnx(nn.Module):
    """An ONNX graph in onnxruntime on the CPU, in float32, one window at a time: what every export of it is held to."""

    def __init__(self, program: bytes) -> None:
        super().__init__()
        import onnxruntime  # an extra

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what is wrong is in the error
        self.session = onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])

    def forward(self, image_BChw: Tensor) -> Tensor:
        (name,) = (entry.name for entry in self.session.get_inputs())
        windows = image_BChw.float().cpu().contiguous().numpy()
        answers = [self.session.run(None, {name: windows[b : b + 1]})[0] for b in range(len(windows))]
        return torch.cat([torch.from_numpy(answer) for answer in answers]).to(image_BChw)


class Picked(nn.Module):
    """A torch program that may give several tensors, of which one is the answer."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, image_BChw: Tensor) -> Tensor:
        return pick(self.body(image_BChw))


def pick(answer: Any) -> Tensor:
    """Find the answer among what a network gives: by a usual name, or else the first tensor."""
    if isinstance(answer, Mapping):
        name = next((name for name in PREFERRED if name in answer), next(iter(answer), None))
        return pick(answer[name]) if name is not None else pick(None)
    if isinstance(answer, Sequence) and len(answer):
        return pick(answer[0])
    if isinstance(answer, Tensor):
        return answer
    raise BadCheckpoint(f"the network gives {type(answer).__name__}; a tensor of logits [B, K, h, w] is wanted")


def _load_torchscript(program: bytes) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated", category=DeprecationWarning)
        return Picked(torch.jit.load(io.BytesIO(program), map_location="cpu").eval())  # type: ignore[no-untyped-call]


def _load_pt2(program: bytes) -> nn.Module:
    """Load a program of torch.export, without the checks of its inputs, which cannot be traced.

    One of a picture and masks is cut where the masks begin, into `encode` and `decode`.
    """
    exported = read_pt2(program)
    if len(exported.graph_signature.user_inputs) == 2:
        encode, decode = partition(exported)
        return nn.ModuleDict({"encode": encode, "decode": decode})
    body = exported.module(check_guards=False)
    body._forward_pre_hooks.clear()
    make_traceable(body.graph)
    body.recompile()
    return Picked(body)


def read_pt2(program: bytes) -> torch.export.ExportedProgram:
    """Read a program of torch.export. Raises BadCheckpoint where it would run more than torch's operators."""
    with zipfile.ZipFile(io.BytesIO(program)) as archive:
        foreign = [name for name in archive.namelist() if FOREIGN.search(name)]
        sizes = [size for name in archive.namelist() if name.endswith(".json")
                 for size in EXPRESSION.findall(archive.read(name))]  # fmt: skip
    strange = [size.decode() for size in sizes if not ARITHMETIC.fullmatch(size)]
    if foreign or strange:
        raise BadCheckpoint(f"the pt2 program holds {(foreign + strange)[0]!r:.80}, which is no part of a network")
    with _weights_only():
        exported = torch.export.load(io.BytesIO(program))
    graphs = [module for module in exported.graph_module.modules() if isinstance(module, fx.GraphModule)]
    for target in (node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"):
        own = isinstance(target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator))
        if not own and getattr(target, "__module__", "") not in CALLED:
            raise BadCheckpoint(f"the pt2 program calls {target}, which is no operator that torch has here")
    return exported


@contextmanager
def _weights_only() -> Iterator[None]:
    """Let torch.load rebuild tensors and nothing else, also where torch.export.load asks it for more."""
    before = os.environ.get(FORCE)
    os.environ[FORCE] = "1"
    try:
        yield
    finally:
        os.environ.pop(FORCE)
        if before is not None:
            os.environ[FORCE] = before
