"""TensorRT-RTX engines of every network are really built, without a GPU, by the parser and builder that users have.

A graph that builds must be valid ONNX, its numbers must be the checkpoint's by the export's own gate, and the builder's
log must say what was asked for. Whether a GPU computes the same from an engine is for `tests/gpu`.
"""

import copy
import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install 'penumbra-serving[tensorrt-rtx]'")

from benchmarks.methods import NETWORKS
from penumbra.export import tensorrt_rtx as rtx
from penumbra.export.bundle import _measure, _measure_in, export_network
from penumbra.export.golden import ask
from penumbra.export.onnx import to_onnx
from penumbra.export.parity import check_parity
from penumbra.export.parts import Part, cut, is_open
from penumbra.export.zoo import ZOO
from penumbra.models import find_method
from penumbra.models.card import Card, ClassInfo, ExportFacts, InputSpec, Parity, Readout, WindowSpec
from penumbra.models.checkpoint import load_checkpoint
from penumbra.models.contract import Network
from penumbra.models.errors import BadArtifact, BadOption, ParityFailed
from penumbra.serving.engine.backends import Backend, load_backend
from penumbra.serving.engine.backends.engines import load_plan
from penumbra.serving.engine.backends.tensorrt_rtx import check_validity, target
from penumbra.serving.engine.runtime import SIZES
from penumbra.serving.engine.store import open_artifact
from tests.conftest import toy_card
from tests.models.small import calibrate, card_of, seeded

CPU = torch.device("cpu")
NAMES = {"fp32": "Float", "fp16": "Half", "bf16": "BFloat16"}
"""What TensorRT calls a precision."""
RELATIVE = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.1}
"""Bounds of the largest difference over the largest logit, of networks with random weights: labels of theirs are near
ties, which the gate counts."""
REFUSED = {
    (name, "bf16"): "of labels flip, 0.5 % allowed"
    for name in (
        "cpal-camvid",
        *(f"{kind}-lite2-camvid" for kind in ("mc_dropout", "np_linear", "np_semiseg", "supervised")),
    )
}
"""What the gate does not let pass, of the zoo, on drawn golden windows (on pictures the last one passes)."""
NEAR = {("supervised-lite2-camvid", "fp16")}
"""What flips about as many labels on drawn golden windows as are allowed: 0.54 % were seen, and 0.06 % on pictures."""
BYTES_PER_PIXEL = {"encode": 500, "prompt": 900, "decode": 400}
"""Bounds of the memory that a window's pixel (in decode: of a sample) takes at the largest sizes. The most were, in
fp32, SIPE's encoder (443), the ResNet-101's prompt (835), and HRNet-W48's decoder with MC dropout (362). The encoder of
SIPE at four scales, which is not built here, takes 2709."""

PUBLISHED = {
    "np_semiseg U2PL R50": "bf16",
    "cps R50, branch1": "fp16",
    "proto_seg HRNet-W48 parametric": "fp16",
    "self_correcting R101, with boxes": "fp32",
    "cpal SIPE R50, one scale": "fp32",
    "cpal PACAM R50": "bf16",
}
"""Networks of published size, each in one of the precisions: all of them in each would take an hour."""


@pytest.fixture
def all_cores() -> Iterator[None]:
    """Slow tests have the machine for themselves."""
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)


@dataclass(frozen=True, slots=True)
class Built:
    """A network's engines in one precision: what the builder says of each part's, and the gate's figures."""

    precision: str
    facts: dict[str, Any]
    parity: Parity


