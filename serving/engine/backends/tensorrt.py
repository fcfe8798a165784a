"""TensorRT engines: machine code for one GPU, TensorRT and driver. Loading one may run code: load only your own."""

import re
from pathlib import Path

import tensorrt as trt
import torch

from penumbra.models.errors import BadOption
from penumbra.serving.engine.backends import Graph, flat
from penumbra.serving.engine.backends.engines import Engine, load_plan
from penumbra.serving.engine.device import hardware_of

DRIVER = Path("/proc/driver/nvidia/version")


def open_graph(path: Path, device: torch.device, _: str) -> Graph:
    loaded = load_plan(trt, path.read_bytes(), str(path))
    context = loaded[1].create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    return flat(Engine(trt, loaded, context, name=path.stem, device=device))


def target(device: torch.device) -> dict[str, str]:
    """Name the GPU, its compute capability, TensorRT and the driver. Raises BadOption where there is no GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        raise BadOption(f"TensorRT engines are built for and run on a CUDA GPU, and the device is {device}")
    driver = re.search(r"\d+\.\d+(\.\d+)?", DRIVER.read_text()) if DRIVER.exists() else None
    return hardware_of(device) | {"TensorRT": trt.__version__, "driver": driver[0] if driver else "unknown"}
