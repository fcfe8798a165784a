"""CPAL's context: prototypes of other images, and the maps that they activate."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from penumbra.models.card import Card, ClassInfo, InputSpec, Readout, WindowSpec
from penumbra.models.checkpoint import load_checkpoint, save_checkpoint
from penumbra.models.cpal.context import (
    SupportBank,
    activate,
    cluster,
    gather_instances,
    keep_neighbours,
    positiveness,
    summarise,
)
from penumbra.models.cpal.net import CamNetwork
from penumbra.models.errors import BadData
from tests.models.small import SMALL, seeded

NO_SHIFT = torch.zeros(2, 6)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- PACAM ----------------------------------------------------------------------------------------


def test_an_instance_is_the_mean_of_the_features_where_the_cam_is_high() -> None:
    feature, cam = draws(1, 6, 3, 4), torch.zeros(1, 2, 3, 4)
    cam[0, 0, 1, 1], cam[0, 0, 2, 3], cam[0, 0, 0, 0] = 0.9, 0.4, 0.3
    instances = gather_instances(feature, cam, 0.3)
    assert torch.allclose(instances[0, 0], (feature[0, :, 1, 1] + feature[0, :, 2, 3]) / 2)
    assert torch.equal(instances[0, 1], torch.zeros(6))  # seen nowhere


def test_positiveness_is_a_softmax_of_scaled_dot_products() -> None:
    instances, centres = draws(3, 2, 6), draws(2, 4, 6, seed=1)
    weights = positiveness(instances, centres, 0.5)
    plain = torch.stack([F.softmax(0.5 * instances[:, n] @ centres[n].T, dim=1) for n in range(2)], dim=1)
    assert torch.allclose(weights, plain, atol=1e-6)
    assert torch.allclose(weights.sum(2), torch.ones(3, 2))


def test_the_nearest_neighbours_share_the_whole_weight() -> None:
    weights = torch.tensor([[[0.1, 0.4, 0.2, 0.3]]])
    assert torch.allclose(keep_neighbours(weights, 2), torch.tensor([[[0, 4 / 7, 0, 3 / 7]]]))
    assert torch.allclose(keep_neighbours(weights, 4), weights)  # K = P takes all of them


def test_the_map_equals_the_plain_sum_of_weighted_cosines() -> None:
    feature, centres, shift = draws(2, 6, 3, 4), draws(2, 5, 6, seed=1), draws(2, 6, seed=2)
    weights = keep_neighbours(positiveness(draws(2, 2, 6, seed=3), centres, 1.0), 3)
    plain = torch.zeros(2, 2, 3, 4)
    for n in range(2):
        for i in range(5):
            moved = feature + shift[n][:, None, None]
            cosine = F.cosine_similarity(moved, centres[n, i][:, None, None].expand_as(moved), dim=1)
            plain[:, n] += weights[:, n, i, None, None] * cosine
    assert torch.allclose(activate(feature, centres, weights, shift), plain.relu(), atol=1e-5)
    assert float(plain.min()) < 0  # so that the ReLU had something to do


def test_a_feature_that_is_a_context_prototype_scores_highest_and_its_opposite_nothing() -> None:
    centres, feature = draws(2, 4, 6), draws(1, 6, 3, 4, seed=1)
    feature[0, :, 1, 2], feature[0, :, 0, 0] = 3 * centres[0, 2], -centres[0, 2]
    nearest = keep_neighbours(positiveness(centres[None, :, 2], centres, 100.0), 1)
    pacam = activate(feature, centres, nearest, NO_SHIFT)[0, 0]
    assert int(pacam.argmax()) == 1 * 4 + 2 and float(pacam[1, 2]) == pytest.approx(1, abs=1e-6)
    assert float(pacam[0, 0]) == 0 and float(pacam.min()) == 0


def test_the_shift_brings_a_feature_to_its_context() -> None:
    """A feature that the shift moves onto the prototype scores 1; without the shift it does not."""
    centres, shift = draws(2, 1, 6), 4 * draws(2, 6, seed=1)
    feature = (centres[0, 0] - shift[0])[None, :, None, None]
    weights = torch.ones(1, 2, 1)
    assert float(activate(feature, centres, weights, shift)[0, 0]) == pytest.approx(1, abs=1e-5)
    assert float(activate(feature, centres, weights, NO_SHIFT)[0, 0]) < 0.9


def test_a_feature_of_length_zero_scores_nothing() -> None:
    nothing = torch.zeros(1, 6, 2, 2)
    assert torch.equal(activate(nothing, draws(2, 4, 6), torch.ones(1, 2, 4), NO_SHIFT), torch.zeros(1, 2, 2, 2))


# -- bank -----------------------------------------------------------------------------------------


def test_a_bank_keeps_the_last_instances_of_the_classes_that_were_there() -> None:
    bank = SupportBank(2, 1, size=3)
    for step in range(5):
        instances = torch.tensor([[[10.0 * step], [1.0]], [[10.0 * step + 1], [2.0]]])
        bank.push(instances, torch.tensor([[1, 0], [step % 2, 0]]))
    assert bank.rows[0].flatten().tolist() == [30, 31, 40]
    assert len(bank.rows[1]) == 0 and len(bank.rows) == 2


def clouds(count: int, spread: float) -> tuple[Tensor, Tensor]:
    """Points [60 * count, 6] around well separated centres, shuffled; and the centres."""
    centres = 10 * torch.eye(6)[:count]
    points = (centres[:, None] + spread * draws(count, 60, 6, seed=1)).flatten(0, 1)
    return points[torch.randperm(len(points), generator=generator())], centres


@pytest.mark.parametrize("seed", range(5))
def test_separated_clusters_are_found(seed: int) -> None:
    rows, centres = clouds(4, 0.1)
    found = cluster(rows, 4, generator(seed))
    assert torch.cdist(centres, found).amin(1).max() < 0.1
    assert torch.equal(found, cluster(rows, 4, generator(seed)))


def test_every_centroid_is_the_mean_of_the_rows_that_are_nearest_to_it() -> None:
    rows = draws(80, 6)
    found = cluster(rows, 5, generator())
    nearest = torch.cdist(rows, found).argmin(1)
    for i in range(5):
        assert torch.allclose(found[i], rows[nearest == i].mean(0), atol=1e-5)


def test_equal_rows_make_equal_centroids() -> None:
    assert torch.allclose(cluster(torch.full((7, 6), 2.0), 3, generator()), torch.full((3, 6), 2.0))


def test_the_shift_is_the_mean_way_from_an_instance_to_a_context_prototype() -> None:
    bank = SupportBank(2, 6)
    bank.push(draws(30, 2, 6), torch.ones(30, 2))
    centres, shift = summarise(bank, 4, generator())
    for n in range(2):
        ways = centres[n][:, None] - bank.rows[n]
        assert torch.allclose(shift[n], ways.mean((0, 1)), atol=1e-6)


def test_a_class_with_too_few_instances_is_named() -> None:
    bank = SupportBank(2, 6)
    bank.push(draws(5, 2, 6), torch.tensor([[1, 1], [1, 1], [1, 0], [1, 0], [1, 0]]))
    with pytest.raises(BadData, match="class 2 has 2 instances in the bank; 4 are wanted"):
        summarise(bank, 4, generator())


# -- in the network -------------------------------------------------------------------------------


def small() -> CamNetwork:
    network = seeded("cpal context")
    assert isinstance(network, CamNetwork) and network.context is not None
    return network


def picture(num: int) -> Tensor:
    return draws(num, 3, 64, 80, seed=7)


@torch.inference_mode()
def test_each_member_can_be_asked_for_alone() -> None:
    network = small()
    view = network.look(picture(2))
    maps_B2Khw = network.draw_maps(view)
    for i, member in enumerate(network.members):
        network.members = (member,)
        assert torch.equal(network.draw_maps(view)[:, 0], maps_B2Khw[:, i])


@torch.inference_mode()
def test_a_bank_of_training_images_goes_into_the_checkpoint_and_comes_back(tmp_path: Path) -> None:
    network = small()
    assert network.context is not None
    before = network.encode(picture(2))[0]
    view = network.look(picture(6))
    cam_BNhw = network.draw_maps(view)[:, 0, 1:]
    bank = SupportBank(2, 8)
    bank.push(network.context.instances(view.hierarchical_BDhw, cam_BNhw), torch.ones(6, 2))
    network.context.adopt(*summarise(bank, 4, generator()))
    after = network.encode(picture(2))[0]
    assert torch.equal(before[:, 0], after[:, 0])  # the CAM knows no context
    assert not torch.equal(before[:, 1], after[:, 1])

    classes = tuple(ClassInfo(f"class {k}", (k, k, k)) for k in range(3))
    card = Card(
        "context", 1, "cpal", asdict(SMALL["cpal context"]), classes, InputSpec(), WindowSpec(0, 0),
        network.sampling, Readout(), prompt=network.prompt,
    )  # fmt: skip
    save_checkpoint(tmp_path / "context.safetensors", card, network)
    _, loaded = load_checkpoint(tmp_path / "context.safetensors")
    assert torch.equal(loaded.encode(picture(2))[0], after)


@torch.inference_mode()
def test_the_background_of_the_context_map_is_that_of_is_cam() -> None:
    network = small()
    view = network.look(picture(2))
    network.members = ("cam", "is_cam", "pacam")
    _, is_cam, pacam = network.draw_maps(view).unbind(1)
    assert torch.equal(is_cam[:, 0], pacam[:, 0])
    assert not torch.equal(is_cam[:, 1:], pacam[:, 1:]) and float(pacam.min()) >= 0
