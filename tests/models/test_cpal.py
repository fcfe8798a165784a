"""SIPE, the base of CPAL: recorded maps come back, and what tags, scales and seeds promise is kept."""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from penumbra.export.bundle import export_network
from penumbra.export.importer import import_checkpoint
from penumbra.models.card import Card, ClassInfo, InputSpec, PromptSpec, Readout
from penumbra.models.checkpoint import load_checkpoint
from penumbra.models.cpal import METHOD
from penumbra.models.cpal.config import CpalConfig, sipe
from penumbra.models.cpal.net import (
    ABSENT,
    CamNetwork,
    choose_seeds,
    divide_by_maximum,
    gather_prototypes,
    normalise_cam,
    overlap,
    reactivate,
)
from penumbra.models.cpal.pyramid import Pyramid, rescale
from penumbra.models.cpal.upstream import SIPE
from penumbra.models.errors import BadCheckpoint, BadOption
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.windows import normalise
from tests.models import golden
from tests.models.small import LITE, SMALL, seeded, traced

STEMS = golden.fixtures("sipe_*")
SIZE = re.compile(r"_(\d+)x(\d+)")
THREE = tuple(ClassInfo(f"class {k}", (k, k, k)) for k in range(3))
EMPTY = torch.zeros(1, 1, 0)


class Case(NamedTuple):
    """One fixture, and its file imported to be run as published, and as we would."""

    stem: str
    arrays: golden.Arrays
    card: Card
    published: CamNetwork
    ours: CamNetwork

    @property
    def label_1K(self) -> Tensor:
        return torch.from_numpy(next(v for k, v in self.arrays.items() if re.fullmatch(r"label\d+", k)))[None]

    def sizes(self, what: str) -> list[tuple[int, int]]:
        """Of the recorded arrays of that name."""
        found = (re.fullmatch(rf"{what}_(\d+)x(\d+)", key) for key in self.arrays)
        return [(int(match[1]), int(match[2])) for match in found if match]

    def check(self, key: str, ours: Tensor) -> None:
        """Maps to the stated tolerance; of activations of 1e8, which only the plain filler has, that share."""
        recorded = self.arrays[key]
        allowed = 2e-3 if self.stem.endswith("_calib") else 2e-5 * max(1.0, float(np.abs(recorded).max()))
        difference = float(np.abs(ours.numpy().reshape(recorded.shape) - recorded).max())
        assert difference <= allowed, f"{key} differs by {difference}, {allowed} allowed"

    def check_where_recorded(self, key: str, ours: Tensor) -> None:
        if key in self.arrays:
            self.check(key, ours)

    def check_seeds(self, key: str, ours: Tensor) -> None:
        if key in self.arrays:
            assert np.array_equal(ours.numpy(), self.arrays[key]), key


def original(facts: dict, arrays: golden.Arrays) -> dict[str, Tensor]:
    """The file's tensors. Calibrated heads are projected off their stage's mean: W - (W m + b) m^T."""
    state = golden.state_dict(facts, arrays)
    for key, entry in facts["state_dict"].items():
        if "+project" in entry["rule"]:
            stage, offset = ("4", 0.04) if key.startswith("classifier") else (key[len("side")], 0.0)
            mean = arrays[f"unitmean::stage{stage}"].astype(np.float64)
            weight = state[key].double().numpy()[:, :, 0, 0]
            state[key] = torch.from_numpy((weight - np.outer(weight @ mean + offset, mean)).astype(np.float32))
            state[key] = state[key][:, :, None, None]
        elif "alias_of" in entry:
            state[key] = state[entry["alias_of"]].clone()
    return state


