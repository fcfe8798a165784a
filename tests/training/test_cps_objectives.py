"""The CPS family and the MC-dropout baseline against closed forms, and gradients that flow where they should.

Every kind of objective is also trained for a few steps, killed, resumed and written.
"""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks.losses import at_size, cross_entropy, ramp, soft_cross_entropy
from models.card import IGNORE, Sampling
from models.checkpoint import load_checkpoint
from models.contract import Views
from models.cps.net import CpsNetwork
from models.cps.objective import KINDS
from models.cps.objectives.cross_probability import squared_distance, symmetric_divergence
from models.cps.objectives.mean_teacher import MeanTeacherObjective, follow
from models.cps.objectives.pseudoseg import soft_labels
from models.cps.objectives.semi_supervised import SemiSupervised
from models.cps.objectives.terms import cross_supervision, mean_where, mixed, pseudo_labels, supervision
from models.errors import BadArtifact, BadOption
from models.np_semiseg.net import NpNetwork
from models.np_semiseg.objective_dropout import DropoutObjective, draw_masks
from models.np_semiseg.objective_terms import at_grid
from tests.training import tiny
from training.data import find_data
from training.evaluate import draw_noise
from training.loop import Training, build_network, train
from training.objective import build_objective
from training.recipe import Recipe

SINGLE = ("supervised", "pseudo", "pseudoseg")
VARIANTS: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS} | {"cross_probability-kl": {"distance": "kl"}}
RUNS = (*VARIANTS, "dropout")


def _recipe(name: str, folder: Path = Path(), *, steps: int = 8) -> Recipe:
    """A tiny recipe of one kind of objective, that uses unlabelled views from the start."""
    kind = name.partition("-")[0]
    begin = {} if kind == "supervised" else {"start": 0.0, "full": 0.1}
    if kind == "dropout":
        recipe = tiny.recipe("np_semiseg", folder, steps=steps)
        config, options = {"sampling": "dropout", "dropout": 0.25}, {"confidence": 0.4}
    else:
        recipe = tiny.recipe("cps", folder, steps=steps)
        config, options = {"branches": 1 if kind in SINGLE else 2}, VARIANTS[name]
    return dataclasses.replace(
        recipe, name=f"{name}-shapes", config=recipe.config | config, objective={"kind": kind} | begin | options
    )


def _objective(name: str, **options: Any) -> Any:
    recipe = _recipe(name)
    network = build_network(recipe, 3)
    average = copy.deepcopy(network).requires_grad_(False).eval()
    objective = build_objective(recipe.method, network, average, recipe.objective | options).train()
    objective.average.eval()
    return objective


def _losses(name: str, batch: Views, progress: float = 1.0, **options: Any) -> dict[str, Tensor]:
    losses: dict[str, Tensor] = _objective(name, **options)(batch, progress, torch.Generator().manual_seed(0))
    return losses


def _training(name: str, folder: Path) -> Training:
    data = find_data("shapes")
    return Training(_recipe(name, folder), data.load(folder, "train"), len(data.classes))


def _logits(num: int = 2) -> tuple[Tensor, ...]:
    return tuple(torch.randn(num, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)))


# Every kind, through the loop


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_of_every_kind_goes_on_with_identical_numbers(name: str, tmp_path: Path) -> None:
    whole, killed, resumed = (_training(name, tmp_path) for _ in range(3))
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
    training = _training(name, tmp_path)
    losses = [training.advance(0.02)["supervised"] for _ in range(24)]
    assert sum(losses[-4:]) < 0.85 * sum(losses[:4])


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_every_kind_writes_a_checkpoint_that_can_be_read(name: str, tmp_path: Path) -> None:
    path = train(_recipe(name, tmp_path, steps=2), tmp_path, runs_dir=tmp_path / "runs")
    card, network = load_checkpoint(path)
    assert card.sampling == network.sampling and 0 <= card.provenance.metrics["val/seg/mIoU"] <= 1


@pytest.mark.parametrize("name", RUNS)
def test_every_weight_that_is_trained_gets_a_gradient_also_under_autocast(name: str) -> None:
    objective = _objective(name)
    with torch.autocast("cpu", torch.bfloat16):
        losses = objective(tiny.batch(), 0.5, torch.Generator())
    losses["total"].backward()
    assert all(p.grad is not None for p in objective.network.parameters() if p.requires_grad)
    assert all(p.grad is None for p in objective.average.parameters())


