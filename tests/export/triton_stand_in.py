"""Triton's Python backend in the place of its libtorch backend: a TorchScript file, called by the same convention.

Positions are read from the tensors' names, and requests that Triton joined become one batch. This file is copied into
a model's version directory as `model.py`; it runs in Triton's own process, which has no path to torch.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = os.environ["STAND_IN_PATH"].split(os.pathsep)

import torch  # noqa: E402 - the path above leads to it
import triton_python_backend_utils as pb  # noqa: E402


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        torch.set_num_threads(1)
        config = json.loads(args["model_config"])
        self.inputs, self.outputs = (
            sorted((tensor["name"] for tensor in config[side]), key=lambda name: int(name.split("__")[1]))
            for side in ("input", "output")
        )
        self.graph = torch.jit.load(Path(args["model_repository"]) / args["model_version"] / "model.pt")

    def execute(self, requests: list[Any]) -> list[Any]:
        given = [[_tensor(request, name) for name in self.inputs] for request in requests]
        with torch.inference_mode():
            answer = self.graph(*map(torch.cat, zip(*given, strict=True)))
        answer = (answer,) if isinstance(answer, torch.Tensor) else answer
        shares = zip(*(x.split([len(tensors[0]) for tensors in given]) for x in answer), strict=True)
        return [pb.InferenceResponse(list(map(_named, self.outputs, share))) for share in shares]


def _tensor(request: Any, name: str) -> torch.Tensor:
    return torch.from_dlpack(pb.get_input_tensor_by_name(request, name).to_dlpack())


def _named(name: str, tensor: torch.Tensor) -> Any:
    return pb.Tensor.from_dlpack(name, tensor.contiguous())
