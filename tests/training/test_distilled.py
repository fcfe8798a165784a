"""Distilling an ensemble into the linear head: what is learnt, what stays, and the two moments in closed form."""

import copy
import dataclasses
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from penumbra.models.card import InputSpec, Provenance
from penumbra.models.checkpoint import load_checkpoint, save_checkpoint
from penumbra.models.errors import BadOption
from penumbra.models.np_semiseg.distilled import DistilledObjective, moments
from penumbra.models.np_semiseg.linear import LinearHead
from penumbra.models.np_semiseg.net import NpNetwork
from penumbra.training.data import find_data
from penumbra.training.evaluation.shift import find_seen
from penumbra.training.loop import Training, build_network, card_of, read_sources, train
from penumbra.training.objective import build_objective
from penumbra.training.recipe import Recipe
from tests.training import tiny

LINEAR = {"head": "linear", "linear": {"rank": 4, "hidden": 8}}


def save_untrained(method: str, path: Path, **config: Any) -> str:
    """A checkpoint of a tiny network with random weights."""
    recipe = tiny.recipe(method, path.parent, steps=1)
    recipe = dataclasses.replace(recipe, config=recipe.config | config)
    network = build_network(recipe, 3).eval()
    save_checkpoint(path, card_of(recipe, find_data("shapes"), num_frames=1, num_labelled=1, network=network), network)
    return str(path)


def recipe_of(folder: Path, *, steps: int = 8, **facts: Any) -> Recipe:
    """A recipe whose host and teachers lie in the folder."""
    host, cps = (save_untrained(method, folder / f"{method}.safetensors") for method in ("np_semiseg", "cps"))
    recipe = tiny.recipe("np_semiseg", folder, steps=steps)
    options = {"kind": "distilled", "host": host, "teachers": [cps]}
    return dataclasses.replace(recipe, name="linear", config=recipe.config | LINEAR, objective=options, **facts)


def objective_of(folder: Path, **options: Any) -> DistilledObjective:
    recipe = recipe_of(folder)
    network = build_network(recipe, 3)
    average = copy.deepcopy(network).requires_grad_(False).eval()
    objective = build_objective("np_semiseg", network, average, recipe.objective | options).train()
    assert isinstance(objective, DistilledObjective)
    return objective


def test_two_members_that_disagree_completely_carry_ln2_nats_and_equal_ones_none() -> None:
    sure = 50 * torch.eye(2)[:, None, :, None, None]
    log_p_BKhw, mutual_Bhw = moments(sure)
    assert torch.allclose(log_p_BKhw.exp(), torch.full((1, 2, 1, 1), 0.5))
    assert float(mutual_Bhw) == pytest.approx(math.log(2))
    assert float(moments(sure[:1].repeat(3, 1, 1, 1, 1))[1]) == 0


def test_only_the_pointwise_network_learns_and_the_hosts_statistics_stay(tmp_path: Path) -> None:
    objective = objective_of(tmp_path)
    before = copy.deepcopy(objective.state_dict())
    objective(tiny.batch(), 0.5, torch.Generator().manual_seed(0))["total"].backward()
    taught = {name for name, p in objective.named_parameters() if p.grad is not None and p.grad.any()}
    layers = ("pointwise.0", "pointwise.2", "last")
    assert taught == {f"network.head.{layer}.{what}" for layer in layers for what in ("weight", "bias")}
    after = objective.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    objective(tiny.batch(), 0.0, torch.Generator().manual_seed(0))
    changed = {name for name, value in objective.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("network.head.standardise.") for name in changed)


def test_the_student_begins_as_its_host_answers(tmp_path: Path) -> None:
    objective = objective_of(tmp_path)
    _, host = load_checkpoint(tmp_path / "np_semiseg.safetensors")
    image_B3hw = tiny.batch().image_B3hw
    for network in (objective.network, objective.average):
        ours = network.eval()(image_B3hw, torch.zeros(1, 2, 4))
        assert torch.allclose(ours, host(image_B3hw, torch.zeros(1, 2, 8)), atol=1e-5)


