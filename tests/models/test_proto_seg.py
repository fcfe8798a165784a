"""ProtoSeg reproduces the recorded outputs of the original code, and its head keeps what its docstrings promise."""

import re
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from penumbra.export.bundle import export_network
from penumbra.export.importer import import_checkpoint
from penumbra.models.card import Card, ClassInfo, InputSpec, Readout
from penumbra.models.checkpoint import load_checkpoint
from penumbra.models.errors import BadCheckpoint, BadOption
from penumbra.models.proto_seg.heads import PrototypeHead
from penumbra.models.proto_seg.net import ProtoConfig, ProtoNetwork, build_network
from penumbra.models.proto_seg.upstream import BASELINE, DEEPLAB, PROTOTYPE, TRAINED
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.windows import normalise
from tests.models import golden
from tests.models.small import SMALL, seeded, traced

STEMS = golden.fixtures("protoseg_*") + golden.fixtures("protoseg-baseline_*")
SCALES = (0.5, 0.75, 1, 1.25, 1.5, 1.75, 2)
IMAGE = torch.randn(2, 3, 37, 53, generator=torch.Generator().manual_seed(1))
THREE = tuple(ClassInfo(f"class {k}", (k, k, k)) for k in range(3))
SIZE = re.compile(r"_(\d+)x(\d+)")


class Case(NamedTuple):
    """One fixture, and the network that its file became."""

    stem: str
    arrays: golden.Arrays
    card: Card
    network: ProtoNetwork

    @property
    def logit_tolerance(self) -> float:
        """As the reference states it: absolute, but relative for the baseline with activations of 1e8 and more."""
        calibrated = self.stem.endswith("_calib")
        if self.stem.startswith("protoseg_"):
            return 2e-3 if calibrated else 2e-4
        return 1e-3 if calibrated else 1e-5 * float(max(np.abs(self.arrays[k]).max() for k in self.named("logits")))

    @property
    def relative_tolerance(self) -> float:
        """Of what stands before the logits: the logits' own, relative to their size of about 5."""
        return 4e-4 if self.stem.endswith("_calib") else 4e-5

    def named(self, what: str) -> list[str]:
        """Arrays of that name at any size; skips the test where the fixture has none."""
        keys = [key for key in self.arrays if re.match(rf"{what}_\d", key)]
        return keys or pytest.skip(f"{self.stem} has no {what}")

    def check(self, key: str, ours: Tensor, tolerance: float) -> None:
        recorded = self.arrays[key]
        assert ours.shape == recorded.shape, key
        difference = float(np.abs(ours.numpy() - recorded).max())
        assert difference <= tolerance, f"{key} differs by {difference}, {tolerance} allowed"

    def check_relative(self, key: str, ours: Tensor) -> None:
        self.check(key, ours, self.relative_tolerance * float(np.abs(self.arrays[key]).max()))


@pytest.fixture(scope="module", params=STEMS or [pytest.param("", marks=pytest.mark.skip("no recorded outputs"))])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    facts, arrays = golden.load(request.param)
    state = golden.state_dict(facts, arrays)
    assert golden.wrong_tensors(facts, state) == []
    num_classes = len(state["mask_norm.weight" if "prototypes" in state else "cls_head.3.weight"])
    folder = tmp_path_factory.mktemp("published")
    theirs, ours = folder / "theirs.pth", folder / "ours.safetensors"
    torch.save({"config_dict": {"network": {}}, "state_dict": {f"module.{k}": v for k, v in state.items()}}, theirs)
    classes = tuple(ClassInfo(f"class {k}", (k, k, k)) for k in range(num_classes))
    imported = import_checkpoint("proto_seg", [theirs], ours, classes=None if num_classes == 19 else classes)
    assert imported.train_only == ()
    card, network = load_checkpoint(ours)
    theirs.unlink()
    ours.unlink()
    assert isinstance(network, ProtoNetwork)
    return Case(request.param, arrays, card, network)


def size_of(key: str) -> tuple[int, int]:
    match = SIZE.search(key)
    assert match
    return int(match[1]), int(match[2])


def strided(key: str, x: Tensor) -> Tensor:
    return x[..., ::2, ::2] if key.endswith("hw::2") else x