def build(
    network: Network, card: Card, precisions: tuple[str, ...], measure: Callable[..., Parity] = _measure
) -> Iterator[Built]:
    """As `tensorrt_rtx.write` does, of one conversion to ONNX, which takes most of the time; and checks the facts."""
    network = network.eval().requires_grad_(False)
    golden = ask(network, card)
    parts = cut(network, card, golden, precision="fp32", device=CPU)
    programs = [to_onnx(part, opset=rtx.OPSET) for part in parts]
    for precision in precisions:
        facts, graphs = {}, {}
        for part, program in zip(parts, programs, strict=True):
            own = copy.copy(program)
            own.model = program.model.clone()
            model = rtx.prepare(own, precision)
            onnx.checker.check_model(model, full_check=True)
            plan, lines = rtx.build(model, part, card, precision=precision)
            assert len(plan) > 1000
            facts[part.name] = read_log(lines)
            check_facts(facts[part.name], part, card, precision)
            graphs[part.name] = rtx.open_model(model, precision)
        exported = Backend(graphs, device=CPU, one_at_a_time=True)
        yield Built(precision, facts, measure(card, exported, golden))


def check_facts(facts: dict[str, Any], part: Part, card: Card, precision: str) -> None:
    """The log's tables are what was asked for; its kernels compute in the precision; its memory is bounded."""
    assert facts["warnings"] == []
    for name, sizes in facts["inputs"].items():
        least, best, most = map(list, zip(*part.ranges(int(name.removeprefix("input.")), card), strict=True))
        assert sizes == {"type": "Float", "least": least, "best": best, "most": most}
    calls = ([tuple(x.shape) for x in pytree.tree_leaves(part.module(*call))] for call in (part.example, part.other))
    outputs = [[a if a == b else -1 for a, b in zip(*pair, strict=True)] for pair in zip(*calls, strict=True)]
    said = [facts["outputs"][f"output.{i}"] for i in range(len(outputs))]
    assert [each["type"] for each in said] == ["Float"] * len(outputs)
    for output, each in zip(outputs, said, strict=True):
        assert all(size in (-1, fixed) or fixed == -1 for size, fixed in zip(each["sizes"], output, strict=True))
    kernels = facts["kernels"]
    assert {kind for _, kind in kernels} & set(NAMES.values()) <= {"Float", NAMES[precision]}
    convolutions = {kind: count for (name, kind), count in kernels.items() if name == "correlation"}
    if not is_open(card):
        pixels = card.window.height * card.window.width
        windows = max(SIZES) * (samples_of(part, card) if part.name == "decode" else 1)
        assert facts["activation_bytes"] <= BYTES_PER_PIXEL[part.name] * pixels * windows
    if part.name == "encode" and "toy" not in card.method:
        assert convolutions[NAMES[precision]] >= 0.85 * sum(convolutions.values())


def read_log(lines: list[str]) -> dict[str, Any]:
    """What a builder's log says of an engine."""
    text = "\n".join(lines)
    tensors = re.findall(r"Name: (\S+), IOMode: (\w+), DataType: (\w+), Dimensions: (\[.*?\])", text)
    ranges = re.findall(r"MinShape: (\[.*?\]), OptShape: (\[.*?\]), MaxShape: (\[.*?\])", text)
    inputs, outputs = ([tensor for tensor in tensors if tensor[1] == mode] for mode in ("Input", "Output"))
    activation = re.search(r"Total Activation Memory: (\d+)", text)
    assert activation
    return {
        "activation_bytes": int(activation[1]),
        "inputs": {
            name: {"type": kind} | dict(zip(("least", "best", "most"), map(json.loads, sizes), strict=True))
            for (name, _, kind, _), sizes in zip(inputs, ranges, strict=True)
        },
        "outputs": {name: {"type": kind, "sizes": json.loads(sizes)} for name, _, kind, sizes in outputs},
        "kernels": Counter(re.findall(r"LayerType: (\w+), Inputs: .*Outputs: \[ .*?Datatype: (\w+)", text)),
        "warnings": [line for line in lines if line.startswith(("WARNING", "ERROR", "INTERNAL_ERROR"))],
    }


def samples_of(part: Part, card: Card) -> int:
    noise = len(pytree.tree_leaves(part.example)) - 1
    return part.ranges(noise, card)[0][2]


