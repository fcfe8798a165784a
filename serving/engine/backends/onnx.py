"""ONNX graphs in onnxruntime, on the CPU. They are data: loading one runs nothing, and wrong shapes are refused."""

from collections.abc import Sequence
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

from penumbra.models.card import Card
from penumbra.models.errors import BadArtifact
from penumbra.serving.engine.backends import DTYPES, first_words
from penumbra.serving.engine.backends.flat import FlatBackend, part_names


class OnnxGraph:
    """One session, with as many threads as torch has in the thread that loads it."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._names = [entry.name for entry in self._session.get_inputs()]

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        arrays = [tensor.contiguous().numpy() for tensor in inputs]
        return [
            torch.from_numpy(array) for array in self._session.run(None, dict(zip(self._names, arrays, strict=True)))
        ]


def load(card: Card, directory: Path, _: torch.device) -> FlatBackend:
    assert card.export
    names = part_names(prompted=card.prompt.kind != "none")
    try:
        graphs = {name: OnnxGraph(directory / f"{name}.onnx") for name in names}
    except Exception as error:  # its exceptions share no base class
        raise BadArtifact(f"{directory} holds ONNX that this onnxruntime cannot load: {first_words(error)}") from None
    return FlatBackend(graphs, device=torch.device("cpu"), dtype=DTYPES[card.export.precision])


def target(_: torch.device) -> dict[str, str]:
    """It runs anywhere."""
    return {}