def run(network: ProtoNetwork, image_B3HW: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits resized to `size` as the published evaluation does."""
    logits = network(image_B3HW, torch.zeros(1, len(image_B3HW), 0))[0]
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=True)


# -- the recorded outputs -------------------------------------------------------------------------


@torch.inference_mode()
def test_the_original_logits_come_back(case: Case) -> None:
    upsampled_inside = case.card.config["head"] == "parametric"
    for key in case.named("logits"):
        size = size_of(key)
        low = case.network(golden.image(*size), torch.zeros(1, 1, 0))[0]
        full = F.interpolate(low, size=size, mode="bilinear", align_corners=True)
        case.check(key, strided(key, full if upsampled_inside else low), case.logit_tolerance)
        if upsampled_inside:
            case.check(f"lowres_{key.partition('_hw')[0]}", low, case.logit_tolerance)


@torch.inference_mode()
def test_the_four_branches_of_the_backbone_come_back(case: Case) -> None:
    for i in range(4):
        for key in case.named(f"backbone{i}"):
            branches = case.network.trunk.backbone(golden.image(*size_of(key)))
            case.check_relative(key, branches[i][:, ::8, ::2, ::2])


@torch.inference_mode()
def test_every_step_of_the_prototype_head_comes_back(case: Case) -> None:
    head = case.network.head
    if not isinstance(head, PrototypeHead):
        pytest.skip("of the parametric head")
    for key in case.named("amax"):
        end = key.removeprefix("amax")
        x = case.network.trunk(golden.image(*size_of(key)))
        case.check_relative(f"proj_raw{end}_c::16", head.project(x)[:, ::16])
        case.check_relative(f"proj_head{end}_c::16", F.normalize(head.project(x), dim=head.axis)[:, ::16])
        e = head.embed(x)
        case.check_relative(f"embed{end}_d::16", e[0].flatten(1).T[:, ::16])
        cosine_PMK = head.compare(e)[0].flatten(2).permute(2, 1, 0)
        case.check_relative(f"sim{end}_n::3", cosine_PMK[::3])
        case.check_relative(key, head.score(x)[0].flatten(1).T)
    unit_KMD = F.normalize(head.prototypes_KMD, dim=2)
    case.check_relative("prototypes_after_forward_c::4", unit_KMD[::4, :, ::16])


@torch.inference_mode()
def test_the_published_single_scale_evaluation_comes_back(case: Case) -> None:
    for key in case.named("ss_test"):
        size = size_of(key)
        case.check(key, strided(key, run(case.network, golden.image(*size), size)), case.logit_tolerance)


@torch.inference_mode()
def test_the_published_evaluation_by_crops_comes_back(case: Case) -> None:
    """Crops begin at multiples of their size, the last is flush with the end; logits are averaged."""
    for key in case.named("sscrop_test"):
        (height, width), (h, w) = (tuple(map(int, pair)) for pair in re.findall(r"(\d+)x(\d+)", key))
        image, total, count = golden.image(height, width), torch.zeros(1, 1, height, width), torch.zeros(height, width)
        for y, x in product(starts(height, h), starts(width, w)):
            place = (..., slice(y, y + h), slice(x, x + w))
            crop = run(case.network, image[place], (h, w))
            total = total.repeat(1, crop.shape[1] // total.shape[1], 1, 1)
            total[place] += crop
            count[place] += 1
        case.check(key, strided(key, total / count), case.logit_tolerance)


def starts(length: int, crop: int) -> list[int]:
    return sorted({*range(0, length - crop + 1, crop), length - crop})


@pytest.mark.slow
@torch.inference_mode()
def test_the_published_multi_scale_evaluation_comes_back(case: Case) -> None:
    """A sum of fourteen logits. The picture is flipped before it is resized; the baseline resizes twice."""
    for key in case.named("ms_test"):
        size = size_of(key)
        total = torch.zeros(1, 1, 1, 1)
        for scale, flip in product(SCALES, (False, True)):
            scaled = (int(size[0] * scale), int(size[1] * scale))
            image = golden.image(*size).flip(3) if flip else golden.image(*size)
            image = F.interpolate(image, size=scaled, mode="bilinear", align_corners=True)
            if case.card.config["head"] == "parametric":
                full = F.interpolate(run(case.network, image, scaled), size=size, mode="bilinear", align_corners=True)
            else:
                full = run(case.network, image, size)
            total = total + (full.flip(3) if flip else full)
        case.check(key, strided(key, total), 2 * len(SCALES) * case.logit_tolerance)


@torch.inference_mode()
def test_the_recorded_picture_gets_the_recorded_logits_and_labels(case: Case) -> None:
    """Read as BGR by the card's input facts."""
    for key in case.named("image_rgb"):
        size = size_of(key)
        pixels_HW3 = normalise(case.arrays[key], case.card.input)
        image_B3HW = torch.from_numpy(pixels_HW3).permute(2, 0, 1)[None]
        end = key.removeprefix("image_rgb")
        case.check(f"image_input{end}", image_B3HW, 1e-5)
        logits = run(case.network, image_B3HW, size)
        case.check(f"image_logits{end}_hw::2", logits[..., ::2, ::2], case.logit_tolerance)
        assert np.array_equal(logits.argmax(1)[0].numpy(), case.arrays[f"image_trainid{end}"])


def test_the_card_tells_the_published_protocol(case: Case) -> None:
    card = case.card
    assert (card.window.height, card.window.width) == (0, 0)
    assert card.readout == Readout(softmax_at="window", align_corners=True)
    assert card.input == InputSpec(order="BGR")
    assert card.window.trained == (TRAINED if card.config["head"] == "prototype" else None)


@pytest.mark.slow
def test_the_server_gives_the_recorded_labels_and_warns_of_the_geometry(case: Case, tmp_path: Path) -> None:
    export_network(case.network, case.card, tmp_path)
    with Segmenter.open(tmp_path, device="cpu", threads=1, tuning=Tuning(1, 1)) as segmenter:
        for key in case.named("image_rgb"):
            end = key.removeprefix("image_rgb")
            prediction = segmenter.segment(case.arrays[key], SegmentOptions())
            assert np.array_equal(prediction.labels_HW, case.arrays[f"image_trainid{end}"])
            recorded = torch.from_numpy(case.arrays[f"image_logits{end}_hw::2"])[0].softmax(0).amax(0)
            confidence = prediction.maps["confidence"][::2, ::2]
            # A softmax moves by at most half of what its logits do.
            assert np.abs(confidence - recorded.numpy()).max() <= case.logit_tolerance / 2 + 1e-6
            warned = any("2048x1024" in warning for warning in prediction.warnings)
            assert warned == (case.stem.startswith("protoseg_"))


# -- files of the published layout, from small networks ------------------------------------------


LAYOUTS = {"proto_seg prototype": PROTOTYPE, "proto_seg parametric": BASELINE, "proto_seg deeplab": DEEPLAB}


def published_file(name: str, folder: Path) -> Path:
    """The small network's tensors under the published names, as a file."""
    network = seeded(name)
    layout = LAYOUTS[name]
    state = {}
    for key, value in network.state_dict().items():
        theirs, ours = max(
            ((t, o) for t, o in layout.renames.items() if key.startswith(o)), key=lambda pair: len(pair[1])
        )
        state[f"module.{theirs}{key[len(ours) :]}"] = value
    for copy, original in layout.aliases.items():
        copies = {k.replace(original, copy): v.clone() for k, v in state.items() if original in k}
        state |= copies
    path = folder / "theirs.pth"
    torch.save({"config_dict": {"gpu": [0]}, "state_dict": state}, path)
    return path


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("protocol", ["published", "penumbra"])
@torch.inference_mode()
def test_an_imported_file_gives_the_logits_of_its_network(tmp_path: Path, name: str, protocol: str) -> None:
    theirs = published_file(name, tmp_path)
    imported = import_checkpoint(
        "proto_seg",
        [theirs],
        tmp_path / "ours.safetensors",
        classes=THREE,
        protocol=protocol,  # type: ignore[arg-type]
    )
    card, network = load_checkpoint(tmp_path / "ours.safetensors")
    assert build_network(SMALL[name]).state_dict().keys() == network.state_dict().keys()
    assert torch.equal(network(IMAGE, torch.zeros(1, 2, 0)), seeded(name)(IMAGE, torch.zeros(1, 2, 0)))
    assert card.extra_maps == seeded(name).extra_maps
    trained_on_whole_pictures = name == "proto_seg prototype"
    windows = (0, 0) if trained_on_whole_pictures or protocol == "published" else (512, 1024)
    assert (card.window.height, card.window.width) == windows
    assert any("row" in warning for warning in imported.warnings) == trained_on_whole_pictures


def test_deeplab_leaves_its_auxiliary_head_and_cannot_have_dropout(tmp_path: Path) -> None:
    theirs, ours = published_file("proto_seg deeplab", tmp_path), tmp_path / "ours.safetensors"
    content = torch.load(theirs, weights_only=True)
    content["state_dict"]["module.decoder.layer_dsn.2.bias"] = torch.zeros(3)
    torch.save(content, theirs)
    imported = import_checkpoint("proto_seg", [theirs], ours, classes=THREE)
    assert imported.train_only == ("decoder.layer_dsn.2.bias",)
    with pytest.raises(BadOption, match="no dropout"):
        import_checkpoint("proto_seg", [theirs], ours, classes=THREE, sampling="dropout")


def test_deeplab_r101_has_as_many_tensors_as_the_original() -> None:
    """689 with the auxiliary head's 9: two convolutions with bias and a BatchNorm."""
    with torch.device("meta"):
        network = build_network(ProtoConfig(19, head="parametric", trunk="deeplab"))
    assert len(network.state_dict()) == 689 - 9


def test_a_file_can_be_imported_with_dropout(tmp_path: Path) -> None:
    theirs, ours = published_file("proto_seg prototype", tmp_path), tmp_path / "ours.safetensors"
    import_checkpoint("proto_seg", [theirs], ours, classes=THREE, sampling="dropout")
    card, network = load_checkpoint(ours)
    assert card.sampling == network.sampling
    assert (card.sampling.kind, card.sampling.keep, card.sampling.default_samples) == ("dropout", 0.9, 8)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"module.proj_head.mlp2.0.bias": torch.ones(30)}, "differ"),
        ({"module.prototypes": torch.ones(3, 30)}, "axes"),
        ({"module.feat_norm.weight": torch.ones(7)}, "feat_norm"),
        ({"module.cls_head.3.weight": torch.ones(3, 30, 1, 1)}, "no place for cls_head.3.weight"),
        ({"module.backbone.conv1.weight": None}, "backbone.conv1.weight"),
        ({"module.backbone.stage3.0.fuse_layers.0.2.0.weight": None}, "fuse_layers.0.2.0.weight"),
    ],
)
def test_a_file_that_is_no_network_is_refused_by_name(
    tmp_path: Path, change: dict[str, Tensor | None], problem: str
) -> None:
    theirs = published_file("proto_seg prototype", tmp_path)
    content = torch.load(theirs, weights_only=True)
    content["state_dict"] = {k: v for k, v in (content["state_dict"] | change).items() if v is not None}
    torch.save(content, theirs)
    with pytest.raises(BadCheckpoint, match=problem):
        import_checkpoint("proto_seg", [theirs], tmp_path / "ours.safetensors", classes=THREE)


