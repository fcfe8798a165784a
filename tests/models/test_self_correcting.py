"""Self-correcting networks: the original logits, what boxes change, and how q joins p and p_anc."""

import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from penumbra.export.bundle import export_network
from penumbra.export.importer import import_checkpoint
from penumbra.models.card import ClassInfo, PromptSpec, WindowSpec
from penumbra.models.checkpoint import load_checkpoint
from penumbra.models.contract import Prompt
from penumbra.models.errors import BadCheckpoint
from penumbra.models.self_correcting.net import SelfCorrectingNetwork, correct_linearly
from penumbra.models.self_correcting.upstream import ANCILLARY, CORRECTION, PRIMARY, assemble
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from tests.models import golden
from tests.models.small import SMALL, seeded, traced

PROMPTED = ["self_correcting ancillary", "self_correcting linear", "self_correcting convolutional"]
NO_NOISE = torch.zeros(1, 2, 0)
SIZE = (64, 80)

every_prompted = pytest.mark.parametrize("name", PROMPTED)


def network(name: str) -> SelfCorrectingNetwork:
    found = seeded(name)
    assert isinstance(found, SelfCorrectingNetwork)
    return found


def image(num_windows: int = 2, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(num_windows, 3, *size, generator=torch.Generator().manual_seed(1))


def boxes(num_windows: int = 2, size: tuple[int, int] = SIZE) -> Tensor:
    """Overlapping boxes of the classes 1 and 2, elsewhere in every window."""
    mask_BKhw = torch.zeros(num_windows, 3, *size)
    for b in range(num_windows):
        mask_BKhw[b, 1, 4 + b : 30, 8:40] = 1
        mask_BKhw[b, 2, 16:50, 24 + 8 * b : 60] = 1
    return mask_BKhw


def prompt_of(name: str, num_windows: int = 2, size: tuple[int, int] = SIZE) -> Prompt:
    mask = boxes(num_windows, size)
    return (mask, torch.arange(num_windows) + 0.5) if name.endswith("linear") else (mask,)


def resize(logits_BKhw: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits_BKhw, size=size, mode="bilinear", align_corners=False)


# -- the unofficial code's files -------------------------------------------------------------------

STEMS = golden.fixtures("selfcorr-unofficial_*")
LOGITS = re.compile(r"(primary|ancillary|conv|linear_a[\d.]+)_logits_(\d+)x(\d+)_hw::(\d+)")
FEATURES = re.compile(r"(low|high|attn_low|attn_high)_(\d+)x(\d+)_c::(\d+)")
BOX = re.compile(r"channel (\d+) rows (\d+):(\d+) cols (\d+):(\d+) = 1")


class Original:
    """One fixture, its three files, and the networks that they were imported as."""

    def __init__(self, stem: str, folder: Path) -> None:
        self.facts, self.arrays = golden.load(stem)
        self.num_classes = self.facts["state_dict"]["primary"]["decoder.classifier.weight"]["shape"][0]
        self.classes = tuple(ClassInfo(f"class {k}", (k, k, k)) for k in range(self.num_classes))
        self.files = [self._write(part, folder) for part in ("primary", "ancillary", "correcting")]
        self.linear = self._read(self.files[:2], folder / "linear.safetensors")
        self.convolutional = self._read(self.files, folder / "convolutional.safetensors")

    def _write(self, part: str, folder: Path) -> Path:
        facts = {"state_dict": self.facts["state_dict"][part]}
        state = golden.state_dict(facts, self.arrays, overrides=f"override::{part}.")
        assert golden.wrong_tensors(facts, state) == []
        path = folder / f"epoch649_{part}.pth"
        settings = {"config": sys.modules["configs"].Config(), "val_accuracy": np.float64(0.5)}  # type: ignore[attr-defined]
        torch.save({"epoch": 649, "model_state_dict": state, **settings}, path)
        return path

    def _read(self, files: list[Path], path: Path) -> SelfCorrectingNetwork:
        import_checkpoint("self_correcting", files, path, classes=self.classes)
        self.card, found = load_checkpoint(path)
        assert isinstance(found, SelfCorrectingNetwork)
        return found

    def boxes(self, size: tuple[int, int]) -> Tensor:
        mask_BKhw = torch.zeros(1, self.num_classes, *size)
        for k, y0, y1, x0, x1 in BOX.findall(" ".join(self.facts["notes"])):
            mask_BKhw[0, int(k), int(y0) : int(y1), int(x0) : int(x1)] = 1
        assert mask_BKhw.any()
        return mask_BKhw

    def check(self, name: str, ours: Tensor) -> None:
        """Within the fixture's own tolerance, which is absolute or a share of the largest value."""
        recorded = self.arrays[name]
        kind, number = re.match(r"(abs|rel)\w* ([\d.e+-]+)", self.facts["tolerance_hint"]).groups()  # type: ignore[union-attr]
        allowed = float(number) * (np.abs(recorded).max() if kind == "rel" else 1)
        difference = np.abs(ours.numpy() - recorded).max()
        assert difference <= allowed, f"{name} differs by {difference}, {allowed} allowed"


@pytest.fixture(scope="module", params=STEMS or [None])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Original:
    if request.param is None:
        pytest.skip(f"no recorded outputs of self-correcting networks in {golden.GOLDEN}")
    with pytest.MonkeyPatch.context() as patch:  # the original files pickle a class of a module that is not here
        module = types.ModuleType("configs")
        module.Config = type("Config", (), {"__module__": "configs"})  # type: ignore[attr-defined]
        patch.setitem(sys.modules, "configs", module)
        return Original(request.param, tmp_path_factory.mktemp("original"))


def members(net: SelfCorrectingNetwork, size: tuple[int, int], prompt: Prompt) -> list[Tensor]:
    picture = golden.image(*size)
    features = net.take_prompt(picture, net.encode(picture), prompt)
    return [resize(logits_BKhw, size) for logits_BKhw in net.decode(features, NO_NOISE)]


@pytest.mark.slow
@torch.inference_mode()
def test_the_original_logits_of_every_network_and_correction_are_reproduced(original: Original) -> None:
    found = [(name, m.groups()) for name in original.arrays if (m := LOGITS.fullmatch(name))]
    assert {kind for _, (kind, *_) in found} >= {"primary", "ancillary", "conv", "linear_a0.5", "linear_a30"}
    for name, (kind, height, width, step) in found:
        size, stride = (int(height), int(width)), int(step)
        if kind.startswith("linear_a"):
            alpha_B = torch.tensor([float(kind.removeprefix("linear_a"))])
            ours = members(original.linear, size, (original.boxes(size), alpha_B))[2]
        else:
            member = ("primary", "ancillary", "conv").index(kind)
            ours = members(original.convolutional, size, (original.boxes(size),))[member]
        original.check(name, ours[..., ::stride, ::stride])


@pytest.mark.slow
@torch.inference_mode()
def test_without_boxes_the_original_primary_answers(original: Original) -> None:
    for name in original.arrays:
        if (match := LOGITS.fullmatch(name)) and match[1] == "primary":
            size, stride = (int(match[2]), int(match[3])), int(match[4])
            logits_SBKhw = original.linear(golden.image(*size), NO_NOISE)
            assert len(logits_SBKhw) == 1
            original.check(name, resize(logits_SBKhw[0], size)[..., ::stride, ::stride])


@pytest.mark.slow
def test_the_export_at_published_size_is_served_with_and_without_boxes(original: Original, tmp_path: Path) -> None:
    card = replace(original.card, window=WindowSpec(96, 128))
    export_network(original.convolutional, card, tmp_path)
    picture = np.random.Generator(np.random.PCG64(1)).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    with Segmenter.open(tmp_path, device="cpu", threads=1, tuning=Tuning(1, 1)) as segmenter:
        plain = segmenter.segment(picture, SegmentOptions())
        boxed = segmenter.segment(picture, SegmentOptions(boxes=((20, 10, 80, 60, 5),)))
    assert plain.members == ("primary",) and boxed.members == ("primary", "ancillary", "corrected")
    assert float(boxed.maps["mutual_information"].mean()) > 0 and "mutual_information" not in plain.maps


@pytest.mark.slow
@torch.inference_mode()
def test_the_original_features_and_box_attention_are_reproduced(original: Original) -> None:
    found = [(name, m.groups()) for name in original.arrays if (m := FEATURES.fullmatch(name))]
    assert len(found) >= 4
    for name, (kind, height, width, step) in found:
        size = (int(height), int(width))
        low, high = original.linear.primary.encode(golden.image(*size))
        ours = {
            "low": low,
            "high": high,
            "attn_low": original.linear.ancillary.low_gate(original.boxes(size), low),
            "attn_high": original.linear.ancillary.high_gate(original.boxes(size), high),
        }
        original.check(name, ours[kind][:, :: int(step)])


@pytest.mark.slow
def test_the_primary_file_alone_makes_a_network_that_takes_no_boxes(original: Original, tmp_path: Path) -> None:
    path, alone = tmp_path / "primary.safetensors", original.files[:1]
    card = import_checkpoint("self_correcting", alone, path, classes=original.classes, sampling="dropout").card
    assert (card.prompt, card.sampling.kind, card.sampling.keep) == (PromptSpec(), "dropout", 0.5)
    assert not card.readout.align_corners


def parts(*names: str, classes: int = 3, odd: str = "", depth: int = 50) -> dict[str, dict[str, Tensor]]:
    """Just what `assemble` looks at. odd: the part that has one class more."""
    count = {name: classes + (name == odd) for name in names}
    prefixes = {PRIMARY: "primary", ANCILLARY: "ancillary.deeplab"}
    made = {
        name: {
            f"{prefixes[name]}.classifier.weight": torch.zeros(count[name], 256, 1, 1),
            f"{prefixes[name]}.backbone.layer3.{5 if depth == 50 else 6}.conv1.weight": torch.zeros(1),
        }
        for name in names
        if name in prefixes
    }
    if CORRECTION in names:
        made[CORRECTION] = {"correction.2.weight": torch.zeros(count[CORRECTION], 64, 3, 3)}
    return made


def test_the_files_given_decide_the_correction() -> None:
    alone, both = assemble(parts(PRIMARY)).config, assemble(parts(PRIMARY, ANCILLARY)).config
    all_three = assemble(parts(PRIMARY, ANCILLARY, CORRECTION)).config
    assert (alone.ancillary, alone.correction) == (False, "none")
    assert (both.ancillary, both.correction, both.num_classes, both.backbone.depth) == (True, "linear", 3, 50)
    assert (all_three.correction, all_three.correction_hidden) == ("convolutional", 64)


@pytest.mark.parametrize(
    ("given_parts", "sentence"),
    [
        (parts(ANCILLARY), "there is the ancillary network but no primary network"),
        (parts(PRIMARY, CORRECTION), "there is the primary network and the correction network but no ancillary"),
        (parts(PRIMARY, ANCILLARY, odd=ANCILLARY), "3 in the primary network, 4 in the ancillary network"),
        (parts(PRIMARY, ANCILLARY, CORRECTION, odd=CORRECTION), "classes differs.* 4 in the correction network"),
        (parts(PRIMARY, depth=101) | parts(ANCILLARY), "layers differs: 101 in the primary network, 50 in the anc"),
    ],
)
def test_files_that_make_no_network_together_are_refused(
    given_parts: dict[str, dict[str, Tensor]], sentence: str
) -> None:
    with pytest.raises(BadCheckpoint, match=sentence):
        assemble(given_parts)


# -- boxes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "members", "alpha"),
    [
        ("ancillary", ("primary", "ancillary"), None),
        ("linear", ("primary", "ancillary", "corrected"), 0.5),
        ("convolutional", ("primary", "ancillary", "corrected"), None),
    ],
)
def test_a_network_that_sees_boxes_names_its_members(name: str, members: tuple[str, ...], alpha: float | None) -> None:
    wanted = PromptSpec(kind="boxes", members=members, background=0, alpha=alpha)
    assert seeded(f"self_correcting {name}").prompt == wanted


