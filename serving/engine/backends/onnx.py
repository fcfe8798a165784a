"""ONNX graphs in onnxruntime, on the CPU. They are data: loading one runs nothing, and wrong shapes are refused."""

from collections.abc import Sequence
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

from penumbra.serving.engine.backends import Graph, flat


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


def open_graph(path: Path, _: torch.device, __: str) -> Graph:
    return flat(OnnxGraph(path))


def target(_: torch.device) -> dict[str, str]:
    """It runs anywhere."""
    return {}
