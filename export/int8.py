"""Post-training quantisation: the ONNX graphs of an export compute in int8 wherever its gate lets them.

A layer is a convolution or a product with constant weights. What enters it is rounded to 8 bits within the range that
was seen on pictures, and its weights are, channel by channel. All layers are tried at once; where the gate refuses
that, each is tried alone, and those that take up most of what the gate allows are given back, as few as it takes. What
is not in int8 is in bf16 where the processor has it, else in float32.
"""

import math
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime.quantization import QDQQuantizer, QuantType, TensorsData, create_calibrator
from torch import Tensor
from torch.utils import _pytree as pytree

from penumbra.export.golden import golden_prompt, noise_of, windows_of
from penumbra.export.onnx import anonymous
from penumbra.export.onnx_program import inputs_of
from penumbra.export.parity import check_parity, strain
from penumbra.models.card import Card, Parity
from penumbra.models.contract import Network
from penumbra.models.errors import BadOption, ParityFailed

RANGE_WINDOWS, PROOF_WINDOWS = 32, 8
"""Windows that ranges are taken from, and others on which the gate is held beside the two golden ones."""
LEAST_PICTURES, PROOF_EVERY = 8, 4
"""Pictures that are needed; every fourth is kept for the proof."""
LEAST_OPSET = 13
KINDS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
OPTIONS = {"OpTypesToExcludeOutputQuantization": KINDS, "MatMulConstBOnly": True}
"""What leaves a layer is rounded only where it enters the next one; sums and activations between them are wider."""


def split(pictures: Sequence[Path], card: Card, device: torch.device) -> tuple[Sequence[Path], Sequence[Path]]:
    """Split pictures into those of the proof and those of the ranges. Raises BadOption: too few, or no int8."""
    if device.type != "cpu":
        raise BadOption(f"int8 is for the CPU, and {card.name} is to run on {device}; fp16 and bf16 are for it")
    if len(pictures) < LEAST_PICTURES:
        raise BadOption(
            f"int8 takes the ranges of its values from pictures like those that will be sent, and is proved on others "
            f"of them: {LEAST_PICTURES} or more are needed, and {len(pictures)} are given; add --pictures FOLDER"
        )
    return pictures[::PROOF_EVERY], [path for i, path in enumerate(pictures) if i % PROOF_EVERY]


def windows_beside(golden_BChw: Tensor, pictures: Sequence[Path], card: Card) -> Tensor:
    """Cut windows for the proof, each once and none that is golden: few and small pictures have fewer, or none."""
    found = list[Tensor]()
    for window_Chw in windows_of(pictures, card, PROOF_WINDOWS + len(golden_BChw)):
        if not any(torch.equal(window_Chw, one) for one in (*golden_BChw, *found)):
            found.append(window_Chw)
    return torch.stack(found) if found else golden_BChw[:0]


