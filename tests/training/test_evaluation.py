"""What is measured is what is served: figures of toy models, whose answers are known in closed form."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from click.testing import CliRunner
from PIL import Image
from rasterio.transform import from_origin

from penumbra.__main__ import main
from penumbra.export.bundle import export_network
from penumbra.models.card import IGNORE, Calibration, Readout, ScaleRule
from penumbra.models.errors import BadData, BadOption
from penumbra.serving.engine.decode import open_image
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.training import frames as training_frames
from penumbra.training.data import find_data
from penumbra.training.evaluation import run
from penumbra.training.evaluation.answers import LIMITS, check_classes, segment_frame
from penumbra.training.evaluation.figures import ClassAbstention, Evaluation
from penumbra.training.evaluation.run import (
    SAMPLE_COUNTS,
    Measured,
    Question,
    as_rasters,
    check_hidden,
    check_unseen,
    evaluate,
    load_frames,
)
from penumbra.training.evaluation.verb import evaluate_artifact, typical, write_document
from penumbra.training.frames import Frame, Frames, choose, count_ids, hold, pair_files
from penumbra.training.plots import against_samples, contact_sheet, draw_all
from tests.conftest import CLASSES, GAIN, picture, toy_card

MAPS = ("confidence", "entropy", "mutual_information")
CALIBRATION = Calibration((0.02, 0.3), (0.2, 0.9), num_frames=60, num_samples=1, data="made up")
NOWHERE = Path("nowhere")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("store")
    for form in ("pointwise", "latent", "bright"):
        card, network = toy_card(form)
        export_network(network, dataclasses.replace(card, calibration=CALIBRATION), store)
    card, network = toy_card("pointwise", name="toy-logits")
    export_network(network, dataclasses.replace(card, readout=Readout(average="logits")), store)
    return store


@pytest.fixture(scope="module")
def segmenter(store: Path) -> Iterator[Segmenter]:
    with Segmenter.open(store, threads=1, tuning=Tuning(1, 1)) as opened:
        yield opened


@pytest.fixture
def frames(rng: np.random.Generator) -> Frames:
    """Noise whose truth is the brightest channel, but for a tenth of the pixels, and void in the first column."""
    images = np.stack([picture(rng, 50, 70) for _ in range(4)])
    labels = images.argmax(-1).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.1] = 1
    labels[:, :, 0] = IGNORE
    return Frames(tuple("abcd"), torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels))


def softmax_of(frames: Frames) -> np.ndarray:
    """prob_NHWK of the pointwise toy."""
    logits = GAIN * frames.image_N3HW.permute(0, 2, 3, 1).numpy() / 255
    powers = np.exp(logits)
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def measure(segmenter: Segmenter, model: str, frames: Frames, **options: object) -> Measured:
    return evaluate(segmenter, Question(model, NOWHERE, **options), frames)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", ["toy-pointwise", "toy-logits"])
def test_figures_are_those_of_the_models_closed_form(segmenter: Segmenter, frames: Frames, model: str) -> None:
    figures = measure(segmenter, model, frames).evaluation.figures()
    prob, truth = softmax_of(frames), frames.label_NHW.numpy()
    known = truth != IGNORE
    prob, truth = prob[known], truth[known].astype(int)
    hits = prob.argmax(-1) == truth
    assert figures["seg/pixAcc"] == pytest.approx(hits.mean(), abs=1e-9)
    for k, info in enumerate(CLASSES):
        said, there = prob.argmax(-1) == k, truth == k
        assert figures[f"seg/IoU/{info.name}"] == pytest.approx((said & there).sum() / (said | there).sum())
    assert figures["seg/mIoU"] == pytest.approx(np.mean([figures[f"seg/IoU/{info.name}"] for info in CLASSES]))
    assert figures["seg/mAcc"] == pytest.approx(np.mean([hits[truth == k].mean() for k in range(3)]))
    assert figures["seg/NLL"] == pytest.approx(-np.log(prob[np.arange(len(truth)), truth]).mean(), rel=1e-4)
    assert figures["seg/Brier"] == pytest.approx(((prob - np.eye(3)[truth]) ** 2).sum(-1).mean(), rel=1e-4)
    gaps = [
        (prob.max(-1)[step].sum() - hits[step].sum())
        for step in ((prob.max(-1) * 15).astype(int).clip(max=14) == b for b in range(15))
    ]
    assert figures["cal/ECE"] == pytest.approx(np.abs(gaps).sum() / len(truth), abs=1e-4)


def test_errors_that_follow_the_entropy_are_found_perfectly(segmenter: Segmenter, frames: Frames) -> None:
    prob = softmax_of(frames)
    entropy = -(prob * np.log(prob)).sum(-1)
    truth = np.where(entropy > 0.7, (prob.argmax(-1) + 1) % 3, prob.argmax(-1))
    truth[np.abs(entropy - 0.7) < 0.01] = IGNORE
    wrong = dataclasses.replace(frames, label_NHW=torch.from_numpy(truth.astype(np.uint8)))
    figures = measure(segmenter, "toy-pointwise", wrong).evaluation.figures()
    assert figures["err/AUROC/entropy"] == 1 and figures["err/FPR95/entropy"] == 0
    assert figures["sc/E-AURC/entropy"] == pytest.approx(0, abs=1e-3)


def test_void_pixels_count_nowhere(segmenter: Segmenter, frames: Frames) -> None:
    evaluation = measure(segmenter, "toy-pointwise", frames).evaluation
    num = int((frames.label_NHW != IGNORE).sum())
    assert evaluation.confusion_KK.sum() == num == evaluation.reliability.num
    assert all(ranking.counts_2N.sum() == num for ranking in evaluation.rankings.values())


def test_abstention_is_measured_at_the_cards_thresholds(segmenter: Segmenter, frames: Frames) -> None:
    figures = measure(segmenter, "toy-pointwise", frames).evaluation.figures()
    options = SegmentOptions(model="toy-pointwise", max_risk=0.05, outputs=("entropy",))
    kept, risk = [], []
    for image_HW3, truth_HW in zip(
        frames.image_N3HW.permute(0, 2, 3, 1).numpy(), frames.label_NHW.numpy(), strict=True
    ):
        labels_HW, known_HW = segmenter.segment(image_HW3, options).labels_HW, truth_HW != IGNORE
        kept.append((labels_HW != IGNORE)[known_HW].mean())
        risk.append(((labels_HW != IGNORE) & (labels_HW != truth_HW))[known_HW].mean())
    assert figures["abstain/coverage@0.02"] == pytest.approx(np.mean(kept))
    assert figures["abstain/risk@0.02"] == pytest.approx(np.mean(risk))
    assert figures["abstain/coverage@0.3"] > figures["abstain/coverage@0.02"]


def test_the_share_of_a_class_that_is_withheld_is_that_of_the_answers(segmenter: Segmenter, frames: Frames) -> None:
    """At thresholds of each class by itself; blue has none and is withheld altogether."""
    calibration = dataclasses.replace(CALIBRATION, class_risks=(0.1,), class_entropy_nats=((0.4, 0.8, None),))
    card = dataclasses.replace(segmenter.find("toy-pointwise").card, calibration=calibration)
    cards = dict.fromkeys(range(4), card)
    figures = evaluate(segmenter, Question("toy-pointwise", NOWHERE), frames, cards=cards).evaluation.figures()
    prob, known = softmax_of(frames), frames.label_NHW.numpy() != IGNORE
    entropy, called = -np.sum(prob * np.log(prob), -1)[known], prob.argmax(-1)[known]
    for k, (name, nats) in enumerate({"red": 0.4, "green": 0.8}.items()):
        share = (entropy[called == k] > nats).mean()
        assert 0.1 < share < 0.9
        assert figures[f"abstain/class_withheld@0.1/{name}"] == pytest.approx(share, abs=2e-3)
    assert figures["abstain/class_withheld@0.1/blue"] == 1


def test_a_class_that_nothing_is_called_has_no_share_withheld() -> None:
    calibration = dataclasses.replace(CALIBRATION, class_risks=(0.1,), class_entropy_nats=((0.4, 0.4),))
    by_class = ClassAbstention(calibration, CLASSES[:2])
    by_class.add(np.array([0.1, 0.5], np.float32), np.zeros(2, np.uint8), np.array([True, False]))
    figures = by_class.figures()
    assert figures["abstain/class_withheld@0.1/red"] == 0.5 and math.isnan(figures["abstain/class_withheld@0.1/green"])


@pytest.mark.parametrize(
    ("data", "split", "is_seen"),
    [
        ("Streets train, 4 of 16 frames labelled (0.25, seed 0), the rest unlabelled", "train", True),
        ("Streets train, 4 of 16 frames labelled (0.25, seed 0), the rest unlabelled", "train/a", True),
        ("Streets train, 4 of 16 frames labelled (0.25, seed 0), the rest unlabelled", "val", False),
        ("Streets train without a and Bicyclist, 4 of 12 frames labelled", "train/a", False),
        ("Streets train without a and Bicyclist, 4 of 12 frames labelled", "train/a_7", False),
        ("Streets train without a and Bicyclist, 4 of 12 frames labelled", "train/b", True),
        ("Streets train without a and Bicyclist, 4 of 12 frames labelled", "train", True),
        ("Streets train without a, 4 of 12; with another: Streets train, 4 of 16 frames labelled", "train/a", True),
        ("Streets train without a, 4 of 12; with another: Streets train without a, 4 of 12", "train/a", False),
        ("Roads train, 4 of 16 frames labelled", "train", False),
        ("", "train", False),
    ],
)
def test_frames_that_a_training_has_seen_are_warned_of(data: str, split: str, is_seen: bool) -> None:
    card, _ = toy_card("pointwise")
    card = dataclasses.replace(card, provenance=dataclasses.replace(card.provenance, data=data))
    warning = check_unseen(card, dataclasses.replace(find_data("shapes"), title="Streets"), split)
    assert bool(warning) == is_seen and (not is_seen or "toy-pointwise was trained on Streets train" in warning)


@pytest.mark.parametrize(
    ("data", "is_told"),
    [
        ("Streets train without a and Bicyclist, 4 of 12 frames labelled", False),
        ("Streets train without Trees, and bushes and Bicyclist, 4 of 12 frames labelled", False),
        ("Streets train without Bicyclists, 4 of 12 frames labelled", True),
        ("Streets train without Bicyclist, 4 of 12; with another: Streets train, 4 of 16 frames labelled", True),
        ("", True),
    ],
)
def test_a_class_that_a_training_knew_is_none_to_find(data: str, is_told: bool) -> None:
    card, _ = toy_card("pointwise")
    card = dataclasses.replace(card, provenance=dataclasses.replace(card.provenance, data=data))
    streets = dataclasses.replace(find_data("shapes"), title="Streets")
    assert ("does not say that Bicyclist was void" in check_hidden(card, streets, "Bicyclist")) == is_told
    assert not check_hidden(card, streets, "")


def test_the_command_warns_of_frames_that_a_training_has_seen(tmp_path: Path) -> None:
    card, network = toy_card("pointwise")
    seen = dataclasses.replace(card.provenance, data="procedural shapes train, 4 of 16 frames labelled")
    export_network(network, dataclasses.replace(card, provenance=seen), tmp_path)
    common = [
        "evaluate",
        card.name,
        "--data",
        str(tmp_path),
        "--set",
        "shapes",
        "--every",
        "4",
        "--store",
        str(tmp_path),
    ]
    for split in ("train", "val"):
        told = CliRunner().invoke(main, [*common, "--split", split])
        assert told.exit_code == 0 and ("says little of others" in " ".join(told.stderr.split())) == (split == "train")


def test_a_methods_own_maps_are_judged_too(segmenter: Segmenter, frames: Frames) -> None:
    assert 0 <= measure(segmenter, "toy-bright", frames).evaluation.figures()["err/AUROC/brightness"] <= 1


def test_a_frame_without_labels_changes_nothing(segmenter: Segmenter, frames: Frames) -> None:
    card = segmenter.find("toy-pointwise").card
    evaluation = Evaluation(card, 1)
    image_3HW, label_HW, *_ = frames[0]
    for labels_HW in (label_HW, torch.full_like(label_HW, IGNORE)):
        evaluation.add(segment_frame(segmenter, Frame(image_3HW, labels_HW), SegmentOptions(model=card.name)))
    assert evaluation.num_frames == 1 and evaluation.figures()["seg/pixAcc"] > 0.8


def test_a_frame_is_run_at_the_scale_of_its_place_as_it_is_served(tmp_path: Path, rng: np.random.Generator) -> None:
    card, network = toy_card("pointwise")
    spec = dataclasses.replace(card.input, resolution=ScaleRule("gsd", 2.0))
    export_network(network, dataclasses.replace(card, input=spec), tmp_path / "store")
    pixels_HW3, path = picture(rng, 60, 70), tmp_path / "a.tif"
    profile = {"driver": "GTiff", "height": 60, "width": 70, "count": 3, "dtype": "uint8", "crs": "EPSG:32631"}
    with rasterio.open(path, "w", **profile, transform=from_origin(500_000, 5_800_000, 0.5, 0.5)) as target:
        target.write(pixels_HW3.transpose(2, 0, 1))
    Image.fromarray(pixels_HW3.argmax(2).astype(np.uint8)).save(tmp_path / "a.png")
    files = pair_files(["a"], [path], [tmp_path / "a.png"], count_ids(3))
    with Segmenter.open(tmp_path / "store", threads=1, tuning=Tuning(1, 1)) as segmenter:
        options = SegmentOptions(model=card.name)
        served = segmenter.segment(open_image(path, LIMITS), options)
        assert served.warnings and np.not_equal(served.labels_HW, pixels_HW3.argmax(2)).mean() > 0.3
        for frames in (files, hold(files), choose(hold(files), [0])):
            assert np.array_equal(segment_frame(segmenter, frames[0], options).labels_HW, served.labels_HW)
            assert as_rasters(frames, spec, every=1)[0][0].place == served.image.place


def test_data_without_any_label_is_refused_with_a_sentence(segmenter: Segmenter, frames: Frames) -> None:
    void = dataclasses.replace(frames, label_NHW=torch.full_like(frames.label_NHW, IGNORE))
    with pytest.raises(BadData, match="nothing to measure against"):
        measure(segmenter, "toy-pointwise", void)


def test_every_nth_frame_is_taken(segmenter: Segmenter, frames: Frames) -> None:
    measured = measure(segmenter, "toy-pointwise", frames, every=2)
    assert list(measured.cards) == [0, 2] and measured.evaluation.num_frames == 2


def test_small_pictures_have_no_large_patches(segmenter: Segmenter, frames: Frames) -> None:
    small = Frames(frames.names, frames.image_N3HW[:, :, :20, :20], frames.label_NHW[:, :20, :20])
    document = measure(segmenter, "toy-pointwise", small).document()
    assert "pavpu/entropy/16" in document["figures"] and "pavpu/entropy/32" not in document["figures"]


def test_classes_of_another_number_are_refused_and_of_other_names_warned_of() -> None:
    card, _ = toy_card("pointwise")
    assert check_classes(card, CLASSES, data="shapes") == ""
    assert "0 is red here and ground there" in check_classes(card, find_data("shapes").classes, data="shapes")
    with pytest.raises(BadData, match="camvid has 11 classes and toy-pointwise has 3"):
        check_classes(card, find_data("camvid").classes, data="camvid")


def test_every_frame_has_draws_of_its_own(segmenter: Segmenter, frames: Frames) -> None:
    image_3HW, label_HW, *_ = frames[0]
    twice = Frames(("a", "b"), torch.stack((image_3HW, image_3HW)), torch.stack((label_HW, label_HW)))
    measured = measure(segmenter, "toy-latent", twice, seed=5)
    again = measure(segmenter, "toy-latent", twice, seed=5)
    assert measured.accuracies[0] != measured.accuracies[1] and measured.accuracies == again.accuracies


def test_samples_are_compared_in_quality_and_cost(segmenter: Segmenter, frames: Frames) -> None:
    rows = evaluate(segmenter, Question("toy-latent", NOWHERE, every=2), frames, compare=True).against_samples
    assert [row["samples"] for row in rows] == list(SAMPLE_COUNTS)
    assert rows[0]["time_ratio"] == 1 and rows[0]["err/AUROC/mutual_information"] is None
    nll = [row["seg/NLL"] for row in rows]
    assert nll[0] and nll[-1] and nll[-1] < nll[0], "a mean over samples is a better forecast than one"


def test_what_is_undefined_on_a_few_frames_ends_neither_document_nor_picture(
    segmenter: Segmenter, frames: Frames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pixel has a label, in a frame that is not the first, and no score ranks it."""
    labels = torch.full_like(frames.label_NHW, IGNORE)
    labels[1, 3, 3] = 0
    monkeypatch.setattr(run, "FEW_FRAMES", 1)
    one = dataclasses.replace(frames, label_NHW=labels)
    measured = evaluate(segmenter, Question("toy-latent", NOWHERE), one, compare=True)
    (tmp_path / "out.json").symlink_to(tmp_path / "own.json")
    write_document(tmp_path / "out.json", measured)
    assert {
        row["err/AUROC/entropy"] for row in json.loads((tmp_path / "own.json").read_bytes())["against_samples"]
    } == {None}
    assert {title.partition(": ")[2] for title, _ in typical(measured, segmenter, one)} == {"b"}
    void = Frame(*frames[0][:2], torch.ones_like(labels[0], dtype=torch.bool))
    answer = segment_frame(segmenter, void, SegmentOptions("toy-latent", samples=2))
    axes = contact_sheet([("void", answer)], measured.card).axes
    assert np.isnan(answer.maps["entropy"]).all() and axes[4].images[0].get_clim() == (0, 1e-3)


