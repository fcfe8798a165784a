"""The class that runs engines of both TensorRTs, over a stand-in for their runtime that computes on the processor.

The stand-in has the calls that both libraries have (TensorRT 11.4, TensorRT-RTX 1.7.1) and their rules: every input
has an address, memory is at least what the sizes need, and sizes are those that the engine was built for.
"""

import ctypes
import hashlib
from collections.abc import Callable
from enum import Enum, IntFlag
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from penumbra.models.errors import BadArtifact, BadOption
from penumbra.serving.engine.backends import engines
from penumbra.serving.engine.backends.engines import Engine, load_plan, position_of

CPU = torch.device("cpu")
BUILT = {"input.2": ((1, 4), (8, 4)), "input.0": ((1, 4), (8, 4))}
"""Inputs of the stand-in's engine, out of order and without the idle one between, with their least and most sizes."""
BYTES_PER_WINDOW = 1000


class Modes(Enum):
    INPUT, OUTPUT = range(2)


class Types(Enum):
    FLOAT, HALF, BF16 = range(3)


class Severity(Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class Reasons(IntFlag):
    VERSION_MISMATCH, UNSUPPORTED_CC, OLD_CUDA_DRIVER = 1, 2, 4
    MALFORMED_ENGINE = 32


class Logger:
    INTERNAL_ERROR, ERROR = Severity.INTERNAL_ERROR, Severity.ERROR


class Context:
    """It adds its two inputs, from and to the addresses that it is given."""

    def __init__(self, log: Any) -> None:
        self.log = log
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory, self.streams, self.is_broken = (0, 0), [], False

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, most = BUILT[name]
        fits = all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))
        if fits:
            self.shapes[name] = shape
        return fits

    def update_device_memory_size_for_shapes(self) -> int:
        return BYTES_PER_WINDOW * self.shapes["input.0"][0]

    def set_device_memory(self, address: int, num_bytes: int) -> None:
        self.memory = (address, num_bytes)

    def get_tensor_shape(self, _: str) -> tuple[int, ...]:
        return self.shapes["input.0"]

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        if self.is_broken:
            self.log.log(Severity.ERROR, "Cuda Runtime (out of memory)")
            return False
        self.streams.append(stream)
        address, num_bytes = self.memory
        assert num_bytes >= self.update_device_memory_size_for_shapes()
        ctypes.memset(address, 0xFF, num_bytes)  # whoever shares this memory shall notice
        count = self.shapes["input.0"][0] * self.shapes["input.0"][1]
        one, other, total = (
            (ctypes.c_float * count).from_address(self.addresses[name]) for name in ("input.0", "input.2", "output.0")
        )
        total[:] = [a + b for a, b in zip(one, other, strict=True)]
        return True


