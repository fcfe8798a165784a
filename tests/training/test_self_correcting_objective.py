"""The three corrections, their stages, and where gradients go, against closed forms."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from penumbra.models.blocks.losses import soft_cross_entropy
from penumbra.models.card import IGNORE, WindowSpec
from penumbra.models.checkpoint import save_checkpoint
from penumbra.models.contract import Views
from penumbra.models.errors import BadArtifact, BadCheckpoint, BadOption
from penumbra.models.self_correcting.net import SelfCorrectingNetwork
from penumbra.models.self_correcting.objective import SelfCorrectingObjective, Stage, build_objective, draw_kept
from penumbra.training.data import find_data
from penumbra.training.loop import Training, build_network, card_of
from penumbra.training.recipe import Recipe
from tests.training import tiny

Correction = Literal["none", "linear", "convolutional"]
CORRECTIONS: tuple[Correction, ...] = ("none", "linear", "convolutional")
SHARES = {"ancillary_share": 0.25, "initial_share": 0.25, "ramp_share": 0.1}
CONFIG: dict[str, Any] = {
    "backbone": tiny.BACKBONE,
    "aspp_channels": 16,
    "low_channels": 8,
    "decoder_channels": 16,
    "correction_hidden": 8,
}


def _recipe(correction: Correction, **config: Any) -> Recipe:
    return Recipe(
        name="self_correcting-shapes",
        method="self_correcting",
        config=CONFIG | {"correction": correction} | config,
        data="shapes",
        checkpoint="unused.safetensors",
        window=WindowSpec(48, 64),
        crop=(48, 64),
        steps=8,
        scale=(0.9, 1.1),
        labelled_batch=3,
        unlabelled_batch=2,
        average_decay=0.9,
        precision="32-true",
        weak_labels="boxes",
        objective=SHARES,
    )


def _objective(correction: Correction = "linear", **options: float) -> SelfCorrectingObjective:
    network = build_network(_recipe(correction), 3)
    assert isinstance(network, SelfCorrectingNetwork)
    average = copy.deepcopy(network).requires_grad_(False).eval()
    return build_objective(network, average, {**SHARES, **options}).train()


def _batch() -> Views:
    boxes_BKhw = torch.zeros(2, 3, 32, 48)
    boxes_BKhw[:, 1, 4:20, 6:30] = 1
    boxes_BKhw[:, 2, 10:30, 20:44] = 1
    return tiny.batch()._replace(boxes_BKhw=boxes_BKhw, label_boxes_BKhw=boxes_BKhw.flip(-1))


def _step(objective: SelfCorrectingObjective, progress: float) -> dict[str, Tensor]:
    objective.zero_grad()
    losses: dict[str, Tensor] = objective(_batch(), progress, torch.Generator())
    torch.autograd.backward(losses["total"])
    return losses


def _has_gradient(objective: SelfCorrectingObjective) -> dict[str, bool]:
    """Per part of the network: whether all of its weights have a gradient; they never differ within one."""
    answer = {}
    for name, part in objective.network.named_children():
        given = {p.grad is not None for p in part.parameters()}
        assert len(given) == 1, name
        answer[name] = given.pop()
    return answer


def _soft_labels(objective: SelfCorrectingObjective, progress: float) -> tuple[Tensor, Tensor, Tensor]:
    """Class-last probabilities q, p and p_anc at the network's resolution."""
    batch = _batch()
    assert batch.boxes_BKhw is not None
    logits_BKhw = objective.network.primary(batch.weak_B3hw)
    ancillary_BKhw = objective.network.ancillary.eval()(batch.weak_B3hw, batch.boxes_BKhw)
    corrected_BKhw = objective.correct(batch.weak_B3hw, logits_BKhw, batch.boxes_BKhw, progress)
    q, p, p_anc = (x.detach().double().softmax(1).movedim(1, -1) for x in (corrected_BKhw, logits_BKhw, ancillary_BKhw))
    return q, p, p_anc


