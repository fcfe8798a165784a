"""EfficientNet-lite has the published shapes and TensorFlow's padding, at every size of a picture."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penumbra.models.blocks.efficientnet import EfficientNet, EfficientNetConfig, pad_same
from penumbra.models.cps.net import CpsConfig
from penumbra.models.errors import BadArtifact
from penumbra.models.strict import read_strict
from tests.models.small import LITE, close, image

LITE2 = EfficientNetConfig("efficientnet_lite")


def pad_plainly(x_BDhw: Tensor, kernel: int) -> Tensor:
    """TensorFlow's SAME for stride 2: out = ceil(in / 2), what is missing is shared out, and the odd one comes last."""
    for axis in (3, 2):
        length = x_BDhw.shape[axis]
        missing = max((math.ceil(length / 2) - 1) * 2 + kernel - length, 0)
        pad = [0, 0, 0, 0]
        pad[2 * (3 - axis) : 2 * (3 - axis) + 2] = [missing // 2, missing - missing // 2]
        x_BDhw = F.pad(x_BDhw, pad)
    return x_BDhw


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [(2, 4), (16, 22), (30, 8)])
def test_even_sizes_are_padded_as_tensorflow_pads_them(kernel: int, size: tuple[int, int]) -> None:
    assert torch.equal(pad_same(image(2, size), kernel), pad_plainly(image(2, size), kernel))


def test_a_strided_convolution_begins_at_the_first_pixel_and_ends_beyond_the_last() -> None:
    ramp = torch.arange(1.0, 7.0).expand(1, 1, 6, 6)
    row = F.conv2d(pad_same(ramp, 3), torch.ones(1, 1, 1, 3), stride=2)[0, 0, 0]
    assert row.tolist() == [1 + 2 + 3, 3 + 4 + 5, 5 + 6 + 0]


@pytest.mark.parametrize(
    ("width", "depth", "channels", "blocks"),
    [
        (1.0, 1.0, [16, 24, 40, 80, 112, 192, 320], [1, 2, 2, 3, 3, 4, 1]),
        (1.1, 1.2, [16, 24, 48, 88, 120, 208, 352], [1, 3, 3, 4, 4, 5, 1]),
        (1.4, 1.8, [24, 32, 56, 112, 160, 272, 448], [1, 4, 4, 6, 6, 8, 1]),
    ],
)
def test_width_and_depth_give_the_published_lite0_lite2_and_lite4(
    width: float, depth: float, channels: list[int], blocks: list[int]
) -> None:
    config = replace(LITE2, width=width, depth=depth)
    assert config.channels == channels and config.blocks == blocks


def test_lite2_has_the_published_weights() -> None:
    sizes = [sum(p.numel() for p in EfficientNet(replace(LITE2, num_stages=n)).parameters()) for n in (5, 7)]  # type: ignore[arg-type]
    assert sizes == [1_161_584, 4_357_952]
    assert {module.eps for module in EfficientNet(LITE2).modules() if isinstance(module, nn.BatchNorm2d)} == {1e-3}


@pytest.mark.parametrize("num_stages", [5, 7])
@pytest.mark.parametrize("size", [(37, 53), (48, 64), (1, 17)])
@torch.inference_mode()
def test_a_picture_of_any_size_is_seen_as_if_grey_stood_beyond_it(num_stages: int, size: tuple[int, int]) -> None:
    network = EfficientNet(replace(LITE, num_stages=num_stages)).double().eval()  # type: ignore[arg-type]
    picture = image(1, size).double()
    padded = F.pad(picture, (0, -size[1] % 16, 0, -size[0] % 16))
    for own, whole, stride in zip(network.stages(picture), network.stages(padded), (4, 8, 16, 16), strict=True):
        height, width = (math.ceil(length / stride) for length in size)
        assert own.shape[2:] == (height, width) and close(own, whole[:, :, :height, :width], 1e-12)


@pytest.mark.parametrize(
    ("backbone", "sentence"),
    [
        ({"kind": "efficientnet"}, r"backbone\.kind is 'efficientnet'; 'efficientnet_lite' is wanted"),
        ({"=kind": "efficientnet_lite"}, "backbone has an unknown field '=kind'; known are depth, stem"),
        ({"kind": "efficientnet_lite", "widht": 1}, "backbone has an unknown field 'widht'; known are kind, width"),
        ({"kind": "efficientnet_lite", "num_stages": 6}, r"backbone\.num_stages is 6; one of 5, 7 is wanted"),
        ({"depht": 18}, "backbone has an unknown field 'depht'; known are depth, stem"),
    ],
)
def test_a_mistake_in_a_backbone_is_named_among_the_fields_of_its_kind(backbone: object, sentence: str) -> None:
    with pytest.raises(BadArtifact, match=rf"^config\.{sentence}"):
        read_strict(CpsConfig, {"num_classes": 3, "backbone": backbone}, where="config")