class Plan:
    """An engine as the libraries hand it out."""

    num_io_tensors = 3

    def __init__(self, context: Context) -> None:
        self.context, self.config = context, SimpleNamespace()

    def get_tensor_name(self, i: int) -> str:
        return ("output.0", *BUILT)[i]

    def get_tensor_mode(self, name: str) -> Modes:
        return Modes.INPUT if name in BUILT else Modes.OUTPUT

    def get_tensor_dtype(self, _: str) -> Types:
        return Types.FLOAT

    def get_tensor_profile_shape(self, name: str, _: int) -> tuple[Any, ...]:
        least, most = BUILT[name]
        return least, least, most

    def create_runtime_config(self) -> Any:
        class Cache:
            held = b""

            def deserialize(self, data: bytes) -> bool:
                self.held = data
                return True

            def serialize(self) -> bytes:
                return b"compiled"

        self.config.create_runtime_cache = Cache
        self.config.set_runtime_cache = lambda cache: setattr(self.config, "cache", cache)
        self.config.set_execution_context_allocation_strategy = lambda kind: setattr(self.config, "memory", kind)
        return self.config

    def create_execution_context(self, _: Any) -> Context:
        return self.context


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A TensorRT: `verdict` is what it says of an engine, `plan` is what comes out of any bytes."""
    library: Any = ModuleType("tensorrt_stand_in")
    library.__version__ = "1.2.3"
    library.ILogger, library.DataType, library.TensorIOMode = Logger, Types, Modes
    library.EngineValidity = SimpleNamespace(VALID="valid", SUBOPTIMAL="suboptimal", INVALID="invalid")
    library.EngineInvalidityDiagnostics = Reasons
    library.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")
    library.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
    library.plan = Plan(Context(engines.find_log(library)))
    library.verdict = ("valid", Reasons(0))
    library.Runtime = lambda _: SimpleNamespace(
        deserialize_cuda_engine=lambda _: library.plan, get_engine_validity=lambda _: library.verdict
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=7))
    return library


def make(trt: Any, **options: Callable[[], object]) -> Engine:
    return Engine(trt, load_plan(trt, b"", "x"), trt.plan.context, name="encode", device=CPU, **options)


def three(num_windows: int) -> list[Tensor]:
    return [torch.full((num_windows, 4), value) for value in (1.0, float("nan"), 2.0)]


def test_inputs_are_found_by_position_idle_ones_are_left_out_and_the_stream_is_the_current_one(trt: Any) -> None:
    (total,) = make(trt)(three(3))
    assert torch.equal(total, torch.full((3, 4), 3.0))
    assert trt.plan.context.streams == [7] and trt.plan.context.addresses.keys() == {"input.0", "input.2", "output.0"}
    assert trt.plan.context.addresses["output.0"] == total.data_ptr()
    assert [position_of(name) for name in ("input.3", "inputs_12", "output0")] == [3, 12, 0]


def test_inputs_that_are_not_contiguous_are_copied_first(trt: Any) -> None:
    tall = torch.arange(12.0).reshape(4, 3).T
    (total,) = make(trt)([tall, tall, tall])
    assert torch.equal(total, 2 * tall)


def test_memory_is_for_the_sizes_at_hand_and_not_for_the_largest(trt: Any) -> None:
    engine = make(trt)
    for num_windows in (2, 8, 1):
        engine(three(num_windows))
        assert trt.plan.context.memory[1] == BYTES_PER_WINDOW * num_windows


def test_sizes_that_an_engine_was_not_built_for_are_refused_with_those_that_it_was(trt: Any) -> None:
    with pytest.raises(BadOption, match=r"input\.\d of encode is \[9, 4\]; it was built for \[1, 4\] to \[8, 4\]"):
        make(trt)(three(9))


def test_a_run_that_fails_says_what_the_library_logged(trt: Any) -> None:
    trt.plan.context.is_broken = True
    with pytest.raises(RuntimeError, match=r"could not run encode: Cuda Runtime \(out of memory\)"):
        make(trt)(three(1))


def test_what_was_compiled_is_kept_once_for_every_new_size(trt: Any) -> None:
    kept: list[int] = []
    engine = make(trt, grown=lambda: kept.append(1))
    for num_windows in (1, 2, 1, 2, 2):
        engine(three(num_windows))
    assert len(kept) == 2


def test_an_engine_that_does_not_load_is_a_bad_artifact(trt: Any) -> None:
    trt.plan = None
    with pytest.raises(
        BadArtifact, match=r"store/x is no engine that tensorrt_stand_in 1\.2\.3 can load here \(no rea"
    ):
        load_plan(trt, b"", "store/x")


# -- TensorRT-RTX ----------------------------------------------------------------------------------


@pytest.fixture
def rtx(trt: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The module over the stand-in, on a machine with a GPU that it takes and an empty cache."""
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install 'penumbra-serving[tensorrt-rtx]'")
    from penumbra.serving.engine.backends import tensorrt_rtx

    monkeypatch.setattr(tensorrt_rtx, "trt", trt)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA L40S")
    monkeypatch.setattr(tensorrt_rtx, "Engine", lambda *given, device, **named: Engine(*given, device=CPU, **named))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "encode.engine").write_bytes(b"plan")
    return tensorrt_rtx


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (Reasons.VERSION_MISMATCH, "version mismatch"),
        (Reasons.UNSUPPORTED_CC | Reasons.OLD_CUDA_DRIVER, "unsupported compute capability, old cuda driver"),
        (Reasons.MALFORMED_ENGINE, "malformed engine"),
        (Reasons(0), "no reason is given"),
    ],
)
def test_an_engine_that_cannot_run_is_refused_with_the_librarys_reasons(
    bits: Reasons, words: str, rtx: Any, trt: Any, tmp_path: Path
) -> None:
    trt.verdict = ("invalid", bits)
    with pytest.raises(BadArtifact, match=rf"encode\.engine cannot run here: {words}; export .* TensorRT-RTX 1\.2\.3"):
        rtx.open_graph(tmp_path / "encode.engine", torch.device("cuda", 0), "fp16")


def test_kernels_are_specialised_before_they_run_memory_is_torchs_and_what_is_compiled_stays_on_this_machine(
    rtx: Any, trt: Any, tmp_path: Path
) -> None:
    path, device = tmp_path / "encode.engine", torch.device("cuda", 0)
    graph = rtx.open_graph(path, device, "fp16")
    config = trt.plan.config
    assert config.dynamic_shapes_kernel_specialization_strategy == "eager" and config.memory == "user managed"
    assert config.cache.held == b""
    graph(*three(2))
    (kept,) = (tmp_path / "cache").rglob("*/tensorrt_rtx/*")
    assert kept.read_bytes() == b"compiled" and kept.parent.stat().st_mode & 0o777 == 0o700
    assert kept.name == hashlib.sha256(b"planNVIDIA L40S 1.2.3").hexdigest()
    assert set(tmp_path.iterdir()) == {path, tmp_path / "cache"}
    rtx.open_graph(path, device, "fp16")
    assert trt.plan.config.cache.held == b"compiled"


def test_a_cache_that_cannot_be_written_is_a_warning(
    rtx: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "encode.engine"))
    graph = rtx.open_graph(tmp_path / "encode.engine", torch.device("cuda", 0), "fp16")
    assert torch.equal(graph(*three(2))[0], torch.full((2, 4), 3.0))
    assert "cannot be written (Not a directory): engines are compiled again" in caplog.text