# -- the prototype head ---------------------------------------------------------------------------


def prototype_head(name: str) -> PrototypeHead:
    head = seeded(name).head
    assert isinstance(head, PrototypeHead)
    return head


def random_features(num: int = 1) -> Tensor:
    return torch.randn(num, 30, 9, 14, generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def moved(name: str, *, row: int, column: int) -> Tensor:
    """Where embeddings change when the feature of one pixel does: changed_hw."""
    head, x = prototype_head(name), random_features()
    other = x.clone()
    other[0, :, row, column] += 1
    return (head.embed(x) - head.embed(other)).abs().amax((0, 1)) > 1e-4


def test_the_published_normalisation_lets_one_pixel_change_its_whole_row_and_no_other() -> None:
    """The documented trap: sliding windows and padding are not equal to the whole picture."""
    changed_hw = moved("proto_seg prototype", row=4, column=13)
    assert changed_hw[4].all()
    assert not changed_hw[:4].any() and not changed_hw[5:].any()


def test_the_papers_normalisation_keeps_a_pixel_to_itself() -> None:
    changed_hw = moved("proto_seg channel", row=4, column=13)
    assert changed_hw.sum() == 1 and changed_hw[4, 13]


@torch.inference_mode()
def test_the_published_logits_of_a_crop_are_not_those_of_the_picture() -> None:
    head, x = prototype_head("proto_seg prototype"), random_features()
    cropped = head.logits(head.score(x[..., :7]))
    assert (cropped - head.logits(head.score(x))[..., :7]).abs().max() > 0.05


@torch.inference_mode()
def test_cosines_and_logits_equal_the_plain_formula() -> None:
    head, x = prototype_head("proto_seg prototype"), random_features(2)
    v = head.project(x)
    v = v / v.square().sum(3, keepdim=True).sqrt()
    e = F.layer_norm(v.permute(0, 2, 3, 1), (30,), head.feat_norm.weight, head.feat_norm.bias, 1e-5)
    e = e / e.square().sum(-1, keepdim=True).sqrt()
    p = head.prototypes_KMD / head.prototypes_KMD.square().sum(-1, keepdim=True).sqrt()
    cosine = torch.einsum("bhwd,kmd->bhwkm", e, p).max(-1).values
    logits = F.layer_norm(cosine, (3,), head.mask_norm.weight, head.mask_norm.bias, 1e-5)
    score = head.score(x)
    assert torch.allclose(score, cosine.permute(0, 3, 1, 2), atol=1e-6)
    assert torch.allclose(head.logits(score), logits.permute(0, 3, 1, 2), atol=1e-4)


@torch.inference_mode()
def test_a_pass_leaves_the_prototypes_alone_and_asks_only_for_their_directions() -> None:
    network = seeded("proto_seg prototype")
    before, logits = network.head.prototypes_KMD.clone(), network(IMAGE, torch.zeros(1, 2, 0))
    assert torch.equal(network.head.prototypes_KMD, before)
    network.head.prototypes_KMD *= torch.linspace(0.5, 3, 4)[:, None]
    assert torch.allclose(network(IMAGE, torch.zeros(1, 2, 0)), logits, atol=1e-4)


# -- the extra maps -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["proto_seg prototype", "proto_seg channel", "proto_seg dropout"])
@torch.inference_mode()
def test_extra_maps_are_of_the_cosines_before_the_class_norm_and_without_dropout(name: str) -> None:
    network = seeded(name)
    cosine = network.head.score(network.trunk(IMAGE)).sort(dim=1, descending=True).values
    extras = network.encode(IMAGE)[-1]
    assert [extra.name for extra in network.extra_maps] == ["distance", "cosine_margin"]
    assert extras.dtype == torch.float32 and extras.shape == (2, 2, 10, 14)
    assert torch.equal(extras[:, 0], 1 - cosine[:, 0])
    assert torch.equal(extras[:, 1], cosine[:, 0] - cosine[:, 1])
    assert extras.min() >= 0 and extras.max() <= 2


@torch.inference_mode()
def test_extra_maps_do_not_see_the_class_norm() -> None:
    network = seeded("proto_seg prototype")
    logits, extras = network.encode(IMAGE)
    network.head.mask_norm.weight.mul_(3)
    network.head.mask_norm.bias.add_(torch.tensor([1.0, -2.0, 5.0]))
    other_logits, other_extras = network.encode(IMAGE)
    assert torch.equal(extras, other_extras)
    assert not torch.allclose(logits, other_logits)


@torch.inference_mode()
def test_the_distance_of_a_pixel_on_a_prototype_is_zero_and_the_logits_cannot_tell_it() -> None:
    """Cosines lowered by one constant: further from every prototype, the same logits."""
    head = prototype_head("proto_seg prototype")
    e = F.normalize(head.prototypes_KMD[1, 2], dim=0)[None, :, None, None]
    cosine = head.compare(e).amax(2)
    assert float(head.extras(cosine)[0][0, 0]) == pytest.approx(0, abs=1e-6)
    assert torch.allclose(head.logits(cosine), head.logits(cosine - 0.5), atol=1e-5)
    assert float(head.extras(cosine - 0.5)[0][0, 0]) == pytest.approx(0.5, abs=1e-6)


def test_the_parametric_head_has_no_extra_maps() -> None:
    network = seeded("proto_seg parametric")
    assert network.extra_maps == () and len(network.encode(IMAGE)) == 1


# -- dropout --------------------------------------------------------------------------------------

DROPOUT = {"proto_seg dropout": "proto_seg prototype", "proto_seg parametric-dropout": "proto_seg parametric"}


def masks(num_samples: int) -> Tensor:
    kept = torch.rand(num_samples, 2, 30, generator=torch.Generator().manual_seed(4)) < 0.9
    return kept / 0.9


@pytest.mark.parametrize(("name", "single"), DROPOUT.items())
@torch.inference_mode()
def test_dropout_that_keeps_every_channel_is_the_single_network(name: str, single: str) -> None:
    network, one = seeded(name), seeded(single)
    one.load_state_dict(network.state_dict())
    logits = network(IMAGE, torch.ones(3, 2, 30))
    for sample in logits:
        assert torch.allclose(sample, one(IMAGE, torch.zeros(1, 2, 0))[0], atol=1e-5)


@pytest.mark.parametrize("name", DROPOUT)
@torch.inference_mode()
def test_every_dropout_sample_is_the_head_behind_dropout2d_with_that_mask(name: str) -> None:
    network, draws = seeded(name), masks(3)
    logits, x = network(IMAGE, draws), network.trunk(IMAGE)
    for sample, mask_BD in zip(logits, draws, strict=True):
        plain = network.head.logits(network.head.score(x * mask_BD[:, :, None, None]))
        assert torch.allclose(sample, plain, atol=1e-5)
    assert float(logits.var(0).mean()) > 1e-6


# -- export ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SMALL if name.startswith("proto_seg")])
@torch.inference_mode()
def test_exported_graphs_run_at_other_batches_and_sizes(name: str) -> None:
    """In float64, so that what is left is the graphs' own difference; extras are float32 at all times."""
    network = seeded(name).double().requires_grad_(False)
    dropout = network.sampling.kind == "dropout"
    graphs = traced(network, IMAGE.double(), masks(3).double() if dropout else torch.zeros(1, 2, 0))
    for num, size in ((1, (64, 96)), (3, (45, 70))):
        image = torch.randn(num, 3, *size, generator=torch.Generator().manual_seed(num)).double()
        noise = masks(5)[:, :1].repeat(1, num, 1).double() if dropout else torch.zeros(1, num, 0)
        features, wanted = graphs.encode(image), network.encode(image)
        for ours, theirs in zip(features, wanted, strict=True):
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-10 if theirs.dtype == torch.float64 else 1e-6)
        logits = graphs.decode(features, noise)
        assert logits.shape[:2] == (5 if dropout else 1, num)
        assert torch.allclose(logits, network.decode(wanted, noise), rtol=0, atol=1e-10)


# -- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SMALL if name.startswith("proto_seg")])
@torch.inference_mode()
def test_a_window_is_the_same_alone_and_in_a_batch_but_for_the_convolutions_rounding(name: str) -> None:
    """In float64: the class norm divides by the spread of nearly equal cosines, which magnifies any rounding."""
    network, image = seeded(name).double(), IMAGE.double()
    noise = masks(3).double() if network.sampling.kind == "dropout" else torch.zeros(1, 2, 0)
    together = network(image, noise)
    alone = torch.cat([network(image[b : b + 1], noise[:, b : b + 1]) for b in range(2)], dim=1)
    assert torch.allclose(together, alone, rtol=0, atol=1e-10)


@torch.inference_mode()
def test_the_head_gives_a_window_the_same_bytes_in_every_batch() -> None:
    head, x = prototype_head("proto_seg prototype"), random_features(3)
    together = head.logits(head.score(x))
    assert all(torch.equal(together[b : b + 1], head.logits(head.score(x[b : b + 1]))) for b in range(3))