class Quantiser:
    """A quantiser holds the float32 graphs of a draft and the range of every value that enters one of their layers.

    layers: names, such as `encode encoder.conv1`, in the order in which they run; the graph of a prompt has none.
    The ranges are those of the network's own calls on the windows, with as many samples as are usual.
    """

    def __init__(self, network: Network, card: Card, draft: Path, windows_BChw: Tensor) -> None:
        self._card, self._draft = card, draft
        windows = zip(torch.split(windows_BChw, 1), strict=True)
        calls = {"encode": windows, "decode": _decodes(network, card, windows_BChw)}
        self._graphs = {part: _read(draft / f"{part}.onnx") for part in calls}
        self._nodes = dict[str, list[tuple[str, str]]]()  # of a layer that is used twice there are two
        for part, graph in self._graphs.items():
            for name, node in _layers(graph):
                self._nodes.setdefault(f"{part} {name}", []).append((part, node))
        self._ranges = {part: _ranges(graph, calls[part]) for part, graph in self._graphs.items()}
        self.layers = list(self._nodes)

    def write(self, layers: Collection[str]) -> None:
        """Write the draft's graphs anew, with these layers in int8 and all others as they were."""
        for part, model in self._graphs.items():
            nodes = [node for layer in layers for where, node in self._nodes[layer] if where == part]
            if nodes:  # none would be taken for all
                by_channel, seven_bits, types = True, False, (QuantType.QInt8, QuantType.QUInt8)
                quantizer = QDQQuantizer(
                    model, by_channel, seven_bits, *types, self._ranges[part], nodes, [], KINDS, OPTIONS
                )  # a copy is worked on
                model = anonymous(quantizer.quantize_model())
            (self._draft / f"{part}.onnx").write_bytes(model.SerializeToString())

    def choose(self, quickly: Callable[[], Parity], wholly: Callable[[], Parity], *, search_s: float) -> list[str]:
        """Write as many layers in int8 as the gate lets pass, and return those that are not.

        quickly: measures what is written on little, to tell layers apart, for so many seconds; wholly: for the gate.
        Raises ParityFailed where the gate lets none pass.
        """

        def refusal(layers: Collection[str]) -> ParityFailed | None:
            self.write(layers)
            try:
                check_parity(wholly(), self._card)
            except ParityFailed as error:
                return error
            return None

        def strain_of(layers: Collection[str]) -> float:
            self.write(layers)
            with suppress(ParityFailed):
                return strain(quickly(), self._card)
            return math.inf  # what is not finite fails

        if not self.layers:
            raise BadOption(f"{self._card.name} has no convolution and no product of constant weights to be in int8")
        failed = refusal(self.layers)
        if not failed:
            return []
        started = time.perf_counter()
        strain_of(self.layers)
        num_groups = np.clip(int(search_s / (time.perf_counter() - started)), 1, len(self.layers))
        groups = sorted((list(group) for group in np.array_split(self.layers, num_groups)), key=strain_of)
        passing, failing = 0, len(groups)
        while failing - passing > 1:
            middle = (passing + failing) // 2
            error = refusal(list(chain(*groups[:middle])))
            passing, failing, failed = (passing, middle, error) if error else (middle, failing, failed)
        if not passing:
            raise failed
        chosen = set(chain(*groups[:passing]))
        self.write(chosen)
        return [layer for layer in self.layers if layer not in chosen]


def _read(path: Path) -> onnx.ModelProto:
    """Read a graph, in which every node has a name. Raises BadOption: int8 channel by channel came with opset 13."""
    model = onnx.load(path)
    version = next((entry.version for entry in model.opset_import if not entry.domain), 0)
    if version < LEAST_OPSET:
        raise BadOption(
            f"the network is an ONNX program of opset {version}; for int8 it has to be of {LEAST_OPSET} or more"
        )
    for i, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{i}"
    return model


def _layers(model: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    """Yield the layers' names, by their weights, and their nodes' names."""
    weights = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in KINDS and node.input[1] in weights:
            yield node.input[1].removeprefix("network.").removesuffix(".weight"), node.name


def _decodes(network: Network, card: Card, windows_BChw: Tensor) -> Iterator[tuple[Any, ...]]:
    """Yield calls of decode: one for every window, and where the network takes prompts, one more with a prompt."""
    for i, image_BChw in enumerate(torch.split(windows_BChw, 1)):
        with torch.inference_mode():
            features = network.encode(image_BChw)
            yield features, noise_of(card.sampling, (i,))
            if card.prompt.kind != "none":
                prompted = network.take_prompt(image_BChw, features, golden_prompt(card, image_BChw))
                yield prompted, noise_of(card.sampling_with(prompt=True), (i,))


def _ranges(model: onnx.ModelProto, calls: Iterable[tuple[Any, ...]]) -> TensorsData | None:
    """Find the least and the greatest value of whatever enters or leaves a layer; None where there is no layer."""
    if not any(node.op_type in KINDS for node in model.graph.node):
        return None
    names = [entry.name for entry in inputs_of(model.graph)]
    feeds = (
        {name: tensor.contiguous().numpy() for name, tensor in zip(names, pytree.tree_leaves(call), strict=True)}
        for call in calls
    )
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, Path(folder) / "graph.onnx")
        calibrator = create_calibrator(
            Path(folder) / "graph.onnx", KINDS, augmented_model_path=str(Path(folder) / "ranges.onnx")
        )
        calibrator.collect_data(SimpleNamespace(get_next=lambda: next(feeds, None)))
        return calibrator.compute_data()
