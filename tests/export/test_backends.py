"""Every format gives the checkpoint's answers, is bound to what it must be bound to, and says what it lacks."""

import dataclasses
import logging
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from torch import Tensor

from penumbra.export.bundle import export_network, verify_artifact
from penumbra.models.card import Card
from penumbra.models.contract import Features
from penumbra.models.errors import BadArtifact, BadOption, ParityFailed
from penumbra.models.toy.net import ToyNetwork
from penumbra.serving.engine.backends import Backend, load_backend, open_backend
from penumbra.serving.engine.backends import onnx as onnx_backend
from penumbra.serving.engine.backends.aot import open_graph
from penumbra.serving.engine.store import open_artifact
from tests.conftest import toy_card
from tests.models.small import card_of, close, image, is_served, noise, seeded

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
EXACTLY = 1e-4
WINDOW = (64, 80)
QUICK = ("toy boxed", "cps", "np_semiseg film", "plain onnx")
"""Four shapes of network: one that takes a prompt, one with members, one with a latent, one that is a graph already."""
SLOW = (
    "toy opposed",
    "toy bright",
    "proto_seg channel",
    "cpal cam",
    "np_semiseg published",
    "np_semiseg linear",
    "self_correcting linear",
    "self_correcting dropout",
    "cpal wrn38-dropout",
    "cps lite",
    "plain pt2",
    "plain dropout",
)
COMPILED = ("toy latent", "self_correcting linear", "plain pt2", "plain dropout")
"""A compiler works on every graph for half a minute: few cases, the second with members that a prompt adds."""


def load(directory: Path, **facts: object) -> Backend:
    """An artifact's graphs; facts: of the export, otherwise than its card has them."""
    card = open_artifact(directory).card
    assert card.export
    return load_backend(dataclasses.replace(card, export=dataclasses.replace(card.export, **facts)), directory, CPU)


@torch.inference_mode()
def agrees(name: str, graphs: Backend) -> None:
    """At batches and numbers of samples other than those it was exported with."""
    for num_windows, num_samples in ((1, 1), (5, 1), (1, 5), (3, 4)):
        pixels, draws = image(num_windows, WINDOW), noise(name, num_samples, num_windows)
        got, wanted = graphs.decode(graphs.encode(pixels), draws), seeded(name)(pixels, draws)
        assert got.shape == wanted.shape and got.dtype == torch.float32 and close(got, wanted, EXACTLY)


class WrongInBatches(ToyNetwork):
    """Its graphs are right for one window, and for two they are not."""

    def encode(self, image_B3hw: Tensor) -> Features:
        return super().encode(image_B3hw + (image_B3hw.shape[0] - 1 if torch.jit.is_tracing() else 0) * image_B3hw)


