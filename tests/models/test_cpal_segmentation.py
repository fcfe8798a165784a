"""The segmentation networks of CPAL reproduce the recorded outputs of the original code."""

import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penumbra.export.bundle import export_network
from penumbra.export.importer import import_checkpoint
from penumbra.models.card import Card, ClassInfo, InputSpec, Readout
from penumbra.models.checkpoint import load_checkpoint
from penumbra.models.contract import Network
from penumbra.models.cpal import METHOD
from penumbra.models.cpal.config import deeplabv2, wrn38
from penumbra.models.cpal.segmentation import DeepLabV2Network, Wrn38Network
from penumbra.models.errors import BadOption
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.windows import normalise
from tests.models import golden
from tests.models.small import SMALL, seeded

STEMS = golden.fixtures("deeplabv2msc_*") + golden.fixtures("seamv1-*")
RECORDED = re.compile(r"(\w+?)_(\d+)x(\d+)(?:_hw::(\d+))?")
ABSOLUTE = {"deeplabv2msc": 5e-2, "seamv1": 1e-3}
"""Stated for calibrated weights; the plain filler's logits are compared relative to their size."""
EMPTY = torch.zeros(1, 1, 0)


class Case(NamedTuple):
    """One fixture, and the network that its file became."""

    stem: str
    arrays: golden.Arrays
    card: Card
    network: Network

    @property
    def is_calibrated(self) -> bool:
        return self.stem.endswith("_calib")

    def check(self, key: str, ours: Tensor) -> None:
        recorded = self.arrays[key]
        relative = 2e-5 * float(np.abs(recorded).max())
        allowed = ABSOLUTE[self.stem.partition("-")[0].partition("_")[0]] if self.is_calibrated else relative
        difference = float(np.abs(ours.numpy() - recorded).max())
        assert difference <= allowed, f"{key} differs by {difference}, {allowed} allowed"


@pytest.fixture(scope="module", params=STEMS or [pytest.param("", marks=pytest.mark.skip("no recorded outputs"))])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    facts, arrays = golden.load(request.param)
    state = golden.state_dict(facts, arrays)
    assert golden.wrong_tensors(facts, state) == []
    count = len(state["base.aspp.c0.bias" if "base.aspp.c0.bias" in state else "cls_conv.bias"])
    classes = tuple(ClassInfo(f"class {k}", (k, k, k)) for k in range(count))
    folder = tmp_path_factory.mktemp("published")
    theirs, ours = folder / "theirs.pth", folder / "ours.safetensors"
    torch.save(state, theirs)
    assert import_checkpoint("cpal", [theirs], ours, classes=classes).train_only == ()
    card, network = load_checkpoint(ours)
    theirs.unlink()
    ours.unlink()
    return Case(request.param, arrays, card, network)


@torch.inference_mode()
def test_the_original_logits_come_back(case: Case) -> None:
    """At feature resolution, and resized to the image: what a recorded array is, its shape tells."""
    compared = []
    for key, match in ((key, RECORDED.fullmatch(key)) for key in case.arrays):
        if match is None or case.arrays[key].shape[1] != case.card.num_classes:
            continue
        size, stride = (int(match[2]), int(match[3])), int(match[4] or 1)
        low = logits(case.network, golden.image(*size), base=match[1].startswith("base"))
        full = F.interpolate(low, size=size, mode="bilinear", align_corners=case.card.readout.align_corners)
        fitting = [x for x in (low, full[..., ::stride, ::stride]) if x.shape == case.arrays[key].shape]
        assert fitting, f"{key} has the shape of no answer"
        case.check(key, fitting[0])
        compared.append(key)
    assert compared


def logits(network: Network, image: Tensor, *, base: bool) -> Tensor:
    """The network's answer, or DeepLabV2's at scale 1 alone."""
    if base:
        assert isinstance(network, DeepLabV2Network)
        return network.base(image)
    return network(image, EMPTY)[0]


@pytest.mark.slow
def test_the_export_at_published_size_gives_the_label_of_the_largest_logit(case: Case, tmp_path: Path) -> None:
    export_network(case.network, case.card, tmp_path)
    picture = np.random.Generator(np.random.PCG64(1)).integers(0, 256, (97, 129, 3), dtype=np.uint8)
    with Segmenter.open(tmp_path, device="cpu", threads=1, tuning=Tuning(1, 1)) as segmenter:
        prediction = segmenter.segment(picture, SegmentOptions())
    with torch.inference_mode():
        image = torch.from_numpy(normalise(picture, case.card.input)).permute(2, 0, 1)[None]
        full = F.interpolate(
            case.network(image, torch.zeros(1, 1, 0))[0], size=(97, 129), mode="bilinear",
            align_corners=case.card.readout.align_corners,
        )  # fmt: skip
    ranked_K = full[0].sort(dim=0).values
    clear = (ranked_K[-1] - ranked_K[-2] > 1e-3 * full.abs().max()).numpy()
    assert (prediction.labels_HW == full[0].argmax(0).numpy())[clear].all() and clear.mean() > 0.9


