"""The Triton kernels pass the operators' own tests by Triton's interpreter, and compile for GPUs that are not here."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("triton", reason="Triton is not installed; it comes with torch for CUDA, and with the extra `dev`")

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from penumbra.serving.engine import operators, plain
from penumbra.serving.engine.gpu import kernels

ROOT = Path(__file__).parents[4]
CLASSES = (1, 2, 11, 19, 21, 81, 150, 255)
"""Those of published data sets, and the ends. Seen with others: 56 bytes spilled at 28 classes in fp16."""
MAX_SPILLED_BYTES = 8
"""Per thread: two registers. ptxas takes that to let one more program run beside the others."""
POINTERS = {
    "table": "*i64", "factor": "*fp32", "offset": "*fp32", "pads": "*fp32", "bounds": "*fp32", "out": "*fp32",
    "stats": "*fp32", "scale": "fp32", "inverse_temperature": "fp32",
}  # fmt: skip


class Usage(NamedTuple):
    """What a program takes: registers and spilled bytes of a thread, bytes of shared memory; and its assembly."""

    registers: int
    spilled: int
    shared: int
    ptx: str


@pytest.mark.parametrize(
    "chosen", ["strips or rings or sure or requested", pytest.param("", marks=pytest.mark.slow)], ids=["quick", "all"]
)
def test_the_interpreted_kernels_pass_the_tests_of_the_operators(chosen: str) -> None:
    """In a process of its own: Triton decides once whether it interprets. The quick part is one test per operator."""
    tests = Path(__file__).with_name("test_operators.py")
    command = [sys.executable, "-m", "pytest", "-q", "-k", chosen, tests]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0 and not re.search("skipped|no tests", ran.stdout), ran.stdout[-4000:]


def compiled(kernel: Any, architecture: int, *, fuse: bool = True, logits: str = "*bf16", **constants: object) -> Usage:
    names = kernel.arg_names
    types = {
        name: "constexpr" if name in constants else (POINTERS | {"logits": logits}).get(name, "i32") for name in names
    }
    source = ASTSource(kernel, types, {(names.index(name),): value for name, value in constants.items()})
    options = {"num_warps": 4, "enable_fp_fusion": fuse}
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    listing = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    registers, stack, local = (int(re.search(rf"\b{what}:(\d+)", listing)[1]) for what in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    return Usage(registers, stack + local, built.metadata.shared, built.asm["ptx"])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Any:
    def show(name: str, usage: Usage) -> None:
        with capsys.disabled():
            print(f"\n{name}: {usage.registers} registers, {usage.spilled} B spilled, {usage.shared} B shared", end="")

    return show


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 120])
def test_cut_compiles_and_rounds_twice_as_the_cpu_does(architecture: int, report: Any) -> None:
    for mirror in (False, True):
        usage = compiled(
            kernels._cut, architecture, fuse=False, C=3, MIRROR=mirror, REVERSED=True, BOUNDED=mirror,
            TYPE=tl.int16, BLOCK=kernels.BLOCK,
        )  # fmt: skip
        report(f"sm_{architecture} cut, mirror {mirror}", usage)
        assert "fma.rn.f32" not in usage.ptx
        assert usage.registers <= 80 and usage.spilled == 0


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 120])
def test_blend_compiles_within_its_registers(architecture: int, report: Any) -> None:
    usage = compiled(
        kernels._blend, architecture, WINDOWS=64, CHANNELS=kernels.CHANNELS, COLUMNS=kernels.COLUMNS
    )  # fmt: skip
    report(f"sm_{architecture} blend", usage)
    assert usage.registers <= 160 and usage.spilled == 0


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 120])
@pytest.mark.parametrize("num_classes", CLASSES)
def test_accumulate_and_read_out_compile_within_their_registers(
    architecture: int, num_classes: int, report: Any
) -> None:
    tile = kernels.tile(num_classes)
    for logits in ("*fp16", "*bf16", "*fp32"):
        usage = compiled(
            kernels._accumulate, architecture, logits=logits, K=num_classes, ALIGN=True, LOGITS=False, **tile
        )  # fmt: skip
        report(f"sm_{architecture} accumulate, {num_classes} classes, {logits[1:]}", usage)
        assert usage.registers <= (252 if num_classes <= 24 else 128) and usage.spilled <= MAX_SPILLED_BYTES
    for softmax in (False, True):
        usage = compiled(kernels._read_out, architecture, K=num_classes, SOFTMAX=softmax, **tile)
        report(f"sm_{architecture} read_out, {num_classes} classes, softmax {softmax}", usage)
        assert usage.registers <= 96 and usage.spilled <= MAX_SPILLED_BYTES


def test_one_kernel_of_each_kind_compiles_for_hopper() -> None:
    """The quick part of the above."""
    tile = kernels.tile(19)
    compiled(kernels._cut, 90, fuse=False, C=3, MIRROR=True, REVERSED=False, TYPE=tl.uint8, BLOCK=kernels.BLOCK)
    compiled(kernels._blend, 90, WINDOWS=64, CHANNELS=kernels.CHANNELS, COLUMNS=kernels.COLUMNS)
    compiled(kernels._accumulate, 90, K=19, ALIGN=False, LOGITS=True, **tile)
    compiled(kernels._read_out, 90, K=19, SOFTMAX=True, **tile)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs here")
def test_where_triton_does_not_run_the_plain_forms_do_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert operators._triton.__wrapped__() is plain
    assert "Triton does not run here" in caplog.text