def test_the_time_of_samples_is_drawn_where_it_is_seen() -> None:
    row: dict[str, float | None] = dict.fromkeys(("seg/mIoU", "seg/NLL", "cal/ECE", "err/AUROC/entropy"), 0.6)
    row["err/AUROC/mutual_information"] = None
    rows = [row | {"samples": count, "time_ratio": count} for count in (1, 2, 5)]
    axes = against_samples({"model": "any", "version": 1, "against_samples": rows}).axes[-1]
    low, high = axes.get_ylim()
    assert 0.5 < low < 1 and 5 < high < 10
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2", "5"]


def test_a_single_pass_is_not_compared_with_itself(segmenter: Segmenter, frames: Frames) -> None:
    assert evaluate(segmenter, Question("toy-pointwise", NOWHERE), frames, compare=True).against_samples == []


def test_the_command_writes_figures_curves_and_pictures(store: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", "toy-latent", "--data", tmp_path, "--set", "shapes", "--samples", 2, "--every", 4]
    arguments += ["--json", tmp_path / "new" / "out.json", "--plots", tmp_path / "plots", "--store", store]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "new" / "out.json").read_text())
    assert document["model"] == "toy-latent" and document["samples"] == 2 and document["frames"] == 2
    names = {
        "seg/mIoU",
        "seg/NLL",
        "cal/ECE",
        "cal/aECE",
        "sc/AURC",
        "sc/E-AURC",
        "err/FPR95/entropy",
        "pavpu/entropy/4",
    }
    assert names <= document["figures"].keys() and "err/AUROC/entropy" in document["errors"]
    for value in document["figures"].values():
        assert value is None or math.isfinite(value)
    drawn = {path.stem for path in (tmp_path / "plots").glob("*.png")}
    assert drawn == {"reliability", "risk_coverage", "pavpu", "confusion", "contact_sheet", "samples"}
    assert "seg/mIoU" in result.stdout


