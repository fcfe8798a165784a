"""The CPS family against closed forms, and gradients that flow where they should.

Every kind of objective, MC dropout's too, is also trained for a few steps, killed, resumed and written.
"""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penumbra.models.blocks.losses import at_size, cross_entropy, mixed, ramp, soft_cross_entropy
from penumbra.models.card import IGNORE
from penumbra.models.checkpoint import load_checkpoint
from penumbra.models.cps.objective import (
    CpsObjective,
    MeanTeacherObjective,
    SemiSupervised,
    cross_supervision,
    follow,
    mean_where,
    pseudo_labels,
    soft_labels,
    squared_distance,
    supervision,
    symmetric_divergence,
)
from penumbra.models.errors import BadArtifact, BadOption
from penumbra.training.loop import build_network, train
from penumbra.training.objective import build_objective
from tests.training import tiny
from tests.training.kinds import RUNS, VARIANTS, losses_of, objective_of, recipe_of, training_of


def _logits(num: int = 2) -> tuple[Tensor, ...]:
    return tuple(torch.randn(num, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)))


# Every kind, through the loop


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_of_every_kind_goes_on_with_identical_numbers(name: str, tmp_path: Path) -> None:
    whole, killed, resumed = (training_of(name, tmp_path) for _ in range(3))
    expected = [whole.advance(step / 4) for step in range(4)]
    first = [killed.advance(step / 4) for step in range(2)]
    killed.save(tmp_path / "state.ckpt")
    resumed.resume(tmp_path / "state.ckpt")
    assert first + [resumed.advance(step / 4) for step in (2, 3)] == expected
    for ours, theirs in zip(
        whole.objective.state_dict().values(), resumed.objective.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", RUNS)
def test_a_few_steps_of_every_kind_lower_its_supervised_loss(name: str, tmp_path: Path) -> None:
    training = training_of(name, tmp_path)
    losses = [training.advance(0.02)["supervised"] for _ in range(24)]
    assert sum(losses[-4:]) < 0.85 * sum(losses[:4])


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_every_kind_writes_a_checkpoint_that_can_be_read(name: str, tmp_path: Path) -> None:
    path = train(recipe_of(name, tmp_path, steps=2), tmp_path, runs_dir=tmp_path / "runs")
    card, network = load_checkpoint(path)
    assert card.sampling == network.sampling and 0 <= card.provenance.metrics["val/seg/mIoU"] <= 1


@pytest.mark.parametrize("name", RUNS)
def test_every_weight_that_is_trained_gets_a_gradient_also_under_autocast(name: str) -> None:
    objective = objective_of(name)
    with torch.autocast("cpu", torch.bfloat16):
        losses = objective(tiny.batch(), 0.5, torch.Generator())
    losses["total"].backward()
    assert all(p.grad is not None for p in objective.network.parameters() if p.requires_grad)
    assert all(p.grad is None for p in objective.average.parameters())


@pytest.mark.parametrize("name", [name for name in RUNS if name != "supervised"])
def test_before_its_start_every_kind_learns_from_labels_alone(name: str) -> None:
    batch = tiny.batch()
    blank = batch._replace(weak_B3hw=0 * batch.weak_B3hw, strong_B3hw=0 * batch.strong_B3hw)
    early, other = (losses_of(name, b, 0.3, start=0.5, full=0.6) for b in (batch, blank))
    assert early.keys() == {"total", "supervised"} and early["total"] == other["total"] == early["supervised"]


def test_the_unsupervised_term_waits_for_its_start_and_grows_to_its_weight() -> None:
    assert [ramp(p, 0.1, 0.3) for p in (0.0, 0.1, 0.2, 0.3, 1.0)] == pytest.approx([0, 0, 0.5, 1, 1])
    losses = losses_of("pseudo", tiny.batch(), 0.2, start=0.1, full=0.3, weight=4.0)
    assert torch.allclose(losses["total"], losses["supervised"] + 2 * losses["unsupervised"])


# Which objective


def test_a_recipe_without_a_kind_trains_cps() -> None:
    network = build_network(recipe_of("cps"), 3)
    objective = build_objective("cps", network, network, {"cps_weight": 1.0, "start": 0.12, "full": 0.4})
    assert type(objective) is CpsObjective


@pytest.mark.parametrize("kind", ["cpss", ["cps"]])
def test_an_unknown_kind_is_answered_with_the_known_ones(kind: object) -> None:
    network = build_network(recipe_of("cps"), 3)
    with pytest.raises(BadOption, match=r"objective\.kind is .*cps.*; one of cps, cps_plain, supervised, .* is wanted"):
        build_objective("cps", network, network, {"kind": kind})


@pytest.mark.parametrize(("name", "branches"), [("pseudo", 2), ("cps", 1), ("mean_teacher", 1)])
def test_branches_that_an_objective_cannot_train_are_refused(name: str, branches: int) -> None:
    recipe = recipe_of(name)
    network = build_network(dataclasses.replace(recipe, config=recipe.config | {"branches": branches}), 3)
    with pytest.raises(BadOption, match=rf"branches is {branches}; the objective '{name}' trains {3 - branches}"):
        build_objective("cps", network, network, recipe.objective)


def test_an_option_of_another_kind_is_named() -> None:
    network = build_network(recipe_of("supervised"), 3)
    with pytest.raises(BadArtifact, match=r"recipe\.objective has an unknown field 'cps_weight'"):
        build_objective("cps", network, network, {"kind": "supervised", "cps_weight": 1.0})


# Supervised


def test_supervised_training_ignores_unlabelled_views_entirely() -> None:
    batch = tiny.batch()
    nothing = {name: getattr(batch, name)[:0] for name in ("weak_B3hw", "strong_B3hw", "inside_Bhw", "mix_B1hw")}
    with_views, without = (losses_of("supervised", b) for b in (batch, batch._replace(**nothing)))
    assert with_views["total"] == without["total"]


def test_the_supervised_loss_is_the_sum_over_branches_of_the_mean_cross_entropy_of_known_pixels() -> None:
    one, two = _logits()
    label_Bhw = torch.tensor([0, 1, 2, IGNORE]).expand(2, 4, 4)
    by_hand = sum(F.cross_entropy(x[..., :3], label_Bhw[..., :3]) for x in (one, two))
    assert torch.allclose(supervision([one, two], label_Bhw), torch.as_tensor(by_hand))
    assert cross_entropy(one, torch.full_like(label_Bhw, IGNORE)) == 0


# CPS


def test_each_branch_learns_from_the_other_branchs_labels() -> None:
    one, two = _logits()
    labels = [one.argmax(1), two.argmax(1)]
    by_hand = F.cross_entropy(one, labels[1]) + F.cross_entropy(two, labels[0])
    assert torch.allclose(cross_supervision([one, two], labels), by_hand)


def test_no_gradient_flows_through_pseudo_labels() -> None:
    objective, batch = objective_of("cps"), tiny.batch()
    labels = pseudo_labels(objective.network, batch)
    assert not any(label.requires_grad for label in labels)
    logits = [torch.zeros(2, 3, 32, 48, requires_grad=True), torch.zeros(2, 3, 32, 48)]
    cross_supervision(logits, labels).backward()
    assert logits[0].grad is not None and all(p.grad is None for p in objective.network.parameters())


def test_pseudo_labels_are_mixed_as_the_pictures_are() -> None:
    objective, batch = objective_of("cps"), tiny.batch()
    plain = pseudo_labels(objective.network, batch._replace(mix_B1hw=torch.zeros_like(batch.mix_B1hw)))
    swapped = pseudo_labels(objective.network, batch._replace(mix_B1hw=torch.ones_like(batch.mix_B1hw)))
    assert torch.equal(plain[0].roll(1, 0), swapped[0]) and not torch.equal(plain[0], swapped[0])
    assert torch.equal(mixed(batch.weak_B3hw, torch.ones_like(batch.mix_B1hw)), batch.weak_B3hw.flip(0))


def test_pixels_beyond_the_picture_teach_nothing() -> None:
    batch = tiny.batch()
    outside = batch._replace(inside_Bhw=torch.zeros_like(batch.inside_Bhw))
    labels = pseudo_labels(objective_of("cps").network, outside)
    assert all((label == IGNORE).all() for label in labels)
    void = outside._replace(label_Bhw=torch.full_like(batch.label_Bhw, IGNORE))
    for name in VARIANTS:
        assert losses_of(name, void)["total"] == 0, name


def test_plain_cps_also_compares_labelled_pictures_and_mixes_nothing() -> None:
    objective, batch = objective_of("cps_plain", cps_weight=1.0), tiny.batch()
    losses = objective(batch._replace(mix_B1hw=torch.ones_like(batch.mix_B1hw)), 1.0, torch.Generator())
    logits = [at_size(x, batch.label_Bhw) for x in objective.network.encode(torch.cat((batch[0], batch.weak_B3hw)))]
    by_hand = F.cross_entropy(logits[0], logits[1].argmax(1)) + F.cross_entropy(logits[1], logits[0].argmax(1))
    assert torch.allclose(losses["unsupervised"], by_hand, rtol=1e-5)


@pytest.mark.parametrize("name", ["cps", "cps_plain"])
def test_the_branch_that_teaches_gets_no_gradient_for_it(name: str) -> None:
    objective = objective_of(name)
    objective.network.get_submodule("branch1").requires_grad_(False)
    _, cross = objective.losses(tiny.batch())
    cross.backward()
    assert all(p.grad is None for p in objective.network.get_submodule("branch1").parameters())
    assert all(p.grad is not None for p in objective.network.get_submodule("branch2").parameters())


# Cross probability


def test_distances_of_equal_branches_are_zero_and_of_opposed_ones_as_computed_by_hand() -> None:
    one, two = (torch.tensor(p).log()[None, :, None, None] for p in ([0.8, 0.2], [0.4, 0.6]))
    assert squared_distance(one, one) == symmetric_divergence(one, one) == 0
    assert squared_distance(one, two).item() == pytest.approx(0.4**2 + 0.4**2)
    there = 0.8 * math.log(0.8 / 0.4) + 0.2 * math.log(0.2 / 0.6)
    back = 0.4 * math.log(0.4 / 0.8) + 0.6 * math.log(0.6 / 0.2)
    assert symmetric_divergence(one, two).item() == pytest.approx(there + back)


@pytest.mark.parametrize("name", ["cross_probability", "cross_probability-kl"])
def test_branches_of_equal_weights_have_nothing_to_agree_on(name: str) -> None:
    objective = objective_of(name)
    one, two = (objective.network.get_submodule(branch) for branch in ("branch1", "branch2"))
    assert objective.losses(tiny.batch())[1] > 0
    two.load_state_dict(one.state_dict())
    assert objective.losses(tiny.batch())[1].item() == pytest.approx(0, abs=1e-9)


def test_the_mean_over_chosen_pixels_leaves_the_others_out() -> None:
    value_Bhw, chosen_Bhw = torch.tensor([[[1.0, 3.0, 100.0]]]), torch.tensor([[[True, True, False]]])
    assert mean_where(value_Bhw, chosen_Bhw) == 2 and mean_where(value_Bhw, chosen_Bhw & False) == 0


# Mean teacher


def _moved(objective: MeanTeacherObjective) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(teacher before, student, teacher after one call), of every parameter, with a student that has moved."""
    for p in objective.student.parameters():
        p.data.add_(1.0)
    before = [p.detach().clone() for p in objective.teacher.parameters()]
    student = [p.detach().clone() for p in objective.student.parameters()]
    objective(tiny.batch(), 1.0, torch.Generator())
    return list(zip(before, student, objective.teacher.parameters(), strict=True))


def test_the_teacher_begins_as_the_student() -> None:
    objective = objective_of("mean_teacher")
    for network in (objective.network, objective.average):
        one, two = (network.get_submodule(name).state_dict().values() for name in ("branch1", "branch2"))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_teacher_moves_one_hundredth_of_the_way_before_a_step() -> None:
    for before, student, after in _moved(objective_of("mean_teacher")):
        assert torch.allclose(after, 0.99 * before + 0.01 * student, atol=1e-6)


def test_a_teacher_follows_in_parameters_and_not_in_statistics() -> None:
    teacher, student = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    nn.init.constant_(student.weight, 5.0)
    student.running_mean = torch.tensor([1.0, 2.0])
    follow(teacher, student, decay=0.75)
    assert teacher.weight.tolist() == [2.0, 2.0]
    assert teacher.running_mean is not None and teacher.running_mean.tolist() == [0.0, 0.0]


def test_a_teacher_gets_no_gradient_and_no_step_of_the_optimiser(tmp_path: Path) -> None:
    training = training_of("mean_teacher", tmp_path)
    objective = training.objective
    assert isinstance(objective, MeanTeacherObjective)
    training.advance(0.5)
    student = [p.detach().clone() for p in objective.student.parameters()]
    before = [p.detach().clone() for p in objective.teacher.parameters()]
    training.advance(0.5)
    for ours, theirs, now in zip(before, student, objective.teacher.parameters(), strict=True):
        assert now.grad is None and torch.allclose(now, 0.99 * ours + 0.01 * theirs, atol=1e-6)


def test_the_mean_teacher_term_is_the_mean_squared_difference_of_softmaxes() -> None:
    objective, batch = objective_of("mean_teacher"), tiny.batch()
    nn.init.normal_(objective.student.classifier.weight, generator=torch.Generator().manual_seed(1))
    _, term = objective.losses(batch)
    image = torch.cat((batch.image_B3hw, batch.weak_B3hw))
    one, two = (at_size(net(image), batch.label_Bhw).softmax(1) for net in (objective.student, objective.teacher))
    assert torch.allclose(term, F.mse_loss(one, two), rtol=1e-4) and term > 0


# Pseudo supervision and PseudoSeg


def test_a_single_network_learns_from_its_own_labels_of_the_weak_view() -> None:
    objective, batch = objective_of("pseudo"), tiny.batch()
    _, term = objective.losses(batch)
    (label_Bhw,) = pseudo_labels(objective.network, batch)
    pictures = torch.cat((batch.image_B3hw, mixed(batch.strong_B3hw, batch.mix_B1hw)))
    (logits,) = objective.network.encode(pictures)
    assert torch.allclose(term, F.cross_entropy(at_size(logits[2:], label_Bhw), label_Bhw), rtol=1e-5)


def test_a_soft_label_is_the_prediction_fused_with_itself_sharpened() -> None:
    logits = torch.tensor([0.6, 0.3, 0.1]).log()[None, :, None, None] + 7
    sharp = [0.36 / 0.46, 0.09 / 0.46, 0.01 / 0.46]
    by_hand = [0.25 * p + 0.75 * s for p, s in zip((0.6, 0.3, 0.1), sharp, strict=True)]
    assert soft_labels(logits, share=0.25, temperature=0.5).flatten().tolist() == pytest.approx(by_hand)


def test_the_soft_cross_entropy_of_a_hard_label_is_the_cross_entropy() -> None:
    (logits,) = _logits(1)
    label_Bhw = logits.argmin(1)
    target = F.one_hot(label_Bhw, 3).movedim(-1, 1).float()
    inside_Bhw = torch.ones_like(label_Bhw, dtype=torch.bool)
    assert torch.allclose(soft_cross_entropy(logits, target, inside_Bhw), F.cross_entropy(logits, label_Bhw))


@pytest.mark.parametrize("name", ["pseudo", "pseudoseg"])
def test_only_the_strong_view_carries_a_gradient(name: str) -> None:
    objective, batch = objective_of(name), tiny.batch()
    assert isinstance(objective, SemiSupervised)
    weak, strong = batch.weak_B3hw.clone().requires_grad_(), batch.strong_B3hw.clone().requires_grad_()
    _, term = objective.losses(batch._replace(weak_B3hw=weak, strong_B3hw=strong))
    term.backward()
    assert weak.grad is None and strong.grad is not None and strong.grad.any()
