"""Prompts, extra maps and published read-outs through the whole engine, on toys whose answers are closed forms."""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from penumbra.export.bundle import export_network
from penumbra.models.card import MAPS, MAPS_OF_ONE, PromptSpec, Readout, WindowSpec
from penumbra.models.errors import BadArtifact, BadOption, TooLarge
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.options import Limits, SegmentOptions, parse_options
from penumbra.serving.engine.prompts import check_prompt
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.windows import cover
from tests.conftest import FIXED, GAIN, picture, toy_card

HEIGHT, WIDTH = 70, 101
BOXES = ((10.0, 5.0, 60.0, 40.0, 1), (40.0, 20.0, 101.0, 70.0, "blue"))


@pytest.fixture(scope="module")
def segmenter(toy_store: Path) -> Iterator[Segmenter]:
    with Segmenter.open(toy_store, threads=1, device="cpu", tuning=FIXED) as opened:
        yield opened


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def mask_HWK() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH, 3))
    mask[5:40, 10:60, 1] = 1
    mask[20:70, 40:101, 2] = 1
    return mask


def members(image: np.ndarray, alpha: float) -> list[np.ndarray]:
    plain = GAIN * image / 255.0
    boxed = plain + GAIN * mask_HWK()
    return [plain, boxed, (plain + alpha * boxed) / (1 + alpha)]


def is_mean_of(prediction: Prediction, logits: list[np.ndarray]) -> None:
    mean = np.mean([softmax(member) for member in logits], axis=0)
    np.testing.assert_allclose(prediction.maps["confidence"], mean.max(-1), atol=2e-5)
    expected = np.mean([-(softmax(m) * np.log(softmax(m))).sum(-1) for m in logits], axis=0)
    total = -(mean * np.log(mean)).sum(-1)
    disagreement = prediction.maps["mutual_information" if prediction.num_samples > 1 else "seam"]
    np.testing.assert_allclose(disagreement, total - expected, atol=2e-4)


# -- boxes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0.0, 0.5])
@pytest.mark.parametrize("alpha", [None, 0.0, 4.0])
def test_overlapping_boxes_reach_every_window_at_their_place(
    segmenter: Segmenter, rng: np.random.Generator, overlap: float, alpha: float | None
) -> None:
    image = picture(rng, HEIGHT, WIDTH)
    options = SegmentOptions("toy-boxed", overlap=overlap, outputs=MAPS, boxes=BOXES, alpha=alpha)
    prediction = segmenter.segment(image, options)
    assert prediction.members == ("plain", "boxed", "mixed") and prediction.num_samples == 3
    is_mean_of(prediction, members(image, 1.0 if alpha is None else alpha))


def test_without_boxes_the_plain_network_answers_alone(segmenter: Segmenter, rng: np.random.Generator) -> None:
    image = picture(rng, HEIGHT, WIDTH)
    prediction = segmenter.segment(image, SegmentOptions("toy-boxed", outputs=MAPS_OF_ONE))
    assert prediction.members == () and prediction.num_samples == 1
    is_mean_of(prediction, members(image, 0)[:1])


def test_requests_with_and_without_boxes_share_the_server_and_not_their_batches(
    toy_store: Path, rng: np.random.Generator
) -> None:
    image, tuning = picture(rng, HEIGHT, WIDTH), Tuning(windows_per_batch=4)
    options = [SegmentOptions("toy-boxed", boxes=BOXES), SegmentOptions("toy-boxed")] * 6
    with Segmenter.open(toy_store, threads=1, device="cpu", tuning=tuning) as segmenter:
        alone = [segmenter.segment(image, one) for one in options[:2]]
        with ThreadPoolExecutor(len(options)) as pool:
            together = list(pool.map(lambda one: segmenter.segment(image, one), options))
    for i, prediction in enumerate(together):
        np.testing.assert_allclose(prediction.maps["entropy"], alone[i % 2].maps["entropy"], atol=1e-5)


@pytest.mark.parametrize("padding", ["mirror", "mean"])
def test_beyond_a_small_image_boxes_are_padded_as_the_picture_is(padding: str) -> None:
    card, _ = toy_card("boxed", window=WindowSpec(16, 16, padding=padding))  # type: ignore[arg-type]
    source = check_prompt(card, 10, 12, boxes=((0, 0, 12, 2, 0), (8, 6, 12, 10, 2)), tags=(), alpha=None)
    assert source
    plan = cover(10, 12, card.window)
    mask_Khw, alpha = source.cut(next(iter(plan)), plan)
    inside = np.zeros((3, 10, 12), np.uint8)
    inside[0, :2], inside[2, 6:, 8:] = 1, 1
    mode = "symmetric" if padding == "mirror" else "constant"
    assert np.array_equal(mask_Khw, np.pad(inside, ((0, 0), (0, 6), (0, 4)), mode=mode)) and alpha == 1  # type: ignore[call-overload]