@pytest.mark.parametrize("name", [name for name in RUNS if name != "supervised"])
def test_before_its_start_every_kind_learns_from_labels_alone(name: str) -> None:
    batch = tiny.batch()
    blank = batch._replace(weak_B3hw=0 * batch.weak_B3hw, strong_B3hw=0 * batch.strong_B3hw)
    early, other = (_losses(name, b, 0.3, start=0.5, full=0.6) for b in (batch, blank))
    assert early.keys() == {"total", "supervised"} and early["total"] == other["total"] == early["supervised"]


def test_the_unsupervised_term_waits_for_its_start_and_grows_to_its_weight() -> None:
    assert [ramp(p, 0.1, 0.3) for p in (0.0, 0.1, 0.2, 0.3, 1.0)] == pytest.approx([0, 0, 0.5, 1, 1])
    losses = _losses("pseudo", tiny.batch(), 0.2, start=0.1, full=0.3, weight=4.0)
    assert torch.allclose(losses["total"], losses["supervised"] + 2 * losses["unsupervised"])


# Which objective


def test_a_recipe_without_a_kind_trains_cps() -> None:
    network = build_network(_recipe("cps"), 3)
    objective = build_objective("cps", network, network, {"cps_weight": 1.0, "start": 0.12, "full": 0.4})
    assert type(objective) is KINDS["cps"].build


@pytest.mark.parametrize("kind", ["cpss", ["cps"]])
def test_an_unknown_kind_is_answered_with_the_known_ones(kind: object) -> None:
    network = build_network(_recipe("cps"), 3)
    with pytest.raises(BadOption, match=r"objective\.kind is .*cps.*; one of cps, cps_plain, supervised, .* is wanted"):
        build_objective("cps", network, network, {"kind": kind})


@pytest.mark.parametrize(("name", "branches"), [("pseudo", 2), ("cps", 1), ("mean_teacher", 1)])
def test_branches_that_an_objective_cannot_train_are_refused(name: str, branches: int) -> None:
    recipe = _recipe(name)
    network = build_network(dataclasses.replace(recipe, config=recipe.config | {"branches": branches}), 3)
    with pytest.raises(BadOption, match=rf"branches is {branches}; the objective '{name}' trains {3 - branches}"):
        build_objective("cps", network, network, recipe.objective)


def test_an_option_of_another_kind_is_named() -> None:
    network = build_network(_recipe("supervised"), 3)
    with pytest.raises(BadArtifact, match=r"recipe\.objective has an unknown field 'cps_weight'"):
        build_objective("cps", network, network, {"kind": "supervised", "cps_weight": 1.0})


@pytest.mark.parametrize(("name", "kind"), [("dropout", "np"), ("dropout", "cps")])
def test_a_latent_objective_does_not_train_a_dropout_network(name: str, kind: str) -> None:
    network = build_network(_recipe(name), 3)
    with pytest.raises(
        BadOption, match=r"sampling is 'dropout'; the objective 'np' trains 'latent'|one of np, dropout"
    ):
        build_objective("np_semiseg", network, network, {"kind": kind})


# Supervised


def test_supervised_training_ignores_unlabelled_views_entirely() -> None:
    batch = tiny.batch()
    nothing = {name: getattr(batch, name)[:0] for name in ("weak_B3hw", "strong_B3hw", "inside_Bhw", "mix_B1hw")}
    with_views, without = (_losses("supervised", b) for b in (batch, batch._replace(**nothing)))
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
    objective, batch = _objective("cps"), tiny.batch()
    labels = pseudo_labels(objective.network, batch)
    assert not any(label.requires_grad for label in labels)
    logits = [torch.zeros(2, 3, 32, 48, requires_grad=True), torch.zeros(2, 3, 32, 48)]
    cross_supervision(logits, labels).backward()
    assert logits[0].grad is not None and all(p.grad is None for p in objective.network.parameters())


