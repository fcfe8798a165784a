"""CPAL's stages learn from tags alone: closed forms of the losses, a bank that fills, summarises and resumes."""

import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from penumbra.models.blocks.losses import cross_entropy
from penumbra.models.card import IGNORE, Card, InputSpec, Readout, WindowSpec
from penumbra.models.checkpoint import load_checkpoint, save_checkpoint
from penumbra.models.contract import Network, Views
from penumbra.models.cpal import build
from penumbra.models.cpal.config import CpalConfig
from penumbra.models.cpal.net import CamNetwork, divide_by_maximum
from penumbra.models.cpal.objective import (
    CamObjective,
    CamOptions,
    MaskObjective,
    build_objective,
    draw_masks,
    read_cam_options,
    self_supervision,
)
from penumbra.models.errors import BadArtifact, BadOption
from penumbra.training.batches import choose_split
from penumbra.training.data import find_data
from penumbra.training.frames import Frames
from penumbra.training.loop import Training
from penumbra.training.recipe import Recipe
from tests.training import tiny

Precision = Literal["32-true", "bf16-mixed"]
CAM = CpalConfig(
    3, depth=18, width=4, background=False, members=("cam", "pacam"), context=2, context_channels=8, neighbours=2
)
EAGER = CamOptions(start=0.0, full=0.0, least_rows=2, summarise_every=2)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _built(config: CpalConfig) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(config)


def _stage1(config: CpalConfig = CAM, options: CamOptions = EAGER) -> CamObjective:
    network = _built(config)
    assert isinstance(network, CamNetwork)
    return CamObjective(network, copy.deepcopy(network).requires_grad_(False), options).train()


def _views(tags: list[list[float]] | None = None) -> Views:
    return tiny.batch(size=(64, 96))._replace(tags_BK=torch.tensor(tags or [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]))


def _fill(objective: CamObjective, *, steps: int = 2) -> dict[str, Tensor]:
    losses: dict[str, Tensor] = {}
    for _ in range(steps):
        losses = objective(_views(), 0.5, _generator())
    return losses


def _checkpoint(path: Path, config: CpalConfig = CAM) -> Path:
    network, classes = _built(config), find_data("shapes").classes
    card = Card(
        name="maps", version=1, method="cpal", config=asdict(config), classes=classes[: config.num_classes],
        input=InputSpec(), window=WindowSpec(48, 64), sampling=network.sampling, readout=Readout(),
        prompt=network.prompt,
    )  # fmt: skip
    save_checkpoint(path, card, network)
    return path


def _recipe(folder: Path, *, stage: int) -> Recipe:
    recipe = tiny.recipe("cps", folder, steps=4)
    config = {**asdict(CAM), "context": 2} if stage == 1 else {"net": "deeplabv2", "width": 2, "members": ["scale1"]}
    config.pop("num_classes", None)
    options = {"least_rows": 2, "summarise_every": 2, "start": 0.0, "full": 0.1}
    return replace(
        recipe, method="cpal", config=config, labelled_fraction=0.0, labelled_batch=0, unlabelled_batch=4,
        weak_labels="tags", objective=options if stage == 1 else {"maps": str(folder / "maps.safetensors")},
    )  # fmt: skip


def _training(folder: Path, *, stage: int, precision: Precision = "32-true") -> Training:
    if stage == 2 and not (folder / "maps.safetensors").exists():
        _checkpoint(folder / "maps.safetensors")
    recipe = replace(_recipe(folder, stage=stage), precision=precision)
    return Training(recipe, find_data("shapes").load(folder, "train"), 3)


# -- stage 1: maps from tags ----------------------------------------------------------------------


def test_the_self_supervision_is_the_mean_distance_to_the_map_over_its_maximum() -> None:
    cam = torch.tensor([[[[1.0, 0.5]], [[0.0, 0.25]]]])
    other = torch.tensor([[[[4.0, 2.0]], [[0.0, 0.0]]]])  # equal to the first map; a class without any
    assert self_supervision(cam, other).item() == pytest.approx(0.25 / 4, abs=1e-5)


