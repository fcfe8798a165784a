"""Memory that is short is recognised whoever says so: what the backends really raise, and what CUDA's libraries say."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from penumbra.models.errors import BadArtifact
from penumbra.serving.engine.backends.openvino import the_core
from penumbra.serving.engine.runtime import Runtime, Tuning, is_out_of_memory
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.steps import WindowInput
from tests.conftest import FIXED

TOO_MANY = 2**24
"""Its square in float32 is a petabyte."""
CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.06 GiB is free."
)


class Outer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, None] * x[None] + 1


def vectors() -> list[np.ndarray]:
    ones = np.ones(TOO_MANY, np.float32)
    return [ones[:, None], ones[None]]


@pytest.fixture
def outer_onnx(tmp_path: Path) -> Path:
    def tensor(name: str, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "y"], ["z"])], "outer", [tensor("x", "N", 1), tensor("y", 1, "N")],
        [tensor("z", "N", "N")],
    )  # fmt: skip
    path = tmp_path / "outer.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def raised(run: Callable[[], object]) -> BaseException:
    try:
        run()
    except Exception as error:
        return error
    raise AssertionError("a petabyte was allocated")


def test_torch_and_numpy_that_cannot_allocate_are_recognised() -> None:
    assert is_out_of_memory(raised(lambda: torch.empty(TOO_MANY, TOO_MANY)))
    assert is_out_of_memory(raised(lambda: np.empty((TOO_MANY, TOO_MANY))))


def test_torchscript_that_cannot_allocate_is_recognised() -> None:
    graph = torch.jit.freeze(torch.jit.trace(Outer().eval(), torch.ones(3)).eval())
    error = raised(lambda: graph(torch.ones(TOO_MANY)))
    assert type(error) is RuntimeError and "failed in the TorchScript interpreter" in str(error)
    assert is_out_of_memory(error)


@pytest.mark.parametrize("arena", [True, False])
def test_onnxruntime_that_cannot_allocate_is_recognised(outer_onnx: Path, arena: bool) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.enable_cpu_mem_arena = 4, arena
    session = onnxruntime.InferenceSession(outer_onnx, options, providers=["CPUExecutionProvider"])
    error = raised(lambda: session.run(None, dict(zip("xy", vectors(), strict=True))))
    assert not isinstance(error, RuntimeError) and is_out_of_memory(error)


def test_openvino_that_cannot_allocate_is_recognised(outer_onnx: Path) -> None:
    core = the_core()
    request = core.compile_model(core.read_model(outer_onnx), "CPU").create_infer_request()
    assert is_out_of_memory(raised(lambda: request.infer(vectors())))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch warns of its own compiler's use of its own names
def test_compiled_code_that_cannot_allocate_is_recognised(tmp_path: Path) -> None:
    size = torch.export.Dim("size", min=2, max=2 * TOO_MANY)
    program = torch.export.export(Outer(), (torch.ones(8),), dynamic_shapes={"x": {0: size}})
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "outer.pt2"))
    package = torch._C._aoti.AOTIModelPackageLoader(path, "model", False, 1, -1)
    assert is_out_of_memory(raised(lambda: package.run([torch.ones(TOO_MANY)])))


@pytest.mark.parametrize(
    "text",
    [
        "The following operation failed in the TorchScript interpreter.\nTraceback of TorchScript (most recent call "
        f"last):\n/net.py(9): forward\nRuntimeError: {CUDA}",
        f"{CUDA}\nException raised from malloc at CUDACachingAllocator.cpp:1650 (most recent call first):\nframe #0",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "CUDA driver error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "GET was unable to find an engine to execute this computation",
        "Unable to find a valid cuDNN algorithm to run convolution",
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : CUDA failure 2: out of memory ; GPU=0 ; hostname=a",
        "[ONNXRuntimeError] : 1 : FAIL : bfc_arena.cc Available memory of 0 is smaller than requested bytes of 8388608",
        "Exception from infer_request.cpp:224:\nstd::bad_alloc",
        "[Errno 12] Cannot allocate memory",
        "TensorRT: [defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)",
        "TensorRT: [resizingAllocator.cpp::allocate::74] OutOfMemory (Requested size was 9 bytes.)",
        "TensorRT could not run decode: Requested amount of GPU memory (9 bytes) could not be allocated.",
        "could not create a memory object",
        "MPS backend out of memory (MPS allocated: 17.9 GB)",
    ],
)  # fmt: skip
def test_what_allocators_say_is_recognised_in_an_exception_of_any_type(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text)) and is_out_of_memory(Exception(text))


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: device-side assert triggered",
        "required rank 4 tensor to use channels_last format (unsupported memory format option)",
        "mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)",
        "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Got invalid dimensions for input: image",
        "TensorRT could not run decode: its log says why",
    ],
)  # fmt: skip
def test_another_failure_is_not_taken_for_a_shortage(text: str) -> None:
    assert not is_out_of_memory(RuntimeError(text))


def test_a_batch_that_does_not_fit_while_sizes_are_tried_is_only_too_large(
    toy_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Runtime.run

    def fits_two(runtime: Runtime, inputs: list[WindowInput]) -> object:
        if len(inputs) > 2:
            raise RuntimeError(CUDA)
        return run(runtime, inputs)

    monkeypatch.setattr(Runtime, "run", fits_two)
    with Segmenter(threads=1, device="cpu", tuning=Tuning(budget_s=1e9, samples_per_call=1)) as segmenter:
        monkeypatch.setattr("penumbra.serving.engine.runtime.time.perf_counter", Ticks())
        segmenter.load(toy_store / "toy-latent" / "1")
        assert segmenter.find("toy-latent").windows_per_batch <= 2


class Ticks:
    """A clock on which every look at it takes a second until sizes were tried twice, and then for ever."""

    looks = 0

    def __call__(self) -> float:
        self.looks += 1
        return float(self.looks if self.looks < 40 else 1e12 + self.looks)


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [(RuntimeError(CUDA), "does not fit into the memory"), (RuntimeError("x"), "cannot be run")],
)
def test_a_model_that_fails_while_it_is_loaded_is_refused_by_name_and_keeps_no_other_away(
    toy_store: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, sentence: str
) -> None:
    check = Runtime.check_golden

    def fail(runtime: Runtime, least: int) -> None:
        if runtime.card.name == "toy-latent":
            raise failure
        check(runtime, least)

    monkeypatch.setattr(Runtime, "check_golden", fail)
    with Segmenter(threads=1, device="cpu", tuning=FIXED) as direct, pytest.raises(BadArtifact, match=sentence):
        direct.load(toy_store / "toy-latent" / "1")
    with Segmenter.open(toy_store, threads=1, device="cpu", tuning=FIXED) as segmenter:
        assert sentence in segmenter.refused["toy-latent"]
        assert "toy-pointwise" in {card.name for card in segmenter.cards()}