def test_pseudo_labels_are_mixed_as_the_pictures_are() -> None:
    objective, batch = _objective("cps"), tiny.batch()
    plain = pseudo_labels(objective.network, batch._replace(mix_B1hw=torch.zeros_like(batch.mix_B1hw)))
    swapped = pseudo_labels(objective.network, batch._replace(mix_B1hw=torch.ones_like(batch.mix_B1hw)))
    assert torch.equal(plain[0].roll(1, 0), swapped[0]) and not torch.equal(plain[0], swapped[0])
    assert torch.equal(mixed(batch.weak_B3hw, torch.ones_like(batch.mix_B1hw)), batch.weak_B3hw.flip(0))


def test_pixels_beyond_the_picture_teach_nothing() -> None:
    batch = tiny.batch()
    outside = batch._replace(inside_Bhw=torch.zeros_like(batch.inside_Bhw))
    labels = pseudo_labels(_objective("cps").network, outside)
    assert all((label == IGNORE).all() for label in labels)
    void = outside._replace(label_Bhw=torch.full_like(batch.label_Bhw, IGNORE))
    for name in VARIANTS:
        assert _losses(name, void)["total"] == 0, name


def test_plain_cps_also_compares_labelled_pictures_and_mixes_nothing() -> None:
    objective, batch = _objective("cps_plain", cps_weight=1.0), tiny.batch()
    losses = objective(batch._replace(mix_B1hw=torch.ones_like(batch.mix_B1hw)), 1.0, torch.Generator())
    logits = [at_size(x, batch.label_Bhw) for x in objective.network.encode(torch.cat((batch[0], batch.weak_B3hw)))]
    by_hand = F.cross_entropy(logits[0], logits[1].argmax(1)) + F.cross_entropy(logits[1], logits[0].argmax(1))
    assert torch.allclose(losses["unsupervised"], by_hand, rtol=1e-5)


@pytest.mark.parametrize("name", ["cps", "cps_plain"])
def test_the_branch_that_teaches_gets_no_gradient_for_it(name: str) -> None:
    objective = _objective(name)
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
    objective = _objective(name)
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
    objective = _objective("mean_teacher")
    for network in (objective.network, objective.average):
        one, two = (network.get_submodule(name).state_dict().values() for name in ("branch1", "branch2"))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_teacher_moves_one_hundredth_of_the_way_before_a_step() -> None:
    for before, student, after in _moved(_objective("mean_teacher")):
        assert torch.allclose(after, 0.99 * before + 0.01 * student, atol=1e-6)


def test_a_teacher_follows_in_parameters_and_not_in_statistics() -> None:
    teacher, student = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    nn.init.constant_(student.weight, 5.0)
    student.running_mean = torch.tensor([1.0, 2.0])
    follow(teacher, student, decay=0.75)
    assert teacher.weight.tolist() == [2.0, 2.0]
    assert teacher.running_mean is not None and teacher.running_mean.tolist() == [0.0, 0.0]


def test_a_teacher_gets_no_gradient_and_no_step_of_the_optimiser(tmp_path: Path) -> None:
    training = _training("mean_teacher", tmp_path)
    objective = training.objective
    assert isinstance(objective, MeanTeacherObjective)
    training.advance(0.5)
    student = [p.detach().clone() for p in objective.student.parameters()]
    before = [p.detach().clone() for p in objective.teacher.parameters()]
    training.advance(0.5)
    for ours, theirs, now in zip(before, student, objective.teacher.parameters(), strict=True):
        assert now.grad is None and torch.allclose(now, 0.99 * ours + 0.01 * theirs, atol=1e-6)


def test_the_mean_teacher_term_is_the_mean_squared_difference_of_softmaxes() -> None:
    objective, batch = _objective("mean_teacher"), tiny.batch()
    nn.init.normal_(objective.student.classifier.weight, generator=torch.Generator().manual_seed(1))
    _, term = objective.losses(batch)
    image = torch.cat((batch.image_B3hw, batch.weak_B3hw))
    prob = [at_size(net(image), batch.label_Bhw).softmax(1) for net in (objective.student, objective.teacher)]
    assert torch.allclose(term, F.mse_loss(*prob), rtol=1e-4) and term > 0


# Pseudo supervision and PseudoSeg