@pytest.mark.parametrize("progress", [0.25, 0.6, 1.0])
def test_the_linear_correction_minimises_the_stated_sum_of_divergences(progress: float) -> None:
    objective = _objective()
    q, p, p_anc = _soft_labels(objective, progress)
    alpha = objective.alpha(progress)

    def cost(r: Tensor) -> Tensor:
        return (r * (r / p).log()).sum(-1) + alpha * (r * (r / p_anc).log()).sum(-1)

    generator = torch.Generator().manual_seed(0)
    for size in (1e-2, 0.3, 3.0):
        other = (q.log() + size * torch.randn(q.shape, generator=generator, dtype=q.dtype)).softmax(-1)
        assert (cost(other) > cost(q)).all()


def test_without_correction_the_soft_labels_are_the_ancillarys() -> None:
    q, p, p_anc = _soft_labels(_objective("none"), 0.5)
    assert torch.equal(q, p_anc) and not torch.allclose(q, p)


def test_alpha_falls_exponentially_from_30_to_a_half_over_the_last_stage() -> None:
    objective = _objective()
    assert [objective.alpha(p) for p in (0.0, 0.25, 1.0)] == pytest.approx([30, 30, 0.5])
    assert objective.alpha(0.625) == pytest.approx(math.sqrt(30 * 0.5))


def test_the_stages_follow_the_schedule_and_the_middle_one_is_the_convolutions() -> None:
    progresses = (0.0, 0.24, 0.25, 0.49, 0.5, 1.0)
    one, two, three = Stage
    assert [_objective().stage(p) for p in progresses] == [one, one, three, three, three, three]
    assert [_objective("convolutional").stage(p) for p in progresses] == [one, one, two, two, three, three]


def test_the_weight_of_the_boxed_pictures_ramps_up_in_the_last_stage() -> None:
    weights = [_objective(weak_weight=2.0).weak_weight(p) for p in (0.0, 0.25, 0.3, 0.35, 1.0)]
    assert weights == pytest.approx([0, 0, 1, 2, 2])
    assert [_objective("convolutional").weak_weight(p) for p in (0.5, 0.6)] == pytest.approx([0, 1])


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_only_the_ancillary_learns_in_the_first_stage(correction: Correction) -> None:
    objective = _objective(correction)
    assert _step(objective, 0.1).keys() == {"total", "ancillary"}
    assert _has_gradient(objective) == {name: name == "ancillary" for name, _ in objective.network.named_children()}


@pytest.mark.parametrize("correction", ["none", "linear"])
def test_the_ancillary_is_frozen_while_the_primary_learns(correction: Correction) -> None:
    objective = _objective(correction)
    _step(objective, 0.25)
    before = copy.deepcopy(objective.network.ancillary.state_dict())
    assert _step(objective.train(), 0.9).keys() == {"total", "supervised", "weak"}
    assert _has_gradient(objective) == {"primary": True, "ancillary": False}
    after = objective.network.ancillary.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_convolutions_middle_stage_freezes_the_ancillary_and_the_last_trains_all_three() -> None:
    objective = _objective("convolutional")
    assert _step(objective, 0.4).keys() == {"total", "supervised", "correction"}
    assert _has_gradient(objective) == {"primary": True, "ancillary": False, "correction": True}
    losses = _step(objective.train(), 0.9)
    assert losses.keys() == {"total", "supervised", "correction", "ancillary", "weak"}
    assert _has_gradient(objective) == {"primary": True, "ancillary": True, "correction": True}
    assert losses["total"].item() == pytest.approx(sum(v.item() for k, v in losses.items() if k != "total"), rel=1e-5)


def test_the_correction_is_taught_by_masks_and_teaches_the_primary_nothing_about_them() -> None:
    objective = _objective("convolutional")
    objective(_batch(), 0.4, torch.Generator())["correction"].backward()
    assert _has_gradient(objective) == {"primary": False, "ancillary": False, "correction": True}


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_soft_labels_carry_no_gradient_to_what_made_them(correction: Correction) -> None:
    objective = _objective(correction)
    losses = objective(_batch(), 0.9, torch.Generator())
    losses["weak"].backward()
    assert _has_gradient(objective) == {name: name == "primary" for name, _ in objective.network.named_children()}


