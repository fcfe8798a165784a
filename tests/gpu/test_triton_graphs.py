"""The files of a Triton repository, made on a CPU, on a GPU."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("tritonclient.grpc", reason="needs tritonclient")
pytest.importorskip("httpx", reason="needs httpx")

from penumbra.export.triton import write_repository
from penumbra.models.card import MAPS
from tests.export.test_triton import VARIANTS, ask, follow, made
from tests.gpu.test_formats import needs_gpu
from tests.gpu.test_pipeline import ROUNDING


@needs_gpu
@pytest.mark.parametrize("name", VARIANTS)
def test_a_triton_repository_made_on_the_cpu_answers_on_the_gpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # no backend is loaded, which would see to it
    artifact = made(tmp_path, name)
    write_repository(artifact, tmp_path / "repository")
    kind = artifact.card.prompt.kind
    for ensemble in ["small"] + [f"small_with_{kind}"] * (kind != "none"):
        inputs = ask(artifact, num_windows=3, num_samples=5)
        here, there = (follow(tmp_path / "repository", ensemble, inputs, device) for device in ("cpu", "cuda"))
        for key in [name for name in MAPS if name in here]:
            torch.testing.assert_close(there[key].cpu(), here[key], rtol=0, atol=ROUNDING)