@pytest.fixture(scope="module", params=STEMS or [pytest.param("", marks=pytest.mark.skip("no recorded outputs"))])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    facts, arrays = golden.load(request.param)
    state = original(facts, arrays)
    assert golden.wrong_tensors(facts, state) == []
    count = len(state["classifier.weight"]) + 1
    classes = tuple(ClassInfo(f"class {k}", (k, k, k)) for k in range(count))
    folder = tmp_path_factory.mktemp("published")
    torch.save({"net": state}, folder / "theirs.pth")
    loaded = []
    for protocol in ("published", "penumbra"):
        output = folder / f"{protocol}.safetensors"
        imported = import_checkpoint("cpal", [folder / "theirs.pth"], output, classes=classes, protocol=protocol)  # type: ignore[arg-type]
        assert imported.train_only == ()
        loaded.append(load_checkpoint(output))
    for path in folder.iterdir():
        path.unlink()
    (card, published), (_, ours) = loaded
    assert isinstance(published, CamNetwork) and isinstance(ours, CamNetwork)
    return Case(request.param, arrays, card, published, ours)


# -- the recorded outputs -------------------------------------------------------------------------


@torch.inference_mode()
def test_the_training_network_s_maps_come_back(case: Case) -> None:
    assert case.sizes("net_score")
    for size in case.sizes("net_score"):
        end = f"_{size[0]}x{size[1]}"
        for prefix, label_1K in (("net", case.label_1K), ("net_all", torch.ones_like(case.label_1K))):
            found = case.ours.localise(case.ours.observe(golden.image(*size)), label_1K[..., None, None])
            case.check_where_recorded(f"{prefix}_cam{end}", found.cam_BKhw)
            case.check_seeds(f"{prefix}_seeds{end}", found.seeds_BKhw)
            case.check_where_recorded(f"{prefix}_probs{end}", found.overlap_BKhw.softmax(1))
            case.check_where_recorded(f"{prefix}_prototypes{end}", found.prototypes_BKD)
            case.check_where_recorded(f"{prefix}_IS_cam{end}", found.is_cam_BKhw)
            case.check_where_recorded(f"{prefix}_hie_fea{end}_c::8", found.view.hierarchical_BDhw[:, ::8])
            case.check_where_recorded(f"{prefix}_x4{end}_c::32", found.view.deep_BDhw[:, ::32])
            case.check_where_recorded(f"{prefix}_score{end}", found.view.score_BN)
            case.check_where_recorded(f"{prefix}_rawcam{end}", found.view.raw_BNhw)


@torch.inference_mode()
def test_the_inference_network_s_maps_and_seeds_come_back(case: Case) -> None:
    """Of an image and its mirror image; the label masks the seeds, hence whole maps."""
    assert case.sizes("cam_norm_cam")
    for size in case.sizes("cam_norm_cam"):
        end = f"_{size[0]}x{size[1]}"
        view = case.ours.look(golden.image(*size))
        cam_1Khw, is_cam_1Khw = case.ours.draw_maps(view).unbind(1)
        seeds_1Khw, label_1K11 = choose_seeds(overlap(cam_1Khw, view.hierarchical_BDhw)), case.label_1K[..., None, None]
        case.check(f"cam_norm_cam{end}", cam_1Khw)
        case.check_where_recorded(f"cam_IS_cam{end}", is_cam_1Khw * label_1K11)
        case.check_seeds(f"cam_seeds{end}", seeds_1Khw * label_1K11)
        case.check_where_recorded(f"cam_all_IS_cam{end}", is_cam_1Khw)
        case.check_seeds(f"cam_all_seeds{end}", seeds_1Khw)


@torch.inference_mode()
def test_seeds_prototypes_and_reactivation_come_back_on_synthetic_maps(case: Case) -> None:
    if "func_cam" not in case.arrays:
        pytest.skip("not recorded here")
    cam, feature = torch.from_numpy(case.arrays["func_cam"]), torch.from_numpy(case.arrays["func_feature"])
    iou = overlap(cam, feature)
    seeds = choose_seeds(iou) * case.label_1K[..., None, None]
    assert np.array_equal(seeds.numpy(), case.arrays["func_seeds"])
    prototypes = gather_prototypes(seeds, feature)
    for key, ours in (
        ("func_probs", iou.softmax(1)),
        ("func_prototypes", prototypes),
        ("func_IS_cam", reactivate(feature, prototypes)),
    ):
        assert np.abs(ours.numpy() - case.arrays[key]).max() <= 2e-6, key