def test_the_card_tells_the_published_protocol(case: Case) -> None:
    card = case.card
    assert (card.window.height, card.window.width) == (0, 0) and card.prompt.kind == "none"
    if card.config["net"] == "deeplabv2":
        assert card.input == InputSpec((104.008, 116.669, 122.675), (1.0, 1.0, 1.0), 1.0, "BGR")
        assert card.readout == Readout(align_corners=False)
    else:
        assert card.input == InputSpec() and card.readout == Readout(align_corners=True)


# -- without recorded outputs ---------------------------------------------------------------------


def picture(num: int = 2) -> Tensor:
    return torch.randn(num, 3, 61, 77, generator=torch.Generator().manual_seed(8))


@torch.inference_mode()
def test_the_published_answer_is_the_maximum_over_the_scales() -> None:
    published = seeded("cpal deeplabv2")
    apart = replace(SMALL["cpal deeplabv2"], members=("scale1", "scale0.5", "scale0.75", "max"))
    network = METHOD.build(apart).eval()
    network.load_state_dict(published.state_dict())
    *scales, maximum = network(picture(), torch.zeros(4, 2, 0))
    assert torch.equal(torch.stack(scales).amax(0), maximum)
    assert torch.equal(published(picture(), torch.zeros(1, 2, 0))[0], maximum)
    assert not torch.equal(scales[0], scales[1])


@torch.inference_mode()
def test_dropout_acts_on_the_channels_before_the_classifier() -> None:
    network, plain = seeded("cpal wrn38-dropout"), seeded("cpal wrn38")
    assert isinstance(network, Wrn38Network) and network.sampling.keep == 0.5
    masks_SBD = torch.ones(3, 2, network.sampling.noise_length)
    masks_SBD[1, :, 3], masks_SBD[2] = 0, 2
    kept, dropped, doubled = network(picture(), masks_SBD)
    assert torch.equal(kept, plain(picture(), torch.zeros(1, 2, 0))[0])
    (x_BDhw,) = network.encode(picture())
    gone = x_BDhw[:, 3:4] * network.cls_conv.weight[:, 3][None, :, :, :]
    assert torch.allclose(kept - dropped, gone, atol=1e-5)
    bias = network.cls_conv.bias
    assert bias is not None
    assert torch.allclose(doubled - bias[:, None, None], 2 * (kept - bias[:, None, None]), atol=1e-5)


def build_without_weights(network: type[nn.Module], config: object) -> tuple[int, int]:
    """Parameters and tensors of a network of full size."""
    with torch.device("meta"):
        built = network(config)
    return sum(parameter.numel() for parameter in built.parameters()), len(built.state_dict())


def test_the_published_networks_have_as_many_parameters_and_tensors_as_their_files() -> None:
    parameters, tensors = build_without_weights(DeepLabV2Network, deeplabv2(21))
    assert (round(parameters / 1e5), tensors) == (440, 632)
    parameters, tensors = build_without_weights(Wrn38Network, wrn38(21))
    assert (round(parameters / 1e5), tensors) == (1242, 242)


@pytest.mark.parametrize(("net", "members"), [("deeplabv2", ("scale1", "scale0.5", "scale0.75")), ("wrn38", ())])
def test_our_protocol_has_windows_and_the_scales_as_members(tmp_path: Path, net: str, members: tuple[str, ...]) -> None:
    published = {"deeplabv2": deeplabv2, "wrn38": wrn38}[net]
    state = METHOD.build(replace(published(3), width=2)).state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "theirs.pth")
    classes = tuple(ClassInfo(f"class {k}", (k, k, k)) for k in range(3))
    ours = tmp_path / "ours.safetensors"
    import_checkpoint("cpal", [tmp_path / "theirs.pth"], ours, classes=classes, protocol="penumbra")
    card, network = load_checkpoint(ours)
    assert (card.window.height, card.window.width) == (512, 512) and card.sampling.members == members
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_the_published_wrn38_can_be_imported_with_dropout_and_deeplabv2_cannot(tmp_path: Path) -> None:
    classes = tuple(ClassInfo(f"class {k}", (k, k, k)) for k in range(3))
    for published in (wrn38, deeplabv2):
        torch.save(METHOD.build(replace(published(3), width=1)).state_dict(), tmp_path / f"{published.__name__}.pth")
    ours = tmp_path / "ours.safetensors"
    import_checkpoint("cpal", [tmp_path / "wrn38.pth"], ours, classes=classes, sampling="dropout")
    card, network = load_checkpoint(ours)
    assert card.sampling == network.sampling
    assert (card.sampling.kind, card.sampling.noise_length, card.sampling.keep) == ("dropout", 8, 0.5)
    with pytest.raises(BadOption, match="'deeplabv2' has no dropout"):
        import_checkpoint("cpal", [tmp_path / "deeplabv2.pth"], ours, classes=classes, sampling="dropout")