def test_the_soft_cross_entropy_is_the_mean_over_pixels_inside_and_its_gradient_is_p_minus_q() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BKhw = torch.randn(1, 3, 2, 2, generator=generator).requires_grad_()
    q_BKhw = torch.randn(1, 3, 2, 2, generator=generator).softmax(1)
    inside_Bhw = torch.tensor([[[True, True], [True, False]]])
    loss = soft_cross_entropy(logits_BKhw, q_BKhw, inside_Bhw)
    torch.autograd.backward(loss)
    per_pixel_Bhw = -(q_BKhw * logits_BKhw.log_softmax(1)).sum(1)
    assert loss.item() == pytest.approx(per_pixel_Bhw[inside_Bhw].mean().item(), rel=1e-5)
    expected = (logits_BKhw.softmax(1) - q_BKhw) / 3 * inside_Bhw[:, None]
    assert logits_BKhw.grad is not None and torch.allclose(logits_BKhw.grad, expected, atol=1e-6)
    hard = F.one_hot(torch.tensor([[[0, 1], [2, 0]]]), 3).movedim(-1, 1).float()
    label_Bhw = hard.argmax(1).masked_fill(~inside_Bhw, IGNORE)
    assert soft_cross_entropy(logits_BKhw, hard, inside_Bhw).item() == pytest.approx(
        F.cross_entropy(logits_BKhw, label_Bhw, ignore_index=IGNORE).item(), rel=1e-5
    )


def test_the_convolutions_ancillary_sees_the_masks_of_half_of_every_labelled_batch() -> None:
    batch = _batch()
    other = batch._replace(label_Bhw=torch.cat((batch.label_Bhw[:1], batch.label_Bhw[1:].flip(-1))))
    for correction, equal in (("convolutional", True), ("linear", False)):
        objective = _objective(correction)  # type: ignore[arg-type]
        losses = [objective(views, 0.1, torch.Generator())["ancillary"].item() for views in (batch, other)]
        assert (losses[0] == losses[1]) == equal


def test_the_ancillary_becomes_its_running_average_once() -> None:
    objective = _objective()
    ours, averaged = (net.ancillary.low_gate.conv.weight for net in (objective.network, objective.average))
    before = ours.detach().clone()
    averaged.fill_(7.0)
    _step(objective, 0.1)
    assert not objective.settled and torch.equal(ours, before)
    _step(objective, 0.3)
    assert objective.settled and torch.equal(ours, averaged)
    averaged.fill_(8.0)
    _step(objective, 0.4)
    assert torch.equal(ours, torch.full_like(ours, 7.0))


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_every_weight_that_learns_gets_its_gradient_under_autocast_too(correction: Correction) -> None:
    objective = _objective(correction)
    with torch.autocast("cpu", torch.bfloat16):
        losses = objective(_batch(), 0.9, torch.Generator())
    losses["total"].backward()
    assert _has_gradient(objective) == {
        name: name != "ancillary" or correction == "convolutional" for name, _ in objective.network.named_children()
    }


def test_a_box_of_the_class_outside_of_every_box_is_not_looked_at() -> None:
    batch = _batch()
    assert batch.boxes_BKhw is not None and batch.label_boxes_BKhw is not None
    boxed = batch._replace(boxes_BKhw=batch.boxes_BKhw.clone(), label_boxes_BKhw=batch.label_boxes_BKhw.clone())
    assert boxed.boxes_BKhw is not None and boxed.label_boxes_BKhw is not None
    boxed.boxes_BKhw[:, 0] = 1
    boxed.label_boxes_BKhw[:, 0] = 1
    for progress in (0.1, 0.9):
        totals = [_objective()(views, progress, torch.Generator())["total"].item() for views in (batch, boxed)]
        assert totals[0] == totals[1]


def test_half_of_the_views_keep_all_of_their_boxes_and_the_others_each_its_own_share() -> None:
    number_BKhw = torch.zeros(4000, 2, 3, 4)
    number_BKhw[:, 0, 0], number_BKhw[:, 1, :2, 1], number_BKhw[:, 1, 2, 2:] = 1, 2, 3
    kept_BKhw = draw_kept(number_BKhw, torch.Generator().manual_seed(0))
    assert not kept_BKhw[number_BKhw == 0].any()
    first_B, second_B, third_B = kept_BKhw[:, 0, 0, 0], kept_BKhw[:, 1, 0, 1], kept_BKhw[:, 1, 2, 3]
    assert torch.equal(kept_BKhw[:, 0, 0, 3], first_B) and torch.equal(kept_BKhw[:, 1, 1, 1], second_B)
    num_B = first_B + second_B + third_B
    # of three boxes with a chance that is uniform, every number is as likely; half of the views have all besides
    shares = [float((num_B == num).float().mean()) for num in range(4)]
    assert shares == pytest.approx([1 / 8, 1 / 8, 1 / 8, 5 / 8], abs=0.03)


