"""A run can be killed at any step, learns something, and writes a checkpoint that says what it is."""

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from lightning_fabric.plugins.precision import MixedPrecision
from torch.nn import functional as F

from penumbra.__main__ import main
from penumbra.models.card import IGNORE
from penumbra.models.checkpoint import load_checkpoint, read_card
from penumbra.models.confusion import confusion, intersection_over_union
from penumbra.models.errors import BadArtifact, BadOption, ModelFault
from penumbra.training import loop
from penumbra.training.augment import normalise
from penumbra.training.data import find_data
from penumbra.training.evaluate import measure
from penumbra.training.frames import Frame, Frames
from penumbra.training.loop import Training, schedule, train
from penumbra.training.recipe import read_recipe
from tests.models.small import card_of, seeded
from tests.training import tiny

METHODS = ("np_semiseg", "cps")
RECIPES = Path(__file__).parents[2] / "training" / "recipes"


def _training(method: str, folder: Path) -> Training:
    data = find_data("shapes")
    return Training(tiny.recipe(method, folder, steps=8), data.load(folder, "train"), len(data.classes))


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_with_identical_numbers(method: str, tmp_path: Path) -> None:
    whole, killed, resumed = (_training(method, tmp_path) for _ in range(3))
    expected = [whole.advance(step / 4) for step in range(4)]
    first = [killed.advance(step / 4) for step in range(2)]
    killed.save(tmp_path / "state.ckpt")
    resumed.resume(tmp_path / "state.ckpt")
    assert first + [resumed.advance(step / 4) for step in (2, 3)] == expected
    for ours, theirs in zip(whole.average.state_dict().values(), resumed.average.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("method", METHODS)
def test_a_few_steps_lower_the_loss(method: str, tmp_path: Path) -> None:
    training = _training(method, tmp_path)
    losses = [training.advance(0.2)["supervised"] for _ in range(32)]
    assert sum(losses[-4:]) < 0.75 * sum(losses[:4])


def test_a_training_that_diverges_ends_in_a_sentence_and_leaves_its_weights_as_they_were(tmp_path: Path) -> None:
    training = _training("cps", tmp_path)
    weight = next(training.objective.network.parameters())
    weight.data[:] = float("inf")
    before = [tensor.clone() for tensor in training.average.state_dict().values()]
    with pytest.raises(ModelFault, match=r"diverged in step 1 \(total nan, .*a learning_rate below 0.002 is wanted"):
        training.advance(0.5)
    for ours, theirs in zip(training.average.state_dict().values(), before, strict=True):
        assert torch.equal(ours, theirs)


def test_a_recipe_whose_card_nothing_could_read_is_refused_before_its_training(tmp_path: Path) -> None:
    recipe = dataclasses.replace(tiny.recipe("cps", tmp_path, steps=10**9), name="my run")
    with pytest.raises(BadArtifact, match="the card of 'my run': name is no directory's"):
        train(recipe, tmp_path, runs_dir=tmp_path / "runs")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_writes_a_checkpoint_whose_card_states_data_and_figures(method: str, tmp_path: Path) -> None:
    lines: list[str] = []
    recipe = tiny.recipe(method, tmp_path, steps=3)
    path = train(recipe, tmp_path, runs_dir=tmp_path / "runs", report=lambda share, line: lines.append(line))
    card, network = load_checkpoint(path)
    assert card.provenance.data.startswith("procedural shapes train, 4 of 16 frames labelled (0.25, seed 0)")
    assert 0 <= card.provenance.metrics["val/seg/mIoU"] <= 1
    assert card.sampling == network.sampling and card.method == method
    assert (tmp_path / "runs" / recipe.name / "labelled.txt").read_text().count("\n") == 4
    assert lines[-1].startswith("wrote ")


def test_the_time_of_a_validation_is_none_of_the_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that a step moves by a second, and a look at a validation frame by an hour."""
    now = itertools.count()
    hours = [0.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: next(now) + hours[0]))

    class Slow(Frames):
        def __getitem__(self, index: int) -> Frame:
            hours[0] += 3600
            return super().__getitem__(index)

    data, recipe = find_data("shapes"), tiny.recipe("cps", tmp_path, steps=3)
    train_frames, val = data.load(tmp_path, "train"), data.load(tmp_path, "val")
    assert isinstance(val, Frames)
    training = Training(dataclasses.replace(recipe, validate_every_minutes=0.0), train_frames, len(data.classes))
    card = loop.card_of(recipe, data, num_frames=16, num_labelled=4, network=training.average)
    slow = Slow(val.names, val.image_N3HW, val.label_NHW)
    loop.run(training, card, slow, tmp_path, minutes=None, report=lambda share, line: None)
    assert training.step == 3 and hours[0] > 0 and training.elapsed_s < 60


def test_a_state_of_other_classes_is_refused_with_a_sentence(tmp_path: Path) -> None:
    _training("cps", tmp_path).save(tmp_path / "state.ckpt")
    shapes = find_data("shapes").load(tmp_path, "train")
    with pytest.raises(BadOption, match=r"state\.ckpt was begun with other classes"):
        Training(tiny.recipe("cps", tmp_path, steps=8), shapes, 4).resume(tmp_path / "state.ckpt")


def test_a_batch_of_one_view_is_refused_with_a_sentence(tmp_path: Path) -> None:
    shapes = find_data("shapes").load(tmp_path, "train")
    training = Training(tiny.recipe("cps", tmp_path, steps=8, batch=1), shapes, 3)
    with pytest.raises(BadOption, match="batches of two or more are wanted"):
        training.advance(0.5)


@pytest.mark.parametrize(
    "said", ["steps: 0", "steps: -5", "crop: [0, 8]", "scale: [0, 1]", "labelled_batch: -1", "learning_rate: 0"]
)
def test_a_recipe_of_no_size_is_refused_by_its_fields_name(said: str, tmp_path: Path) -> None:
    name = said.partition(":")[0]
    lines = (RECIPES / "cps-camvid.yaml").read_text().splitlines()
    (tmp_path / "r.yaml").write_text("\n".join([*(line for line in lines if not line.startswith(f"{name}:")), said]))
    with pytest.raises(BadOption, match=rf"recipe\.{name}"):
        read_recipe(tmp_path / "r.yaml")


def test_a_state_of_another_recipe_is_refused_with_a_sentence(tmp_path: Path) -> None:
    training = _training("cps", tmp_path)
    training.save(tmp_path / "state.ckpt")
    state = torch.load(tmp_path / "state.ckpt")
    del state["recipe"]["leave_out"]  # a field younger than the state is no other recipe
    torch.save(state, tmp_path / "state.ckpt")
    training.resume(tmp_path / "state.ckpt")
    with pytest.raises(BadOption, match=r"state\.ckpt was begun with another recipe"):
        _training("np_semiseg", tmp_path).resume(tmp_path / "state.ckpt")
    torch.save({"recipe": state["recipe"], "step": 3}, tmp_path / "state.ckpt")
    with pytest.raises(BadOption, match=r"state\.ckpt is in the way, and is no state of a training"):
        training.resume(tmp_path / "state.ckpt")


def test_a_killed_run_goes_on_with_the_scale_of_its_gradients(tmp_path: Path) -> None:
    """As in half precision on a GPU, which does not begin anew with a scale that overflows."""
    killed, resumed = (_training("cps", tmp_path) for _ in range(2))
    for training, scale in ((killed, 128.0), (resumed, 65536.0)):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        training.fabric.strategy.precision = MixedPrecision("16-mixed", "cpu", scaler)
    killed.save(tmp_path / "state.ckpt")
    resumed.resume(tmp_path / "state.ckpt")
    assert resumed.fabric.strategy.precision.state_dict()["scale"] == 128


def test_the_rate_rises_then_falls_to_zero() -> None:
    assert schedule(0.0, warmup=0.1) < 0.02
    assert schedule(0.1, warmup=0.1) == pytest.approx(1)
    assert schedule(0.55, warmup=0.1) == pytest.approx(0.5)
    assert schedule(1.0, warmup=0.1) == pytest.approx(0)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_named_after_its_file(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.name == path.stem and find_data(recipe.data)


def test_a_recipe_takes_from_its_base_what_it_does_not_say() -> None:
    base, own = (read_recipe(RECIPES / f"supervised-camvid{end}.yaml") for end in ("", "-no_0001TP"))
    assert own.leave_out == ("0001TP",) and own.name != base.name and own.checkpoint != base.checkpoint
    assert dataclasses.replace(own, leave_out=(), name=base.name, checkpoint=base.checkpoint) == base


@pytest.mark.parametrize("base", ["3", "[a.yaml]", "empty.yaml", ""])
def test_a_base_that_is_no_recipe_is_refused(base: str, tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "own.yaml").write_text(f"base: {base}\nname: own\n")
    with pytest.raises(BadOption, match=r"own\.yaml: base is .*; the name of another recipe beside it is wanted"):
        read_recipe(tmp_path / "own.yaml")


def test_what_a_network_has_no_use_for_is_refused(tmp_path: Path) -> None:
    frames = find_data("shapes").load(tmp_path, "train")
    for changes in ({"host_rate": 0.1}, {"frozen_share": 0.1}):
        with pytest.raises(BadOption, match="are of an EfficientNet, which is not there"):
            Training(dataclasses.replace(tiny.recipe("cps", tmp_path, steps=1), **changes), frames, 3)


def test_the_card_says_what_a_training_has_not_seen(tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        tiny.recipe("cps", tmp_path, steps=1), leave_out=("train00", "train07"), void_classes=("disc",)
    )
    card = read_card(train(recipe, tmp_path, runs_dir=tmp_path / "runs"))
    assert card.provenance.data.startswith(
        "procedural shapes train without train00 and train07 and disc, 4 of 14 frames"
    )
    assert card.provenance.metrics.get("val/seg/IoU/disc", 0) == 0, "where it is answered, it is wrong"


def test_a_misspelt_recipe_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text((RECIPES / "cps-camvid.yaml").read_text() + "learning_rat: 1\n")
    with pytest.raises(BadOption, match="unknown field 'learning_rat'"):
        read_recipe(path)


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        (
            "{bands: [red, green, nir]}",
            "input reads red, green, nir as uint8; networks are trained on red, green, blue",
        ),
        ("{dtype: uint16}", "input reads red, green, blue as uint16"),
        ("{mean: [0.5]}", "input.mean has 1 values and input.std 3"),
    ],
)
def test_a_recipe_for_other_pictures_than_training_reads_is_refused(tmp_path: Path, spec: str, named: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text((RECIPES / "cps-camvid.yaml").read_text() + f"input: {spec}\n")
    with pytest.raises(BadOption, match=named):
        read_recipe(path)


def test_the_command_answers_a_mistake_with_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("name: x\nlearning_rat: 1\n")
    answer = CliRunner().invoke(main, ["train", str(recipe), "--data", str(tmp_path)])
    assert answer.exit_code == 2
    assert answer.stderr.startswith("penumbra: ") and "learning_rat" in answer.stderr and answer.stderr.count("\n") == 1


def test_intersection_over_union_ignores_void_and_absent_classes() -> None:
    label_hw, predicted_hw = torch.tensor([[0, 0, 1, 255]]), torch.tensor([[0, 1, 1, 0]])
    iou_K = intersection_over_union(confusion(predicted_hw, label_hw, num_classes=3))
    assert iou_K[:2].tolist() == [0.5, 0.5] and iou_K[2].isnan()


def test_a_frame_without_a_label_spoils_no_figure_and_the_likelihood_is_that_of_the_mean_probability(
    rng: np.random.Generator,
) -> None:
    network, card = seeded("cps"), card_of("cps")
    images = torch.from_numpy(rng.integers(0, 256, (2, 3, 96, 128), dtype=np.uint8))
    labels = images.argmax(1).to(torch.uint8)
    alone = measure(network, Frames(("a",), images[:1], labels[:1]), card=card)
    labels[1] = IGNORE
    both = measure(network, Frames(("a", "b"), images, labels), card=card)
    assert both == alone and np.isfinite(list(both.values())).all()
    with torch.inference_mode():
        logits_SBKhw = network(normalise(images[:1].float() / 255, card.input), torch.zeros(2, 1, 0))
    logits_SKHW = F.interpolate(logits_SBKhw[:, 0], size=(96, 128), mode="bilinear", align_corners=True)
    truth_HW = logits_SKHW.softmax(1).mean(0).gather(0, images[0].argmax(0)[None])
    assert both["nll_nats"] == pytest.approx(-float(truth_HW.log().mean()), rel=1e-5)