def test_a_network_with_an_alpha_of_its_own_declares_it() -> None:
    config = replace(SMALL["self_correcting linear"], alpha=2.0)
    assert SelfCorrectingNetwork(config).prompt.alpha == 2.0


@pytest.mark.parametrize("name", ["primary", "dropout"])
def test_the_primary_alone_and_its_dropout_take_no_boxes(name: str) -> None:
    assert seeded(f"self_correcting {name}").prompt.kind == "none"


@every_prompted
@torch.inference_mode()
def test_with_boxes_there_is_one_sample_per_member_and_the_primary_is_as_without(name: str) -> None:
    net = network(name)
    before = net.encode(image())
    kept = before[0].clone()
    after = net.decode(net.take_prompt(image(), before, prompt_of(name)), NO_NOISE)
    assert len(after) == len(net.prompt.members)
    assert torch.equal(before[0], kept)
    torch.testing.assert_close(resize(after[0], SIZE), resize(net.decode(before, NO_NOISE)[0], SIZE))


@every_prompted
@torch.inference_mode()
def test_a_prompted_batch_of_two_equals_two_of_one(name: str) -> None:
    """In double precision, so that only a real mixing of windows could make a difference."""
    net, pictures = network(name).double(), image().double()
    prompt = tuple(part.double() for part in prompt_of(name))
    (together,) = net.take_prompt(pictures, net.encode(pictures), prompt)
    for b in range(2):
        one = pictures[b : b + 1]
        (alone,) = net.take_prompt(one, net.encode(one), tuple(part[b : b + 1] for part in prompt))
        torch.testing.assert_close(together[b : b + 1], alone, atol=1e-12, rtol=0)