@pytest.mark.slow
def test_a_model_without_samples_has_no_picture_of_them(segmenter: Segmenter, frames: Frames, tmp_path: Path) -> None:
    measured = measure(segmenter, "toy-pointwise", frames)
    draw_all(measured.document(), measured.card, typical(measured, segmenter, frames), tmp_path)
    files = [*tmp_path.iterdir()]
    assert files and "samples" not in {path.stem for path in files} and all(path.stat().st_size > 0 for path in files)


def test_frames_may_differ_in_size_and_lie_in_a_plain_folder(
    segmenter: Segmenter, rng: np.random.Generator, tmp_path: Path
) -> None:
    (tmp_path / "classes.txt").write_text("".join(f"{info.name}\n" for info in CLASSES))
    for name, size in {"a": (40, 50), "b": (60, 30)}.items():
        image = picture(rng, *size)
        for kind, values in {"images": image, "masks": image.argmax(-1).astype(np.uint8)}.items():
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(values).save(tmp_path / kind / f"{name}.png")
    question = Question("toy-pointwise", tmp_path, "folder")
    measured = evaluate(segmenter, question, load_frames(question, segmenter.find("toy-pointwise").card))
    assert measured.evaluation.reliability.num == 40 * 50 + 60 * 30
    assert measured.evaluation.figures()["seg/pixAcc"] > 0.99, "all but ties of two channels"