@torch.inference_mode()
def test_the_published_evaluation_gives_the_recorded_maps_and_labels(case: Case) -> None:
    """Four scales with flips, from the pixels of a picture to its labels."""
    for key in [key for key in case.arrays if key.startswith("image_rgb")]:
        end = key.removeprefix("image_rgb")
        keys = case.arrays["ms_IS_CAM_keys"]
        pixels = torch.from_numpy(normalise(case.arrays[key], case.card.input)).permute(2, 0, 1)[None].contiguous()
        features = case.published.take_prompt(pixels, case.published.encode(pixels), (case.label_1K,))
        maps_Khw = features[0][0, 0]
        case.check(f"ms_IS_CAM{end}_hw::2", maps_Khw[torch.from_numpy(keys)][:, ::2, ::2])
        labels = case.published.decode(features, EMPTY)[0, 0].argmax(0)
        assert np.array_equal(labels.numpy(), case.arrays[f"ms_label{end}"])


@pytest.mark.slow
def test_the_server_gives_the_recorded_labels_of_a_tagged_photo(case: Case, tmp_path: Path) -> None:
    export_network(case.published, case.card, tmp_path)
    with Segmenter.open(tmp_path, device="cpu", threads=1, tuning=Tuning(1, 1)) as segmenter:
        for key in [key for key in case.arrays if key.startswith("image_rgb")]:
            tags = tuple(int(k) for k in case.arrays["ms_IS_CAM_keys"])
            prediction = segmenter.segment(case.arrays[key], SegmentOptions(tags=tags, outputs=("margin",)))
            assert prediction.members == ("is_cam",)
            different = prediction.labels_HW != case.arrays[key.replace("image_rgb", "ms_label")]
            # Maps are recorded to 2e-3: only where the two best are that close may rounding decide.
            assert not (different & (prediction.maps["margin"] > 2e-3)).any() and different.mean() < 1e-3


def test_the_card_tells_the_published_protocol(case: Case) -> None:
    card = case.card
    assert (card.window.height, card.window.width, card.window.blend) == (0, 0, "uniform")
    assert card.readout == Readout(align_corners=False) and card.input == InputSpec()
    assert card.prompt == PromptSpec(kind="tags", background=0)
    assert card.sampling.kind == "single" and case.ours.sampling.members == ("cam", "is_cam")
    assert card.config["scales"] == [1.0, 0.5, 1.5, 2.0] and card.config["flip"]


# -- seeds and maps -------------------------------------------------------------------------------


def random_maps(num: int = 2) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(4)
    raw_BNhw, feature_BDhw = (torch.randn(num, count, 7, 9, generator=draws) for count in (4, 11))
    return normalise_cam(raw_BNhw), feature_BDhw


def test_the_matrix_form_of_the_overlap_equals_the_plain_form_of_the_paper() -> None:
    """The plain form holds every class's product of CAM and affinity: [B, K, hw, hw]."""
    cam, feature = random_maps()
    unit = feature.flatten(2) / (feature.flatten(2).norm(dim=1, keepdim=True) + 1e-5)
    affinity = torch.relu(torch.einsum("bdi,bdj->bij", unit, unit))[:, None]
    both = (affinity * cam.flatten(2)[:, :, None]).sum(-1)
    iou = both / (affinity.sum(-1) + cam.flatten(2).sum(-1, keepdim=True) - both)
    iou[:, 0] *= 0.5
    assert torch.allclose(overlap(cam, feature).flatten(2), iou, atol=1e-6)
    assert torch.equal(choose_seeds(overlap(cam, feature)).flatten(2).argmax(1), iou.argmax(1))


