"""ONNX graphs in onnxruntime, on a CPU or GPU. They are data: loading one runs nothing, and wrong shapes are refused.
Tensors are shared with torch where they lie, and nothing waits for a GPU."""

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from penumbra.models.errors import BadArtifact
from penumbra.serving.engine.backends import Graph, anywhere, flat
from penumbra.serving.engine.backends.lanes import LaneGraph, Run

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
DEVICES = ("cpu", "cuda") if CUDA in onnxruntime.get_available_providers() else ("cpu",)
target = anywhere


def provider_of(device: torch.device) -> tuple[str, dict[str, str]]:
    """Name a device's provider, with its options; on a GPU it queues on the stream that is current here and now."""
    if device.type != "cuda":
        return CPU, {}
    stream = torch.cuda.current_stream(device).cuda_stream or 1  # 0 would be none; CUDA knows the default one as 1 too
    return CUDA, {
        "device_id": str(device.index or 0), "user_compute_stream": str(stream), "use_tf32": "0",
        "cudnn_conv_algo_search": "HEURISTIC",  # not a race, whose winner differs from start to start
        "arena_extend_strategy": "kSameAsRequested",
    }  # fmt: skip


def open_graph(path: Path, device: torch.device, _: str) -> Graph:
    """Open one session, and on a CPU another one for the lanes."""
    if device.type != "cpu":
        return flat(open_session(path, device, torch.get_num_threads()))
    opened = cache(partial(open_session, path, device))
    # A call of one thread runs in the lane's own, and all others share the threads of one session.
    return LaneGraph(lambda threads, at_a_time: opened(threads * at_a_time if threads > 1 else 1))


def open_session(path: Path, device: torch.device, threads: int) -> Run:
    options, queued, provider = onnxruntime.SessionOptions(), onnxruntime.RunOptions(), provider_of(device)
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    queued.add_run_config_entry("disable_synchronize_execution_providers", "1")
    session = onnxruntime.InferenceSession(path, options, providers=[provider])
    if session.get_providers()[0] != provider[0]:
        raise BadArtifact(f"onnxruntime lacks a library that its {provider[0]} needs for {path}; its log names it")
    names = [entry.name for entry in session.get_inputs()]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        binding = session.io_binding()
        for name, tensor in zip(names, inputs, strict=True):
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.from_dlpack(to_dlpack(tensor.contiguous())))
        for entry in session.get_outputs():
            binding.bind_output(entry.name, device.type, device.index or 0)
        session.run_with_iobinding(binding, queued)
        return [from_dlpack(value) for value in binding.get_outputs()]

    return run
