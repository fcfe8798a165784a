"""Weights are found in a file whatever stands before their names, and however training wrapped them."""

import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from penumbra.export.weights import fill_from
from penumbra.models.errors import BadCheckpoint
from tests.models.programs import Tiny, named, seeded_tiny


@pytest.mark.parametrize(
    "content",
    [
        named(""), named("module."), named("_orig_mod."), named("model."), named("net."), named("module._orig_mod."),
        {"state_dict": named("model.") | {"criterion.weight": torch.ones(3)}, "epoch": 3},
        {"model": named("", 0), "model_ema": named("")}, {"state_dict": named("student.", 0) | named("teacher.")},
        {"net": named(""), "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
        {"ema_state_dict": {"module": named("")}, "state_dict": named("", 0)},
        {"state_dict": {k: v.half() if v.is_floating_point() else v for k, v in named("model.").items()}},
        (named("net."), {"lr": 0.1}),
    ],
    ids=range(13),
)  # fmt: skip
def test_weights_are_found_behind_any_prefix_and_the_running_average_is_preferred(
    content: dict[str, object], tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "w.pth")
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(content))
    for file in ("w.pth", "w.pkl"):
        network = Tiny()
        fill_from(network, tmp_path / file)
        for name, tensor in seeded_tiny(1).state_dict().items():
            assert torch.allclose(network.state_dict()[name], tensor, atol=1e-3)


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    for content, words in (
        ({"other": torch.ones(1)}, "none of the network's tensors"),
        (named("model.") | {"model.att.weight": torch.ones(1)}, "that the network lacks: att.weight"),
        ({name: named("")[name] for name in ("first.weight", "first.bias")}, "lacks the tensor second.weight"),
        ({"epoch": 1}, "no tensors by name"),
        ({"first.weight": torch.ones(1).expand(2**33)}, "first.weight has more numbers than the file holds"),
    ):
        torch.save(content, path)
        with pytest.raises(BadCheckpoint, match=words):
            fill_from(Tiny(), path)


def test_the_weights_of_a_network_within_a_wrapper_are_found(tmp_path: Path) -> None:
    torch.save({"state_dict": named("")}, tmp_path / "w.pth")
    inner = seeded_tiny()
    for weight in inner.parameters():
        weight.data.zero_()
    fill_from(nn.Sequential(inner), tmp_path / "w.pth")
    assert all(torch.equal(tensor, named("")[name]) for name, tensor in inner.state_dict().items())