def test_the_map_of_a_glimpsed_object_grows_to_the_whole_object() -> None:
    """Left half of the map: an object, of which the CAM shows one pixel well. Right half: background."""
    feature = torch.zeros(1, 2, 4, 6)
    feature[:, 0, :, :3], feature[:, 1, :, 3:] = 1, 1
    raw = torch.zeros(1, 1, 4, 6)
    raw[..., :3], raw[0, 0, 1, 1] = 0.3, 1.0
    seeds = choose_seeds(overlap(normalise_cam(raw), feature))
    is_cam = reactivate(feature, gather_prototypes(seeds, feature))
    inside = torch.zeros(4, 6)
    inside[:, :3] = 1
    assert torch.allclose(is_cam[0, 1], inside) and torch.allclose(is_cam[0, 0], 1 - inside)


def test_a_class_without_seeds_has_an_empty_map() -> None:
    _, feature = random_maps()
    assert torch.equal(reactivate(feature, torch.zeros(2, 3, 11)), torch.zeros(2, 3, 7, 9))


def test_maps_of_a_picture_without_any_feature_are_finite() -> None:
    nothing = torch.zeros(1, 5, 3, 3)
    iou = overlap(normalise_cam(nothing), nothing)
    assert torch.isfinite(iou).all()
    assert torch.isfinite(reactivate(nothing, gather_prototypes(choose_seeds(iou), nothing))).all()


# -- tags -----------------------------------------------------------------------------------------


def picture(num: int = 2, size: tuple[int, int] = (48, 64)) -> Tensor:
    return torch.randn(num, 3, *size, generator=torch.Generator().manual_seed(5))


def small(name: str) -> CamNetwork:
    network = seeded(name)
    assert isinstance(network, CamNetwork)
    return network


@pytest.mark.parametrize("name", ["cpal cam", "cpal scales", "cpal context"])
@torch.inference_mode()
def test_tags_change_only_which_classes_take_part(name: str) -> None:
    network, tags_BK = small(name), torch.tensor([[0.0, 1, 0], [0, 0, 1]])
    maps_BMKhw, _ = features = network.encode(picture())
    tagged = network.take_prompt(picture(), features, (tags_BK,))
    assert torch.equal(tagged[0], maps_BMKhw)
    assert torch.equal(tagged[1], torch.tensor([[1.0, 1, 0], [1, 0, 1]]))  # the background is always there
    logits_MBKhw = network.decode(tagged, torch.zeros(len(network.members), 2, 0))
    shown = maps_BMKhw.transpose(0, 1).clamp_min(1e-5) * tagged[1][:, :, None, None]
    assert torch.allclose(logits_MBKhw.softmax(2), shown / shown.sum(2, keepdim=True), atol=1e-6)
    assert torch.equal(logits_MBKhw == ABSENT, (tagged[1] == 0)[:, :, None, None].expand_as(logits_MBKhw))


@torch.inference_mode()
def test_without_a_background_every_class_is_tagged_and_maps_are_of_nothing_else() -> None:
    network, tags_BK = small("cpal everywhere"), torch.tensor([[0.0, 1, 0], [1, 0, 1]])
    features = network.encode(picture())
    assert network.prompt.background is None and network.classifier.out_channels == 3
    assert torch.equal(network.take_prompt(picture(), features, (tags_BK,))[1], tags_BK)
    view = network.look(picture())
    cam_BKhw, pacam_BKhw = network.draw_maps(view).unbind(1)
    assert torch.equal(cam_BKhw, divide_by_maximum(F.relu(view.raw_BNhw)))
    assert pacam_BKhw.shape == cam_BKhw.shape and pacam_BKhw.any()
    assert torch.equal(overlap(cam_BKhw, view.deep_BDhw)[:, 0] * 2, overlap(cam_BKhw, view.deep_BDhw, 1.0)[:, 0])