# -- networks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "toy boxed",
        pytest.param("np_semiseg film", marks=pytest.mark.slow),
        pytest.param("np_semiseg linear", marks=pytest.mark.slow),
        pytest.param("cpal everywhere", marks=pytest.mark.slow),
    ],
)
def test_small_networks_build_in_every_precision_and_their_graphs_are_right(name: str) -> None:
    for built in build(seeded(name), card_of(name), tuple(NAMES)):
        assert built.parity.relative <= RELATIVE[built.precision], built


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "window", "least", "most"),
    [
        ("cps single", WindowSpec(0, 0), [1, 3, 32, 40], [4, 3, 2048, 2560]),
        ("np_semiseg film", WindowSpec(64, 80, last="clip"), [1, 3, 8, 10], [32, 3, 64, 80]),
    ],
)
def test_windows_of_any_size_build_in_every_precision(
    name: str, window: WindowSpec, least: list[int], most: list[int]
) -> None:
    for built in build(seeded(name), dataclasses.replace(card_of(name), window=window), tuple(NAMES)):
        taken = built.facts["encode"]["inputs"]["input.0"]
        assert (taken["least"], taken["most"]) == (least, most)
        assert built.parity.relative <= RELATIVE[built.precision], built


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", sorted(ZOO.glob("*.safetensors")), ids=lambda path: path.stem)
@pytest.mark.usefixtures("all_cores")
def test_the_zoo_builds_in_every_precision_and_passes_the_gate(checkpoint: Path) -> None:
    card, network = load_checkpoint(checkpoint)
    for built in build(network, card, tuple(NAMES)):
        facts = ExportFacts("tensorrt_rtx", built.precision, torch.__version__, {}, built.parity)
        exported = dataclasses.replace(card, export=facts)
        if (checkpoint.stem, built.precision) in NEAR:
            assert built.parity.label_flips_percent < 1
            built = dataclasses.replace(built, parity=dataclasses.replace(built.parity, label_flips_percent=0.0))
        if reason := REFUSED.get((checkpoint.stem, built.precision)):
            with pytest.raises(ParityFailed, match=reason):
                check_parity(built.parity, exported)
        else:
            check_parity(built.parity, exported)


def published(name: str) -> tuple[Network, Card]:
    """A network of published size with random weights, and normalisations that have the statistics of noise."""
    config = NETWORKS[name]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        network = find_method(name.split()[0]).build(config)
        for key, buffer in network.named_buffers():
            if key.endswith("_centres"):
                nn.init.normal_(buffer)
        calibrate(network.train())
    classes = tuple(ClassInfo(f"class {k}", (k, k, k)) for k in range(config.num_classes))
    card = Card(
        "published", 1, name.split()[0], asdict(config), classes, InputSpec(), WindowSpec(512, 512), network.sampling,
        Readout(), prompt=network.prompt, extra_maps=network.extra_maps,
    )  # fmt: skip
    return network, card


@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision"), list(PUBLISHED.items()), ids=lambda value: value)
@pytest.mark.usefixtures("all_cores")
def test_networks_of_published_size_build_and_their_graphs_are_right(name: str, precision: str) -> None:
    """Measured with both windows in one batch alone."""
    for built in build(*published(name), (precision,), partial(_measure_in, 2, 1)):
        assert built.parity.relative <= RELATIVE[precision], built


# -- the artifact ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    card, network = toy_card("latent")
    return export_network(network, card, tmp_path_factory.mktemp("store"), backend="tensorrt_rtx", precision="fp16")


def test_an_artifact_says_that_its_graph_was_measured_what_it_is_bound_to_and_what_its_engines_take(
    artifact: Path,
) -> None:
    facts = open_artifact(artifact).card.export
    assert facts and facts.measured == "graph" and facts.built_for.keys() == {"TensorRT-RTX"}
    assert 0 < facts.parity.relative < 0.01
    assert set(facts.files) == {"encode.engine", "decode.engine", "engines.txt", "golden.safetensors"}


