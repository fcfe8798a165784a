"""The same ONNX graphs in OpenVINO, on the CPU: fp32 as exported, or in bf16 where the card says so."""

from collections.abc import Sequence
from pathlib import Path

import openvino
import torch
from torch import Tensor

from penumbra.models.card import Card
from penumbra.models.errors import BadArtifact
from penumbra.serving.engine.backends import DTYPES, first_words
from penumbra.serving.engine.backends.flat import FlatBackend, part_names

HINTS = {"fp32": "f32", "bf16": "bf16"}
"""Set always: left alone, OpenVINO takes bf16 where the processor has it."""


class OpenVinoGraph:
    """One compiled graph, with as many threads as torch has in the thread that loads it."""

    def __init__(self, path: Path, precision: str) -> None:
        core = openvino.Core()
        settings = {
            "INFERENCE_PRECISION_HINT": HINTS[precision],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        self._request = core.compile_model(core.read_model(path), "CPU", settings).create_infer_request()

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        arrays = [tensor.contiguous().numpy() for tensor in inputs]
        outputs = self._request.infer(arrays, share_inputs=True)
        return [torch.from_numpy(outputs[i]) for i in range(len(outputs))]


def load(card: Card, directory: Path, _: torch.device) -> FlatBackend:
    assert card.export
    names = part_names(prompted=card.prompt.kind != "none")
    try:
        graphs = {name: OpenVinoGraph(directory / f"{name}.onnx", card.export.precision) for name in names}
    except RuntimeError as error:
        raise BadArtifact(f"{directory} holds graphs that this OpenVINO cannot load: {first_words(error)}") from None
    return FlatBackend(graphs, device=torch.device("cpu"), dtype=DTYPES[card.export.precision])


def target(_: torch.device) -> dict[str, str]:
    """It runs anywhere."""
    return {}
