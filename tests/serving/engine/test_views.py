"""Views: every window flipped, turned or shrunk is a member of every sample, whatever the network."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from penumbra.export.bundle import export_network
from penumbra.models.card import MAPS, MAPS_OF_ONE, NUM_VIEWS, Readout, WindowSpec, dump_card, parse_card
from penumbra.models.contract import Features
from penumbra.models.errors import BadArtifact, BadOption, TooLarge
from penumbra.models.toy.net import ToyConfig, ToyNetwork
from penumbra.serving.engine.options import PROBABILITIES, Limits, SegmentOptions
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.views import VIEWS
from tests.conftest import FIXED, picture, toy_card

SQUARE = WindowSpec(32, 32, overlap=0.25)
TURNS = ("flip", "d4")


class Sided(ToyNetwork):
    """Adds to the first class's logit on the window's left, and to the second's on its upper half: it sees sides."""

    def encode(self, image_B3hw: Tensor) -> Features:
        (logits_BMKhw,) = super().encode(image_B3hw)
        _, _, num_classes, height, width = logits_BMKhw.shape
        left_hw = (torch.arange(width) < width // 2).float().expand(height, width)
        upper_hw = (torch.arange(height) < height // 2).float()[:, None].expand(height, width)
        sides_Khw = torch.stack((left_hw, upper_hw, *[torch.zeros(height, width)] * (num_classes - 2)))
        return (logits_BMKhw + 2 * sides_Khw,)


def export(store: Path, form: str, name: str, *, sided: bool = False, **facts: object) -> None:
    card, network = toy_card(form, name=name, window=SQUARE)
    if sided:
        network = Sided(ToyConfig(form=form))  # type: ignore[arg-type]
    export_network(network, dataclasses.replace(card, **facts), store)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Segmenter]:
    store = tmp_path_factory.mktemp("store")
    for form in ("pointwise", "latent", "opposed", "boxed", "bright"):
        export(store, form, form)
    export(store, "pointwise", "sided", sided=True)
    export(store, "latent", "sided-latent", sided=True)
    export(store, "pointwise", "flipped", sided=True, views="flip")
    card, network = toy_card("pointwise", name="wide")
    export_network(network, card, store)
    clipped, network = toy_card("pointwise", name="clipped", window=dataclasses.replace(SQUARE, last="clip"))
    export_network(network, clipped, store)
    whole, network = toy_card("pointwise", name="whole", window=WindowSpec(0, 0))
    export_network(network, whole, store)
    with Segmenter.open(store, threads=2, device="cpu", tuning=FIXED) as opened:
        yield opened


def softmax(logits_K: np.ndarray) -> np.ndarray:
    p = np.exp(logits_K - logits_K.max(0))
    return p / p.sum(0)


def entropy(p_K: np.ndarray) -> np.ndarray:
    return -(p_K * np.log(np.maximum(p_K, 1e-300))).sum(0)


def ask(segmenter: Segmenter, image_HW3: np.ndarray, **options: object):  # type: ignore[no-untyped-def]
    return segmenter.segment(image_HW3, SegmentOptions(outputs=(*MAPS, PROBABILITIES), **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("views", TURNS)
@pytest.mark.parametrize("size", [(32, 32), (20, 31), (75, 90)])
def test_views_of_a_network_that_sees_no_sides_agree_to_1e_6(
    segmenter: Segmenter, rng: np.random.Generator, views: str, size: tuple[int, int]
) -> None:
    image_HW3 = picture(rng, *size)
    answer = ask(segmenter, image_HW3, model="pointwise", views=views, overlap=0.0)
    once = segmenter.segment(image_HW3, SegmentOptions(model="pointwise", overlap=0.0, outputs=MAPS[:-1]))
    assert answer.maps["mutual_information"].max() <= 1e-6
    np.testing.assert_array_equal(answer.labels_HW, once.labels_HW)
    for name in MAPS[:-1]:
        np.testing.assert_allclose(answer.maps[name], once.maps[name], atol=2e-6)


@pytest.mark.parametrize("views", TURNS)
@pytest.mark.parametrize("form", ["latent", "opposed"])
def test_views_add_nothing_to_the_samples_of_such_a_network(
    segmenter: Segmenter, rng: np.random.Generator, views: str, form: str
) -> None:
    image_HW3 = picture(rng, 75, 90)
    answer, without = (ask(segmenter, image_HW3, model=form, views=kind, seed=5) for kind in (views, "none"))
    assert answer.num_samples == without.num_samples
    for name in MAPS:
        np.testing.assert_allclose(answer.maps[name], without.maps[name], atol=5e-6)


def test_two_views_that_disagree_have_exactly_the_mutual_information_of_their_two_answers(
    segmenter: Segmenter,
) -> None:
    """On black every logit is 0 but for the sides, so that p and its mirror image are known."""
    answer = ask(segmenter, np.zeros((32, 32, 3), np.uint8), model="sided", views="flip")
    for y, upper in ((0, 2), (31, 0)):
        p_2K = np.stack([softmax(np.array([left, upper, 0.0])) for left in (2.0, 0.0)], axis=1)
        expected = entropy(p_2K.mean(1)) - entropy(p_2K).mean()
        np.testing.assert_allclose(answer.maps["mutual_information"][y], expected, atol=1e-6)
        np.testing.assert_allclose(answer.prob_KHW[:, y], p_2K.mean(1)[:, None].repeat(32, 1), atol=1e-6)


@pytest.mark.parametrize("views", TURNS)
def test_views_are_what_numpy_makes_by_hand(segmenter: Segmenter, rng: np.random.Generator, views: str) -> None:
    image_HW3 = picture(rng, 32, 32)
    answer = ask(segmenter, image_HW3, model="sided", views=views)
    network = Sided(ToyConfig(form="pointwise"))
    turns = [(k, mirrored) for k in (range(4) if views == "d4" else range(1)) for mirrored in (False, True)]
    probs = []
    for quarters, mirrored in turns:
        turned = np.rot90(image_HW3, quarters)
        turned = turned[:, ::-1] if mirrored else turned
        x_13hw = torch.from_numpy(turned.copy()).permute(2, 0, 1)[None].float() / 255
        p_Khw = network(x_13hw, torch.zeros(1, 1, 0))[0, 0].softmax(0).numpy()
        p_Khw = p_Khw[:, :, ::-1] if mirrored else p_Khw
        probs.append(np.rot90(p_Khw, -quarters, axes=(1, 2)))
    mean_KHW = np.mean(probs, axis=0)
    np.testing.assert_allclose(answer.prob_KHW, mean_KHW, atol=1e-6)
    expected = entropy(mean_KHW) - np.mean([entropy(p) for p in probs], axis=0)
    np.testing.assert_allclose(answer.maps["mutual_information"], expected, atol=2e-6)
    assert answer.maps["mutual_information"].max() > 0.1


@pytest.mark.parametrize("aligned", [True, False])
def test_a_shrunk_view_is_torchs_bilinear_picture_and_comes_back_to_its_place(aligned: bool) -> None:
    x_13hw = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    for view in VIEWS["scales"][1:]:
        size = int(24 * view.scale), int(40 * view.scale)
        small = view.turn(x_13hw, aligned=aligned)
        assert small.shape == x_13hw.shape
        if not aligned:
            expected = F.interpolate(x_13hw, size=size, mode="bilinear", align_corners=False)
            torch.testing.assert_close(
                small[..., : size[0], : size[1]], expected, atol=5e-6, rtol=0
            )  # torch has its places in float32
        ramp = torch.stack(torch.meshgrid(torch.arange(24.0), torch.arange(40.0), indexing="ij"))[None]
        back = view.turn_back(view.turn(ramp, aligned=aligned), aligned=aligned)
        torch.testing.assert_close(back[..., 2:-3, 2:-3], ramp[..., 2:-3, 2:-3], atol=1e-4, rtol=0)


def test_scales_of_a_flat_picture_agree_and_of_an_edge_do_not(segmenter: Segmenter) -> None:
    flat = np.full((70, 70, 3), (90, 20, 200), np.uint8)
    assert ask(segmenter, flat, model="pointwise", views="scales").maps["mutual_information"].max() <= 1e-6
    flat[:, 35:] = 0
    edge = ask(segmenter, flat, model="pointwise", views="scales", overlap=0.0).maps["mutual_information"]
    assert edge[:, 34:36].max() > 1e-3 and edge[:, 5:20].max() <= 1e-6


def test_samples_and_views_are_members_of_one_axis_and_the_seed_fixes_both(
    segmenter: Segmenter, rng: np.random.Generator
) -> None:
    """Every view sees the same draws: the answer is the mean of those of the views, each with all samples."""
    image_HW3 = picture(rng, 32, 32)
    answer, again = (ask(segmenter, image_HW3, model="sided-latent", views="flip", samples=3, seed=9) for _ in "ab")
    np.testing.assert_array_equal(answer.prob_KHW, again.prob_KHW)
    plain = ask(segmenter, image_HW3, model="sided-latent", samples=3, seed=9)
    mirrored = ask(segmenter, image_HW3[:, ::-1].copy(), model="sided-latent", samples=3, seed=9)
    expected = (plain.prob_KHW + mirrored.prob_KHW[:, :, ::-1]) / 2
    np.testing.assert_allclose(answer.prob_KHW, expected, atol=1e-6)
    assert (answer.num_samples, answer.views, answer.origin["views"]) == (3, "flip", "flip")
    assert "views" not in plain.origin


@pytest.mark.parametrize("views", ["flip", "d4", "scales"])
def test_boxes_turn_with_the_view(segmenter: Segmenter, rng: np.random.Generator, views: str) -> None:
    image_HW3, boxes = np.full((40, 50, 3), 40, np.uint8), ((4.0, 8.0, 20.0, 32.0, "green"),)
    answer, without = (ask(segmenter, image_HW3, model="boxed", views=kind, boxes=boxes) for kind in (views, "none"))
    inside = np.s_[12:28, 8:16] if views == "scales" else np.s_[:]
    for name in MAPS:
        np.testing.assert_allclose(answer.maps[name][inside], without.maps[name][inside], atol=5e-6)


@pytest.mark.parametrize("aligned", [False, True])
def test_a_shrunk_view_loses_no_box_and_lets_none_grow(aligned: bool) -> None:
    for view in VIEWS["scales"]:
        for height, width in ((1, 1), (1, 20), (20, 1), (2, 20), (3, 3), (16, 12)):
            for y, x in ((8, 8), (8, 9), (9, 8), (9, 9), (10, 11)):
                mask = torch.zeros(1, 1, 40, 50)
                mask[..., y : y + height, x : x + width] = 1
                seen = view.turn_mask(mask, aligned=aligned)[0, 0, : int(40 * view.scale), : int(50 * view.scale)]
                rows, columns = (seen.any(axis).nonzero().flatten() for axis in (1, 0))
                assert seen.unique().tolist() == [0, 1]
                for found, length in ((rows, height), (columns, width)):
                    assert 1 <= len(found) <= view.scale * length + 3, (view, height, width, y, x)
                if min(height, width) > 2:
                    turned = view.turn(mask, aligned=aligned)[0, 0, : len(seen), : seen.shape[1]]
                    assert torch.equal(seen, turned.round())


def test_the_networks_own_map_is_that_of_the_window_as_it_is(segmenter: Segmenter, rng: np.random.Generator) -> None:
    image_HW3 = picture(rng, 50, 60)
    answer, without = (
        segmenter.segment(image_HW3, SegmentOptions(model="bright", outputs=("brightness",), views=views))
        for views in ("scales", "none")
    )
    np.testing.assert_array_equal(answer.maps["brightness"], without.maps["brightness"])


@pytest.mark.parametrize("model", ["whole", "clipped"])
def test_windows_of_any_size_are_turned_as_they_are(segmenter: Segmenter, rng: np.random.Generator, model: str) -> None:
    answer = ask(segmenter, picture(rng, 40, 60), model=model, views="d4", overlap=0.0)
    assert answer.maps["mutual_information"].max() <= 1e-6


def test_the_default_outputs_of_one_sample_in_several_views_have_mutual_information(segmenter: Segmenter) -> None:
    image_HW3 = np.zeros((32, 32, 3), np.uint8)
    assert [*segmenter.segment(image_HW3, SegmentOptions("pointwise", views="flip")).maps][-1] == "mutual_information"
    assert "mutual_information" not in segmenter.segment(image_HW3, SegmentOptions("pointwise")).maps
    with pytest.raises(BadOption, match=r"no output 'mutual_information'.* views is none"):
        segmenter.segment(image_HW3, SegmentOptions("pointwise", outputs=("mutual_information",)))
    with pytest.raises(BadOption, match="no output 'seam'"):
        segmenter.segment(image_HW3, SegmentOptions("pointwise", outputs=("seam",), views="flip"))


def test_the_cards_views_are_those_of_a_request_that_names_none(segmenter: Segmenter, rng: np.random.Generator) -> None:
    image_HW3 = picture(rng, 60, 60)
    default, named = ask(segmenter, image_HW3, model="flipped"), ask(segmenter, image_HW3, model="sided", views="flip")
    np.testing.assert_array_equal(default.prob_KHW, named.prob_KHW)
    without = segmenter.segment(image_HW3, SegmentOptions("flipped", outputs=MAPS_OF_ONE, views="none"))
    assert without.views == "none" and "mutual_information" not in without.maps


def test_windows_that_are_not_square_are_not_turned_on_their_side(segmenter: Segmenter) -> None:
    with pytest.raises(BadOption, match="views is d4, which turns windows on their side, and those of wide are 48x32"):
        ask(segmenter, np.zeros((32, 48, 3), np.uint8), model="wide", views="d4")
    with pytest.raises(BadOption, match="views is 'x'; none, flip, d4, scales are possible"):
        ask(segmenter, np.zeros((32, 48, 3), np.uint8), model="wide", views="x")


def test_the_queue_counts_every_view(segmenter: Segmenter) -> None:
    options = SegmentOptions("latent", samples=10, views="d4")
    with pytest.raises(TooLarge, match=r"9 windows x 10 samples x 8 views = 720 .*leave out the views"):
        segmenter.plan(80, 80, options, limits=Limits(queue_samples=719))
    segmenter.plan(80, 80, options, limits=Limits(queue_samples=720))


def test_a_card_says_its_views_strictly_and_one_without_has_none() -> None:
    card, _ = toy_card("pointwise", window=SQUARE)
    assert parse_card(dump_card(card).replace(',\n  "views": "none"', "")) == card
    with pytest.raises(BadArtifact, match="views is 'turn'; one of 'none', 'flip', 'd4', 'scales' is wanted"):
        parse_card(dump_card(card).replace('"views": "none"', '"views": "turn"'))
    wide = toy_card("pointwise")[0]
    with pytest.raises(BadArtifact, match=r"has the views d4, .* windows of 32x48; square ones are wanted"):
        parse_card(dump_card(dataclasses.replace(wide, views="d4")))
    assert {name: len(views) for name, views in VIEWS.items()} == NUM_VIEWS


@pytest.mark.parametrize("readout", [Readout(average="logits"), Readout(softmax_at="feature"), Readout(temperature=2)])
def test_views_keep_to_the_cards_rules_of_reading_out(
    readout: Readout, tmp_path: Path, rng: np.random.Generator
) -> None:
    export(tmp_path, "pointwise", "ruled", readout=readout)
    with Segmenter.open(tmp_path, threads=1, device="cpu", tuning=FIXED) as segmenter:
        image_HW3 = picture(rng, 40, 40)
        answer, without = (
            segmenter.segment(image_HW3, SegmentOptions(outputs=("entropy", "confidence"), views=views))
            for views in ("d4", "none")
        )
    for name in ("entropy", "confidence"):
        np.testing.assert_allclose(answer.maps[name], without.maps[name], atol=5e-6)


class Counted:
    """Notes the windows and samples of every batch."""

    def __init__(self) -> None:
        self.counts = [0, 0]

    def batch_done(self, model: str, *, windows: int, capacity: int, samples: int) -> None:
        self.counts = [self.counts[0] + windows, self.counts[1] + samples]

    def out_of_memory(self, model: str) -> None: ...

    def model_loaded(self, model: str, *, seconds: float) -> None: ...


def test_metrics_count_every_sample_in_every_view(tmp_path: Path, rng: np.random.Generator) -> None:
    export(tmp_path, "latent", "counted")
    counted = Counted()
    with Segmenter.open(tmp_path, threads=1, device="cpu", tuning=FIXED, observer=counted) as segmenter:
        segmenter.segment(picture(rng, 80, 80), SegmentOptions(samples=3, views="d4"))
    assert counted.counts == [9, 9 * 3 * 8]


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_views_run_in_formats_whose_windows_have_one_size(
    backend: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    pytest.importorskip({"onnx": "onnxruntime"}.get(backend, backend), reason=f"{backend} is not installed")
    card, _ = toy_card("pointwise", name="sided", window=SQUARE)
    export_network(Sided(ToyConfig(form="pointwise")), card, tmp_path / "there", backend=backend)
    export_network(Sided(ToyConfig(form="pointwise")), card, tmp_path / "here")
    image_HW3, probs = picture(rng, 50, 60), []
    for store in ("here", "there"):
        with Segmenter.open(tmp_path / store, threads=1, device="cpu", tuning=FIXED) as segmenter:
            probs.append([ask(segmenter, image_HW3, views=views).prob_KHW for views in ("d4", "scales")])
    np.testing.assert_allclose(*probs, atol=1e-5)
