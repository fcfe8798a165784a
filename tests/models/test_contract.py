"""Every method keeps the contract: a deterministic encode, and a decode that is a pure function of its noise."""

import dataclasses
import json
import math
import re
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.sampling import decode_plain
from penumbra import models
from penumbra.export.bundle import export_network
from penumbra.export.golden import golden_prompt
from penumbra.export.parity import FULL
from penumbra.models import find_method, methods
from penumbra.models.blocks.resnet import ResNet, ResNetConfig
from penumbra.models.contract import Method, Network
from penumbra.models.cps.net import CpsNetwork
from penumbra.models.errors import BadOption
from penumbra.models.np_semiseg.heads import PublishedHead
from penumbra.models.np_semiseg.net import NpConfig, NpNetwork
from penumbra.models.strict import read_strict
from penumbra.serving.engine.backends import load_backend
from penumbra.serving.engine.store import open_artifact
from tests.models.small import SIZE, SMALL, card_of, close, fresh, image, is_served, noise, seeded

every_network = pytest.mark.parametrize("name", SMALL)
every_prompted = pytest.mark.parametrize("name", [name for name in SMALL if fresh(name).prompt.kind != "none"])
every_sampled = pytest.mark.parametrize(
    "name", [name for name in SMALL if fresh(name).sampling.kind in ("latent", "dropout")]
)
every_method = pytest.mark.parametrize(
    "method", [m for m in methods().values() if m.name != "toy"], ids=lambda m: m.name
)
QUICKLY_EXPORTED = (
    *(name for name in SMALL if name.startswith("toy")),
    "np_semiseg film", "self_correcting linear", "cpal context", "cps lite",
)  # fmt: skip
"""The toys, three shapes of network (with a latent, with boxes, with maps of its own), and the other backbone."""
EXACTLY = 1e-9


def exact(name: str) -> Network:
    """In double precision, where a rounding that a network amplifies cannot pass for a dependence."""
    return seeded(name).double()


def test_every_discovered_method_is_tested_here() -> None:
    assert {name.split()[0] for name in SMALL} == set(methods())


def test_an_unknown_method_is_named_beside_the_known_ones() -> None:
    with pytest.raises(BadOption, match=f"'deeplab'; known are {', '.join(sorted(methods()))}"):
        find_method("deeplab")


@every_method
def test_a_readme_states_paper_equations_and_deviations(method: Method) -> None:
    text = (Path(models.__file__).parent / method.name / "README.md").read_text()
    assert re.search(r"\. \*[A-Z][^*]+\.\*\s(CVPR|ICML|NeurIPS) \d{4}", text) or "No paper" in text
    assert any(line.startswith("    ") and "=" in line for line in text.splitlines())
    assert "eviation" in text or "DEVIATION" in text


@every_network
@torch.inference_mode()
def test_encoding_twice_gives_the_same_bytes(name: str) -> None:
    network = seeded(name)
    once, again = network.encode(image(name=name)), network.encode(image(name=name))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert all(feature.shape[0] == 2 for feature in once)


@every_network
@torch.inference_mode()
def test_the_same_noise_gives_the_same_logits_and_leaves_the_features_alone(name: str) -> None:
    network = seeded(name)
    features = network.encode(image(name=name))
    before = [feature.clone() for feature in features]
    once, again = (network.decode(features, noise(name, 3)) for _ in range(2))
    assert torch.equal(once, again)
    assert all(torch.equal(a, b) for a, b in zip(features, before, strict=True))


@every_network
@torch.inference_mode()
def test_a_batch_of_two_windows_equals_two_batches_of_one(name: str) -> None:
    network, draws, images = exact(name), noise(name, 3).double(), image(name=name).double()
    together = network(images, draws)
    alone = torch.cat([network(images[b : b + 1], draws[:, b : b + 1]) for b in range(2)], dim=1)
    assert close(together, alone, EXACTLY)


@every_network
@torch.inference_mode()
def test_features_can_be_split_and_joined_by_window(name: str) -> None:
    network, draws = exact(name), noise(name, 3).double()
    features = network.encode(image(name=name).double())
    swapped = network.decode(tuple(feature.flip(0) for feature in features), draws.flip(1))
    assert close(swapped.flip(1), network.decode(features, draws), EXACTLY)


