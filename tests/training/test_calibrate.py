"""A known temperature is found again, the promised risk is kept, and what is promised is served."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from penumbra.__main__ import main
from penumbra.export.bundle import export_network, verify_artifact
from penumbra.models.card import IGNORE, Card, ExtraMap
from penumbra.models.errors import BadData, BadOption
from penumbra.models.references import MOST_MEANS
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.raster import Raster
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.store import GOLDEN, artifact_card, open_artifact, write_version
from penumbra.training.calibrate import Calibrated, Evidence, calibrate, check_risks, frames_in_all, split_frames
from penumbra.training.conformal import NUM_CANDIDATES, AbstentionLoss, ClassLoss, find_thresholds, least_frames
from penumbra.training.evaluation.answers import segment_frame
from penumbra.training.evaluation.run import Question
from penumbra.training.evaluation.temperature import fit_temperature, mean_nll, set_temperature
from penumbra.training.frames import Frames, choose
from tests.conftest import GAIN, picture, toy_card

TRUE_TEMPERATURE = 2.5
RISKS = (0.02, 0.1, 0.2, 0.9)
CLASS_RISKS = (0.3, 0.4)


@pytest.fixture(scope="module")
def frames() -> Frames:
    """Noise whose truth is drawn from softmax(logits / 2.5) of the pointwise toy, which is thus too sure of itself."""
    rng = np.random.Generator(np.random.PCG64(3))
    images = np.stack([picture(rng, 50, 60) for _ in range(64)])
    logits = GAIN * images / 255 / TRUE_TEMPERATURE
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(-1).astype(np.uint8)
    labels[:, 0] = IGNORE
    return Frames(tuple(map(str, range(64))), torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("store")
    card, network = toy_card("pointwise")
    export_network(network, card, store)
    return store


@pytest.fixture(scope="module")
def segmenter(store: Path) -> Iterator[Segmenter]:
    with Segmenter.open(store, threads=1, tuning=Tuning(1, 1)) as opened:
        yield opened


@pytest.fixture(scope="module")
def calibrated(segmenter: Segmenter, frames: Frames) -> Calibrated:
    return calibrate(
        segmenter, Question("toy-pointwise", Path("nowhere")), frames, risks=RISKS, class_risks=CLASS_RISKS
    )


@pytest.mark.parametrize("best", [0.5, 1.0, 3.0])
def test_the_temperature_of_least_nll_is_found(best: float) -> None:
    assert fit_temperature(lambda t: (math.log(t) - math.log(best)) ** 2) == pytest.approx(best, rel=0.01)


def test_without_a_label_no_temperature_is_better_than_another_and_none_is_chosen(store: Path, frames: Frames) -> None:
    blank = dataclasses.replace(frames, label_NHW=torch.full_like(frames.label_NHW, IGNORE))
    with (
        Segmenter.open(store, threads=1, tuning=Tuning(1, 1)) as segmenter,
        pytest.raises(BadData, match="none of the frames for the temperature has a label"),
    ):
        calibrate(segmenter, Question("toy-pointwise", Path("nowhere")), blank, risks=RISKS)
    with pytest.raises(BadData):
        mean_nll([])


def test_a_known_temperature_is_recovered_through_the_engine(calibrated: Calibrated) -> None:
    assert calibrated.card.readout.temperature == pytest.approx(TRUE_TEMPERATURE, rel=0.03)
    assert calibrated.temperature_before == 1


def test_calibration_error_falls_and_labels_stay_on_frames_that_fitted_nothing(calibrated: Calibrated) -> None:
    before, after = calibrated.before, calibrated.after
    assert before["cal/ECE"] > 0.1 and after["cal/ECE"] < 0.02 and after["seg/NLL"] < before["seg/NLL"]
    assert after["seg/pixAcc"] == before["seg/pixAcc"]


def test_thresholds_keep_their_risk_on_frames_that_fitted_nothing(calibrated: Calibrated) -> None:
    calibration = calibrated.card.calibration
    assert calibration and calibration.risks == (0.1, 0.2, 0.9) and calibration.num_frames == 32
    coverage = [calibrated.after[f"abstain/coverage@{risk:g}"] for risk in calibration.risks]
    assert coverage == sorted(coverage) and 0 < coverage[0] < 0.9 and coverage[-1] == 1
    for risk in calibration.risks[:2]:
        # Frames of iid pixels differ little, so the realised risk lies close below the bound less 1 / (n + 1).
        assert risk - 2 / 33 < calibrated.after[f"abstain/risk@{risk:g}"] < risk


def test_what_is_called_a_class_keeps_its_risk_on_frames_that_fitted_nothing(calibrated: Calibrated) -> None:
    calibration, after = calibrated.card.calibration, calibrated.after
    assert calibration and calibration.class_risks == CLASS_RISKS
    for risk, row in zip(calibration.class_risks, calibration.class_entropy_nats, strict=True):
        assert None not in row, "every class is in every frame"
        for name in ("red", "green", "blue"):
            assert 0 < after[f"abstain/class_risk@{risk:g}/{name}"] <= risk
    assert 0.02 < after["abstain/class_coverage@0.3"] < after["abstain/class_coverage@0.4"] < 1


def test_the_frames_of_the_thresholds_are_what_novelty_is_measured_against(
    calibrated: Calibrated, segmenter: Segmenter, frames: Frames
) -> None:
    novelty, runtime = calibrated.card.novelty, segmenter.find("toy-pointwise", None)
    assert novelty and novelty.map == "entropy" and novelty.num_pictures == 32 == len(novelty.means)
    assert novelty.num_samples == 1 and list(novelty.means) == sorted(novelty.means)
    runtime.card, old = calibrated.card, runtime.card
    images = (np.ascontiguousarray(frames.image_N3HW[i].permute(1, 2, 0)) for i in calibrated.split.thresholds)
    scores = [segmenter.segment(image, SegmentOptions("toy-pointwise")).scores for image in images]
    runtime.card = old
    assert novelty.means == pytest.approx(sorted(each.means[0] for each in scores), rel=1e-5) and novelty.scales == ()


def test_a_map_of_the_models_own_and_the_entropy_are_brought_to_one_scale(rng: np.random.Generator) -> None:
    """New pictures of the same kind are stranger than 9 in 10 as often as that says, on either side."""
    card, alarms = toy_card("pointwise")[0], []
    card = dataclasses.replace(card, extra_maps=(ExtraMap("density", "made up", "nats"),))
    for _ in range(100):
        means_NM = rng.standard_t(5, size=(220, 2)) @ rng.normal(size=(2, 2)) + 7
        evidence = Evidence(card)
        evidence.means = means_NM[:120].tolist()
        novelty = evidence.novelty(1, "made up")
        assert novelty and novelty.map == "density" and novelty.warn_above == 0.99 and len(novelty.means) == 120
        np.testing.assert_allclose(novelty.scales, np.stack((means_NM[:120].mean(0), means_NM[:120].std(0)), axis=1))
        alarms += [novelty.share_below(means) > 0.9 for means in means_NM[120:].tolist()]
    assert np.mean(alarms) == pytest.approx(0.1, abs=0.015)
    stranger = []
    for _ in range(400):
        evidence.means = rng.normal(size=(8, 2)).tolist()
        novelty = evidence.novelty(1, "few")
        stranger += [novelty.share_below(means) == 1 for means in rng.normal(size=(10, 2)).tolist()]
    assert np.mean(stranger) < 1 / 9, "by scales that they had a part in, it would be one in five"
    evidence.means = [[0.3, 0.3]] * 20
    alike = evidence.novelty(1, "made up")
    assert alike and alike.share_below((0.3, 0.3)) == 0 and alike.share_below((0.3, 0.2999)) == 1


def test_void_pixels_count_in_a_reference_as_little_as_in_what_is_served(
    segmenter: Segmenter, frames: Frames
) -> None:  # fmt: skip
    card, voids, served = segmenter.find("toy-pointwise").card, torch.zeros(3, 50, 60, dtype=torch.bool), []
    voids[1, :, 20:], voids[2] = True, True
    first = choose(frames, [0, 1, 2])
    assert isinstance(first, Frames)
    evidence, framed = Evidence(card), dataclasses.replace(first, voids=tuple(voids))
    for i in range(3):
        frame = choose(framed, [i])[0]
        evidence.add(segment_frame(segmenter, frame, SegmentOptions(card.name)))
        raster = Raster(np.ascontiguousarray(frame.image_3HW.permute(1, 2, 0)), void_HW=voids[i].numpy())
        served.append(segmenter.segment(raster, SegmentOptions(card.name)).scores.means)
    assert served[2] == () and evidence.means == served[:2]
    novelty = evidence.novelty(1, "three pictures")
    assert novelty and novelty.num_pictures == 2 and Evidence(card).novelty(1, "none") is None


def test_a_thousand_quantiles_stand_for_more_pictures(calibrated: Calibrated) -> None:
    evidence = Evidence(calibrated.card)
    evidence.means = np.linspace(3, 1, 5001)[:, None].tolist()
    novelty = evidence.novelty(1, "made up")
    assert len(novelty.means) == MOST_MEANS and novelty.num_pictures == 5001 and novelty.warn_above == 0.99
    assert novelty.means[0] == 1 and novelty.means[-1] == 3 and list(novelty.means) == sorted(novelty.means)


def test_a_risk_below_one_in_n_plus_one_is_refused_with_the_frames_it_needs(calibrated: Calibrated) -> None:
    assert calibrated.refused == {"0.02": "a risk of 0.02 cannot be guaranteed with 32 frames; at least 49 are needed"}


def test_a_class_risk_for_which_every_class_would_be_withheld_is_said_to_be_refused() -> None:
    evidence = Evidence(toy_card("pointwise")[0])
    for _ in range(20):
        evidence.loss.add(np.ones(4, np.float32), np.arange(4) == 0)
        evidence.class_loss.add(np.ones(4, np.float32), np.zeros(4, np.int64), np.arange(4) == 0)
    found, refused = evidence.calibration([0.4], [0.1, 0.5], 1, "drawn")
    assert found and found.class_risks == (0.5,)
    assert refused == {
        "class 0.1": "a risk of 0.1 in each class would need withholding every class, with these 20 frames"
    }


def test_no_frame_serves_two_purposes_and_the_seed_decides() -> None:
    split = split_frames(range(0, 200, 2), seed=1)
    parts = [split.temperature, split.thresholds, split.check]
    assert [len(part) for part in parts] == [25, 50, 25]
    assert sorted([*split.temperature, *split.thresholds, *split.check]) == list(range(0, 200, 2))
    assert split == split_frames(range(0, 200, 2), seed=1) != split_frames(range(0, 200, 2), seed=2)


def test_no_more_frames_fit_the_temperature_than_one_number_needs() -> None:
    split = split_frames(range(400), seed=0)
    assert [len(split.temperature), len(split.thresholds), len(split.check)] == [32, 268, 100]


@pytest.mark.parametrize(
    ("risk", "needed"), [(0.5, 1), (0.1, 9), (0.05, 19), (0.02, 49), (0.01, 99), (0.003, 333), (1e-4, 9999)]
)
def test_the_frames_that_a_risk_needs_are_known_before_any_is_run(risk: float, needed: int) -> None:
    assert least_frames(risk) == needed and 1 / (needed + 1) <= risk < 1 / needed
    total = frames_in_all(risk)
    assert len(split_frames(range(total), seed=0).thresholds) >= needed
    assert total == 8 or len(split_frames(range(total - 1), seed=0).thresholds) < needed


def test_what_cannot_be_guaranteed_is_said_up_front_and_fails_where_nothing_can(
    segmenter: Segmenter, frames: Frames, capsys: pytest.CaptureFixture[str]
) -> None:
    split = split_frames(range(64), seed=0)
    check_risks(split, [0.01, 0.05], [0.1])
    sentence = (
        "a risk of 0.01 cannot be guaranteed with 32 frames; at least 99 are needed for the thresholds, 175 in all"
    )
    unwarned = (
        "of ordinary pictures about one in 33 is stranger than all of 32, so answers tell their novelty and do not "
        "warn of it; with 99 for the thresholds they do"
    )
    assert capsys.readouterr().err.splitlines() == [sentence, unwarned]
    check_risks(split_frames(range(200), seed=0), [0.05], [0.1])
    assert capsys.readouterr().err == ""
    with pytest.raises(BadOption, match=sentence.replace("0.01", "0.02").replace("99", "49").replace("175", "98")):
        calibrate(segmenter, Question("toy-pointwise", Path("nowhere")), frames, risks=[0.01], class_risks=[0.02])
    assert "temperature" not in capsys.readouterr().err, "no picture was run"


def test_too_few_frames_are_refused() -> None:
    with pytest.raises(BadOption, match="there are 7 frames to calibrate on; at least 8"):
        split_frames(range(7), seed=0)


def draw_frame(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """300 pixels; how often the uncertain ones are wrong differs from frame to frame."""
    entropy = rng.random(300).astype(np.float32)
    return entropy, rng.random(300) < rng.beta(1, 2) * entropy


def test_conformal_thresholds_keep_the_risk_in_expectation_and_waste_little(rng: np.random.Generator) -> None:
    num, risk, got = 20, 0.1, []
    for _ in range(250):
        loss = AbstentionLoss()
        for _ in range(num):
            loss.add(*draw_frame(rng))
        thresholds, _ = find_thresholds(loss, [risk], num_classes=3)
        entropy, wrong = zip(*(draw_frame(rng) for _ in range(10)), strict=True)
        got.append(((np.concatenate(entropy) <= thresholds[risk]) & np.concatenate(wrong)).mean())
    error = np.std(got) / math.sqrt(len(got))
    assert np.mean(got) <= risk + 3 * error, "Angelopoulos et al. 2022, theorem 1"
    assert np.mean(got) >= risk - 2 / (num + 1) - 3 * error, "and theorem 2"
    assert np.mean(np.array(got) > risk) < 0.6, "single calibrations may exceed it; about half do at most"


def test_conformal_thresholds_of_classes_keep_their_risk_in_expectation(rng: np.random.Generator) -> None:
    risk, got = 0.2, []
    for _ in range(120):
        loss = ClassLoss(3)
        for _ in range(20):
            entropy, wrong = draw_frame(rng)
            loss.add(entropy, rng.integers(0, 2, 300), wrong)
        row = loss.thresholds(risk)
        assert row[2] is None, "what is never called has no frames, and is withheld"
        above = np.array([-1 if nats is None else nats for nats in row])
        for _ in range(10):
            entropy, wrong = draw_frame(rng)
            labels = rng.integers(0, 2, 300)
            kept = (entropy <= above[labels]) & (labels == 0)
            got.append((kept & wrong).sum() / max(kept.sum(), 1))
    error = np.std(got) / math.sqrt(len(got) / 10)
    assert np.mean(got) <= risk + 3 * error, "Angelopoulos et al. 2024, theorem 1"
    assert np.mean(got) >= risk - 0.1, "and it answers what it may"


def test_a_class_has_the_largest_candidate_that_its_own_frames_allow() -> None:
    loss = ClassLoss(3)
    step = loss.candidates_T[0]
    entropy = np.array([0.5, 1.5, 2.5, 0.5, 1.5], np.float32) * step
    for i in range(9):
        labels = np.array([0, 0, 0, 1, 1]) if i < 4 else np.array([0, 0, 0, 2, 2])
        loss.add(entropy, labels, np.array([False, False, True, False, False]))
    # class 0: a third is wrong from the third candidate on, (9 / 3 + 1) / 10 = 0.4; the others are in 4 and 5 frames
    assert loss.num_frames_K.tolist() == [9, 4, 5]
    assert loss.thresholds(0.1) == (pytest.approx(2 * step), None, None)
    assert loss.thresholds(0.2) == (
        pytest.approx(2 * step),
        pytest.approx(NUM_CANDIDATES * step),
        loss.candidates_T[-1],
    )
    assert loss.thresholds(0.4)[0] == pytest.approx(NUM_CANDIDATES * step)


def test_one_picture_full_of_errors_does_not_hide_behind_many_with_a_few_right_pixels() -> None:
    loss = ClassLoss(2)
    step = loss.candidates_T[0]
    for _ in range(20):
        loss.add(np.full(1, 0.5 * step, np.float32), np.zeros(1, np.int64), np.zeros(1, bool))
    loss.add(np.full(90, 1.5 * step, np.float32), np.zeros(90, np.int64), np.ones(90, bool))
    # the mean over pictures is (1 + 1) / 22 = 0.09 from the second candidate on, and 90 of 110 pixels are wrong there
    assert loss.thresholds(0.1) == (pytest.approx(step), None)
    assert loss.thresholds(0.9) == (pytest.approx(NUM_CANDIDATES * step), None)


def test_a_share_that_falls_again_counts_as_its_largest() -> None:
    loss = ClassLoss(2)
    step = loss.candidates_T[0]
    for _ in range(20):  # the most certain pixel is wrong, and nine more right ones dilute it
        loss.add(np.array([0.5] + [3.5] * 9, np.float32) * step, np.zeros(10, np.int64), np.arange(10) == 0)
    assert loss.losses_KT[0].tolist() == [20] * NUM_CANDIDATES
    assert loss.thresholds(0.2) == (None, None)


def test_the_threshold_is_the_largest_that_the_bound_allows() -> None:
    loss = AbstentionLoss()
    entropy = np.linspace(0.1, 1.0, 10, dtype=np.float32)
    for _ in range(9):
        loss.add(entropy, entropy > 0.65)  # wrong from 0.7 on, a tenth of the pixels each
    thresholds, refused = find_thresholds(loss, [0.15, 0.2, 0.4], num_classes=3)
    # (9 L + 1) / 10 <= risk: L = 0 for 0.15; 0.1 for 0.2 (0.19); 0.3 for 0.4 (0.37), three of the four errors
    assert refused == {}
    kept = {risk: (entropy <= threshold).sum() for risk, threshold in thresholds.items()}
    assert kept == {0.15: 6, 0.2: 7, 0.4: 9}


def test_a_risk_above_the_models_own_answers_everything() -> None:
    loss = AbstentionLoss()
    for _ in range(20):
        loss.add(np.array([0.1, 0.9], np.float32), np.array([False, True]))
    thresholds, _ = find_thresholds(loss, [0.9], num_classes=3)
    assert math.log(3) < thresholds[0.9] < 1.02 * math.log(3)


def test_errors_without_any_entropy_make_a_risk_impossible() -> None:
    loss = AbstentionLoss()
    for _ in range(20):
        loss.add(np.zeros(4, np.float32), np.array([True, True, False, False]))
    thresholds, refused = find_thresholds(loss, [0.2], num_classes=3)
    assert thresholds == {} and "would need abstaining from every pixel" in refused[0.2]


def test_a_frame_without_labels_is_no_calibration_frame() -> None:
    loss = AbstentionLoss()
    loss.add(np.zeros(0, np.float32), np.zeros(0, bool))
    assert loss.num_frames == 0


def test_a_new_temperature_drops_the_old_thresholds(calibrated: Calibrated) -> None:
    changed = set_temperature(calibrated.card, 1.0)
    assert calibrated.card.calibration and changed.calibration is None and changed.novelty is None


def test_the_next_version_has_the_same_files_and_keeps_its_promise(
    store: Path, calibrated: Calibrated, frames: Frames
) -> None:
    source, place = store / "toy-pointwise" / "1", store / "toy-pointwise" / "2"
    old = artifact_card(source)
    write_version(source, place, dataclasses.replace(calibrated.card, version=2))
    new = open_artifact(place).card
    assert new.readout.temperature == calibrated.card.readout.temperature and new.calibration
    assert new.export == old.export and artifact_card(source) == old
    assert (place / GOLDEN).samefile(source / GOLDEN), "hard-linked, not copied"
    verify_artifact(place)
    options = SegmentOptions(model="toy-pointwise", max_risk=0.1, outputs=())
    with Segmenter.open(store, threads=1, tuning=Tuning(1, 1)) as newest:
        risks = []
        for i in calibrated.split.check:
            truth_HW = frames.label_NHW[i].numpy()
            labels_HW = newest.segment(np.ascontiguousarray(frames.image_N3HW[i].permute(1, 2, 0)), options).labels_HW
            known_HW = truth_HW != IGNORE
            risks.append(((labels_HW != IGNORE) & (labels_HW != truth_HW))[known_HW].mean())
    assert np.mean(risks) == pytest.approx(calibrated.after["abstain/risk@0.1"])


def test_risks_that_are_no_shares_are_refused(segmenter: Segmenter, frames: Frames) -> None:
    for risks in ((), (0.0,), (0.1, 1.0), (0.1, 1e-7)):
        with pytest.raises(BadOption, match=r"shares from 0\.000001 to below 1 are wanted"):
            calibrate(segmenter, Question("toy-pointwise", Path("nowhere")), frames, risks=risks, class_risks=())


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_writes_the_next_version_and_says_what_it_found(tmp_path: Path) -> None:
    card, network = toy_card("latent")
    export_network(network, card, tmp_path)
    common = ("calibrate", "toy-latent", "--data", tmp_path, "--set", "shapes", "--store", tmp_path)
    code, stdout, told = run(*common, "--risks", "0.3,0.01", "--class-risks", "0.4", "--samples", 2, "--json")
    document = json.loads(stdout)
    assert code == 0 and document["directory"].endswith("toy-latent/2")
    stored: Card = artifact_card(tmp_path / "toy-latent" / "2")
    assert stored.readout.temperature == document["temperature"]
    assert "cannot be guaranteed with 4 frames" in document["refused"]["0.01"] and stored.novelty
    assert "a risk of 0.01 cannot be guaranteed with 4 frames; at least 99 are needed for the thresholds" in told
    assert "samples is 2 and an answer has 4 where it asks for no other: such answers will tell no novelty" in told
    code, stdout, stderr = run(*common, "--risks", "0.3")
    assert "tell no novelty" not in stderr
    assert "PENUMBRA_WATCH_STORE_S" in stderr and "/v2/repository/models/toy-latent/load" in stderr
    assert code == 0 and "temperature" in stdout and "toy-latent/3" in "".join(stdout.split())
    code, _, _ = run(*common, "--risks", "0.3", "--views", "flip")
    assert code == 0 and artifact_card(tmp_path / "toy-latent" / "4").views == "flip"
    code, _, stderr = run(*common, "--risks", "low")
    assert code == 2 and "risks is 'low'" in stderr
    code, _, stderr = run(*common, "--class-risks", "0.1;0.2")
    assert code == 2 and "class_risks is '0.1;0.2'" in stderr