@pytest.mark.parametrize("partial", [True, False])
def test_a_model_that_learned_from_all_boxes_alone_says_so_of_every_answer_with_boxes(
    tmp_path: Path, rng: np.random.Generator, partial: bool
) -> None:
    card, network = toy_card("boxed")
    network.prompt = dataclasses.replace(network.prompt, partial=partial)
    export_network(network, dataclasses.replace(card, prompt=network.prompt), tmp_path)
    image = picture(rng, HEIGHT, WIDTH)
    with Segmenter.open(tmp_path, threads=1, device="cpu", tuning=FIXED) as segmenter:
        boxed = segmenter.segment(image, SegmentOptions("toy-boxed", boxes=BOXES)).warnings
        assert segmenter.segment(image, SegmentOptions("toy-boxed")).warnings == ()
    assert [("every object boxed" in text, "box all or none" in text) for text in boxed] == [(True, True)] * (
        not partial
    )


def test_a_pixel_is_in_a_box_when_its_centre_is() -> None:
    card, _ = toy_card("boxed", window=WindowSpec(4, 8))
    source = check_prompt(card, 4, 8, boxes=((1.4, 0, 3.5, 4, 0), (3.51, 1.6, 8, 4, 1)), tags=(), alpha=None)
    assert source
    plan = cover(4, 8, card.window)
    mask_Khw = source.cut(next(iter(plan)), plan)[0]
    assert mask_Khw[0, 0].tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    assert (
        mask_Khw[1].any(0).tolist() == [False] * 4 + [True] * 4
        and mask_Khw[1].any(1).tolist() == [False] * 2 + [True] * 2
    )


@pytest.mark.parametrize("a", [0, 0.2, 2.6, 3.4, 4.5, 7.51])
@pytest.mark.parametrize("length", [0.01, 0.3, 0.49])
def test_a_box_between_centres_has_the_pixel_of_its_middle(a: float, length: float) -> None:
    card, _ = toy_card("boxed", window=WindowSpec(4, 8))
    source = check_prompt(card, 4, 8, boxes=((a, 0, a + length, 4, 0),), tags=(), alpha=None)
    assert source
    plan = cover(4, 8, card.window)
    columns = np.flatnonzero(source.cut(next(iter(plan)), plan)[0][0].all(0))
    has_centre = [i for i in range(8) if a <= i + 0.5 < a + length]
    assert columns.tolist() == (has_centre or [int(a + length / 2)])


def test_a_box_of_a_picture_at_another_scale_is_never_lost(segmenter: Segmenter) -> None:
    grey = np.full((64, 96, 3), 100, np.uint8)
    asked = SegmentOptions("toy-boxed", scale=0.25, boxes=((20, 10, 21, 11, 2),))
    assert (segmenter.segment(grey, asked).labels_HW == 2).any()


@pytest.mark.parametrize(
    ("boxes", "says"),
    [
        (((0, 0, 5, 5, "purple"),), "'purple'; toy-boxed knows red, green, blue"),
        (((0, 0, 5, 5, 3),), "'3'; toy-boxed knows"),
        (((0, 0, 5, 5, -1),), "'-1'"),
        (((5, 0, 5, 5, 1),), "x0 < x1"),
        (((0, 9, 5, 5, 1),), "y0 < y1"),
        (((-1, 0, 5, 5, 1),), "leaves the image; x is 0 to 101 and y is 0 to 70"),
        (((0, 0, 101.5, 5, 1),), "leaves the image"),
        (((0, 0, 5, 70.5, 1),), "leaves the image"),
    ],
)
def test_a_box_that_cannot_be_meant_is_refused(segmenter: Segmenter, boxes: tuple, says: str) -> None:
    with pytest.raises(BadOption) as refusal:
        segmenter.plan(HEIGHT, WIDTH, SegmentOptions("toy-boxed", boxes=boxes))
    assert says in str(refusal.value)


