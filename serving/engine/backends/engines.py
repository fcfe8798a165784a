"""What TensorRT and TensorRT-RTX have in common: they run one part of a network each, by the same runtime.

An engine takes the inputs that its part uses, each named by its position among all (`input.3`). Its memory is torch's,
for the sizes at hand: a context with memory of its own would take what the largest sizes need, once per part and lane.
"""

import logging
import re
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from penumbra.models.errors import BadArtifact, BadOption

log = logging.getLogger("penumbra")

KEPT_LINES = 200_000
"""All that a builder says of a large engine; in a server there are a few hundred."""


@cache
def find_log(trt: ModuleType) -> Any:
    """Give the log of a TensorRT, which keeps the first in a process and ignores others."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        """A log passes on what is wrong, and keeps its lines: a call that fails returns no reason."""

        def __init__(self) -> None:
            super().__init__()
            self.lines: deque[str] = deque(maxlen=KEPT_LINES)

        def log(self, severity: Any, text: str) -> None:
            self.lines.append(f"{severity.name} {text}")
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                log.error("TensorRT: %s", text)

        def reason(self) -> str:
            """Return the last error."""
            errors = [line.split(" ", 1)[1] for line in list(self.lines) if "ERROR" in line.split(" ", 1)[0]]
            return errors[-1] if errors else "no reason is given"

    return Log()


def position_of(name: str) -> int:
    """Find a tensor's position among the inputs (`input.3`, `inputs_3`) or among the outputs (`output0`)."""
    return int(re.findall(r"\d+", name)[-1])


class Engine:
    """An engine runs one part of a network in the stream that is current. It is used by one thread at a time.

    loaded: a runtime, which must outlive its engine, and the engine. context: one whose memory is USER_MANAGED.
    grown: called after the first run of new sizes, when kernels have been compiled for them.
    """

    def __init__(
        self, trt: ModuleType, loaded: tuple[Any, Any], context: Any, *, name: str, device: torch.device,
        grown: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        kinds = trt.DataType
        dtypes = {kinds.FLOAT: torch.float32, kinds.HALF: torch.float16, kinds.BF16: torch.bfloat16}
        self._runtime, self._engine = loaded
        engine = self._engine
        names = sorted(map(engine.get_tensor_name, range(engine.num_io_tensors)), key=position_of)
        self._inputs = [each for each in names if engine.get_tensor_mode(each) == trt.TensorIOMode.INPUT]
        self._outputs = {each: dtypes[engine.get_tensor_dtype(each)] for each in names if each not in self._inputs}
        self._log, self._context = find_log(trt), context
        self._name, self._device, self._grown = name, device, grown
        self._known: set[tuple[torch.Size, ...]] = set()

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run the engine; nothing waits for it. Raises BadOption for sizes that it was not built for."""
        given = {name: inputs[position_of(name)].contiguous() for name in self._inputs}
        for name, tensor in given.items():
            if not self._context.set_input_shape(name, tuple(tensor.shape)):
                least, _, most = self._engine.get_tensor_profile_shape(name, 0)
                raise BadOption(
                    f"{name} of {self._name} is {list(tensor.shape)}; it was built for {list(least)} to {list(most)}"
                )
        num_bytes = max(self._context.update_device_memory_size_for_shapes(), 1)
        scratch = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)  # is this stream's when it is freed
        self._context.set_device_memory(scratch.data_ptr(), num_bytes)
        outputs = {
            name: torch.empty(tuple(self._context.get_tensor_shape(name)), dtype=dtype, device=self._device)
            for name, dtype in self._outputs.items()
        }
        for name, tensor in (given | outputs).items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        if not self._context.execute_async_v3(torch.cuda.current_stream(self._device).cuda_stream):
            raise RuntimeError(f"TensorRT could not run {self._name}: {self._log.reason()}")
        sizes = tuple(tensor.shape for tensor in given.values())
        if sizes not in self._known:
            self._known.add(sizes)
            self._grown()
        return list(outputs.values())


def load_plan(trt: ModuleType, plan: bytes, name: str) -> tuple[Any, Any]:
    """Make a runtime and an engine of it. Raises BadArtifact."""
    runtime = trt.Runtime(find_log(trt))
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BadArtifact(
            f"{name} is no engine that {trt.__name__} {trt.__version__} can load here ({find_log(trt).reason()}); "
            "export the checkpoint here"
        )
    return runtime, engine