def test_a_single_network_learns_from_its_own_labels_of_the_weak_view() -> None:
    objective, batch = _objective("pseudo"), tiny.batch()
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
    objective, batch = _objective(name), tiny.batch()
    assert isinstance(objective, SemiSupervised)
    weak, strong = batch.weak_B3hw.clone().requires_grad_(), batch.strong_B3hw.clone().requires_grad_()
    _, term = objective.losses(batch._replace(weak_B3hw=weak, strong_B3hw=strong))
    term.backward()
    assert weak.grad is None and strong.grad is not None and strong.grad.any()


# MC dropout


@pytest.mark.parametrize("keep", [0.5, 0.75])
def test_masks_are_zero_or_one_by_keep_with_mean_one_and_depend_on_the_generator_alone(keep: float) -> None:
    first, second = (draw_masks((4, 50, 200), keep, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second) and first.unique().tolist() == pytest.approx([0, 1 / keep])
    assert first.mean().item() == pytest.approx(1, abs=5 * math.sqrt((1 - keep) / keep / first.numel()))
    rows = first.flatten(0, 1)
    assert rows.mean(1).std() > 0 and not torch.equal(rows[0], rows[1])  # pictures have their own


def test_validation_draws_masks_for_a_dropout_network_and_normal_noise_for_a_latent() -> None:
    generator = torch.Generator().manual_seed(0)
    mask_SBL = draw_noise(Sampling(kind="dropout", noise_length=500, keep=0.8, default_samples=4), generator)
    assert mask_SBL.shape == (4, 1, 500) and mask_SBL.unique().tolist() == pytest.approx([0, 1.25])
    noise_SBL = draw_noise(Sampling(kind="latent", noise_length=500, default_samples=4), generator)
    assert noise_SBL.min() < -2 and noise_SBL.std().item() == pytest.approx(1, abs=0.1)


def test_the_network_sees_one_mask_per_picture_and_the_teacher_several(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, seen = _objective("dropout", samples=3), []
    assert isinstance(objective, DropoutObjective) and isinstance(objective.network, NpNetwork)
    for network in (objective.average, objective.network):
        decode = network.decode_dropped
        monkeypatch.setattr(network, "decode_dropped", lambda f, mask, d=decode: (seen.append(mask), d(f, mask))[1])
    objective(tiny.batch(), 1.0, torch.Generator().manual_seed(0))
    assert [tuple(mask.shape) for mask in seen] == [(3, 2, 16), (1, 4, 16)]
    assert all(set(mask.unique().tolist()) == {0, torch.tensor(1 / 0.75).item()} for mask in seen)


def test_the_dropout_loss_is_the_cross_entropy_under_the_drawn_mask_on_the_grid_of_the_loss() -> None:
    objective, batch = _objective("dropout", start=0.5), tiny.batch()
    losses = objective(batch, 0.3, torch.Generator().manual_seed(0))
    mask_1BL = draw_masks((1, 2, 16), 0.75, torch.Generator().manual_seed(0))
    logits_BKhw = objective.network(batch.image_B3hw, mask_1BL)[0]
    fine_BKhw = F.interpolate(logits_BKhw, size=(16, 24), mode="bilinear", align_corners=True)
    by_hand = F.cross_entropy(fine_BKhw, at_grid(batch.label_Bhw, 16, 24))
    assert torch.allclose(losses["supervised"], by_hand, rtol=1e-5)


def test_an_unsure_teacher_adds_nothing_to_the_dropout_loss() -> None:
    losses = _losses("dropout", tiny.batch(), confidence=1.1)
    assert losses["kept"] == losses["unlabelled"] == 0 and losses["total"] == losses["supervised"]


def test_the_dropout_network_answers_differently_under_different_masks() -> None:
    network = _objective("dropout").network.eval()
    noise_SBL = draw_masks((2, 2, 16), 0.75, torch.Generator().manual_seed(0))
    one, two = network(tiny.batch().weak_B3hw, noise_SBL)
    assert not torch.allclose(one, two)
    assert torch.equal(*network(tiny.batch().weak_B3hw, torch.ones(2, 2, 16)))


def test_a_branch_is_a_network_of_its_own() -> None:
    network = build_network(_recipe("supervised"), 3)
    assert isinstance(network, CpsNetwork) and network.names == ("branch1",)