def test_without_tags_the_scores_say_which_classes_are_there() -> None:
    scores = torch.tensor([[2.0, 0.1, -1.0], [-3.0, -2.0, -4.0]])
    network = CamNetwork(CpalConfig(4, depth=18, width=4))
    assert torch.equal(network.predict_tags(scores), torch.tensor([[1.0, 1, 1, 0], [1, 0, 1, 0]]))
    strict = CamNetwork(CpalConfig(4, depth=18, width=4, tag_threshold=0.8))
    assert torch.equal(strict.predict_tags(scores), torch.tensor([[1.0, 1, 0, 0], [1, 0, 1, 0]]))


@torch.inference_mode()
def test_the_predicted_labels_are_those_of_the_mean_score() -> None:
    network = small("cpal scales")
    scores = [network.look(image).score_BN for image in network.pyramid(picture())]
    assert torch.equal(network.encode(picture())[1], network.predict_tags(sum(scores) / 3))  # type: ignore[arg-type]


@torch.inference_mode()
def test_a_mirrored_picture_gets_mirrored_maps() -> None:
    network = small("cpal scales")
    maps, mirrored = network.encode(picture())[0], network.encode(picture().flip(3))[0]
    assert torch.allclose(mirrored.flip(4), maps, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (CpalConfig(3, members=("cam", "pacam")), r"members are cam, pacam; of cam, is_cam, each once"),
        (CpalConfig(3, members=()), "members are empty"),
        (CpalConfig(3, "deeplabv2", members=("max", "max")), "of max, scale1, each once"),
        (CpalConfig(3, sampling="dropout"), "'cam' has no dropout"),
        (CpalConfig(3, tag_threshold=1.0), "tag_threshold is 1.0"),
        (CpalConfig(3, scales=(1.0, 1.0)), r"scales are \(1.0, 1.0\)"),
        (CpalConfig(3, scales=()), r"scales are \(\)"),
        (CpalConfig(3, context=4, neighbours=0), "neighbours is 0"),
        (CpalConfig(3, "deeplabv2", members=("max",), flip=True), "'deeplabv2' has neither flips nor context"),
        (CpalConfig(3, "deeplabv2", members=("max",), background=False), "'deeplabv2' takes every class alike"),
        (CpalConfig(3, "wrn38", members=("logits",), scales=(1.0, 0.5)), "'wrn38' has the scale 1 alone"),
        (CpalConfig(3, "wrn38", 18, members=("logits",)), "depth is 18, and the network 'wrn38' has no ResNet"),
        (CpalConfig(3, depth=18, lite=LITE), "depth is 18, and the network 'cam' has no ResNet; leave it out"),
        (
            CpalConfig(3, "deeplabv2", width=24, members=("max",), lite=LITE),
            "width is 24, which no part of the network 'deeplabv2' has; leave it out",
        ),
    ],
)
def test_a_configuration_that_fits_no_network_is_refused(config: CpalConfig, problem: str) -> None:
    with pytest.raises(BadOption, match=problem):
        METHOD.build(config)


# -- scales ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(120, 160), (37, 53), (5, 7), (1, 3)])
@pytest.mark.parametrize("scale", [0.5, 0.75, 1.5, 2.0])
def test_a_rescaled_picture_has_the_bytes_that_pillow_gives(size: tuple[int, int], scale: float) -> None:
    if min(size) * scale <= 0.5:
        pytest.skip("nothing is left of it")
    pixels_HW3 = golden.picture(*size)
    height, width = (int(np.round(length * scale)) for length in size)
    theirs = np.asarray(Image.fromarray(pixels_HW3).resize((width, height), Image.Resampling.BICUBIC))
    ours = rescale(torch.from_numpy(pixels_HW3).permute(2, 0, 1)[None].double(), scale)
    assert np.array_equal(ours[0].permute(1, 2, 0).numpy(), theirs)


def test_a_pyramid_undoes_the_normalisation_to_whole_pixels() -> None:
    pixels_HW3 = golden.picture(20, 30)
    image = torch.from_numpy(normalise(pixels_HW3, InputSpec())).permute(2, 0, 1)[None]
    same, half = Pyramid((1.0, 0.5))(image)
    assert torch.allclose(same, image, atol=1e-6)
    halved = np.asarray(Image.fromarray(pixels_HW3).resize((15, 10), Image.Resampling.BICUBIC))
    assert torch.allclose(half[0].permute(1, 2, 0), torch.from_numpy(normalise(halved, InputSpec())), atol=1e-6)


