"""A package of bioimage.io (specification 0.5): one TorchScript graph from raw values to probabilities, with a test.

The graph is the artifact's own two, run on the noise of seed 0, so it is one fixed answer: the mean over its usual
samples, without uncertainty. https://bioimage.io/docs
"""

import io
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from penumbra.export.golden import noise_of
from penumbra.export.readout import Normalise, check_read_out, moments
from penumbra.models.card import Card
from penumbra.models.errors import BadOption
from penumbra.models.files import write_whole
from penumbra.serving.engine.backends.torchscript import open_graph
from penumbra.serving.engine.runtime import as_type
from penumbra.serving.engine.store import Artifact, sha256_of

SPDX = {"apache-2.0": "Apache-2.0", "mit": "MIT", "bsd-3-clause": "BSD-3-Clause", "cc0-1.0": "CC0-1.0",
        "cc-by-4.0": "CC-BY-4.0"}  # fmt: skip
"""Licences that are said; another one stands in the documentation."""
PACKAGE = ("rdf.yaml", "documentation.md", "weights.pt", "test_input.npy", "test_output.npy")
"""The files of a package."""


class Whole(nn.Module):
    """From raw values [B, C, h, w] to mean probabilities [B, K, h, w]."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__()
        card, folder, cpu = artifact.card, artifact.directory, torch.device("cpu")
        self.encode, self.decode = (open_graph(folder / f"{part}.ts", cpu, "") for part in ("encode", "decode"))
        self.readout, self.normalise = card.readout, Normalise(card.input)
        self.noise_S1L = noise_of(card.sampling)

    def forward(self, values_BChw: Tensor) -> Tensor:
        seen = self.normalise(values_BChw.permute(0, 2, 3, 1))
        logits_SBKhw = self.decode(self.encode(seen), self.noise_S1L.expand(-1, seen.shape[0], -1))
        return moments(logits_SBKhw.transpose(0, 1), values_BChw.shape[2:], self.readout)[0]


def write_package(artifact: Artifact, documentation: str, output: Path) -> Path:
    """Write the package's files, and return its `rdf.yaml`. Raises BadOption for a model that is no TorchScript,
    or is answered in views."""
    card = artifact.card
    if not card.export or card.export.backend != "torchscript":
        raise BadOption(f"{card.name} is {card.export and card.export.backend}; a package of bioimage.io is made of "
                        "torchscript, so export it so")  # fmt: skip
    check_read_out(card, "bioimage.io")
    whole = Whole(artifact)
    factor_C11, offset_C11 = (torch.tensor(values)[:, None, None] for values in card.input.factor_offset)
    values_BChw = (artifact.golden.image_B3hw[:1] - offset_C11) / factor_C11
    ordered = values_BChw.flip(1) if card.input.order == "BGR" else values_BChw
    raw_BChw = as_type(ordered.numpy(), np.dtype(card.input.dtype))
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TorchScript, which is deprecated, and of its tracer's guesses
        example = torch.from_numpy(raw_BChw.astype(np.float32))
        graph = torch.jit.trace(whole, example, check_trace=False)  # type: ignore[no-untyped-call]
        weights, expected = io.BytesIO(), graph(example).numpy()
        torch.jit.save(graph, weights)
    files = {"weights.pt": weights.getvalue(), "documentation.md": documentation.encode()}
    for name, array in (("test_input.npy", raw_BChw), ("test_output.npy", expected)):
        file = io.BytesIO()
        np.save(file, array)
        files[name] = file.getvalue()
    for name, data in files.items():
        write_whole(output / name, data)
    described = _describe(card, raw_BChw.shape, {name: sha256_of(output / name) for name in files})
    write_whole(output / "rdf.yaml", (json.dumps(described, indent=1) + "\n").encode())  # JSON is YAML
    return output / "rdf.yaml"


def _describe(card: Card, shape: tuple[int, ...], hashes: dict[str, str]) -> dict[str, Any]:
    """Describe the package as a resource description file. shape: [B, C, h, w] of the test's input."""
    assert card.export

    def tensor(name: str, dtype: str, channels: list[str]) -> dict[str, Any]:
        axes = [{"type": "batch"}, {"type": "channel", "channel_names": channels}]
        axes += [{"type": "space", "id": axis, "size": size} for axis, size in zip("yx", shape[2:], strict=True)]
        file = f"test_{name}.npy"
        return {"id": name, "axes": axes, "data": {"type": dtype},
                "test_tensor": {"source": file, "sha256": hashes[file]}}  # fmt: skip

    name = re.sub(r"[^\w+() -]", "_", f"{card.name} version {card.version}", flags=re.ASCII)
    licence = SPDX.get(card.provenance.licence.lower())
    return {
        "type": "model", "format_version": "0.5.4", "name": name,
        "description": f"Semantic segmentation by {card.method}: mean probabilities of {card.num_classes} classes",
        "authors": [], "tags": ["semantic-segmentation", "pytorch", "2d"],
        "documentation": {"source": "documentation.md", "sha256": hashes["documentation.md"]},
        "inputs": [tensor("input", card.input.dtype, [*card.input.bands])],
        "outputs": [tensor("output", "float32", [one.name for one in card.classes])],
        "weights": {"torchscript": {"source": "weights.pt", "sha256": hashes["weights.pt"],
                                    "pytorch_version": card.export.torch.partition("+")[0]}},
    } | ({"license": licence} if licence else {})  # fmt: skip
