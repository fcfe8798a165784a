"""ONNX graphs in onnxruntime, on the CPU. They are data: loading one runs nothing, and wrong shapes are refused."""

from collections.abc import Sequence
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

from penumbra.serving.engine.backends import Graph, anywhere, flat

target = anywhere


def open_graph(path: Path, _: torch.device, __: str) -> Graph:
    """Open one session, with as many threads as torch has in the thread that loads it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        arrays = [tensor.contiguous().numpy() for tensor in inputs]
        return [torch.from_numpy(array) for array in session.run(None, dict(zip(names, arrays, strict=True)))]

    return flat(run)
