"""TensorRT where its library is: engines that were built on a CPU run on an RTX GPU, or are refused in one sentence."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from penumbra.export.bundle import export_network, verify_artifact
from penumbra.models.errors import BadArtifact
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.segmenter import Segmenter
from tests.gpu.test_pipeline import picture
from tests.models.small import card_of, seeded

NAMES = ("np_semiseg published", "cps")
NO_KERNELS = ("has no kernels for", "runs on an NVIDIA RTX GPU")
"""What TensorRT-RTX's refusals of a GPU and of a CPU say."""


def has_kernels(device: str) -> bool:
    """Ampere, Ada and RTX Blackwell; not Hopper, and no Blackwell of data centres."""
    return device != "cpu" and torch.cuda.get_device_capability(device)[0] in (8, 12)


def answers(directory: Path, device: str) -> None:
    """The engines pass the export's gate on the device, and a picture of several windows is answered."""
    verify_artifact(directory, device)
    with Segmenter(device=device) as segmenter:
        segmenter.load(directory)
        assert segmenter.segment(picture(), SegmentOptions()).num_windows > 1


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_engines_of_tensorrt_rtx_built_on_a_cpu_reproduce_their_golden_windows_or_are_refused_in_a_sentence(
    name: str, precision: str, device: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    directory = export_network(seeded(name), card_of(name), tmp_path, backend="tensorrt_rtx", precision=precision)
    if has_kernels(device):
        return answers(directory, device)
    with pytest.raises(BadArtifact) as refusal, Segmenter(device=device) as segmenter:
        segmenter.load(directory)
    assert any(words in str(refusal.value) for words in NO_KERNELS)
    record_property("refusal", str(refusal.value).replace(str(directory), "PATH"))


@pytest.mark.skipif(find_spec("torch_tensorrt") is None, reason="needs torch_tensorrt")
@pytest.mark.parametrize("name", NAMES)
def test_engines_of_tensorrt_built_on_the_device_reproduce_their_golden_windows(
    name: str, device: str, tmp_path: Path
) -> None:
    if device == "cpu":
        pytest.skip("TensorRT builds on a GPU alone")
    answers(
        export_network(
            seeded(name), card_of(name), tmp_path, backend="tensorrt", precision="fp16", device=device
        ), device
    )  # fmt: skip
