"""Triton's Python backend around the network; copied into a model's version directory as `model.py`.

It runs in Triton's own process, which has no path to ours. Pictures arrive as the bytes of their files, padded to one
length so that Triton's dynamic batcher joins them whatever their sizes. Tensors pass by DLPack: the arrays that this
Triton makes of strings are of an older numpy, and end the process.
"""

import os
import sys
from typing import Any

sys.path[:0] = os.environ["PEER_PATH"].split(os.pathsep)

import torch  # noqa: E402 - the path above leads to it
import triton_python_backend_utils as pb  # noqa: E402

from benchmarks.peers.network import from_environment  # noqa: E402


class TritonPythonModel:
    def initialize(self, _: dict[str, str]) -> None:
        self.network = from_environment()

    def execute(self, requests: list[Any]) -> list[Any]:
        jpegs = [
            torch.from_dlpack(pb.get_input_tensor_by_name(request, "image").to_dlpack()).numpy().tobytes()
            for request in requests
        ]
        return [
            pb.InferenceResponse(
                [pb.Tensor.from_dlpack("labels", torch.frombuffer(bytearray(png), dtype=torch.uint8)[None])]
            )
            for png in self.network.answer(jpegs)
        ]
