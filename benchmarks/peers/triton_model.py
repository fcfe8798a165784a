"""Triton's Python backend around the network; copied into a model's version directory as `model.py`.

It runs in Triton's own process, which has no path to ours. Pictures arrive as encoded bytes, one shape for all sizes,
so that Triton's dynamic batcher joins them.
"""

import os
import sys
from typing import Any

sys.path[:0] = os.environ["PEER_PATH"].split(os.pathsep)

import numpy as np  # noqa: E402 - the path above leads to it
import triton_python_backend_utils as pb  # noqa: E402

from benchmarks.peers.network import from_environment  # noqa: E402


class TritonPythonModel:
    def initialize(self, _: dict[str, str]) -> None:
        self.network = from_environment()

    def execute(self, requests: list[Any]) -> list[Any]:
        jpegs = [pb.get_input_tensor_by_name(request, "image").as_numpy().item() for request in requests]
        return [
            pb.InferenceResponse([pb.Tensor("labels", np.array([[png]], dtype=np.object_))])
            for png in self.network.answer(jpegs)
        ]