def test_a_training_begins_with_the_weights_of_its_start(tmp_path: Path) -> None:
    data, path = find_data("shapes"), tmp_path / "begun.safetensors"
    frames = data.load(tmp_path, "train")
    recipe = _recipe("linear")
    begun = Training(dataclasses.replace(recipe, seed=5), frames, 3)
    save_checkpoint(path, card_of(recipe, data, num_frames=1, num_labelled=1, network=begun.average), begun.average)
    own = dataclasses.replace(_recipe("linear", partial=True), start=str(path), objective={"ancillary_share": 1.0})
    training = Training(own, frames, 3)
    fresh, weights = begun.average.state_dict(), training.average.state_dict()
    assert all(torch.equal(fresh[key], weights[key]) for key in fresh)
    training.advance(0.5)
    for key, value in training.objective.network.primary.state_dict().items():
        assert torch.equal(value, fresh[f"primary.{key}"])  # the first stage alone leaves the primary as it is
    with pytest.raises(BadCheckpoint, match="begun"):
        Training(dataclasses.replace(own, config=own.config | {"aspp_channels": 8}), frames, 3)


def test_only_the_ancillary_s_lesson_has_some_of_the_boxes_and_only_where_the_configuration_says_so() -> None:
    def total(progress: float, *, partial: bool) -> float:
        network = build_network(_recipe("linear", partial=partial), 3)
        assert isinstance(network, SelfCorrectingNetwork) and network.prompt.partial == partial
        objective = build_objective(network, copy.deepcopy(network).eval(), SHARES).train()
        return objective(_batch(), progress, torch.Generator().manual_seed(1))["total"].item()

    assert total(0.1, partial=True) != total(0.1, partial=False)
    assert total(0.9, partial=True) == total(0.9, partial=False)


def test_missing_boxes_a_missing_ancillary_and_an_unknown_option_are_named() -> None:
    with pytest.raises(BadOption, match="weak_labels 'boxes' is wanted"):
        _objective()(tiny.batch(), 0.5, torch.Generator())
    network: Any = build_network(_recipe("linear", ancillary=False), 3)
    with pytest.raises(BadOption, match="ancillary is false"):
        build_objective(network, network, {})
    with pytest.raises(BadOption, match=r"config\.partial is of the ancillary, which config\.ancillary leaves out"):
        build_network(_recipe("linear", ancillary=False, partial=True), 3)
    network = build_network(_recipe("linear"), 3)
    with pytest.raises(BadArtifact, match=r"recipe.objective has an unknown field 'alpha'"):
        build_objective(network, network, {"alpha": 1})


def _training(correction: Correction, folder: Path) -> Training:
    data = find_data("shapes")
    return Training(_recipe(correction), data.load(folder, "train"), len(data.classes))


@pytest.mark.parametrize(("correction", "killed_after"), [("none", 2), ("linear", 1), ("convolutional", 3)])
def test_a_killed_run_goes_on_with_identical_numbers(correction: Correction, killed_after: int, tmp_path: Path) -> None:
    progresses = (0.1, 0.3, 0.6, 0.9)  # in each stage, and twice in the last
    whole, killed, resumed = (_training(correction, tmp_path) for _ in range(3))
    expected = [whole.advance(p) for p in progresses]
    first = [killed.advance(p) for p in progresses[:killed_after]]
    killed.save(tmp_path / "state.ckpt")
    resumed.resume(tmp_path / "state.ckpt")
    assert first + [resumed.advance(p) for p in progresses[killed_after:]] == expected
    ours, theirs = whole.objective.state_dict(), resumed.objective.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_few_steps_lower_the_ancillarys_loss_and_then_the_primarys(tmp_path: Path) -> None:
    training = _training("linear", tmp_path)
    ancillary = [training.advance(0.2)["ancillary"] for _ in range(32)]
    supervised = [training.advance(0.5)["supervised"] for _ in range(32)]
    for losses in (ancillary, supervised):
        assert sum(losses[-4:]) < 0.75 * sum(losses[:4])