def test_a_few_steps_bring_the_answer_and_the_disagreement_nearer_to_the_teachers(tmp_path: Path) -> None:
    objective = objective_of(tmp_path)
    optimizer = torch.optim.Adam([p for p in objective.network.parameters() if p.requires_grad], lr=0.02)
    history = []
    for _ in range(40):
        losses = objective(tiny.batch(), 0.5, torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
        history.append({name: float(value.detach()) for name, value in losses.items()})
    assert history[-1]["answer"] < history[0]["answer"] and history[-1]["spread"] < 0.5 * history[0]["spread"]


def test_training_writes_a_checkpoint_whose_density_knows_its_labelled_frames(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, labelled_batch=2, corruptions=("fog", "gaussian_noise"))
    path = train(recipe, tmp_path, runs_dir=tmp_path / "runs")
    card, network = load_checkpoint(path)
    assert "; views spoiled by fog, gaussian_noise and pasted objects; with" in card.provenance.data
    assert find_seen(card) == ["fog", "gaussian_noise"]
    assert card.sampling.law == "antithetic" and [extra.name for extra in card.extra_maps] == ["density"]
    assert isinstance(network, NpNetwork) and isinstance(network.head, LinearHead)
    assert float(network.head.density.share_K.sum()) == pytest.approx(1, abs=1e-3)
    frames = find_data("shapes").load(tmp_path, "train")
    image_3HW = frames[0].image_3HW
    plain_13HW = (image_3HW[None].float() / 255 - 0.45) / 0.23
    known, strange = (float(network.encode(x)[-1].mean()) for x in (plain_13HW, torch.randn_like(plain_13HW)))
    assert known < strange


def test_the_card_names_what_its_teachers_were_given_and_none_may_have_seen_what_is_left_out(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    facts: dict[str, Any] = {"num_frames": 1, "num_labelled": 1, "network": build_network(recipe, 3)}
    made = card_of(recipe, find_data("shapes"), **facts).provenance
    assert all(made.data.count(f"; with {name}-shapes: procedural shapes train") == 1 for name in ("np_semiseg", "cps"))
    assert made.licence == find_data("shapes").licence
    with pytest.raises(
        BadOption, match=r"np_semiseg\.safetensors was trained on .* leaves train07 out; one that has not"
    ):
        card_of(dataclasses.replace(recipe, leave_out=("train07",)), find_data("shapes"), **facts)


@pytest.mark.parametrize(
    ("told", "is_refused"),
    [
        ("shapes train without 0 and train, 4 of 9", False),
        ("shapes train without 0 and train, 4 of 9; with another: shapes train without 0 and train, 3 of 9", False),
        ("shapes train without 0 and train, 4 of 9; with another: shapes train, 4 of 16", True),
        ("shapes train without 0, 4 of 16 frames labelled", True),
        ("shapes train, 4 of 16 frames labelled (0.25, seed 0)", True),
        ("", True),
    ],
)
def test_each_training_that_a_teacher_tells_of_must_name_what_is_left_out(
    told: str, is_refused: bool, tmp_path: Path
) -> None:
    """A drive whose name is part of 0.25, and a class that is called as the split is."""
    recipe, path = recipe_of(tmp_path), tmp_path / "np_semiseg.safetensors"
    card, network = load_checkpoint(path)
    save_checkpoint(path, dataclasses.replace(card, provenance=Provenance(told)), network)
    data = dataclasses.replace(find_data("shapes"), title="shapes")
    objective = {"kind": "distilled", "host": str(path), "teachers": [str(path)]}
    recipe = dataclasses.replace(recipe, leave_out=("01",), void_classes=("train",), objective=objective)
    with pytest.raises(BadOption, match="one that has not") if is_refused else nullcontext():
        read_sources(recipe, data)


def test_a_training_that_was_interrupted_ends_with_the_same_weights(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, steps=4, corruptions=("darken",))
    frames = find_data("shapes").load(tmp_path, "train")
    whole, begun, resumed = (Training(recipe, frames, 3) for _ in range(3))
    for step in range(4):
        whole.advance(step / 4)
    for step in range(2):
        begun.advance(step / 4)
    begun.save(tmp_path / "state.ckpt")
    resumed.resume(tmp_path / "state.ckpt")
    for step in range(2, 4):
        resumed.advance(step / 4)
    for training in (whole, resumed):
        training.finish()
    ours, theirs = whole.average.state_dict(), resumed.average.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("fact", ["host", "teacher", "kind", "nobody", "single"])
def test_what_cannot_be_distilled_is_refused(fact: str, tmp_path: Path) -> None:
    other = save_untrained("np_semiseg", tmp_path / "other.safetensors", hidden=24)
    options: dict[str, Any]
    options, sentence = {
        "host": ({"host": other}, "other.safetensors is not the film network of recipe.config"),
        "teacher": ({"teachers": [foreign(tmp_path)]}, "foreign.safetensors has 3 classes and InputSpec"),
        "nobody": ({"teachers": []}, "teachers are 0, samples 8"),
        "single": ({"samples": 1, "strong_every": 0}, "samples 1 and strong_every 0; at least 1, 2 and 1 are wanted"),
        "kind": ({"kind": "np"}, "recipe.config.head is 'linear'; 'linear' is trained by the objective 'distilled'"),
    }[fact]
    with pytest.raises(BadOption, match=sentence):
        objective_of(tmp_path, **options)


def foreign(folder: Path) -> str:
    """A teacher that takes its input otherwise."""
    card, network = load_checkpoint(Path(save_untrained("cps", folder / "cps.safetensors")))
    save_checkpoint(folder / "foreign.safetensors", dataclasses.replace(card, input=InputSpec(scale=1.0)), network)
    return str(folder / "foreign.safetensors")


def test_a_head_that_is_fitted_in_the_end_wants_labelled_frames(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, labelled_fraction=0.0, labelled_batch=0, weak_labels="tags")
    with pytest.raises(BadOption, match="fitted to labelled frames in the end, and there are none"):
        Training(recipe, find_data("shapes").load(tmp_path, "train"), 3)