@every_sampled
@torch.inference_mode()
def test_five_samples_in_one_call_equal_five_calls_of_one(name: str) -> None:
    network, draws = exact(name), noise(name, 5).double()
    features = network.encode(image(name=name).double())
    together = network.decode(features, draws)
    alone = torch.cat([network.decode(features, draw[None]) for draw in draws])
    assert close(together, alone, EXACTLY)
    assert float(together.var(0).mean()) > 1e-6


@every_prompted
@torch.inference_mode()
def test_a_prompt_changes_features_and_not_the_ones_it_was_given(name: str) -> None:
    network, card, images = exact(name), card_of(name), image(name=name).double()
    prompt, features = tuple(p.double() for p in golden_prompt(card, images)), network.encode(images)
    before = [feature.clone() for feature in features]
    draws = noise(name, 3, prompt=True).double()
    logits = network.decode(network.take_prompt(images, features, prompt), draws)
    assert all(torch.equal(a, b) for a, b in zip(features, before, strict=True))
    assert len(logits) == card.sampling_with(prompt=True).default_samples and torch.isfinite(logits).all()
    alone = []
    for b in (slice(0, 1), slice(1, 2)):
        prompted = network.take_prompt(images[b], network.encode(images[b]), tuple(part[b] for part in prompt))
        alone.append(network.decode(prompted, draws[:, b]))
    assert close(logits, torch.cat(alone, dim=1), EXACTLY)


@every_network
@torch.inference_mode()
def test_extra_maps_are_the_last_feature(name: str) -> None:
    network = seeded(name)
    if network.extra_maps:
        extras_BEhw = network.encode(image(name=name))[-1]
        assert extras_BEhw.shape[:2] == (2, len(network.extra_maps)) and extras_BEhw.dtype == torch.float32
        assert torch.isfinite(extras_BEhw).all()


@pytest.mark.parametrize(
    "name", [name if name in QUICKLY_EXPORTED else pytest.param(name, marks=pytest.mark.slow) for name in SMALL]
)
@torch.inference_mode()
def test_the_export_passes_its_gate_agrees_at_other_batches_and_is_served(name: str, tmp_path: Path) -> None:
    card, network = card_of(name), seeded(name)
    directory = export_network(network, card, tmp_path)
    graphs = load_backend(open_artifact(directory).card, directory, torch.device("cpu"))
    size = (card.window.height, card.window.width) if "onnx" in network.formats else SIZE  # ONNX takes no other
    for num_windows, num_samples in ((1, 1), (5, 1), (1, 5), (3, 4)):
        draws, pictures = noise(name, num_samples, num_windows), image(num_windows, size, name=name)
        wanted, got = network(pictures, draws), graphs.decode(graphs.encode(pictures), draws)
        assert got.shape == wanted.shape and close(got, wanted, FULL.relative)
    for path in directory.glob("*.ts"):
        assert made_on_a_device(torch.jit.load(path)) <= {"aten::to"}, path.name  # of sizes, which stay on the CPU
    is_served(card, tmp_path)


def made_on_a_device(graph: torch.jit.ScriptModule) -> set[str]:
    """Kinds of operations that name the device they were traced on: on another one they would stay behind."""
    nodes = graph.inlined_graph.nodes()
    return {node.kind() for node in nodes if any(x.type().kind() == "DeviceObjType" for x in node.inputs())}


@every_network
@torch.inference_mode()
def test_logits_have_the_axes_that_the_sampling_declares(name: str) -> None:
    network, draws = seeded(name), noise(name, 4)
    logits = network(image(name=name), draws)
    assert logits.shape[:3] == (len(draws), 2, SMALL[name].num_classes)
    assert torch.isfinite(logits).all()
    sampling = network.sampling
    assert (sampling.noise_length > 0) == (sampling.kind in ("latent", "dropout"))
    assert (sampling.keep < 1) == (sampling.kind == "dropout")
    if sampling.kind in ("members", "single"):
        assert len(logits) == sampling.default_samples == max(1, len(sampling.members))


@every_network
def test_weights_survive_a_round_trip_of_the_state_dict(name: str) -> None:
    first, second = seeded(name, seed=0), seeded(name, seed=1)
    second.load_state_dict(first.state_dict())
    with torch.inference_mode():
        assert torch.equal(first(image(name=name), noise(name, 2)), second(image(name=name), noise(name, 2)))


