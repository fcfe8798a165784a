"""Shifts and controls of toy models, whose answers to changed pictures are known."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from penumbra.__main__ import main
from penumbra.export.bundle import export_network
from penumbra.models.card import IGNORE, Novelty, ScaleRule, dump_card, parse_card
from penumbra.models.errors import BadOption
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.training.corruptions import CORRUPTIONS
from penumbra.training.evaluation.answers import Question
from penumbra.training.evaluation.figures import Evaluation
from penumbra.training.evaluation.run import evaluate, segment_frames
from penumbra.training.evaluation.shift import (
    SCALES,
    VARIANTS,
    Changed,
    find_class,
    find_seen,
    find_strange,
    measure_shift,
    paste_objects,
)
from penumbra.training.evaluation.temperature import control_cards, single_pass
from penumbra.training.evaluation.verb import tables_of
from penumbra.training.frames import Frames, hide_classes
from penumbra.training.plots import shifts
from tests.conftest import GAIN, picture, toy_card

TRUE_TEMPERATURE = 2.5
FORMS = ("pointwise", "latent", "dropout", "bright")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("store")
    for form in FORMS:
        card, network = toy_card(form)
        export_network(network, card, store)
    return store


@pytest.fixture(scope="module")
def segmenter(store: Path) -> Iterator[Segmenter]:
    with Segmenter.open(store, threads=1, tuning=Tuning(1, 1)) as opened:
        yield opened


@pytest.fixture(scope="module")
def frames() -> Frames:
    """Noise whose truth is drawn from softmax(logits / 2.5) of the pointwise toy, which is thus too sure of itself."""
    rng = np.random.Generator(np.random.PCG64(3))
    images = np.stack([picture(rng, 50, 60) for _ in range(12)])
    logits = GAIN * images / 255 / TRUE_TEMPERATURE
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(-1).astype(np.uint8)
    labels[:, 0] = IGNORE
    names = tuple(f"a_{i}" for i in range(12))
    return Frames(names, torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels))


def question(form: str, **options: int) -> Question:
    return Question(f"toy-{form}", Path("nowhere"), **options)  # type: ignore[arg-type]


def test_the_controls_halves_are_whole_blocks(frames: Frames, segmenter: Segmenter) -> None:
    """Frames beside each other are nearly one; of a single block the halves meet once."""
    many = dataclasses.replace(
        frames, names=tuple(f"a_{i}" for i in range(45)), image_N3HW=frames.image_N3HW[[i % 12 for i in range(45)]],
        label_NHW=frames.label_NHW[[i % 12 for i in range(45)]],
    )  # fmt: skip

    def halves(indices: range) -> list[list[int]]:
        cards = control_cards(segmenter, question("pointwise"), many, list(indices))
        return [[index for index in sorted(cards) if cards[index] is card] for card in (cards[0], cards[indices[-1]])]

    assert halves(range(40)) == [[*range(10), *range(20, 30)], [*range(10, 20), *range(30, 40)]]
    assert halves(range(7)) == [[0, 1, 2], [3, 4, 5, 6]]


def test_a_latent_whose_draws_have_a_law_has_a_control_too(segmenter: Segmenter) -> None:
    card = segmenter.find("toy-latent").card
    paired = dataclasses.replace(card, sampling=dataclasses.replace(card.sampling, law="antithetic"))
    assert parse_card(dump_card(single_pass(paired))).sampling.kind == "dropout"


@pytest.mark.parametrize("form", ["latent", "dropout"])
def test_the_controls_pass_is_that_of_the_mean_of_the_noise(segmenter: Segmenter, frames: Frames, form: str) -> None:
    own = segmenter.find(f"toy-{form}").card
    (answer,) = segment_frames(segmenter, question(form), frames, {0: single_pass(own)}, title="")
    (plain,) = segment_frames(
        segmenter, question("pointwise"), frames, {0: segmenter.find("toy-pointwise").card}, title=""
    )
    assert np.abs(answer.prob_HW - plain.prob_HW).max() < 1e-5
    assert "mutual_information" not in answer.maps
    assert segmenter.find(f"toy-{form}").card is own, "the model is left as it was"


@pytest.mark.parametrize("form", ["pointwise", "latent"])
def test_the_control_finds_the_temperature_on_the_other_half(segmenter: Segmenter, frames: Frames, form: str) -> None:
    cards = control_cards(segmenter, question(form), frames, list(range(12)))
    first, last = cards[0].readout.temperature, cards[11].readout.temperature
    assert first != last and len({card.readout.temperature for card in cards.values()}) == 2
    assert first == pytest.approx(TRUE_TEMPERATURE, rel=0.05) == last
    figures = evaluate(segmenter, question(form), frames, cards=cards).evaluation.figures()
    assert figures["cal/ECE"] < 0.02 < evaluate(segmenter, question(form), frames).evaluation.figures()["cal/ECE"]


def test_a_control_of_many_samples_or_of_one_frame_is_refused(segmenter: Segmenter, frames: Frames) -> None:
    with pytest.raises(BadOption, match="samples is 4 and the control is a single pass; leave one of both out"):
        control_cards(segmenter, question("latent", samples=4), frames, [0, 1])
    with pytest.raises(BadOption, match="half of the frames fit the control's temperature, of 1; at least 2"):
        control_cards(segmenter, question("latent"), frames, [0])


def test_a_changed_frame_depends_on_seed_and_index_alone(frames: Frames) -> None:
    noisy = [Changed(frames, VARIANTS["gaussian_noise-1"], seed) for seed in (0, 0, 1)]
    assert torch.equal(noisy[0][3][0], noisy[1][3][0]) and not torch.equal(noisy[0][3][0], noisy[2][3][0])
    assert torch.equal(noisy[0][3][1], frames[3][1]) and len(noisy[0]) == 12 and noisy[0].names == frames.names


def test_void_pixels_stay_void_where_a_frame_is_changed(frames: Frames) -> None:
    void_NHW = torch.zeros_like(frames.label_NHW, dtype=torch.bool)
    void_NHW[:, :, : frames.label_NHW.shape[2] // 2] = True
    void = dataclasses.replace(frames, voids=tuple(void_NHW))
    assert torch.equal(Changed(void, VARIANTS["darken-1"], 0)[3].void_HW, void_NHW[3])
    for name in SCALES:
        _, label_HW, void_HW, *_ = Changed(void, VARIANTS[name], 0)[3]
        assert void_HW is not None and void_HW.shape == label_HW.shape and void_HW.float().mean() == 0.5


def errors(frames: Frames, factor: float) -> list[float]:
    """The wrong share of each frame at a factor of light, by its first brightest channel; darkness ties some."""
    dark_N3HW = np.rint(factor * frames.image_N3HW.numpy().astype(np.float32))
    wrong = dark_N3HW.argmax(1) != frames.label_NHW.numpy()
    return [
        float(x_HW[known_HW].mean()) for x_HW, known_HW in zip(wrong, frames.label_NHW.numpy() != IGNORE, strict=True)
    ]


def probability_above(ours: list[float], theirs: list[float]) -> float:
    return float(np.mean([(a > b) + 0.5 * (a == b) for a in ours for b in theirs]))


def test_another_scale_is_another_than_that_at_which_the_card_has_a_frame_run(
    segmenter: Segmenter, frames: Frames
) -> None:
    asked, own = question("bright", every=3), segmenter.find("toy-bright").card
    ruled = dataclasses.replace(own, input=dataclasses.replace(own.input, resolution=ScaleRule("frame", 25)))
    clean = evaluate(segmenter, asked, frames, cards=dict.fromkeys(range(0, 12, 3), ruled))
    rows, half = measure_shift(segmenter, clean, frames)["variants"], dataclasses.replace(asked, scale=0.5)
    for name, change in SCALES.items():
        figures = evaluate(segmenter, half, Changed(frames, change, 0)).evaluation.figures()
        assert rows[name]["figures"]["seg/NLL"] == figures["seg/NLL"]


def test_darkness_brings_doubt_and_is_told_from_the_usual(segmenter: Segmenter, frames: Frames) -> None:
    """The toy's logits are the pixels: less light is less of them. Its card's rule of scale does not undo a change."""
    asked, own = question("bright", every=3), segmenter.find("toy-bright").card
    ruled = dataclasses.replace(own, input=dataclasses.replace(own.input, resolution=ScaleRule("frame", 50)))
    clean = evaluate(segmenter, asked, frames, cards=dict.fromkeys(range(0, 12, 3), ruled))
    shift = measure_shift(segmenter, clean, frames)
    rows = shift["variants"]
    assert rows.keys() == {"clean", *VARIANTS, "corruptions", "corruptions-unseen"} and len(VARIANTS) == 8 * 3 + len(
        SCALES
    )
    assert rows["darken-3"]["separation"] == {
        "error": pytest.approx(probability_above(errors(frames, 0.2)[::3], errors(frames, 1.0)[::3])),
        "confidence": 1, "entropy": 1, "brightness": 0,
    }  # fmt: skip
    assert set(rows["clean"]["separation"].values()) == {0.5}
    for name, change in SCALES.items():
        figures = evaluate(segmenter, asked, Changed(frames, change, 0)).evaluation.figures()
        assert rows[name]["figures"]["seg/NLL"] == figures["seg/NLL"]
    assert (
        rows["darken-3"]["means"]["entropy"] > rows["darken-1"]["means"]["entropy"] > rows["clean"]["means"]["entropy"]
    )
    assert rows["darken-2"]["figures"]["seg/mIoU"] == pytest.approx(rows["clean"]["figures"]["seg/mIoU"], abs=0.02)
    nll = [rows[name]["figures"]["seg/NLL"] for name in VARIANTS if name not in SCALES]
    assert rows["corruptions"]["figures"]["seg/NLL"] == pytest.approx(np.mean(nll), rel=1e-6)
    assert rows["corruptions-unseen"] == rows["corruptions"] and shift["seen"] == []
    assert shift["objects"].keys() == {"confidence", "entropy", "brightness"}


def test_corruptions_that_a_training_has_seen_are_marked_and_pooled_apart(segmenter: Segmenter, frames: Frames) -> None:
    card = segmenter.find("toy-pointwise").card
    provenance = dataclasses.replace(card.provenance, data="a train; views spoiled by fog, darken and pasted objects")
    assert find_seen(card) == [] and find_seen(dataclasses.replace(card, provenance=provenance)) == ["darken", "fog"]
    clean = evaluate(segmenter, question("pointwise", every=6), frames)
    shift = measure_shift(segmenter, clean, frames, seen=("darken", "fog"))
    rows = shift["variants"]
    unseen = [kind for kind in CORRUPTIONS if kind not in ("darken", "fog")]
    nll = [rows[f"{kind}-{severity}"]["figures"]["seg/NLL"] for kind in unseen for severity in (1, 2, 3)]
    assert rows["corruptions-unseen"]["figures"]["seg/NLL"] == pytest.approx(np.mean(nll), rel=1e-6)
    assert rows["corruptions-unseen"] != rows["corruptions"]
    shown = dict(tables_of({"shift": shift}))["pictures"]
    assert "fog-2 (seen)" in shown and "contrast-2" in shown and "corruptions-unseen" in shown
    assert "corruptions-unseen" not in measure_shift(segmenter, clean, frames, seen=CORRUPTIONS)["variants"]


def test_pixels_that_lost_their_label_are_found_by_what_they_look_like(segmenter: Segmenter, frames: Frames) -> None:
    bright = frames.image_N3HW.float().mean(1) > 150
    labels = frames.label_NHW.clone()
    labels[bright] = IGNORE
    changed = dataclasses.replace(frames, label_NHW=labels)
    found = find_strange(segmenter, evaluate(segmenter, question("bright"), frames), frames, changed)
    assert found["brightness"]["AUROC"] == pytest.approx(1, abs=1e-3) == found["brightness"]["AUPR"]
    assert found["brightness"]["FPR95"] == pytest.approx(0, abs=1e-3)


def test_objects_take_labels_away_and_a_hidden_class_too(frames: Frames) -> None:
    image, label = np.zeros((60, 80, 3), np.uint8), np.ones((60, 80), np.uint8)
    _, pasted = paste_objects(image, label, np.random.Generator(np.random.PCG64(0)))
    assert set(np.unique(pasted)) == {1, IGNORE}
    card, _ = toy_card("pointwise")
    assert find_class(card, "green") == 1
    assert set(hide_classes(frames, [1]).label_NHW.unique().tolist()) == {0, 2, IGNORE}
    with pytest.raises(BadOption, match="hidden is 'Moon'; the classes are red, green, blue"):
        find_class(card, "Moon")


def test_a_hidden_class_has_no_iou_though_pixels_of_others_are_called_it(segmenter: Segmenter, frames: Frames) -> None:
    apart = dataclasses.replace(hide_classes(frames, [1]), names=tuple(f"{i}_drive" for i in range(12)))
    evaluation = evaluate(segmenter, question("pointwise", hidden="green"), apart).evaluation
    figures, (low, high) = evaluation.figures(), evaluation.intervals(seed=0)["seg/mIoU"]
    assert evaluation.confusion_KK[0, 1] > 0 and np.isnan(figures["seg/IoU/green"])
    assert figures["seg/mIoU"] == pytest.approx((figures["seg/IoU/red"] + figures["seg/IoU/blue"]) / 2)
    assert low < figures["seg/mIoU"] < high


def test_novelty_is_measured_of_answers_made_as_it_is_told_of() -> None:
    card, _ = toy_card("bright")
    reference = Novelty("entropy", (0.1, 0.4), num_pictures=2, num_samples=8, data="made up")
    for asked, is_told in (((8, None), True), ((8, "none"), True), ((4, "flip"), False), ((8, "flip"), False)):
        for name, expected in (("entropy", is_told), ("brightness", True)):
            novelty = dataclasses.replace(reference, map=name)
            evaluation = Evaluation(dataclasses.replace(card, novelty=novelty), *asked)
            assert ("novelty" in evaluation.pictures) == expected


def test_an_interval_that_lies_above_its_figure_is_drawn_above_it_alone() -> None:
    row = {
        "figures": {"seg/mIoU": 0.5, "cal/ECE": 0.01},
        "intervals": {"seg/mIoU": (0.4, 0.7), "cal/ECE": (0.02, 0.03)},
    }
    variants = dict.fromkeys(
        ("clean", *(f"{kind}-{severity}" for kind in ("fog", "dark") for severity in (1, 2, 3))), row
    )
    about = dict.fromkeys(("model", "version", "set", "split", "frames", "samples"), 1)
    of_iou, of_ece, *_ = shifts(about | {"shift": {"variants": variants, "seen": []}}).axes
    for axes, ends in ((of_iou, (0.4, 0.7)), (of_ece, (0.01, 0.03))):
        (bars,) = axes.containers[0].lines[2]
        assert bars.get_segments()[0][:, 1] == pytest.approx(ends)


@pytest.mark.parametrize(
    "extra", [("--control",), pytest.param(("--shift", "--hidden", "red"), marks=pytest.mark.slow)]
)
def test_the_command_measures_shifts_and_controls(store: Path, tmp_path: Path, extra: tuple[str, ...]) -> None:
    arguments = ["evaluate", "toy-latent", "--data", tmp_path, "--set", "shapes", "--every", 4, "--store", store]
    arguments += [*extra, "--json", tmp_path / "out.json", "--plots", tmp_path / "plots"]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "out.json").read_text())
    if "--control" in extra:
        assert document["samples"] == 1 and len(document["temperatures"]) == 2 and "shift" not in document
    else:
        assert document["hidden"].keys() == {"red"} and "darken-3" in document["shift"]["variants"]
        assert (tmp_path / "plots" / "shift.pdf").read_bytes().startswith(b"%PDF")
        assert document["intervals"] == {} and "AUGRC" in " ".join(result.stdout.split()), "one block has figures too"
        assert "corruptions-unseen" in result.stdout, "names are whole, however narrow the terminal"
        assert "pasted objects" in result.stdout and "pixels of red" in result.stdout