def test_graphs_that_are_wrong_only_for_two_windows_at_once_are_refused(tmp_path: Path) -> None:
    card, network = toy_card("latent")
    with pytest.raises(ParityFailed, match="does not reproduce its checkpoint: relative error"):
        export_network(WrongInBatches(network.config), card, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_onnx_graphs_agree_in_both_libraries_at_other_batches_and_are_served(name: str, tmp_path: Path) -> None:
    directory = export_network(seeded(name), card_of(name), tmp_path, backend="onnx")
    agrees(name, load(directory))
    agrees(name, load(directory, backend="openvino"))
    is_served(card_of(name), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_graphs_agree_at_other_batches_refuse_other_inputs_and_are_served(name: str, tmp_path: Path) -> None:
    directory = export_network(seeded(name), card_of(name), tmp_path, backend="aot")
    graphs = load(directory)
    agrees(name, graphs)
    is_served(card_of(name), tmp_path)
    with pytest.raises(ValueError, match=r"input 0 of encode is torch.float32 \[1, 3, 63, 80\]; it was compiled for"):
        graphs.encode(image(1, (63, 80)))
    encode = open_graph(directory / "encode.pt2", CPU, "fp32")
    package = torch._C._aoti.AOTIModelPackageLoader(str(directory / "encode.pt2"), "model", True, 1, -1)
    assert not any("running_mean" in name for name in package.get_constant_fqns())  # frozen: it is in weights
    with pytest.raises(ValueError, match=r"is torch\.float16"):
        encode([image(1, WINDOW).half()])
    with pytest.raises(ValueError, match="called with 2 inputs; it takes 1"):
        encode([image(1, WINDOW)] * 2)
    pixels = image(2, WINDOW)
    for contiguous, channels_last in zip(
        encode([pixels]), encode([pixels.contiguous(memory_format=torch.channels_last)]), strict=True
    ):
        assert torch.equal(contiguous, channels_last)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cps single", "cps lite"])
@torch.inference_mode()
def test_a_model_that_sees_images_whole_takes_any_size_in_onnx(name: str, tmp_path: Path) -> None:
    card = card_of(name)
    whole = dataclasses.replace(card, window=dataclasses.replace(card.window, height=0, width=0))
    directory = export_network(seeded(name), whole, tmp_path, backend="onnx")
    for graphs, size in product((load(directory), load(directory, backend="openvino")), ((96, 128), (61, 83))):
        pixels, draws = image(1, size), noise(name, 1, 1)
        assert close(graphs.decode(graphs.encode(pixels), draws), seeded(name)(pixels, draws), EXACTLY)


@pytest.mark.slow
def test_a_network_that_cannot_be_exported_for_every_size_is_refused_in_one_sentence(tmp_path: Path) -> None:
    card = card_of("cpal scales")
    whole = dataclasses.replace(card, window=dataclasses.replace(card.window, height=0, width=0))
    with pytest.raises(BadOption, match="encode cannot be exported for every size"):
        export_network(seeded("cpal scales"), whole, tmp_path, backend="onnx")
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def onnx_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    card, network = toy_card("latent")
    return export_network(network, card, tmp_path_factory.mktemp("store"), backend="onnx")


def test_onnx_graphs_are_data_of_the_standard_and_say_nothing_of_where_they_were_made(onnx_toy: Path) -> None:
    for path in onnx_toy.glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        assert {node.domain for node in model.graph.node} == {""} and not model.functions
        assert not any(tensor.external_data for tensor in model.graph.initializer)
        assert str(ROOT).encode() not in path.read_bytes() and b".py" not in path.read_bytes()
        assert not model.metadata_props and not any(node.metadata_props for node in model.graph.node)


def test_onnx_refuses_other_sizes_by_itself(onnx_toy: Path) -> None:
    for backend in ("onnx", "openvino"):
        with pytest.raises(Exception, match=r"(?i)dimension|shape"):
            load(onnx_toy, backend=backend).encode(image(1, (33, 48)))


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_a_graph_that_does_not_read_is_a_bad_artifact(backend: str, onnx_toy: Path, tmp_path: Path) -> None:
    for name in ("encode", "decode"):
        (tmp_path / f"{name}.onnx").write_bytes(b"nothing")
    card = open_artifact(onnx_toy).card
    assert card.export
    with pytest.raises(BadArtifact, match=r"cannot load: (?!Exception from)[^\n]+$"):
        load_backend(dataclasses.replace(card, export=dataclasses.replace(card.export, backend=backend)), tmp_path, CPU)


@pytest.mark.parametrize("backend", ["torchscript", "onnx", "openvino"])
def test_loading_needs_no_method_no_training_and_no_exporter(backend: str, onnx_toy: Path, tmp_path: Path) -> None:
    directory = onnx_toy if backend != "torchscript" else export_network(*reversed(toy_card("latent")), tmp_path)
    code = f"""
import dataclasses, pathlib, sys, torch
from penumbra.serving.engine.backends import load_backend
from penumbra.serving.engine.store import open_artifact
artifact = open_artifact(pathlib.Path({str(directory)!r}))
facts = dataclasses.replace(artifact.card.export, backend={backend!r})
graphs = load_backend(dataclasses.replace(artifact.card, export=facts), artifact.directory, torch.device("cpu"))
answer = artifact.golden.plain
assert torch.allclose(graphs.decode(graphs.encode(artifact.golden.image_B3hw), answer.noise_SBL), answer.logits_SBKhw)
print([name for name in sys.modules if f"{{name}}.".startswith((
    "penumbra.export.", "penumbra.training.", "onnx.", "onnxscript.", "penumbra.models.toy.", "penumbra.models.blocks.",
    "penumbra.models.checkpoint."))])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


# -- where a format runs ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_what_has_nothing_for_a_gpu_runs_on_the_cpu_and_says_so_once(
    backend: str, onnx_toy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    card = open_artifact(onnx_toy).card
    assert card.export
    card = dataclasses.replace(card, export=dataclasses.replace(card.export, backend=backend))
    with caplog.at_level(logging.INFO):
        assert open_backend(card, onnx_toy, torch.device("cuda")).device == CPU
        assert open_backend(card, onnx_toy, CPU).device == CPU
    assert caplog.messages == [f"{card.name} runs on the CPU: as installed here, {backend} has nothing for cuda"]


@pytest.mark.parametrize(("address", "stream"), [(0, "1"), (94_000_000, "94000000")])
def test_onnxruntime_on_a_gpu_queues_on_torchs_stream_and_keeps_float32(
    address: int, stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=address))
    name, options = onnx_backend.provider_of(torch.device("cuda:2"))
    assert name == "CUDAExecutionProvider" and options["use_tf32"] == "0"
    assert (options["device_id"], options["user_compute_stream"]) == ("2", stream)


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider'")
def test_onnxruntime_that_cannot_load_its_library_for_the_gpu_is_told_and_not_run_slowly(
    onnx_toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(onnx_backend, "DEVICES", ("cpu", "cuda"))
    with pytest.raises(
        BadArtifact, match=r"onnxruntime lacks a library that its CUDAExecutionProvider needs for .*encode"
    ):
        open_backend(open_artifact(onnx_toy).card, onnx_toy, torch.device("cuda"))


@torch.inference_mode()
def test_onnxruntime_reads_what_torch_has_and_gives_what_torch_reads_without_copies(
    onnx_toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = []

    class Watched(onnx_backend.onnxruntime.OrtValue):
        @classmethod
        def from_dlpack(cls, data: object, /) -> object:
            value = super().from_dlpack(data)
            shared.append(value.data_ptr())
            return value

    monkeypatch.setattr(onnx_backend.onnxruntime, "OrtValue", Watched)
    encode = onnx_backend.open_graph(onnx_toy / "encode.onnx", CPU, "fp32")
    pixels = image(2, (32, 48))
    assert all(feature.is_contiguous() for feature in encode(pixels))
    encode(pixels.to(memory_format=torch.channels_last))
    assert shared[0] == pixels.data_ptr() != shared[1]


# -- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "precision"), [("torchscript", "bf16"), ("torchscript", "fp16")])
@pytest.mark.parametrize("form", ["latent", "boxed", "bright"])
def test_half_precision_passes_its_own_gate_and_is_served(
    form: str, backend: str, precision: str, tmp_path: Path
) -> None:
    card, network = toy_card(form)
    directory = export_network(network, card, tmp_path, backend=backend, precision=precision)
    facts = open_artifact(directory).card.export
    assert facts and facts.precision == precision and 0 < facts.parity.relative < 0.01
    graphs = load(directory)
    features = graphs.encode(image(1))
    assert features[0].dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert graphs.decode(features, noise("toy latent", 2, 1)).dtype == torch.float32
    assert verify_artifact(directory, "cpu") == facts.parity
    is_served(card, tmp_path)


def test_the_network_that_is_exported_in_half_precision_stays_as_it_was(tmp_path: Path) -> None:
    card, network = toy_card("latent")
    network.register_buffer("extra", torch.full((1,), 1 / 3))
    export_network(network, card, tmp_path, precision="bf16")
    assert network.extra.dtype == torch.float32


@pytest.mark.parametrize(
    ("backend", "precision", "sentence"),
    [
        ("onnx", "bf16", "onnx is not exported in 'bf16'; it is in fp32"),
        ("openvino", "fp16", "openvino is not exported in 'fp16'; it is in fp32, bf16"),
        ("torchscript", "fp8", "torchscript is not exported in 'fp8'; it is in fp32, bf16, fp16"),
    ],
)
def test_a_precision_that_a_format_lacks_is_refused(
    backend: str, precision: str, sentence: str, tmp_path: Path
) -> None:
    card, network = toy_card("latent")
    with pytest.raises(BadOption, match=sentence):
        export_network(network, card, tmp_path, backend=backend, precision=precision)
    assert not any(tmp_path.iterdir())


# -- what is absent, and where an artifact belongs -------------------------------------------------


@pytest.mark.parametrize(("backend", "library"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_library_that_is_not_installed_is_named_with_the_extra_that_brings_it(
    backend: str, library: str, onnx_toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"penumbra.serving.engine.backends.{backend}", raising=False)
    with pytest.raises(
        BadArtifact, match=rf"needs {library}, which is not installed; pip install 'penumbra-serving\[{backend}"
    ):
        load(onnx_toy, backend=backend)


def test_exporting_without_the_exporters_library_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.delitem(sys.modules, "penumbra.export.onnx", raising=False)
    with pytest.raises(
        BadOption, match=r"needs onnxscript, which is not installed; pip install 'penumbra-serving\[onnx\]'"
    ):
        export_network(*reversed(toy_card("latent")), tmp_path, backend="onnx")
    assert not any(tmp_path.iterdir())


def test_compiled_code_of_another_machine_is_refused_with_how_to_build_it_here(onnx_toy: Path) -> None:
    elsewhere = {"processor": "Another One with SSE2", "torch": torch.__version__}
    with pytest.raises(BadArtifact) as refusal:
        load(onnx_toy, backend="aot", precision="bf16", built_for=elsewhere)
    sentence = str(refusal.value)
    assert "was built for processor Another One with SSE2 and this is " in sentence
    assert sentence.endswith("build it here: penumbra export CHECKPOINT --backend aot --precision bf16")


def test_an_unknown_format_is_a_bad_artifact(onnx_toy: Path) -> None:
    with pytest.raises(BadArtifact, match="no backend 'caffe'; known are torchscript, onnx"):
        load(onnx_toy, backend="caffe")


def test_a_card_without_the_newer_facts_still_reads(onnx_toy: Path) -> None:
    """Artifacts of an earlier release: nothing of theirs is lost."""
    card: Card = open_artifact(onnx_toy).card
    assert card.export and card.export.built_for == {} and card.export.parity.miou_change is None


SIGNALLED = """
import faulthandler, gc, signal, sys
from pathlib import Path
import torch
from penumbra.serving.engine.backends.openvino import open_graph

faulthandler.enable()  # signals get a stack of their own, as under pytest
for precision in ("bf16", "fp32"):
    opened = [open_graph(Path(sys.argv[1]), torch.device("cpu"), precision) for _ in range(2)]
    while opened:
        del opened[0]
        gc.collect()
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
signal.raise_signal(signal.SIGTERM)
"""


def test_a_signal_is_handled_after_openvino_s_graphs_were_closed(tmp_path: Path) -> None:
    network = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])], "relu",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [8])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [8])],
    )  # fmt: skip
    path = tmp_path / "relu.onnx"
    onnx.save(onnx.helper.make_model(network, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)
    done = subprocess.run([sys.executable, "-c", SIGNALLED, path], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