@every_network
def test_the_configuration_survives_json(name: str) -> None:
    config = SMALL[name]
    assert dataclasses.fields(config)[0].name == "num_classes"
    data = json.loads(json.dumps(dataclasses.asdict(config)))
    read = read_strict(type(config), data, where="config")
    assert json.loads(json.dumps(dataclasses.asdict(read))) == data and type(read) is type(config)


@torch.inference_mode()
def test_cps_members_are_its_branches_in_order() -> None:
    network = seeded("cps")
    assert isinstance(network, CpsNetwork) and network.sampling.members == ("branch1", "branch2")
    logits = network(image(), noise("cps", 2))
    for member, name in enumerate(network.sampling.members):
        assert close(logits[member], network.get_submodule(name)(image()))


# -- does the latent reach the pixels? ------------------------------------------------------------


def spread(name: str) -> tuple[Tensor, float]:
    """Variance over 16 samples per pixel of the stride-4 map, and the variance of the mean logits over the picture."""
    with torch.inference_mode():
        logits_SBKhw = fresh(name).eval()(image(1, (128, 128)), noise(name, 16, 1))
    return logits_SBKhw.double().var(0).mean((0, 1)), float(logits_SBKhw.double().mean(0).var())


INTERIOR = (slice(8, -8), slice(8, -8))


def test_the_film_heads_latent_moves_the_logits_everywhere() -> None:
    variance_hw, picture_variance = spread("np_semiseg film")
    interior = float(variance_hw[INTERIOR].mean())
    assert interior > 0.3 * picture_variance
    assert abs(interior / float(variance_hw.mean()) - 1) < 0.1


def test_the_published_heads_latent_is_cancelled_inside_and_leaks_in_from_the_border() -> None:
    """The documented trap: InstanceNorm subtracts what is constant over the picture."""
    variance_hw, picture_variance = spread("np_semiseg published")
    interior = float(variance_hw[INTERIOR].mean())
    border = float(torch.cat((variance_hw[0], variance_hw[-1], variance_hw[:, 0], variance_hw[:, -1])).mean())
    assert interior < 0.02 * border
    assert interior < 0.1 * picture_variance


@pytest.mark.parametrize("size", [(9, 9), (32, 64), (37, 53)])
@torch.inference_mode()
def test_the_split_published_head_equals_the_plain_form(size: tuple[int, int]) -> None:
    network = seeded("np_semiseg published")
    assert isinstance(network, NpNetwork)
    x = network.host(image(2, size))
    draws = noise("np_semiseg published", 3)
    assert isinstance(network.head, PublishedHead)
    plain = decode_plain(network.head, x, draws)
    assert close(network.head.decode(network.head.encode(x), draws), plain)


# -- backbones ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "stem", "stride", "ceil_pool"), list(product((18, 50), ("plain", "deep"), (8, 16), (False, True)))
)
@torch.inference_mode()
def test_backbones_run_on_odd_sizes_at_their_strides(depth: int, stem: str, stride: int, ceil_pool: bool) -> None:
    config = ResNetConfig(depth=depth, stem=stem, width=4, output_stride=stride, ceil_pool=ceil_pool)  # type: ignore[arg-type]
    low, high = ResNet(config).eval()(image(1))
    assert [low.shape[1], high.shape[1]] == [config.stage_channels[0], config.stage_channels[-1]]
    for feature, factor in ((low, 4), (high, stride)):
        for have, length in zip(feature.shape[2:], SIZE, strict=True):
            assert 0 <= have - math.ceil(length / factor) <= ceil_pool


@pytest.mark.parametrize("head", ["film", "published"])
@pytest.mark.parametrize("stride", [8, 16])
@torch.inference_mode()
def test_np_nets_of_both_strides_give_logits_at_stride_4(head: str, stride: int) -> None:
    backbone = ResNetConfig(depth=50, width=4, output_stride=stride)  # type: ignore[arg-type]
    config = NpConfig(3, backbone, aspp_channels=8, low_channels=8, latent_length=4, hidden=8, head=head)  # type: ignore[arg-type]
    logits = NpNetwork(config).eval()(image(1), torch.zeros(2, 1, 4))
    assert logits.shape == (2, 1, 3, math.ceil(SIZE[0] / 4), math.ceil(SIZE[1] / 4))
