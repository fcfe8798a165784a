"""Every format and precision on a GPU, of trained networks: too much for `make test-gpu`, for pytest alone."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from penumbra import models
from penumbra.export.bundle import export_checkpoint, export_network, verify_artifact
from penumbra.models.errors import BadArtifact
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.backends import load_backend
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.store import open_artifact
from tests.gpu.test_pipeline import ROUNDING, picture
from tests.models.small import SMALL, card_of, close, image, noise, seeded

ZOO = sorted((Path(models.__file__).parent / "zoo").glob("*.safetensors"))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_tensorrt = pytest.mark.skipif(find_spec("torch_tensorrt") is None, reason="needs torch-tensorrt")
HERE = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
needs_rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None or HERE[0] not in (8, 12), reason="needs TensorRT-RTX and a GPU of its kind"
)
FORMATS = [
    *(pytest.param("torchscript", precision) for precision in ("fp32", "bf16", "fp16")),
    *(pytest.param("aot", precision) for precision in ("fp32", "bf16", "fp16")),
    *(pytest.param("tensorrt", p, marks=needs_tensorrt) for p in ("fp32", "tf32", "fp16", "bf16")),
    *(pytest.param("tensorrt_rtx", p, marks=needs_rtx) for p in ("fp32", "tf32", "fp16", "bf16")),
]


def segment(store: Path, device: str, name: str = "small") -> Prediction:
    tuning = Tuning(windows_per_batch=2, samples_per_call=2)
    with Segmenter.open(store, device=device, tuning=tuning) as segmenter:
        return segmenter.segment(picture(), SegmentOptions(model=name, seed=5))


@needs_gpu
@pytest.mark.parametrize("name", SMALL)
def test_graphs_exported_on_the_cpu_run_on_the_gpu(name: str, tmp_path: Path) -> None:
    export_network(seeded(name), card_of(name), tmp_path, device="cpu")
    assert verify_artifact(tmp_path / "small/1", "cuda").relative <= ROUNDING


@needs_gpu
@needs_rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("checkpoint", ZOO, ids=lambda path: path.stem)
def test_engines_built_on_the_cpu_run_on_the_gpu(checkpoint: Path, precision: str, tmp_path: Path) -> None:
    directory = export_checkpoint(checkpoint, tmp_path, backend="tensorrt_rtx", precision=precision, device="cpu")
    print(precision, checkpoint.stem, verify_artifact(directory, "cuda"))


@needs_gpu
@pytest.mark.parametrize(("backend", "precision"), FORMATS)
@pytest.mark.parametrize("checkpoint", ZOO, ids=lambda path: path.stem)
def test_trained_networks_keep_their_answers_in_every_format(
    checkpoint: Path, backend: str, precision: str, tmp_path: Path
) -> None:
    directory = export_checkpoint(checkpoint, tmp_path, backend=backend, precision=precision, device="cuda")
    print(backend, precision, checkpoint.stem, verify_artifact(directory, "cuda"))
    prediction = segment(tmp_path, "cuda", checkpoint.stem)
    assert all(np.isfinite(values).all() for values in prediction.maps.values())


@needs_gpu
@pytest.mark.parametrize("backend", ["aot", pytest.param("tensorrt", marks=needs_tensorrt)])
def test_machine_code_of_another_gpu_is_refused(backend: str, tmp_path: Path) -> None:
    directory = export_network(seeded("cps"), card_of("cps"), tmp_path, backend=backend, device="cuda")
    card = open_artifact(directory).card
    elsewhere = replace(card, export=replace(card.export, built_for=card.export.built_for | {"gpu": "another"}))
    with pytest.raises(BadArtifact, match=f"was built for gpu another and this is .*--backend {backend}"):
        load_backend(elsewhere, directory, torch.device("cuda"))


@needs_gpu
@pytest.mark.parametrize("backend", ["torchscript", "aot"])
@pytest.mark.parametrize("name", ["np_semiseg published", "cps"])
def test_captured_calls_give_the_networks_bits_at_every_size(name: str, backend: str, tmp_path: Path) -> None:
    export_network(seeded(name), card_of(name), tmp_path, backend=backend, device="cuda")
    artifact = open_artifact(tmp_path / "small/1")
    plain, graphs = (load_backend(artifact.card, artifact.directory, torch.device("cuda")) for _ in range(2))
    calls = [(image(size), noise(name, samples, size)) for size in (4, 1) for samples in (3, 2)]
    answers = [plain.decode(plain.encode(pixels), draws) for pixels, draws in calls * 4][-len(calls) :]
    graphs.capture(graphs.decode(graphs.encode(pixels), draws) for pixels, draws in calls)
    for _ in range(2):
        for (pixels, draws), expected in zip(calls, answers, strict=True):
            assert torch.equal(graphs.decode(graphs.encode(pixels), draws), expected)
    pixels, draws = image(3), noise(name, 3, 3)  # not captured
    assert torch.equal(graphs.decode(graphs.encode(pixels), draws), plain.decode(plain.encode(pixels), draws))


@needs_gpu
@pytest.mark.parametrize("backend", ["torchscript", "aot"])
def test_a_server_with_cuda_graphs_gives_the_bytes_of_one_without(
    backend: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "np_semiseg published"
    export_network(seeded(name), card_of(name), tmp_path, backend=backend, device="cuda")
    tuning = Tuning(windows_per_batch=2, samples_per_call=3)
    answers = []
    for each in (tuning, replace(tuning, cuda_graphs=True)):
        with caplog.at_level("INFO"), Segmenter.open(tmp_path, device="cuda", tuning=each) as segmenter:
            answers.append(segmenter.segment(picture(), SegmentOptions(seed=5)))
    assert "6 calls are CUDA graphs" in caplog.text and "run without" not in caplog.text
    assert all(np.array_equal(values, answers[1].maps[key]) for key, values in answers[0].maps.items())


@needs_gpu
@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="needs onnxruntime")
def test_onnxruntime_answers_on_the_gpu_as_torch_does(tmp_path: Path) -> None:
    from penumbra.serving.engine.backends import onnx

    if "cuda" not in onnx.DEVICES:
        pytest.skip("needs onnxruntime-gpu")
    name = "np_semiseg published"
    export_network(seeded(name), card_of(name), tmp_path, backend="onnx", device="cuda")
    artifact = open_artifact(tmp_path / "small/1")
    graphs = load_backend(artifact.card, artifact.directory, torch.device("cuda"))
    pixels, draws = image(3), noise(name, 4, 3)
    found = graphs.decode(graphs.encode(pixels), draws)
    assert found.device.type == "cuda" and close(found.cpu(), seeded(name)(pixels, draws), ROUNDING)