@torch.inference_mode()
def test_boxes_that_overlap_and_their_classes_move_the_ancillary() -> None:
    net = network("self_correcting linear")
    features, mask = net.encode(image()), boxes()
    assert bool((mask.sum(1) > 1).any())
    top = mask.clone()
    top[:, 1] *= 1 - mask[:, 2]  # one box hides the other
    answers = [net.take_prompt(image(), features, (m,))[0][:, 1] for m in (mask, top, mask.roll(1, 1), 0 * mask)]
    for i, answer in enumerate(answers):
        assert torch.isfinite(answer).all()
        assert all(not torch.allclose(answer, other, atol=1e-4) for other in answers[:i])


@torch.inference_mode()
def test_the_convolutional_members_are_as_large_as_the_image_and_the_others_as_the_features() -> None:
    for name in PROMPTED:
        net = network(name)
        (members_BMKhw,) = net.take_prompt(image(), net.encode(image()), prompt_of(name))
        wanted = SIZE if name.endswith("convolutional") else (16, 20)
        assert tuple(members_BMKhw.shape[-2:]) == wanted


# -- corrections -----------------------------------------------------------------------------------


@given(st.floats(0, 1e6), st.integers(0, 2**16))
def test_linearly_corrected_probabilities_are_the_weighted_geometric_mean(alpha: float, seed: int) -> None:
    logits_BMKhw = torch.randn(1, 2, 4, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    prob = correct_linearly(logits_BMKhw, torch.tensor([alpha], dtype=torch.float64)).softmax(2)
    p, p_anc, q = prob.unbind(1)
    mean = p ** (1 / (1 + alpha)) * p_anc ** (alpha / (1 + alpha))
    torch.testing.assert_close(q, mean / mean.sum(1, keepdim=True))


@torch.inference_mode()
def test_linearly_corrected_probabilities_are_the_nearest_to_both() -> None:
    """q = argmin KL(q || p) + alpha KL(q || p_anc): no other distribution tried does better."""
    generator, alpha = torch.Generator().manual_seed(3), 0.5
    logits_BMKhw = torch.randn(1, 2, 5, 1, 1, generator=generator, dtype=torch.float64)
    log_p, log_anc, log_q = correct_linearly(logits_BMKhw, torch.tensor([alpha]).double()).log_softmax(2)[0, :, :, 0, 0]

    def cost(log_NK: Tensor) -> Tensor:
        return (log_NK.exp() * (log_NK - log_p + alpha * (log_NK - log_anc))).sum(-1)

    others = (log_q + 0.1 * torch.randn(500, 5, generator=generator, dtype=torch.float64)).log_softmax(-1)
    assert bool((cost(log_q) < cost(others)).all())


@torch.inference_mode()
def test_alpha_zero_is_the_primary_and_a_huge_alpha_the_ancillary_window_by_window() -> None:
    net = network("self_correcting linear")
    alpha_B = torch.tensor([0.0, 1e6])
    (members_BMKhw,) = net.take_prompt(image(), net.encode(image()), (boxes(), alpha_B))
    primary, ancillary, corrected = members_BMKhw.unbind(1)
    assert torch.equal(corrected[0], primary[0])
    torch.testing.assert_close(corrected[1], ancillary[1], atol=1e-4, rtol=0)
    assert not torch.allclose(primary, ancillary, atol=1e-2)


@torch.inference_mode()
def test_without_a_requested_alpha_the_configured_one_counts() -> None:
    net = network("self_correcting linear")
    features = net.encode(image())
    (default,) = net.take_prompt(image(), features, (boxes(),))
    (named,) = net.take_prompt(image(), features, (boxes(), torch.full((2,), SMALL["self_correcting linear"].alpha)))
    assert torch.equal(default, named)


@torch.inference_mode()
def test_the_convolution_sees_primary_then_ancillary_and_both_matter() -> None:
    net = network("self_correcting convolutional")
    (members_BMKhw,) = net.take_prompt(image(), net.encode(image()), (boxes(),))
    primary, ancillary, corrected = members_BMKhw.unbind(1)
    torch.testing.assert_close(net.correction(torch.cat((primary, ancillary), 1)), corrected)
    assert not torch.allclose(net.correction(torch.cat((ancillary, primary), 1)), corrected, atol=1e-3)


# -- dropout ---------------------------------------------------------------------------------------


@torch.inference_mode()
def test_dropout_that_keeps_every_channel_is_the_primary_itself() -> None:
    dropout, single = network("self_correcting dropout"), network("self_correcting linear")
    dropout.load_state_dict(single.state_dict())
    logits_SBKhw = dropout(image(), torch.ones(2, 2, 8))
    plain = single(image(), NO_NOISE)
    torch.testing.assert_close(logits_SBKhw, plain.expand_as(logits_SBKhw), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_mask_drops_what_the_aspp_gives_as_a_mask_before_the_decoder_would() -> None:
    net = network("self_correcting dropout")
    mask_SBD = 2.0 * (torch.rand(3, 2, 8, generator=torch.Generator().manual_seed(4)) < 0.5)
    low, high = net.primary.encode(image())
    plain = torch.stack([net.primary.decode(low, high * mask_BD[..., None, None]) for mask_BD in mask_SBD])
    spread = float((plain - plain.mean(0)).abs().max())
    assert spread > 1e-3
    assert float((net(image(), mask_SBD) - plain).abs().max()) < 1e-3 * spread


# -- export ----------------------------------------------------------------------------------------


@every_prompted
@torch.inference_mode()
def test_the_traced_graphs_run_with_boxes_on_other_batches_and_sizes(name: str) -> None:
    net = network(name)
    graphs = traced(net, image(), torch.zeros(1, 2, 0), prompt_of(name))
    for num_windows, size in ((1, (37, 53)), (3, (96, 72))):
        picture, prompt = image(num_windows, size), prompt_of(name, num_windows, size)
        theirs = graphs.decode(graphs.take_prompt(picture, graphs.encode(picture), prompt), NO_NOISE)
        eager = net.decode(net.take_prompt(picture, net.encode(picture), prompt), NO_NOISE)
        torch.testing.assert_close(theirs, eager, atol=1e-5, rtol=1e-5)
