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
from tests.models.small import SMALL, card_of, seeded

ZOO = sorted((Path(models.__file__).parent / "zoo").glob("*.safetensors"))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_tensorrt = pytest.mark.skipif(find_spec("torch_tensorrt") is None, reason="needs torch-tensorrt")
FORMATS = [
    *(pytest.param("torchscript", precision) for precision in ("fp32", "bf16", "fp16")),
    *(pytest.param("aot", precision) for precision in ("fp32", "bf16", "fp16")),
    *(pytest.param("tensorrt", p, marks=needs_tensorrt) for p in ("fp32", "tf32", "fp16", "bf16")),
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
def test_a_recorded_cuda_graph_gives_the_networks_bits(tmp_path: Path) -> None:
    export_network(seeded("np_semiseg published"), card_of("np_semiseg published"), tmp_path, device="cuda")
    artifact = open_artifact(tmp_path / "small/1")
    backend = load_backend(artifact.card, artifact.directory, torch.device("cuda"))
    image, noise = artifact.golden.image_B3hw.cuda(), artifact.golden.plain.noise_SBL.cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries choose and allocate before the recording
        for _ in range(3):
            wanted = backend.decode(backend.encode(image), noise)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = backend.decode(backend.encode(image), noise)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(recorded, wanted)