def test_the_background_cannot_be_boxed() -> None:
    card, _ = toy_card("boxed")
    card = dataclasses.replace(card, prompt=PromptSpec(kind="boxes", background=0))
    with pytest.raises(BadOption, match="'red', which is what lies outside of every box"):
        check_prompt(card, 9, 9, boxes=((0, 0, 5, 5, "red"),), tags=(), alpha=None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (SegmentOptions("toy-latent", boxes=BOXES), "boxes are given, and toy-latent takes no prompt"),
        (SegmentOptions("toy-boxed", tags=("red",)), "tags are given, and toy-boxed takes boxes"),
        (SegmentOptions("toy-latent", alpha=1.0), "has no correction"),
        (SegmentOptions("toy-boxed", alpha=1.0), "there are no boxes"),
        (SegmentOptions("toy-boxed", boxes=BOXES, alpha=-1.0), "alpha is -1.0"),
        (SegmentOptions("toy-boxed", boxes=BOXES, samples=2), "has 3 members, so samples is 3"),
        (SegmentOptions("toy-boxed", samples=3), "is not sampled, so samples is 1"),
    ],
)
def test_a_prompt_that_the_model_does_not_take_is_refused(
    segmenter: Segmenter, options: SegmentOptions, says: str
) -> None:
    with pytest.raises(BadOption) as refusal:
        segmenter.plan(HEIGHT, WIDTH, options)
    assert says in str(refusal.value)


# -- tags -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tags", [("red", "blue"), ("2", 0), (0, 2, 2)])
def test_tags_by_name_or_id_silence_the_other_classes(
    segmenter: Segmenter, rng: np.random.Generator, tags: tuple[str | int, ...]
) -> None:
    image = picture(rng, HEIGHT, WIDTH)
    prediction = segmenter.segment(image, SegmentOptions("toy-tagged", outputs=MAPS_OF_ONE, tags=tags))
    is_mean_of(prediction, [GAIN * image / 255.0 - GAIN * np.array([0, 1, 0])])


@pytest.mark.parametrize(
    ("text", "boxes", "tags"),
    [
        ("", (), ()),
        ("[]", (), ()),
        ('[[0, 1, 2.5, 3, "sky"], [1, 1, 2, 2, 4]]', ((0, 1, 2.5, 3, "sky"), (1, 1, 2, 2, 4)), None),
        ("sky, 4", None, ("sky", "4")),
        ('["sky, blue", 4]', None, ("sky, blue", 4)),
    ],
)
def test_prompts_are_read_from_text(text: str, boxes: tuple | None, tags: tuple | None) -> None:
    if boxes is not None:
        assert parse_options({"boxes": text}).boxes == boxes
    if tags is not None:
        assert parse_options({"tags": text}).tags == tags


@pytest.mark.parametrize(
    "text",
    [
        "1", "{}", "[1]", "[[1, 2, 3, 4]]", "[[1, 2, 3, 4, 5, 6]]", "[[1, 2, 3, 4, null]]", "[[1, 2, 3, 4, true]]",
        "[[1, 2, 3, 4, [0]]]", '[["0", 1, 2, 3, 0]]', "[[true, 1, 2, 3, 0]]", "[[0, 1, NaN, 3, 0]]",
        "[[0, 1, 1e999, 3, 0]]", f"[[0, 1, {10**400}, 3, 0]]",
        "[" * 100_000, "x", "[[0,0,1,1,0]," * 2000 + "[0,0,1,1,0]" + "]",
        "[" + ",".join(["[0,0,1,1,0]"] * 1001) + "]",
    ],
)  # fmt: skip
def test_boxes_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(BadOption, match="boxes"):
        parse_options({"boxes": text})


@pytest.mark.parametrize("text", ["[1.5]", "[[]]", "[null]", "[true]", "[1"])
def test_tags_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(BadOption, match="tags"):
        parse_options({"tags": text})


@pytest.mark.parametrize("text", ["", "nan", "inf", "-inf", "one", "1,5"])
def test_an_alpha_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(BadOption, match="alpha"):
        parse_options({"alpha": text})


# -- maps of a network's own ----------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0.0, 0.6])
def test_an_extra_map_is_stitched_like_the_others(
    segmenter: Segmenter, rng: np.random.Generator, overlap: float
) -> None:
    image = picture(rng, HEIGHT, WIDTH)
    options = SegmentOptions("toy-bright", overlap=overlap, outputs=("brightness", "entropy"))
    prediction = segmenter.segment(image, options)
    np.testing.assert_allclose(prediction.maps["brightness"], image.mean(-1) / 255, atol=1e-5)
    plain = segmenter.segment(image, SegmentOptions("toy-pointwise", overlap=overlap, outputs=("entropy",)))
    np.testing.assert_allclose(prediction.maps["entropy"], plain.maps["entropy"], atol=1e-6)