def test_nonsense_is_refused_with_a_sentence(store: Path) -> None:
    with pytest.raises(BadOption, match="every is 0; 1 or more is possible"):
        evaluate_artifact(Question("toy-latent", NOWHERE, "shapes", every=0), store)
    with pytest.raises(BadOption, match="no data set 'moon'"):
        evaluate_artifact(Question("toy-latent", NOWHERE, "moon"), store)


def test_expected_error_is_the_mean_of_one_less_the_confidence(segmenter: Segmenter, frames: Frames) -> None:
    measured = measure(segmenter, "toy-pointwise", frames)
    expected = (1 - softmax_of(frames).max(-1)).mean((1, 2))
    assert measured.evaluation.pictures["confidence"] == pytest.approx(expected.tolist(), abs=1e-5)
    error = 1 - np.array(measured.accuracies)
    assert measured.evaluation.pictures["error"] == pytest.approx(error.tolist())
    figures = measured.evaluation.figures()
    assert figures["pic/expected_error/MAE"] == pytest.approx(np.abs(expected - error).mean(), abs=1e-5)
    ranks = np.corrcoef(expected.argsort().argsort(), error.argsort().argsort())[0, 1]
    assert figures["pic/expected_error/Spearman"] == pytest.approx(ranks)


def test_augrc_stands_beside_aurc_with_an_interval(segmenter: Segmenter, frames: Frames) -> None:
    names = Frames(("a_1", "a_2", "b_1", "b_2"), frames.image_N3HW, frames.label_NHW)
    document = measure(segmenter, "toy-latent", names).document()
    for name in ("seg/mIoU", "seg/NLL", "seg/Brier", "cal/ECE", "sc/AURC", "sc/AUGRC"):
        low, high = document["intervals"][name]
        assert low < high and low - 1e-3 <= document["figures"][name] <= high + 1e-3
    assert 0 < document["figures"]["sc/AUGRC/entropy"] < document["figures"]["sc/AURC/entropy"]


def test_a_frame_may_be_as_large_as_pillow_opens_and_be_seen_at_twice_its_size() -> None:
    assert LIMITS.pixels >= 4 * training_frames.LIMITS.pixels
