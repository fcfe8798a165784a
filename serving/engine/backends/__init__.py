"""What runs a network's graphs. Formats are interchangeable behind one small protocol, one module per format.

Each module has

    load(card, directory, device) -> Backend    the artifact's graphs, ready to run in any thread; raises BadArtifact
    target(device) -> dict[str, str]            what its artifacts are bound to; {} where they run anywhere

`target` is recorded at export (`card.export.built_for`), and an artifact is refused where it is another. All graphs
take and give float32 whatever they compute in; features are between encode and decode alone, and may be anything.
"""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from penumbra.models.card import Card
from penumbra.models.contract import Features, Prompt
from penumbra.models.errors import BadArtifact, BadOption

BACKENDS = ("torchscript", "onnx", "openvino", "aot", "tensorrt")
EXTRAS = {
    "onnxruntime": "onnx", "onnx": "onnx", "onnxscript": "onnx", "openvino": "openvino",
    "tensorrt": "tensorrt", "torch_tensorrt": "tensorrt",
}  # fmt: skip
"""The optional install that brings a library."""
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What a precision computes in."""


class Backend(Protocol):
    """Both halves of a network, on one device in one precision (see `penumbra.models.contract`)."""

    device: torch.device
    dtype: torch.dtype

    def encode(self, image_B3hw: Tensor) -> Features: ...

    def take_prompt(self, image_B3hw: Tensor, features: Features, prompt: Prompt) -> Features: ...

    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor: ...


def load_backend(card: Card, directory: Path, device: torch.device) -> Backend:
    """The artifact's graphs, ready to run. On CUDA, float32 is float32 from here on in this process: TF32 is off.

    Raises BadArtifact: an unknown format, one whose library is not installed, or one that was built for elsewhere.
    """
    assert card.export
    try:
        module = find_format(__name__, card.export.backend)
    except BadOption as error:
        raise BadArtifact(f"{directory} cannot be loaded: {error}") from None
    here, there = module.target(device), card.export.built_for
    for fact in sorted({*here, *there}):
        if here.get(fact) != there.get(fact):
            raise BadArtifact(
                f"{directory} was built for {fact} {there.get(fact)} and this is {here.get(fact)}; build it here: "
                f"penumbra export CHECKPOINT --backend {card.export.backend} --precision {card.export.precision}"
            )
    if device.type == "cuda":  # cuDNN's convolutions round to 10 bits unless they are told not to
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    backend: Backend = module.load(card, directory, device)
    return backend


def first_words(error: Exception) -> str:
    """What a library says is wrong, in one line: without the places in its own source that it names before."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line and not line.startswith("Exception from ")), type(error).__name__)


def find_format(package: str, name: str) -> ModuleType:
    """The module of a format in `package`. Raises BadOption: an unknown format, or its library is not installed."""
    if name not in BACKENDS:
        raise BadOption(f"there is no backend {name!r}; known are {', '.join(BACKENDS)}")
    try:
        return importlib.import_module(f"{package}.{name}")
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        extra = EXTRAS[error.name]
        raise BadOption(
            f"the backend {name} needs {error.name}, which is not installed; "
            f"pip install 'penumbra-serving[{extra}]' brings it"
        ) from None
