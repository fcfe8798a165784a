"""What runs a network's graphs. Formats are interchangeable behind one small class, one module per format.

Each module has

    open_graph(path, device, precision) -> Graph    one part of a network, ready to run
    target(device) -> dict[str, str]                what its artifacts are bound to; {} where they run anywhere
    DEVICES: tuple[str, ...]                        if it has not all of torch's: it is on the CPU instead of others

`target` is recorded at export (`card.export.built_for`), and an artifact is refused where it is another. All graphs
take and give float32 whatever they compute in; features are between encode and decode alone, and may be anything.
"""

import importlib
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from penumbra.models.card import Card
from penumbra.models.contract import Features, Prompt
from penumbra.models.errors import BadArtifact, BadOption
from penumbra.serving.engine.backends.graphs import Recorder
from penumbra.serving.engine.backends.lanes import LaneGraph

log = logging.getLogger("penumbra")

SUFFIXES = {
    "torchscript": ".ts", "onnx": ".onnx", "openvino": ".onnx", "aot": ".pt2", "tensorrt": ".engine",
    "tensorrt_rtx": ".engine",
}  # fmt: skip
"""Formats, and how their files end."""
BACKENDS = tuple(SUFFIXES)
EXTRAS = {
    "onnxruntime": "onnx", "onnx": "onnx", "onnxscript": "onnx", "openvino": "openvino",
    "tensorrt": "tensorrt", "torch_tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx",
}  # fmt: skip
"""The optional install that brings a library."""
DTYPES = {
    "fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.float32,
}  # fmt: skip
"""What a precision computes in. Around layers in int8 that is for OpenVINO to say, which is in float32 outside."""
Graph = Callable[..., Any]
"""Takes a part's arguments as `penumbra.models.contract` has them, and gives its tensors."""


class Backend:
    """A backend has the graphs of a network, on one device (see `penumbra.models.contract`).

    They may be called from any thread. one_at_a_time: for those whose calls cannot run side by side, or whose
    threads are for all cores.
    can_capture: whether `capture` can make CUDA graphs of them.
    """

    def __init__(
        self, graphs: Mapping[str, Graph], *, device: torch.device, one_at_a_time: bool, can_capture: bool = False
    ) -> None:
        self.device, self._graphs, self._can_capture = device, graphs, can_capture
        self._alone: AbstractContextManager[object] = threading.Lock() if one_at_a_time else nullcontext()

    def prepare(self, threads: int) -> bool:
        """Open graphs for calls of so many threads, where a format wants that, and tell whether one was opened."""
        opened = [graph.open(threads) for graph in self._graphs.values() if isinstance(graph, LaneGraph)]
        return any(opened)

    @torch.inference_mode()
    def encode(self, image_B3hw: Tensor) -> Features:
        with self._alone:
            return tuple(self._graphs["encode"](self._pixels(image_B3hw)))

    @torch.inference_mode()
    def take_prompt(self, image_B3hw: Tensor, features: Features, prompt: Prompt) -> Features:
        prompt = tuple(tensor.to(self.device, torch.float32) for tensor in prompt)
        with self._alone:
            return tuple(self._graphs["prompt"](self._pixels(image_B3hw), features, prompt))

    @torch.inference_mode()
    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        with self._alone:
            logits_SBKhw = self._graphs["decode"](features, noise_SBL.to(self.device, torch.float32))
        return logits_SBKhw if isinstance(logits_SBKhw, Tensor) else logits_SBKhw[0]

    def capture(self, calls: Iterable[object]) -> None:
        """Make CUDA graphs of the calls that iterating makes, if they can be made; other sizes go on as they are.

        From then on a call's outputs are overwritten by the next one of its sizes: a batch's calls, and what reads
        their outputs, have to be queued on one stream before the next batch's.
        """
        if not self._can_capture:
            return
        recorder, before_bytes = Recorder(self.device), torch.cuda.memory_reserved(self.device)
        self._graphs = {part: recorder.captured(graph) for part, graph in self._graphs.items()}
        try:
            for _ in calls:
                pass
        except RuntimeError as error:
            log.warning("not every call is a CUDA graph, and the others run without: %s", first_words(error))
        recorder.is_on = False
        more_mb = (torch.cuda.memory_reserved(self.device) - before_bytes) / 2**20
        log.info("%d calls are CUDA graphs, for which torch holds %.0f MiB more", recorder.num_captures, more_mb)

    def _pixels(self, image_B3hw: Tensor) -> Tensor:
        return image_B3hw.to(self.device, torch.float32, memory_format=torch.channels_last)