def test_an_extra_map_belongs_to_the_models_that_declare_it(segmenter: Segmenter) -> None:
    with pytest.raises(BadOption, match="no output 'brightness'; toy-latent has confidence"):
        segmenter.plan(9, 9, SegmentOptions("toy-latent", outputs=("brightness",)))


def test_a_graph_with_another_number_of_maps_than_its_card_is_refused(tmp_path: Path) -> None:
    card, network = toy_card("bright")
    directory = export_network(network, card, tmp_path)
    file = directory / "card.json"
    extra = '{"name": "second", "description": "", "unit": ""}'
    file.write_text(file.read_text().replace('"extra_maps": [', f'"extra_maps": [{extra}, '))
    with (
        Segmenter(device="cpu", threads=1, tuning=FIXED) as segmenter,
        pytest.raises(BadArtifact, match="gives 1 maps of its own"),
    ):
        segmenter.load(directory)


# -- published protocols --------------------------------------------------------------------------


def serve(card, network, store: Path, **options: object) -> Segmenter:
    export_network(network, card, store)
    return Segmenter.open(store, threads=1, device="cpu", **options)


@pytest.mark.parametrize("form", ["latent", "opposed"])
def test_averaged_logits_are_read_out_by_one_softmax(tmp_path: Path, rng: np.random.Generator, form: str) -> None:
    image = picture(rng, HEIGHT, WIDTH)
    card, network = toy_card(form, name="toy")
    card = dataclasses.replace(card, readout=Readout(average="logits", temperature=2.0))

    class Noise:
        noise = rng.normal(0, 1, (4, 3)).astype(np.float32)

        def draw(self, window_index: int) -> np.ndarray:
            return self.noise

    with serve(card, network, tmp_path) as segmenter:
        bands = list(segmenter.bands(image, SegmentOptions("toy"), noise=Noise() if form == "latent" else None))
    mean = GAIN * image / 255.0 + Noise.noise.mean(0) if form == "latent" else np.zeros(image.shape)
    p = softmax(mean / 2)
    confidence = np.concatenate([band.maps["confidence"] for band in bands])
    np.testing.assert_allclose(confidence, p.max(-1), atol=1e-5)


def test_clipped_windows_end_at_the_border_and_give_the_same_pointwise_answer(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    spec = WindowSpec(32, 48, overlap=1 / 3, blend="uniform", last="clip")
    plan = cover(HEIGHT, WIDTH, spec)
    assert plan.starts_y == (0, 22, 44) and plan.starts_x == (0, 32, 64)
    assert [window.height for window in plan][::3] == [32, 32, 26] and [w.width for w in plan][:3] == [48, 48, 37]
    image = picture(rng, HEIGHT, WIDTH)
    card, network = toy_card("pointwise", name="toy", window=spec)
    with serve(card, network, tmp_path, tuning=Tuning(windows_per_batch=5)) as segmenter:
        prediction = segmenter.segment(image, SegmentOptions("toy", outputs=MAPS_OF_ONE))
        small = segmenter.segment(image[:9, :11], SegmentOptions("toy", outputs=MAPS_OF_ONE))
    is_mean_of(prediction, [GAIN * image / 255.0])
    is_mean_of(small, [GAIN * image[:9, :11] / 255.0])


def test_an_answer_warns_when_its_windows_are_not_the_ones_the_network_was_trained_for(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    card, network = toy_card("pointwise", name="toy", window=WindowSpec(0, 0, trained=(20, 30)))
    with serve(card, network, tmp_path) as segmenter:
        assert segmenter.segment(picture(rng, 20, 30), SegmentOptions("toy")).warnings == ()
        (warning,) = segmenter.segment(picture(rng, 20, 31), SegmentOptions("toy")).warnings
    assert "results of toy hold for windows of 30x20 px" in warning and "run at 31x20" in warning


@pytest.mark.parametrize(("of_server", "of_card"), [(1000, 0), (1000, 2000), (4000, 1000)])
def test_an_image_that_a_model_would_see_whole_is_bounded(tmp_path: Path, of_server: int, of_card: int) -> None:
    card, network = toy_card("pointwise", name="toy", window=WindowSpec(0, 0, max_pixels=of_card))
    with serve(card, network, tmp_path, limits=Limits(window_pixels=of_server)) as segmenter:
        assert segmenter.find("toy").windows_per_batch == 1
        segmenter.plan(20, 50, SegmentOptions("toy"))
        with pytest.raises(TooLarge, match=r"sees an image whole and this one has 51x20 = 1,020 pixels.*1,000"):
            segmenter.plan(20, 51, SegmentOptions("toy"))
