"""A program is cut where its dropout begins: equal to full passes under the same masks, and encode runs once."""

import warnings
from collections.abc import Callable
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from penumbra.models.errors import BadOption
from penumbra.models.plain.cut import kind_of, partition
from penumbra.models.plain.dropout import mask_dropouts
from tests.models.small import close

SIZE, OTHER_SIZE = (32, 48), (40, 24)


def block(channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class Head(nn.Module):
    """Dropout in front of the classifier, as in SegFormer."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.drop, self.head = block(3, 8, stride=2), nn.Dropout(0.3), nn.Conv2d(8, 4, 1)

    def forward(self, image_BChw: Tensor) -> Tensor:
        logits: Tensor = self.head(self.drop(self.trunk(image_BChw)))
        return logits


class DeepLab(nn.Module):
    """DeepLabV3+: a dropout behind the pyramid, low features that pass it by, an answer of the picture's size."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = block(3, 8, stride=2), block(8, 8, stride=2)
        self.branches = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=rate, dilation=rate) for rate in (1, 2))
        self.pooled = nn.Conv2d(8, 8, 1)
        self.project = nn.Sequential(nn.Conv2d(24, 8, 1), nn.ReLU(), nn.Dropout(0.5))
        self.fuse, self.head = block(16, 8), nn.Conv2d(8, 4, 1)
        self.auxiliary = nn.Sequential(nn.Dropout(0.1), nn.Conv2d(8, 4, 1))

    def forward(self, image_BChw: Tensor) -> dict[str, Tensor]:
        low = self.low(image_BChw)
        high = self.high(low)
        pooled = self.pooled(F.adaptive_avg_pool2d(high, 1)).expand(-1, -1, *high.shape[2:])
        joined = self.project(torch.cat([pooled, *(branch(high) for branch in self.branches)], dim=1))
        joined = F.interpolate(joined, size=low.shape[2:], mode="bilinear", align_corners=False)
        logits = self.head(self.fuse(torch.cat((joined, low), dim=1)))
        return {"aux": self.auxiliary(high), "out": F.interpolate(logits, size=image_BChw.shape[2:], mode="bilinear")}


class Series(nn.Module):
    """Three dropouts of three rates, one in place and one of Dropout2d, a residual round two, and the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = block(3, 8), block(8, 8), nn.Conv2d(8, 3, 1)
        self.drops = nn.ModuleList([nn.Dropout(0.5, inplace=True), nn.Dropout2d(0.2), nn.Dropout(0.4)])
        self.head = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, image_BChw: Tensor) -> Tensor:
        x = self.first(image_BChw)
        y = self.drops[1](self.second(self.drops[0](x.clone())))
        logits: Tensor = self.head(self.drops[2](self.third(x + y)) - image_BChw)
        return logits


class Tokens(nn.Module):
    """A transformer's layers: tokens [B, N, C] and [N, B, C], attention by hand whose own dropout has no channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.attention, self.norm = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 24), nn.LayerNorm(8)
        self.attention_drop, self.drop, self.other_drop = nn.Dropout(0.1), nn.Dropout(0.2), nn.Dropout(0.25)
        self.mlp, self.position, self.head = nn.Linear(8, 8), nn.Parameter(torch.randn(8)), nn.Conv2d(8, 4, 1)

    def forward(self, image_BChw: Tensor) -> Tensor:
        patches = self.patches(image_BChw)
        num_windows, channels, height, width = patches.shape
        x = patches.flatten(2).transpose(1, 2) + self.position * torch.arange(height * width)[:, None] / 100
        q, k, v = self.attention(self.norm(x)).chunk(3, dim=-1)
        weights = self.attention_drop((q @ k.transpose(1, 2) / 3).softmax(-1))
        x = x + self.drop(F.gelu(self.mlp(weights @ v)))
        x = x + self.other_drop(self.mlp(x.transpose(0, 1))).transpose(0, 1)
        logits: Tensor = self.head(x.transpose(1, 2).reshape(num_windows, channels, height, width))
        return logits