# -- published files ------------------------------------------------------------------------------


def published_file(folder: Path) -> Path:
    """A narrow network's tensors under the published names, with their three copies."""
    network = METHOD.build(CpalConfig(3, width=2))
    names = {ours: theirs for theirs, ours in SIPE.renames.items()}
    state = {}
    for key, value in network.state_dict().items():
        prefix = next(prefix for prefix in names if key.startswith(prefix))
        state[names[prefix] + key.removeprefix(prefix)] = value
    for copy, source in SIPE.aliases.items():
        state |= {copy + k.removeprefix(source): v.clone() for k, v in state.items() if k.startswith(source)}
    torch.save({"net": state}, folder / "theirs.pth")
    return folder / "theirs.pth"


def test_a_file_of_another_width_and_class_count_is_read_by_its_shapes(tmp_path: Path) -> None:
    import_checkpoint("cpal", [published_file(tmp_path)], tmp_path / "ours.safetensors", classes=THREE)
    card, _ = load_checkpoint(tmp_path / "ours.safetensors")
    assert (card.num_classes, card.config["width"], card.config["depth"]) == (3, 2, 50)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"backbone.4.0.2.bn3.weight": torch.zeros(64)}, "differ"),
        ({"newly_added.4.weight": torch.zeros(8, 64, 1, 1)}, "differ"),
        ({"resnet50.layer3.5.bn2.bias": None}, "layer3.5.bn2.bias"),
        ({"side2.weight": torch.zeros(4, 16, 3, 3), "newly_added.2.weight": torch.zeros(4, 16, 3, 3)}, "side2.weight"),
        ({"resnet50.fc.weight": torch.zeros(1)}, "resnet50.fc.weight"),
    ],
)
def test_a_file_that_is_no_network_is_refused_by_name(
    tmp_path: Path, change: dict[str, Tensor | None], problem: str
) -> None:
    theirs = published_file(tmp_path)
    content = torch.load(theirs, weights_only=True)
    content["net"] = {k: v for k, v in (content["net"] | change).items() if v is not None}
    torch.save(content, theirs)
    with pytest.raises(BadCheckpoint, match=re.escape(problem)):
        import_checkpoint("cpal", [theirs], tmp_path / "ours.safetensors", classes=THREE)


def test_the_published_network_has_as_many_parameters_as_its_file() -> None:
    with torch.device("meta"):
        network = CamNetwork(sipe(21))
    assert sum(parameter.numel() for parameter in network.parameters()) == 24_433_728


# -- export ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SMALL if name.startswith("cpal")])
@torch.inference_mode()
def test_traced_graphs_run_with_other_batches_and_sizes(name: str) -> None:
    network = seeded(name).double()  # rounding would be of the size of what is looked for
    sampling, tags_BK = network.sampling, torch.tensor([[1.0, 0, 1], [1, 1, 0], [1, 1, 1]])
    has_tags = network.prompt.kind == "tags"
    shape = (sampling.default_samples, 3, sampling.noise_length)
    noise = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(6)).double()
    graphs = traced(network, picture().double(), noise[:, :2], (tags_BK[:2],) if has_tags else ())
    for num, size in ((1, (37, 53)), (3, (101, 70))):
        image = picture(num, size).double()
        features, theirs = network.encode(image), graphs.encode(image)
        if has_tags:
            features = network.take_prompt(image, features, (tags_BK[:num],))
            theirs = graphs.take_prompt(image, theirs, (tags_BK[:num],))
        ours = network.decode(features, noise[:, :num])
        difference = (ours - graphs.decode(theirs, noise[:, :num])).abs().max()
        assert difference <= 1e-9 * ours[ours != ABSENT].abs().max()