def flat(run: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> Graph:
    """Make a graph of a function on plain lists of tensors, in the order of the contract's arguments."""
    return lambda *arguments: run(pytree.tree_leaves(arguments))


def anywhere(_: torch.device) -> dict[str, str]:
    """Say that graphs of a format run anywhere."""
    return {}


def load_backend(card: Card, directory: Path, device: torch.device) -> Backend:
    """Load an artifact's graphs, ready to run. On CUDA, float32 is float32 from here on in this process: TF32 is off.

    Raises BadArtifact: an unknown format, one whose library is not installed, or one that was built for elsewhere.
    """
    assert card.export
    try:
        here = find_format(__name__, card.export.backend).target(device)
    except BadOption as error:
        raise BadArtifact(f"{directory} cannot be loaded: {error}") from None
    there = card.export.built_for
    for fact in sorted({*here, *there}):
        if here.get(fact) != there.get(fact):
            raise BadArtifact(
                f"{directory} was built for {fact} {there.get(fact)} and this is {here.get(fact)}; build it here: "
                f"penumbra export CHECKPOINT --backend {card.export.backend} --precision {card.export.precision}"
            )
    if device.type == "cuda":  # cuDNN's convolutions round to 10 bits unless they are told not to
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return open_backend(card, directory, device)


def open_backend(card: Card, directory: Path, device: torch.device) -> Backend:
    """Load graphs, whatever machine they were built for. Raises BadArtifact for graphs that do not load."""
    assert card.export
    name, precision = card.export.backend, card.export.precision
    module = find_format(__name__, name)
    if device.type not in getattr(module, "DEVICES", (device.type,)):
        log.info("%s runs on the CPU: as installed here, %s has nothing for %s", card.name, name, device)
        device = torch.device("cpu")
    parts = ("encode", "decode", "prompt") if card.prompt.kind != "none" else ("encode", "decode")
    try:
        graphs = {part: module.open_graph(directory / f"{part}{SUFFIXES[name]}", device, precision) for part in parts}
    except BadArtifact:
        raise
    except Exception as error:  # those of onnxruntime share no base class
        raise BadArtifact(
            f"{directory} holds {name} graphs that this machine cannot load: {first_words(error)}"
        ) from None
    alone = name not in ("torchscript", *(("onnx", "openvino") if device.type == "cpu" else ()))
    can_capture = device.type == "cuda" and name != "onnx"
    return Backend(graphs, device=device, one_at_a_time=alone, can_capture=can_capture)


def first_words(error: Exception) -> str:
    """Take what a library says is wrong into one line: without the places in its own source that it names before."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line and not line.startswith("Exception from ")), type(error).__name__)


def find_format(package: str, name: str) -> ModuleType:
    """Find the module of a format in `package`. Raises BadOption: unknown, or its library is not installed."""
    if name not in BACKENDS:
        raise BadOption(f"there is no backend {name!r}; known are {', '.join(BACKENDS)}")
    return import_with_extra(f"{package}.{name}", f"the backend {name}")


def import_with_extra(module: str, what: str) -> ModuleType:
    """Import a module that needs an optional library. what: how it is called in a sentence. Raises BadOption."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        extra = EXTRAS[error.name]
        raise BadOption(
            f"{what} needs {error.name}, which is not installed; pip install 'penumbra-serving[{extra}]' brings it"
        ) from None