class Awkward(nn.Module):
    """Whole numbers and a tensor without windows in front are read behind the dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.drop, self.head = block(3, 8), nn.Dropout(0.3), nn.Conv2d(8, 4, 1)

    def forward(self, image_BChw: Tensor) -> Tensor:
        x = self.trunk(image_BChw)
        turned, chosen = x.transpose(0, 1), x.argmax(1, keepdim=True)
        dropped = self.drop(x)
        mixed = (dropped.transpose(0, 1) * turned).transpose(0, 1)
        logits: Tensor = self.head(mixed) + mixed.gather(1, chosen)
        return logits


NETWORKS: dict[type[nn.Module], list[str]] = {
    Head: ["drop"],
    DeepLab: ["project.2"],
    Series: ["drops.0", "drops.1", "drops.2"],
    Tokens: ["drop", "other_drop"],
    Awkward: ["drop"],
}
"""And the names of their dropouts that become masks, in their order."""
every_network = pytest.mark.parametrize("kind", NETWORKS, ids=lambda kind: kind.__name__)


def build(kind: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = kind()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
    return network.eval().requires_grad_(False)


def export(network: nn.Module, axes: tuple[int, ...] = (0, 2, 3)) -> ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(network, (pictures(),), dynamic_shapes=(dict.fromkeys(axes, Dim.DYNAMIC),))


def pictures(num_windows: int = 2, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(num_windows, 3, *size, generator=torch.Generator().manual_seed(1))


def masks(runs: tuple[tuple[int, float], ...], num_samples: int, num_windows: int) -> Tensor:
    random = torch.Generator().manual_seed(2)
    drawn = [(torch.rand(num_samples, num_windows, length, generator=random) < keep) / keep for length, keep in runs]
    return torch.cat(drawn, dim=2)


def full_passes(network: nn.Module, names: list[str], image_BChw: Tensor, noise_SBL: Tensor) -> Tensor:
    """The oracle: pass after pass of the module itself, whose dropouts are told their masks."""
    answers, lengths = [], [channels_of(network, name) for name in names]
    for noise_BL in noise_SBL:
        hooks = []
        for name, (first, end) in zip(names, pairwise(accumulate(lengths, initial=0)), strict=True):
            hooks.append(network.get_submodule(name).register_forward_hook(drop_by(noise_BL[:, first:end])))
        answer = network(image_BChw)
        answers.append(answer["out"] if isinstance(answer, dict) else answer)
        for hook in hooks:
            hook.remove()
    return torch.stack(answers)


def drop_by(mask_BC: Tensor) -> Callable[..., Tensor]:
    def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        if output.dim() == 4:
            return output * mask_BC[:, :, None, None]
        return output * (mask_BC[:, None] if len(output) == len(mask_BC) else mask_BC[None])

    return hook


def channels_of(network: nn.Module, name: str) -> int:
    return 3 if isinstance(network, Series) and name == "drops.2" else 8


@every_network
@pytest.mark.parametrize("axes", [(0,), (0, 2, 3)], ids=["fixed size", "free size"])
def test_a_cut_program_equals_full_passes_under_the_same_masks(kind: type[nn.Module], axes: tuple[int, ...]) -> None:
    network = build(kind)
    masked = mask_dropouts(export(network, axes), pictures())
    encode, decode = partition(masked.program)
    for num_windows, size in ((2, SIZE), (3, OTHER_SIZE if 2 in axes else SIZE), (1, SIZE)):
        image_BChw, noise_SBL = pictures(num_windows, size), masks(masked.sampling.masks, 4, num_windows)
        expected = full_passes(network, NETWORKS[kind], image_BChw, noise_SBL)
        features = encode(image_BChw)
        assert close(decode(*features, noise_SBL), expected)
        assert all(len(feature) == num_windows and feature.is_floating_point() for feature in features)
        assert float(expected.var(0).mean()) > 1e-6


def operations(graph: fx.GraphModule) -> list[str]:
    kinds = [kind_of(node) for node in graph.graph.nodes]
    return [kind for kind in kinds if kind in ("conv2d", "linear", "batch_norm", "argmax")]


@pytest.mark.parametrize(
    ("kind", "num_features", "decoded"),
    [
        (Head, 1, ["conv2d"]),
        (DeepLab, 2, ["conv2d", "batch_norm", "conv2d"]),
        (Series, 2, ["conv2d", "batch_norm", "conv2d", "conv2d"]),
        (Tokens, 2, ["linear", "conv2d"]),
        (Awkward, 1, ["argmax", "conv2d"]),
    ],
)
def test_decode_holds_what_depends_on_masks_and_reads_no_more_than_it_must(
    kind: type[nn.Module], num_features: int, decoded: list[str]
) -> None:
    network = build(kind)
    encode, decode = partition(mask_dropouts(export(network, axes=(0,)), pictures()).program)
    assert operations(decode) == decoded
    assert len(encode(pictures())) == num_features
    halves = [{name for name, _ in half.named_parameters()} for half in (encode, decode)]
    shared = {"mlp.weight", "mlp.bias"} if kind is Tokens else set()
    assert halves[0] & halves[1] == shared
    assert halves[0] | halves[1] == {name for name, _ in network.named_parameters() if "auxiliary" not in name}


def test_rates_of_their_own_are_declared_and_every_dropout_is_told_of() -> None:
    masked = mask_dropouts(export(build(Series)), pictures())
    assert (masked.sampling.kind, masked.sampling.noise_length, masked.sampling.default_samples) == ("dropout", 19, 8)
    assert masked.sampling.keeps == masked.sampling.masks == ((8, 0.5), (8, 0.8), (3, 0.6))
    assert masked.sampling.keep == pytest.approx((8 * 0.5 + 8 * 0.8 + 3 * 0.6) / 19)
    assert masked.notes[1] == "drops.1 (p = 0.2) is a mask of 8 channels"


def test_dropouts_that_no_mask_stands_for_are_left_out_in_words() -> None:
    assert mask_dropouts(export(build(DeepLab)), pictures()).notes == (
        "project.2 (p = 0.5) is a mask of 8 channels",
        "auxiliary.0 (p = 0.1) is left out: no logits depend on it",
    )
    notes = mask_dropouts(export(build(Tokens)), pictures()).notes
    assert notes[0] == "attention_drop (p = 0.1) is left out: attention weights have no channels"


def head_with(drop: nn.Module) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        network = Head()
        network.drop = drop  # type: ignore[assignment]
        return network

    return make


@pytest.mark.parametrize(
    ("network", "axes", "sentence"),
    [
        (head_with(nn.Identity()), (0,), "the program holds no dropout, or only with p = 0"),
        (head_with(nn.Dropout(0)), (0,), "the program holds no dropout, or only with p = 0"),
        (head_with(nn.Dropout(1)), (0,), "drop .p = 1. is left out: it drops everything"),
        (
            head_with(nn.AlphaDropout(0.5)),
            (0,),
            "drop .p = 0.5. is alpha_dropout, which no mask of channels can stand for",
        ),
        (Head, (), "a fixed number of pictures; export it with a dynamic first axis"),
    ],
)
def test_what_cannot_be_sampled_is_refused_by_name(
    network: Callable[[], nn.Module], axes: tuple[int, ...], sentence: str
) -> None:
    with pytest.raises(BadOption, match=sentence):
        mask_dropouts(export(build(network), axes), pictures())


def test_a_program_in_training_mode_is_refused() -> None:
    with pytest.raises(BadOption, match=r"normalises by its batch, as in training; export it after model.eval\(\)"):
        mask_dropouts(export(build(Head).train()), pictures())


def test_a_dropout_that_is_never_switched_off_becomes_a_mask_too() -> None:
    class Always(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.3)

    masked = mask_dropouts(export(build(head_with(Always()))), pictures())
    encode, decode = partition(masked.program)
    draws = masks(masked.sampling.masks, 3, 2)
    assert torch.equal(decode(*encode(pictures()), draws), decode(*encode(pictures()), draws))
