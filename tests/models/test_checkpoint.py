"""Checkpoints: weights and card survive the file, and a file that is not right is refused by name."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from penumbra.models.card import Card, ClassInfo, InputSpec, Readout, WindowSpec, dump_card
from penumbra.models.checkpoint import load_checkpoint, read_card, save_checkpoint
from penumbra.models.contract import Network
from penumbra.models.errors import BadCheckpoint
from tests.conftest import toy_card
from tests.models.small import SMALL, seeded


def small_checkpoint() -> tuple[Card, Network]:
    config, network = SMALL["cps"], seeded("cps")
    classes = tuple(ClassInfo(f"c{k}", (k, k, k)) for k in range(config.num_classes))
    card = Card(
        "small", 1, "cps", dataclasses.asdict(config), classes, InputSpec(), WindowSpec(32, 32), network.sampling,
        Readout(),
    )  # fmt: skip
    return card, network


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "small.safetensors"
    save_checkpoint(path, *small_checkpoint())
    return path


def rewrite(path: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replace, add or (None) drop tensors; the card stays."""
    card = read_card(path)
    tensors = load_file(path) | change
    save_file({k: v for k, v in tensors.items() if v is not None}, path, metadata={"card": dump_card(card)})


KEY = "branch1.classifier.weight"


def test_card_and_weights_come_back_as_they_were_saved(checkpoint: Path) -> None:
    card, network = small_checkpoint()
    loaded_card, loaded = load_checkpoint(checkpoint)
    assert loaded_card == read_card(checkpoint)
    assert dump_card(loaded_card) == dump_card(card)
    wanted = network.state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in loaded.state_dict().items())
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_half_precision_storage_loses_only_what_rounding_loses(checkpoint: Path) -> None:
    card, network = small_checkpoint()
    size = checkpoint.stat().st_size
    save_checkpoint(checkpoint, card, network, half=True)
    assert checkpoint.stat().st_size < 0.6 * size
    _, loaded = load_checkpoint(checkpoint)
    for key, value in loaded.state_dict().items():
        wanted = network.state_dict()[key]
        assert value.dtype == wanted.dtype
        assert torch.equal(value, wanted.half().to(wanted.dtype))


@pytest.mark.parametrize(("value", "half"), [(float("nan"), False), (1e5, True)])
def test_weights_that_nothing_could_read_do_not_take_the_place_of_a_good_file(
    checkpoint: Path, value: float, half: bool
) -> None:
    before, (card, network) = checkpoint.read_bytes(), small_checkpoint()
    network.get_parameter(KEY).data.view(-1)[-1] = value
    with pytest.raises(BadCheckpoint, match=f"is not written: {KEY} holds NaN or infinity"):
        save_checkpoint(checkpoint, card, network, half=half)
    assert checkpoint.read_bytes() == before


def test_a_missing_tensor_is_named(checkpoint: Path) -> None:
    rewrite(checkpoint, {KEY: None})
    with pytest.raises(BadCheckpoint, match=f"lacks the tensor {KEY}"):
        load_checkpoint(checkpoint)


def test_an_extra_tensor_is_named(checkpoint: Path) -> None:
    rewrite(checkpoint, {"branch3.weight": torch.zeros(1)})
    with pytest.raises(BadCheckpoint, match=r"branch3\.weight"):
        load_checkpoint(checkpoint)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(checkpoint: Path) -> None:
    shape = tuple(load_file(checkpoint)[KEY].shape)
    rewrite(checkpoint, {KEY: torch.zeros(7, *shape[1:])})
    with pytest.raises(BadCheckpoint) as refusal:
        load_checkpoint(checkpoint)
    for named in (KEY, str([7, *shape[1:]]), str([*shape])):
        assert named in str(refusal.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(checkpoint: Path, value: float) -> None:
    weight = load_file(checkpoint)[KEY]
    weight.view(-1)[-1] = value
    rewrite(checkpoint, {KEY: weight})
    with pytest.raises(BadCheckpoint, match=f"{KEY} holds NaN or infinity"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"PK\x03\x04" + bytes(100), bytes(64)])
def test_a_file_that_is_not_safetensors_is_refused_and_never_unpickled(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadCheckpoint, match="not a safetensors file"):
        load_checkpoint(path)


def test_a_truncated_checkpoint_is_refused(checkpoint: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:-10])
    with pytest.raises(BadCheckpoint, match="not a safetensors file"):
        load_checkpoint(checkpoint)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "none.safetensors")


def test_safetensors_without_a_card_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(BadCheckpoint, match="carries no card"):
        load_checkpoint(path)


def test_a_card_that_does_not_read_is_refused_with_the_path(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(1)}, path, metadata={"card": '{"format": 9}'})
    with pytest.raises(BadCheckpoint, match=r"weights\.safetensors.*format 9"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"method": "unheard_of"}, "unheard_of"),
        ({"config": {"num_classes": 3, "layers": 9}}, "layers"),
        ({"config": {"num_classes": "3"}}, "num_classes"),
        ({"config": {"num_classes": 4}}, "num_classes is 4"),
        ({"sampling": toy_card("latent")[0].sampling}, "sampling"),
    ],
)
def test_a_card_that_does_not_fit_its_network_is_refused(tmp_path: Path, change: dict, named: str) -> None:
    path = tmp_path / "toy.safetensors"
    card, network = toy_card("pointwise")
    save_checkpoint(path, dataclasses.replace(card, **change), network)
    with pytest.raises(BadCheckpoint) as refusal:
        load_checkpoint(path)
    assert named in str(refusal.value)