def test_a_machine_without_a_gpu_refuses_engines_with_what_would_run_there(artifact: Path) -> None:
    with pytest.raises(BadArtifact, match=r"encode.engine runs on an NVIDIA RTX GPU, and the device is cpu; export"):
        load_backend(open_artifact(artifact).card, artifact, CPU)


def test_engines_of_another_version_are_refused_with_the_command_that_builds_them(artifact: Path) -> None:
    card = open_artifact(artifact).card
    assert card.export
    older = dataclasses.replace(card, export=dataclasses.replace(card.export, built_for={"TensorRT-RTX": "1.5.0.114"}))
    with pytest.raises(BadArtifact, match=r"was built for TensorRT-RTX 1\.5\.0\.114 and this is .*tensorrt_rtx"):
        load_backend(older, artifact, CPU)


@pytest.mark.parametrize(
    ("gpu", "capability", "sentence"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), r"NVIDIA H100 80GB HBM3 \(Hopper, compute capability 9\.0\), only for 8\.0"),
        ("NVIDIA B200", (10, 0), r"NVIDIA B200 \(Blackwell of data centres, compute capability 10\.0\)"),
        ("Tesla T4", (7, 5), r"Tesla T4 \(Turing, compute capability 7\.5\)"),
        ("Tesla K80", (3, 7), r"Tesla K80 \(compute capability 3\.7\)"),
    ],
)
def test_a_gpu_that_it_has_no_kernels_for_is_refused_by_name_before_anything_is_built(
    gpu: str, capability: tuple[int, int], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    card, network = toy_card("latent")
    with pytest.raises(BadOption, match=sentence):
        rtx.write(network, card, ask(network, card), tmp_path, precision="fp16", device=torch.device("cuda", 0))
    assert not any(tmp_path.iterdir())


def test_a_hopper_refuses_an_artifact_and_a_server_goes_on_without_it(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with pytest.raises(BadArtifact, match=r"cannot be loaded: TensorRT-RTX has no kernels for NVIDIA H200 \(Hopper"):
        load_backend(open_artifact(artifact).card, artifact, torch.device("cuda", 0))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (12, 0), (12, 1), (13, 0)])
def test_gpus_that_it_has_kernels_for_differ_in_nothing_that_an_artifact_is_bound_to(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert target(torch.device("cuda", 0)) == target(CPU)


# -- TensorRT-RTX's own refusals, from the library itself ------------------------------------------


class Determinant(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.det(x)


def test_an_operator_that_it_lacks_is_named_with_its_node() -> None:
    x = torch.eye(3).repeat(2, 1, 1)
    part = Part("encode", Determinant(), (x,), (x[:1],))
    model = rtx.prepare(to_onnx(part, opset=rtx.OPSET), "fp32")
    with pytest.raises(
        BadOption, match=r"^TensorRT-RTX cannot take encode: Det at n0 \(UNSUPPORTED_NODE: .*another backend$"
    ):
        rtx.build(model, part, card_of("toy"), precision="fp32")


def test_bytes_that_are_no_engine_are_called_so() -> None:
    with pytest.raises(BadArtifact, match=r"store/x cannot run here: malformed engine; export"):
        check_validity(b"nothing of an engine" * 100, "store/x")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_an_engine_without_a_gpu_is_refused_and_does_not_end_the_process(artifact: Path) -> None:
    plan = (artifact / "encode.engine").read_bytes()
    with pytest.raises(BadArtifact, match=r"x cannot run here: .*(CUDA|cuda)"):
        check_validity(plan, "x")
    with pytest.raises(BadArtifact, match=r"x is no engine that tensorrt_rtx 1\S+ can load here \(.*cuda"):
        load_plan(rtx.trt, plan, "x")