def test_the_classification_is_the_binary_cross_entropy_of_the_pooled_map() -> None:
    objective, batch = _stage1(), _views([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    score_BN = objective.network.observe(batch.strong_B3hw).raw_BNhw.mean((2, 3))
    by_hand = F.binary_cross_entropy(score_BN.sigmoid(), batch.tags_BK)  # type: ignore[arg-type]
    losses = objective(batch, 0.0, _generator())
    assert losses["classification"].item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_the_weight_of_the_self_supervision_ramps_up() -> None:
    objective = _stage1(options=replace(EAGER, self_weight=2.0, start=0.2, full=0.6))
    for progress, weight in ((0.1, 0.0), (0.4, 1.0), (1.0, 2.0)):
        losses = objective(_views(), progress, _generator())
        expected = losses["classification"] + weight * losses["self_supervised"]
        assert losses["total"].item() == pytest.approx(expected.item())


def test_before_the_bank_is_full_enough_is_cam_plays_pacams_part() -> None:
    objective, batch = _stage1(options=replace(EAGER, least_rows=1000)), _views()
    found = objective.network.localise(objective.network.observe(batch.strong_B3hw), torch.ones(2, 3, 1, 1))
    expected = (found.cam_BKhw - divide_by_maximum(found.is_cam_BKhw)).abs().mean()
    losses = _fill(objective, steps=4)
    assert losses["self_supervised"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert losses["context"] == 0 and not objective.network.context.context_centres.any()  # type: ignore[union-attr]


def test_then_pacam_does_with_the_banks_centroids_and_shifts() -> None:
    objective, batch = _stage1(), _views()
    losses = _fill(objective)
    context = objective.network.context
    assert context is not None and losses["context"] == 1
    rows_RD = objective.bank.rows[1][:2]  # what the bank held at the summary: one row per picture of the first step
    assert torch.allclose(context.context_centres[1].sum(0), rows_RD.sum(0), atol=1e-5)
    assert torch.allclose(context.shift[1], context.context_centres[1].mean(0) - rows_RD.mean(0), atol=1e-6)
    found = objective.network.localise(objective.network.observe(batch.strong_B3hw), torch.ones(2, 3, 1, 1))
    pacam_BKhw = context(found.view.hierarchical_BDhw, found.cam_BKhw)
    expected = (found.cam_BKhw - divide_by_maximum(pacam_BKhw)).abs().mean()
    assert losses["self_supervised"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_average_has_the_same_context_as_the_network() -> None:
    objective = _stage1()
    _fill(objective)
    ours, theirs = objective.network.context, objective.average.context
    assert ours is not None and theirs is not None and ours.context_centres.any()
    assert torch.equal(ours.context_centres, theirs.context_centres) and torch.equal(ours.shift, theirs.shift)


def test_only_tagged_classes_enter_the_bank_and_it_forgets_the_oldest() -> None:
    objective = _stage1(options=replace(EAGER, bank_rows=5, least_rows=5, summarise_every=100))
    for _ in range(4):
        objective(_views([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]]), 0.5, _generator())
    assert [len(objective.bank.rows[n]) for n in range(3)] == [5, 0, 4]


def test_absent_classes_and_pixels_beyond_the_picture_take_no_part_in_the_self_supervision() -> None:
    objective, batch = _stage1(), _views([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert _fill(objective)["context"] == 1
    assert objective(batch, 0.5, _generator())["self_supervised"] == 0
    batch = _views()._replace(inside_Bhw=torch.zeros(2, 64, 96, dtype=torch.bool))
    assert objective(batch, 0.5, _generator())["self_supervised"] == 0


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_both_maps_teach_every_weight_and_the_average_learns_nothing(precision: torch.dtype) -> None:
    objective = _stage1()
    _fill(objective)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        losses = objective(_views(), 0.5, _generator())
    losses["self_supervised"].backward()
    assert all(p.grad is not None and p.grad.any() for p in objective.network.parameters())
    assert all(p.grad is None for p in objective.average.parameters())


def test_the_classification_teaches_neither_sides_nor_projection() -> None:
    objective = _stage1()
    _fill(objective)
    objective(_views(), 0.5, _generator())["classification"].backward()
    taught = {name.split(".")[0] for name, p in objective.network.named_parameters() if p.grad is not None}
    assert taught == {"backbone", "classifier"}


def test_a_network_without_context_is_trained_as_sipe() -> None:
    config = replace(CAM, context=0, members=("cam", "is_cam"))
    losses = _fill(_stage1(config), steps=4)
    assert losses["context"] == 0 and losses["self_supervised"] > 0


def test_with_a_background_the_first_tag_is_not_asked_for() -> None:
    objective = _stage1(replace(CAM, background=True))
    assert objective.network.classifier.out_channels == 2 and len(objective.bank.rows) == 2
    one, other = (objective(_views([[tag, 1.0, 0.0]] * 2), 0.5, _generator()) for tag in (0.0, 1.0))
    assert one["classification"].item() == pytest.approx(other["classification"].item())


def test_no_pixel_of_a_mask_is_looked_at() -> None:
    one, other = _stage1(), _stage1()
    batch = _views()
    blank = batch._replace(image_B3hw=batch.image_B3hw[:0], label_Bhw=batch.label_Bhw[:0])
    assert one(batch, 0.5, _generator())["total"] == other(blank, 0.5, _generator())["total"]


# -- stage 2: a segmentation network from the maps ------------------------------------------------


def _stage2(folder: Path, **config: object) -> MaskObjective:
    shape = CpalConfig(3, net="deeplabv2", width=2, scales=(1.0, 0.5), members=("scale1", "scale0.5"))
    network = _built(replace(shape, **config))  # type: ignore[arg-type]
    path = str(_checkpoint(folder / "maps.safetensors"))
    objective = build_objective(network, copy.deepcopy(network).requires_grad_(False), {"maps": path})
    assert isinstance(objective, MaskObjective)
    return objective.train()


def test_pseudo_masks_hold_tagged_classes_inside_the_picture_only(tmp_path: Path) -> None:
    objective, batch = _stage2(tmp_path), _views([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    inside_Bhw = torch.ones(2, 64, 96, dtype=torch.bool)
    inside_Bhw[:, :8] = False
    pseudo_Bhw = draw_masks(objective.teacher, batch._replace(inside_Bhw=inside_Bhw))
    assert (pseudo_Bhw[:, :8] == IGNORE).all()
    assert set(pseudo_Bhw[0, 8:].unique().tolist()) <= {0, 2} and (pseudo_Bhw[1, 8:] == 1).all()


def test_the_loss_is_the_mean_over_members_of_the_cross_entropy_against_the_pseudo_masks(tmp_path: Path) -> None:
    objective, batch = _stage2(tmp_path), _views()
    pseudo_Bhw = draw_masks(objective.teacher, batch)
    one, half = objective.network.encode(batch.strong_B3hw)
    by_hand = (cross_entropy(one, pseudo_Bhw) + cross_entropy(half, pseudo_Bhw)) / 2
    assert objective(batch, 0.5, _generator())["total"].item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_the_masks_teacher_stays_in_eval_mode_and_learns_nothing(tmp_path: Path) -> None:
    objective = _stage2(tmp_path)
    before = copy.deepcopy(objective.teacher.state_dict())
    objective(_views(), 0.5, _generator())["total"].backward()
    assert objective.training and not any(m.training for m in objective.teacher.modules())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), objective.teacher.state_dict().values(), strict=True))
    assert all(p.grad is None for p in (*objective.teacher.parameters(), *objective.average.parameters()))
    assert all(p.grad is not None for p in objective.network.parameters())


def test_a_network_with_dropout_is_trained_with_one_mask_per_picture(tmp_path: Path) -> None:
    objective = _stage2(
        tmp_path, net="wrn38", width=1, scales=(1.0,), members=("logits",), sampling="dropout"
    )  # fmt: skip
    seen: list[torch.Tensor] = []
    objective.network.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    assert objective(views := _views(), 0.5, _generator())["total"].isfinite()
    assert seen[0].shape == (1, len(views.strong_B3hw), 8) and {*seen[0].unique().tolist()} == {0.0, 2.0}


# -- both -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
def test_a_killed_run_goes_on_with_identical_numbers(stage: int, tmp_path: Path) -> None:
    whole, killed, resumed = (_training(tmp_path, stage=stage) for _ in range(3))
    expected = [whole.advance(step / 8) for step in range(8)]
    first = [killed.advance(step / 8) for step in range(5)]
    killed.save(tmp_path / "state.ckpt")
    resumed.resume(tmp_path / "state.ckpt")
    assert first + [resumed.advance(step / 8) for step in range(5, 8)] == expected
    if stage == 1:
        assert expected[-1]["context"] == 1 and first[0]["context"] == 0
    for ours, theirs in zip(whole.average.state_dict().values(), resumed.average.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_in_half_precision_is_close_to_one_in_full(stage: int, tmp_path: Path) -> None:
    half = _training(tmp_path, stage=stage, precision="bf16-mixed").advance(0.0)
    full = _training(tmp_path, stage=stage).advance(0.0)
    assert half == pytest.approx(full, rel=0.1, abs=0.05)


@pytest.mark.parametrize(("stage", "name"), [(1, "classification"), (2, "total")])
def test_a_few_steps_lower_the_loss(stage: int, name: str, tmp_path: Path) -> None:
    training = _training(tmp_path, stage=stage)
    losses = [training.advance(0.2)[name] for _ in range(24)]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_pixels_of_masks_under_unchanged_tags_change_no_number(tmp_path: Path) -> None:
    frames = find_data("shapes").load(tmp_path, "train")
    assert isinstance(frames, Frames)
    recipe = replace(_recipe(tmp_path, stage=1), scale=(1.0, 1.0))  # whole frames, so that tags stay as they are
    upside_down = replace(frames, label_NHW=frames.label_NHW.flip(1))
    assert len(choose_split(frames, recipe)[0]) == 0
    one, other = Training(recipe, frames, 3), Training(recipe, upside_down, 3)
    assert [one.advance(0.5) for _ in range(3)] == [other.advance(0.5) for _ in range(3)]


def test_a_recipe_without_tags_is_refused(tmp_path: Path) -> None:
    batch = tiny.batch(size=(64, 96))
    for objective in (_stage1(), _stage2(tmp_path)):
        with pytest.raises(BadOption, match="the recipe wants weak_labels: tags"):
            objective(batch, 0.5, _generator())


def test_options_that_cannot_be_followed_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadArtifact, match="unknown field 'bank'"):
        read_cam_options({"bank": 3})
    with pytest.raises(BadOption, match="bank_rows 10, least_rows 50 and summarise_every 100"):
        read_cam_options({"bank_rows": 10})
    segmenter = CpalConfig(3, net="deeplabv2", width=2, members=("scale1",))
    path = _checkpoint(tmp_path / "other.safetensors", segmenter)
    with pytest.raises(BadOption, match=r"one of cpal that draws maps \(net: cam\) is wanted"):
        build_objective(_built(segmenter), _built(segmenter), {"maps": str(path)})
    _, maps = load_checkpoint(_checkpoint(tmp_path / "maps.safetensors", replace(CAM, num_classes=2)))
    assert isinstance(maps, CamNetwork)
    with pytest.raises(BadOption, match="the maps are of 2 classes, the data has 3"):
        draw_masks(maps, _views())
