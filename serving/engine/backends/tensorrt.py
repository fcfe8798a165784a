"""TensorRT engines: machine code for one GPU, TensorRT and driver. Loading one may run code: only our own are loaded.

An engine takes the inputs that its part of the network uses; each is named `inputs_<position among all inputs>`.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import tensorrt as trt
import torch
from torch import Tensor

from penumbra.models.errors import BadArtifact, BadOption
from penumbra.serving.engine.backends import Graph, flat

log = logging.getLogger("penumbra")

DRIVER = Path("/proc/driver/nvidia/version")
TORCH_DTYPES = {
    trt.DataType.FLOAT: torch.float32,
    trt.DataType.HALF: torch.float16,
    trt.DataType.BF16: torch.bfloat16,
}


class Log(trt.ILogger):  # type: ignore[misc]
    """A log passes on what TensorRT says is wrong, and keeps the last of it: a call that fails returns no reason."""

    def __init__(self) -> None:
        super().__init__()
        self.last = "no reason is given"

    def log(self, severity: trt.ILogger.Severity, text: str) -> None:
        if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
            self.last = text
            log.error("TensorRT: %s", text)


class Engine:
    """An engine runs one part of a network in the stream that is current. It is used by one thread at a time."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self._log = Log()
        self._runtime = trt.Runtime(self._log)  # must outlive its engines
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise BadArtifact(
                f"{path} is no engine that TensorRT {trt.__version__} can load; export the checkpoint here"
            )
        names = sorted(map(engine.get_tensor_name, range(engine.num_io_tensors)), key=_position)
        self._inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._outputs = {
            name: TORCH_DTYPES[engine.get_tensor_dtype(name)] for name in names if name not in self._inputs
        }
        self._name, self._device, self._engine = path.stem, device, engine
        self._context = engine.create_execution_context()

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run the engine. Raises ValueError for sizes that it was not built for."""
        given = {name: inputs[_position(name)].contiguous() for name in self._inputs}
        for name, tensor in given.items():
            if not self._context.set_input_shape(name, tuple(tensor.shape)):
                low, _, high = self._engine.get_tensor_profile_shape(name, 0)
                raise ValueError(
                    f"{name} of {self._name} is {list(tensor.shape)}; it was built for {list(low)} to {list(high)}"
                )
        outputs = {
            name: torch.empty(tuple(self._context.get_tensor_shape(name)), dtype=dtype, device=self._device)
            for name, dtype in self._outputs.items()
        }
        for name, tensor in (given | outputs).items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        if not self._context.execute_async_v3(torch.cuda.current_stream(self._device).cuda_stream):
            raise RuntimeError(f"TensorRT could not run {self._name}: {self._log.last}")
        return list(outputs.values())


def _position(name: str) -> int:
    """Find a tensor's position among the inputs (`inputs_3`) or among the outputs (`output0`)."""
    return int(re.findall(r"\d+", name)[-1])


def open_graph(path: Path, device: torch.device, _: str) -> Graph:
    return flat(Engine(path, device))


def target(device: torch.device) -> dict[str, str]:
    """Name the GPU, its compute capability, TensorRT and the driver. Raises BadOption where there is no GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        raise BadOption(f"TensorRT engines are built for and run on a CUDA GPU, and the device is {device}")
    major, minor = torch.cuda.get_device_capability(device)
    driver = re.search(r"\d+\.\d+(\.\d+)?", DRIVER.read_text()) if DRIVER.exists() else None
    return {
        "gpu": torch.cuda.get_device_name(device),
        "compute capability": f"{major}.{minor}",
        "TensorRT": trt.__version__,
        "driver": driver[0] if driver else "unknown",
    }
