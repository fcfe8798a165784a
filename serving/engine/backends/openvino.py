"""The same ONNX graphs in OpenVINO, on the CPU: as exported, fp32 or with int8, or in bf16 where the card says so."""

from collections import deque
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import openvino
import torch
from torch import Tensor

from penumbra.serving.engine.backends import Graph, anywhere
from penumbra.serving.engine.backends.lanes import LaneGraph, Run

HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "bf16"}
"""Set always: left alone, OpenVINO takes bf16 where the processor has it. Around layers in int8 that is meant."""
target, DEVICES = anywhere, ("cpu",)


@cache
def the_core() -> openvino.Core:
    """Make the one core of the process. Each sets up a stack for signals, and two that are closed in the order in which
    they were made leave one behind that is freed: the next signal, were it SIGTERM, would be a crash."""
    return openvino.Core()


def open_graph(path: Path, _: torch.device, precision: str) -> Graph:
    """Compile one graph."""
    core = the_core()

    def open_for(threads: int, at_a_time: int) -> Run:
        settings = {
            "INFERENCE_PRECISION_HINT": HINTS[precision], "NUM_STREAMS": at_a_time,
            "INFERENCE_NUM_THREADS": threads * at_a_time,
            "ENABLE_CPU_PINNING": False,  # every process would be bound to the same cores, the first ones
        }  # fmt: skip
        compiled, idle = core.compile_model(core.read_model(path), "CPU", settings), deque[openvino.InferRequest]()

        def run(inputs: Sequence[Tensor]) -> list[Tensor]:
            try:
                request = idle.pop()
            except IndexError:  # more lanes than ever at a time
                request = compiled.create_infer_request()
            outputs = request.infer([tensor.contiguous().numpy() for tensor in inputs], share_inputs=True)
            idle.append(request)
            return [torch.from_numpy(outputs[i]) for i in range(len(outputs))]

        return run

    return LaneGraph(open_for)
