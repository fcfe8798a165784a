"""A Triton repository leads a window to the engine's answer, and a real Triton loads and serves it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from click.testing import CliRunner
from google.protobuf import text_format
from torch import Tensor
from tritonclient.grpc import model_config_pb2 as pb

from penumbra.__main__ import main
from penumbra.export.bundle import export_network
from penumbra.export.parity import read_window
from penumbra.export.triton import MAX_BATCH, export_repository, write_repository
from penumbra.models.card import MAPS, Card, ClassInfo, InputSpec, Readout, ScaleRule, WindowSpec
from penumbra.models.checkpoint import save_checkpoint
from penumbra.models.errors import BadOption, UnknownModel
from penumbra.serving.engine.backends import load_backend
from penumbra.serving.engine.moments import resize
from penumbra.serving.engine.store import Artifact, open_artifact
from penumbra.serving.engine.windows import normalise
from tests.models.small import card_of, seeded
from tests.serving.server import END_S, free_ports, until

START_S = 600
"""A bound of waiting: seven processes import torch."""
PEERS = Path(sys.prefix) / "peers"
"""`make .venv/peers` puts a Triton there."""
SERVER = PEERS / "pytriton/tritonserver"
STAND_IN = Path(__file__).with_name("triton_stand_in.py")
ROUNDING = 1e-5
VARIANTS = (
    "toy latent", "toy boxed", "toy tagged", "toy bright", "cps", "np_semiseg published", "np_semiseg dropout",
    "np_semiseg linear", "self_correcting linear", "self_correcting dropout", "proto_seg prototype", "cpal context",
)  # fmt: skip
READOUTS = {
    "hot": Readout(temperature=2.5),
    "half pixels": Readout(align_corners=False),
    "softmax of features": Readout(softmax_at="feature"),
    "average of logits": Readout(average="logits", align_corners=False),
    "softmax of averaged logits": Readout(softmax_at="feature", average="logits"),
}


def made(place: Path, name: str, card: Card | None = None) -> Artifact:
    return open_artifact(export_network(seeded(name), card or card_of(name), place / "store"))


def ask(
    artifact: Artifact, *, num_windows: int, num_samples: int, size: tuple[int, int] = (64, 80)
) -> dict[str, Tensor]:
    """Inputs of the ensembles: noise pictures, noise, and a prompt."""
    card, rng = artifact.card, torch.Generator().manual_seed(num_windows)
    inputs = {
        "image": torch.randint(0, 256, (num_windows, *size, 3), generator=rng, dtype=torch.uint8),
        "noise": torch.randn(num_windows, num_samples, card.sampling.noise_length, generator=rng),
        "boxes": torch.zeros(num_windows, card.num_classes, *size),
        "tags": torch.tensor([[0.0, 1.0, 1.0]]).repeat(num_windows, 1),
        "alpha": torch.full((num_windows, 1), 0.5),
    }
    inputs["boxes"][:, 1, 10:40, 5:30] = 1
    return inputs


def engine_logits(
    artifact: Artifact, inputs: dict[str, Tensor], *, prompt: str = ""
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """logits_BSKhw and features as the engine computes them."""
    backend = load_backend(artifact.card, artifact.directory, torch.device("cpu"))
    pixels = [normalise(image.numpy(), artifact.card.input) for image in inputs["image"]]
    image_B3hw = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    features = backend.encode(image_B3hw)
    if prompt:
        alpha = () if artifact.card.prompt.alpha is None else (inputs["alpha"][:, 0],)
        features = backend.take_prompt(image_B3hw, features, (inputs[prompt], *alpha))
    sampling = artifact.card.sampling_with(prompt=bool(prompt))
    fixed = torch.zeros(sampling.default_samples, len(image_B3hw), 0)
    noise_SBL = inputs["noise"].transpose(0, 1) if sampling.noise_length else fixed
    return backend.decode(features, noise_SBL).transpose(0, 1), features


def read_config(place: Path) -> pb.ModelConfig:
    return text_format.Parse((place / "config.pbtxt").read_text(), pb.ModelConfig())


def follow(repository: Path, ensemble: str, inputs: dict[str, Tensor], device: str = "cpu") -> dict[str, Tensor]:
    """Run an ensemble by its configuration alone, from the files that Triton would load."""
    tensors = {name: tensor.to(device) for name, tensor in inputs.items()}
    for step in read_config(repository / ensemble).ensemble_scheduling.step:
        config = read_config(repository / step.model_name)
        graph = torch.jit.load(repository / step.model_name / str(step.model_version) / "model.pt", device)
        assert {tensor.name for tensor in config.input} == set(step.input_map)
        with torch.inference_mode():
            answer = graph(*(tensors[step.input_map[tensor.name]] for tensor in config.input))
        answer = (answer,) if isinstance(answer, Tensor) else answer
        for tensor, value in zip(config.output, answer, strict=True):
            tensors[step.output_map[tensor.name]] = value
            assert all(d in (-1, n) for d, n in zip(tensor.dims, value.shape[1:], strict=True)), tensor.name
    return tensors


def assert_maps(artifact: Artifact, answer: dict[str, Tensor]) -> None:
    """The maps are those that the engine reads out of the same logits."""
    names, (height, width) = [name for name in MAPS if name in answer], answer["labels"].shape[1:]
    for b, logits_SKhw in enumerate(answer["logits"]):
        band = read_window(logits_SKhw, artifact.card, height, width, MAPS)
        for name in names:
            np.testing.assert_allclose(answer[name][b], band.maps[name], atol=ROUNDING, err_msg=name)
        sure = band.maps["margin"] > ROUNDING
        assert sure.mean() > 0.9
        np.testing.assert_array_equal(answer["labels"][b].numpy()[sure], band.labels[sure])
        assert float(answer["shares"][b].sum()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_repository_gives_the_engines_logits_bit_by_bit_and_its_maps(name: str, tmp_path: Path) -> None:
    artifact = made(tmp_path, name)
    write_repository(artifact, tmp_path / "repository")
    kind = artifact.card.prompt.kind
    for prompt, ensemble in [("", "small")] + [(kind, f"small_with_{kind}")] * (kind != "none"):
        inputs = ask(artifact, num_windows=3, num_samples=5)
        answer = follow(tmp_path / "repository", ensemble, inputs)
        logits_BSKhw, features = engine_logits(artifact, inputs, prompt=prompt)
        assert torch.equal(answer["logits"], logits_BSKhw)
        assert_maps(artifact, answer)
        for i, extra in enumerate(artifact.card.extra_maps):
            assert torch.equal(answer[extra.name], resize(features[-1], (64, 80), artifact.card.readout)[:, i])


@pytest.fixture(scope="module")
def exported_cps(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return made(tmp_path_factory.mktemp("cps"), "cps")


@pytest.mark.parametrize("readout", READOUTS.values(), ids=READOUTS)
def test_maps_follow_the_cards_readout(readout: Readout, exported_cps: Artifact, tmp_path: Path) -> None:
    artifact = replace(exported_cps, card=replace(exported_cps.card, readout=readout))
    write_repository(artifact, tmp_path / "repository")
    answer = follow(tmp_path / "repository", "small", ask(artifact, num_windows=1, num_samples=1))
    assert answer["logits"].shape[-2:] != answer["labels"].shape[-2:], "nothing is resized"
    assert_maps(artifact, answer)


def test_a_network_that_sees_whole_images_takes_any_size(tmp_path: Path) -> None:
    spec = InputSpec(mean=(104.0, 116.7, 122.7), std=(1.0, 2.0, 3.0), scale=1.0, order="BGR")
    card = replace(card_of("cpal context"), window=WindowSpec(0, 0), input=spec)
    artifact = made(tmp_path, "cpal context", card)
    write_repository(artifact, tmp_path / "repository")
    image = read_config(tmp_path / "repository/small").input[0]
    assert (image.name, list(image.dims)) == ("image", [-1, -1, 3])
    for size in ((97, 120), (64, 64)):
        inputs = ask(artifact, num_windows=1, num_samples=1, size=size)
        answer = follow(tmp_path / "repository", "small_with_tags", inputs)
        assert answer["labels"].shape == (1, *size)
        assert torch.equal(answer["logits"], engine_logits(artifact, inputs, prompt="tags")[0])


def test_configurations_batch_windows_and_name_the_classes(tmp_path: Path) -> None:
    names = ("road\nway", "sky", "a tree")
    classes = tuple(ClassInfo(name, (0, 0, 0)) for name in names)
    artifact = made(tmp_path, "toy latent", replace(card_of("toy latent"), classes=classes))
    written = write_repository(artifact, tmp_path / "repository")
    configs = {name: read_config(tmp_path / "repository" / name) for name in written}
    assert written == ["small", "small_decode", "small_encode", "small_read_out"]
    assert {config.max_batch_size for config in configs.values()} == {MAX_BATCH}
    assert all(configs[name].HasField("dynamic_batching") for name in written[1:])
    assert [list(tensor.dims) for tensor in configs["small"].input] == [[64, 80, 3], [-1, 3]]
    (labelled,) = (tensor for tensor in configs["small_read_out"].output if tensor.label_filename)
    labels = tmp_path / "repository/small_read_out" / labelled.label_filename
    assert labels.read_text().splitlines() == ["road way", "sky", "a tree"]


def test_a_checkpoint_is_proved_on_its_way_into_a_repository(tmp_path: Path) -> None:
    card = replace(card_of("toy"), name="plain")
    save_checkpoint(tmp_path / "plain.safetensors", card, seeded("toy"))
    export_repository(str(tmp_path / "plain.safetensors"), tmp_path / "store", tmp_path / "repository")
    assert read_config(tmp_path / "repository/plain").platform == "ensemble"
    assert not (tmp_path / "store").exists()


def test_a_scale_rule_that_triton_does_not_follow_is_told(
    exported_cps: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    card = exported_cps.card
    ruled = replace(card, input=replace(card.input, resolution=ScaleRule("frame", 360)))
    write_repository(replace(exported_cps, card=ruled), tmp_path / "repository")
    assert caplog.messages == [
        "small sees pictures by the scale rule frame:360; Triton does not resize, so do before you cut windows"
    ]


def test_values_of_16_bits_are_taken_where_triton_has_them(exported_cps: Artifact, tmp_path: Path) -> None:
    card = exported_cps.card
    signed, unsigned = (
        replace(exported_cps, card=replace(card, input=replace(card.input, dtype=dtype)))
        for dtype in ("int16", "uint16")
    )
    write_repository(signed, tmp_path / "repository")
    assert read_config(tmp_path / "repository/small").input[0].data_type == pb.TYPE_INT16
    with pytest.raises(BadOption, match="reads uint16, and Triton's backend for TorchScript takes no such tensor"):
        write_repository(unsigned, tmp_path / "other")


def test_nothing_is_overwritten_and_nothing_is_left_behind(tmp_path: Path) -> None:
    artifact = made(tmp_path, "toy")
    taken = tmp_path / "repository/small_encode/config.pbtxt"
    taken.parent.mkdir(parents=True)
    taken.write_text("somebody else's")
    with pytest.raises(BadOption, match="has a model small_encode already; remove it, or choose another directory"):
        write_repository(artifact, tmp_path / "repository")
    assert [path.name for path in (tmp_path / "repository").iterdir()] == ["small_encode"]
    assert taken.read_text() == "somebody else's"


def test_other_formats_and_unknown_names_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    artifact = made(tmp_path, "toy")
    export = replace(artifact.card.export, backend="onnx")
    with pytest.raises(BadOption, match="is exported for onnx fp32; a Triton repository is made of torchscript fp32"):
        write_repository(replace(artifact, card=replace(artifact.card, export=export)), tmp_path / "repository")
    with pytest.raises(UnknownModel, match="no model 'tiny'"):
        export_repository("tiny", tmp_path / "store", tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_the_command_line_makes_a_repository_of_a_name_and_asks_for_a_directory(tmp_path: Path) -> None:
    made(tmp_path, "toy")
    command = ["export", "small", "--target", "triton", "--store", str(tmp_path / "store")]
    done = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "repository"), "--json"])
    assert done.exit_code == 0, done.output
    models = json.loads(done.stdout)["models"]
    assert models == sorted(path.name for path in (tmp_path / "repository").iterdir())
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 2 and "add -o DIRECTORY" in refused.stderr
    for option in (["--views", "flip"], ["--precision", "fp16"], ["--tune"]):
        lost = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "other"), *option])
        assert lost.exit_code == 2 and f"{option[0]} is not for --target triton" in lost.stderr
    lost = CliRunner().invoke(main, ["export", "toy.safetensors", "-o", str(tmp_path / "other")])
    assert lost.exit_code == 2 and "--output is not for --target store" in lost.stderr
    assert not (tmp_path / "other").exists()


@contextmanager
def tritonserver(repository: Path, directory: Path) -> Iterator[triton.InferenceServerClient]:
    """A real Triton over a repository, its libtorch models run by the stand-in; ended by its process id."""
    for config in repository.glob("*/config.pbtxt"):
        if 'platform: "pytorch_libtorch"' in config.read_text():
            config.write_text(config.read_text().replace('platform: "pytorch_libtorch"', 'backend: "python"'))
            shutil.copy(STAND_IN, config.parent / "1/model.py")
    backends = directory / "backends"
    shutil.copytree(SERVER / "backends", backends)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(SERVER / "python_backend_stubs" / version / "triton_python_backend_stub", backends / "python")
    http, grpc = free_ports(2)
    command = [
        SERVER / "bin/tritonserver", "--model-repository", repository, "--backend-directory", backends,
        "--http-port", http, "--grpc-port", grpc, "--http-address", "127.0.0.1", "--grpc-address", "127.0.0.1",
        "--allow-metrics", "false", "--model-load-thread-count", 1,
        "--backend-config", f"python,stub-timeout-seconds={START_S}",
    ]  # fmt: skip
    libraries = [Path(sys.base_prefix) / "lib", PEERS / "nvidia_pytriton.libs"]
    environment = os.environ | {
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
        "STAND_IN_PATH": os.pathsep.join(path for path in sys.path if path.endswith("site-packages")),
        "OMP_NUM_THREADS": "1",
    }
    log = directory / "triton.log"
    with log.open("wb") as output:
        process = subprocess.Popen(list(map(str, command)), env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        until(lambda: process.poll() is not None or is_ready(http), bound_s=START_S)
        assert process.poll() is None, f"Triton ended:\n{log.read_text(errors='replace')}"
        with triton.InferenceServerClient(f"127.0.0.1:{grpc}") as client:
            yield client
    finally:
        process.terminate()
        process.wait(END_S)


def is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def infer(client: triton.InferenceServerClient, model: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """All outputs of an ensemble, by the inputs that its metadata asks for."""
    metadata = client.get_model_metadata(model, client_timeout=60)
    given = [
        triton.InferInput(tensor.name, list(inputs[tensor.name].shape), tensor.datatype) for tensor in metadata.inputs
    ]
    for tensor in given:
        tensor.set_data_from_numpy(inputs[tensor.name()].numpy())
    answer = client.infer(model, given, client_timeout=60)
    return {tensor.name: torch.from_numpy(answer.as_numpy(tensor.name).copy()) for tensor in metadata.outputs}


@pytest.mark.slow
@pytest.mark.skipif(not SERVER.exists(), reason="needs Triton itself: make .venv/peers")
def test_a_real_triton_loads_the_repository_and_answers_as_the_engine_does(tmp_path: Path) -> None:
    latent = made(tmp_path, "np_semiseg published", replace(card_of("np_semiseg published"), name="latent"))
    boxed = made(tmp_path, "toy boxed", replace(card_of("toy boxed"), name="boxed"))
    for artifact in (latent, boxed):
        write_repository(artifact, tmp_path / "repository")
    with tritonserver(tmp_path / "repository", tmp_path) as client:
        index = client.get_model_repository_index(client_timeout=60).models
        assert {model.state for model in index} == {"READY"} and len(index) == 11
        inputs = ask(latent, num_windows=2, num_samples=3)
        answer = infer(client, "latent", inputs)
        assert torch.equal(answer["logits"], engine_logits(latent, inputs)[0])
        assert_maps(latent, answer)
        inputs = ask(boxed, num_windows=1, num_samples=1)
        prompted = infer(client, "boxed_with_boxes", inputs)
        assert torch.equal(prompted["logits"], engine_logits(boxed, inputs, prompt="boxes")[0])
        plain = infer(client, "boxed", inputs)
        assert "mutual_information" in prompted and "mutual_information" not in plain
        assert torch.equal(plain["logits"], engine_logits(boxed, inputs)[0])
        image = triton.InferInput("image", [1, 64, 80, 3], "UINT8").set_data_from_numpy(inputs["image"].numpy())
        top = client.infer("boxed", [image], outputs=[triton.InferRequestedOutput("shares", class_count=1)])
        value, _, name = top.as_numpy("shares")[0, 0].decode().split(":")
        assert name == f"class {int(plain['shares'].argmax())}"
        assert float(value) == pytest.approx(float(plain["shares"].max()), abs=1e-4)
