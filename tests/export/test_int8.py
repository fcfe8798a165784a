"""int8 has its ranges from the user's pictures, is proved on others of them, and gives back the layers that cannot."""

from itertools import combinations
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn

from penumbra.__main__ import main
from penumbra.export.bundle import export_checkpoint, export_network, verify_artifact
from penumbra.export.golden import windows_of
from penumbra.export.int8 import split, windows_beside
from penumbra.export.zoo import ZOO
from penumbra.models.card import Sampling, WindowSpec
from penumbra.models.checkpoint import save_checkpoint
from penumbra.models.contract import Features, Network
from penumbra.models.errors import BadOption, ParityFailed
from penumbra.serving.engine.store import open_artifact
from tests.conftest import picture, toy_card
from tests.models.small import is_served

CPU = torch.device("cpu")
CAMVID = Path(__file__).parents[3] / "shared" / "camvid"
LOUD = 3000.0


class Loud(Network):
    """Bands become logits in two layers; beside them runs a channel so loud that 8 bits for all leave none for them."""

    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self.sampling = Sampling(kind="latent", noise_length=3, default_samples=4)
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)
        self.is_first = first
        with torch.no_grad():
            self.first.weight.copy_(torch.cat((torch.eye(3), torch.full((1, 3), LOUD)))[..., None, None])
            self.second.weight.copy_(torch.cat((8 * torch.eye(3), torch.full((3, 1), 1 / LOUD)), 1)[..., None, None])
            self.first.bias.zero_()
            self.second.bias.zero_()

    def encode(self, image_BChw: Tensor) -> Features:
        if self.is_first:
            return (self.first(image_BChw),)
        return (torch.cat((image_BChw, LOUD * image_BChw.sum(1, keepdim=True)), 1),)

    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        return self.second(features[0])[None] + noise_SBL[..., None, None]


def pictures(folder: Path, rng: np.random.Generator, count: int = 8) -> list[Path]:
    paths = [folder / f"{i}.png" for i in range(count)]
    for path in paths:
        Image.fromarray(picture(rng, 64, 80)).save(path)
    return paths


def num_rounded(graph: Path) -> int:
    """How many values are rounded to 8 bits."""
    return sum(node.op_type == "QuantizeLinear" for node in onnx.load(graph).graph.node)


def test_a_layer_that_fails_the_gate_in_int8_is_given_back_and_named(tmp_path: Path, rng: np.random.Generator) -> None:
    card, files = toy_card("latent")[0], pictures(tmp_path, rng)
    directory = export_network(
        Loud(first=True), card, tmp_path / "store", backend="openvino", precision="int8", pictures=files
    )
    artifact = open_artifact(directory)
    facts = artifact.card.export
    assert facts and (facts.num_int8, facts.kept) == (1, ("decode second",))
    assert facts.parity.label_flips_percent <= 0.5 and facts.parity.entropy_rank_correlation >= 0.995
    assert (num_rounded(directory / "encode.onnx"), num_rounded(directory / "decode.onnx")) == (1, 0)
    for window, path in zip(artifact.golden.image_B3hw, (files[0], files[4]), strict=True):  # held back for the proof
        height, width = window.shape[1:]
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255
        corner = pixels[:, :height, :width] if path is files[0] else pixels[:, -height:, -width:]
        assert torch.allclose(window, corner, atol=1e-6)
    assert verify_artifact(directory).label_flips_percent <= 0.5
    is_served(card, tmp_path / "store")


@pytest.mark.parametrize(("count", "size", "expected"), [(2, (32, 48), 0), (10, (32, 48), 8), (2, (96, 144), 8)])
def test_the_proof_takes_every_window_once_and_none_that_is_golden(
    count: int, size: tuple[int, int], expected: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    card = toy_card("latent", window=WindowSpec(32, 48))[0]
    files = [tmp_path / f"{i}.png" for i in range(count)]
    for path in files:
        Image.fromarray(picture(rng, *size)).save(path)
    golden_BChw = windows_of(files, card)
    windows = [*golden_BChw, *windows_beside(golden_BChw, files, card)]
    assert len(windows) == 2 + expected
    assert not any(torch.equal(one, other) for one, other in combinations(windows, 2))


def test_where_no_layer_passes_the_gate_in_int8_nothing_is_written(tmp_path: Path, rng: np.random.Generator) -> None:
    card, files, store = toy_card("latent")[0], pictures(tmp_path, rng), tmp_path / "store"
    with pytest.raises(ParityFailed, match=r"does not reproduce its checkpoint: .* allowed"):
        export_network(Loud(first=False), card, store, backend="openvino", precision="int8", pictures=files)
    assert not store.exists() or not any(store.iterdir())


@pytest.mark.parametrize(
    ("device", "count", "sentence"),
    [
        ("cpu", 0, r"proved on others of them: 8 or more are needed, and 0 are given; add --pictures FOLDER"),
        ("cpu", 7, "8 or more are needed, and 7 are given"),
        ("cuda", 8, "int8 is for the CPU, and toy-latent is to run on cuda"),
    ],
)
def test_int8_without_what_it_needs_is_refused(device: str, count: int, sentence: str) -> None:
    card, _ = toy_card("latent")
    with pytest.raises(BadOption, match=sentence):
        split([Path(str(i)) for i in range(count)], card, torch.device(device))


def test_the_command_takes_pictures_and_refuses_int8_where_there_is_no_layer(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    card, network = toy_card("latent")
    (tmp_path / "pictures").mkdir()
    pictures(tmp_path / "pictures", rng)
    save_checkpoint(tmp_path / "toy-latent.safetensors", card, network)
    command = ["export", str(tmp_path / "toy-latent.safetensors"), "--store", str(tmp_path / "store"),
               "--backend", "openvino", "--precision", "int8"]  # fmt: skip
    result = CliRunner().invoke(main, [*command, "--pictures", str(tmp_path / "pictures")])
    assert result.exit_code == 2 and "has no convolution and no product of constant weights" in result.output


@pytest.mark.slow
@pytest.mark.skipif(not CAMVID.exists(), reason="needs CamVid in ../shared")
def test_most_layers_of_a_zoo_network_are_int8_and_pass_on_pictures_that_gave_no_ranges(tmp_path: Path) -> None:
    files = sorted((CAMVID / "train" / "images").iterdir())[::8]
    directory = export_checkpoint(
        ZOO / "supervised-camvid.safetensors", tmp_path, backend="openvino", precision="int8", pictures=files
    )
    facts = open_artifact(directory).card.export
    assert facts and facts.num_int8 + len(facts.kept) == 29 and facts.num_int8 >= 24
    assert num_rounded(directory / "encode.onnx") >= 20 and 0.01 < facts.parity.label_flips_percent <= 0.5
