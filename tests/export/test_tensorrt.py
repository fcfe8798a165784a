"""What TensorRT would be given, asked of torch-tensorrt itself without a GPU: all of it converts, into one engine each.

Nothing is built here: that needs TensorRT's builder and a GPU (`tests/gpu`).
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.models.small import SMALL

ROOT = Path(__file__).parents[2]
PEERS = Path(sys.prefix) / "peers"
"""`make .venv/peers` puts torch-tensorrt there."""
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
SYMBOLS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip
"""What the Python binding of TensorRT 11 wants of its native libraries."""
VARIANTS = (
    "cps", "np_semiseg film", "np_semiseg linear", "np_semiseg published", "np_semiseg dropout",
    "self_correcting convolutional", "self_correcting dropout", "proto_seg prototype", "proto_seg channel",
    "proto_seg deeplab", "cpal context", "cpal deeplabv2", "cpal wrn38",
)  # fmt: skip
ROUNDING = 1e-4
"""Relative: the graphs are decomposed into other operators, in float32."""
DRY_RUN_S = 800

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (PEERS / "torch_tensorrt").exists(), reason="needs torch-tensorrt: make .venv/peers"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for the shell of TensorRT"),
]
Ask = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """Runs `tensorrt_dry_run` beside torch_tensorrt's Python code and a TensorRT that is all symbols and no code."""
    shell = tmp_path_factory.mktemp("tensorrt")
    shutil.copytree(PEERS / "torch_tensorrt", shell / "torch_tensorrt", ignore=shutil.ignore_patterns("*.so"))
    source = shell / "shell.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
    for library in LIBRARIES:
        name = f"lib{library}.so.11"
        subprocess.run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", shell / name, source], check=True)
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(shell),
        "PYTHONPATH": os.pathsep.join(map(str, (shell, ROOT, PEERS))),
    }
    command = [sys.executable, "-m", "tests.export.tensorrt_dry_run"]

    def ask(*names: str) -> list[dict[str, Any]]:
        done = subprocess.run(
            [*command, *names], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=DRY_RUN_S
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    return ask


def falls_short(report: dict[str, Any]) -> bool:
    """Anything but: every operator has a converter, in one engine, and the graph to be converted is still right."""
    whole = report["supported"] == report["operators"] > 0 and report["engines"] == 1 and not report["in_torch"]
    return not (whole and max(report["errors"]) <= ROUNDING)


def test_every_part_of_every_method_is_one_engine(dry_run: Ask) -> None:
    reports = dry_run(*VARIANTS)
    wanted = {f"{name} {part}" for name in VARIANTS for part in ("encode", "decode")}
    assert wanted <= {report["graph"] for report in reports}
    assert {name.split()[0] for name in VARIANTS} == {name.split()[0] for name in SMALL} - {"toy", "ensemble", "plain"}
    assert [report for report in reports if falls_short(report)] == []


def test_our_decompositions_give_the_values_of_torchs_operators(dry_run: Ask) -> None:
    (report,) = dry_run("rules")
    assert len(report) == 4 and sum(map(len, report.values())) == 95
    assert max(map(max, report.values())) <= 1e-12


def test_operators_that_tensorrt_is_known_to_get_wrong_convert_and_keep_their_values(dry_run: Ask) -> None:
    reports = dry_run("operators")
    assert len(reports) == 13
    assert [report for report in reports if falls_short(report)] == []


def test_engines_of_another_gpu_are_refused_with_the_command_that_builds_them_here(dry_run: Ask) -> None:
    (report,) = dry_run("refusal")
    assert report["here"].keys() == {"gpu", "compute capability", "TensorRT", "driver"}
    assert "was built for gpu NVIDIA A100" in report["sentence"]
    assert "penumbra export CHECKPOINT --backend tensorrt --precision fp16" in report["sentence"]
    assert "run on a CUDA GPU, and the device is cpu" in report["cpu"]
    assert "takes windows of any size, and an engine is built for one" in report["open"]
