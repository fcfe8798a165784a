"""The published CPS and NP-SemiSeg checkpoints, imported as a user would, reproduce the original code's outputs."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.sampling import decode_plain
from penumbra.export.importer import Imported, import_checkpoint
from penumbra.export.layouts import read_published
from penumbra.models import find_method
from penumbra.models.card import ClassInfo, Readout, WindowSpec
from penumbra.models.checkpoint import load_checkpoint
from penumbra.models.contract import Network
from penumbra.models.cps import upstream as cps_upstream
from penumbra.models.cps.net import CpsConfig
from penumbra.models.errors import BadCheckpoint
from penumbra.models.layout import Assembly
from penumbra.models.np_semiseg import upstream as np_upstream
from penumbra.models.np_semiseg.heads import PublishedHead
from penumbra.models.np_semiseg.net import NpNetwork, augseg, u2pl
from penumbra.serving.engine.windows import cover
from tests.models import golden

CPS = [s for s in golden.fixtures("cps_*") if not s.endswith("_protocol")]
NP = [s for s in golden.fixtures("np-*") if not s.endswith("_protocol")]
MEMORIES = ("latent_memory", "deterministic_memory")
none_of = f"no recorded outputs in {golden.GOLDEN}"
every_cps = pytest.mark.parametrize("cps", CPS or [pytest.param("", marks=pytest.mark.skip(none_of))], indirect=True)
every_np = pytest.mark.parametrize("np_net", NP or [pytest.param("", marks=pytest.mark.skip(none_of))], indirect=True)

Recorded = tuple[dict, golden.Arrays, Imported, Network]


def _import(method: str, content: dict, folder: Path, *, count: int, **options: str) -> tuple[Imported, Network]:
    """Through the files: torch.save, import, load."""
    torch.save(content, folder / "original.pth")
    classes = tuple(ClassInfo(f"class {k}", (k, k, k)) for k in range(count))
    imported = import_checkpoint(
        method, [folder / "original.pth"], folder / "ours.safetensors", classes=classes, **options
    )  # type: ignore[arg-type]
    (folder / "original.pth").unlink()
    card, network = load_checkpoint(folder / "ours.safetensors")
    (folder / "ours.safetensors").unlink()
    assert card == imported.card
    return imported, network


@pytest.fixture(scope="module")
def cps(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    facts, arrays = golden.load(request.param)
    state = golden.state_dict(facts, tame=request.param.endswith("_tame"))
    content = {"model": state, "optimizer_l": {}, "optimizer_r": {}, "epoch": 34, "iteration": 0}
    folder, count = tmp_path_factory.mktemp("cps"), facts["num_classes"]
    return facts, arrays, *_import("cps", content, folder, count=count, protocol="penumbra")


@pytest.fixture(scope="module")
def np_net(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    facts, arrays = golden.load(request.param)
    state = golden.state_dict(facts, tame=request.param.endswith("_tame"))
    content = {
        "epoch": 3,
        "model_state": {f"module.{key}": torch.zeros(1) for key in state},
        "teacher_state": {f"module.{key}": value for key, value in state.items()},
        "best_miou": np.float64(0.7),
        **{name: golden.fill(name, facts["banks"][name], {}) for name in MEMORIES},
    }
    folder = tmp_path_factory.mktemp("np")
    return facts, arrays, *_import("np_semiseg", content, folder, count=facts["num_classes"])


def _check(ours: Tensor, recorded: np.ndarray, tolerance: float) -> None:
    difference = np.abs(ours.numpy() - recorded).max()
    assert difference <= tolerance, f"differs by {difference}, {tolerance} allowed"


def _relative(recorded: np.ndarray) -> float:
    return 1e-5 * float(np.abs(recorded).max())


def _np_logits(recorded: np.ndarray) -> float:
    """The fixtures state 5e-5 for logits of order 1; plain-filler logits are larger in proportion."""
    return 5e-5 * max(1.0, float(np.abs(recorded).max()) / 10)


@every_cps
@torch.inference_mode()
def test_cps_reproduces_the_original_logits_of_both_branches(cps: Recorded) -> None:
    _, arrays, imported, network = cps
    assert imported.card.sampling.members == ("branch1", "branch2") and not imported.train_only
    for size, strides in (((97, 129), (1, 4)), ((128, 160), (2, 4))):
        logits_SBKhw = network(golden.image(*size), torch.zeros(2, 1, 0))
        for s, stride in enumerate(strides):
            full = F.interpolate(logits_SBKhw[s], size=size, mode="bilinear", align_corners=True)
            recorded = arrays[f"logits_branch{s + 1}_{size[0]}x{size[1]}"]
            _check(full[:, :, ::stride, ::stride], recorded, _relative(recorded))


@every_np
@torch.inference_mode()
def test_np_reproduces_the_original_samples(np_net: Recorded) -> None:
    _, arrays, _, network = np_net
    for key in [k for k in arrays if re.fullmatch(r"logits_low_\d+x\d+", k)]:
        size = tuple(map(int, key.rpartition("_")[2].split("x")))
        logits = network(golden.image(*size), torch.from_numpy(arrays["eps_T5"]))
        _check(logits, arrays[key], _np_logits(arrays[key]))


@every_np
@torch.inference_mode()
def test_np_reproduces_the_original_features_and_latents_with_the_memories_swapped(np_net: Recorded) -> None:
    _, arrays, imported, network = np_net
    assert isinstance(network, NpNetwork) and "zero" not in "".join(imported.warnings)
    x = network.host(golden.image(97, 129))
    _check(x[:, ::8], arrays["features_stride8ch"], _relative(arrays["features_stride8ch"]))
    for ours, name in zip(network.head.latent(x), ("latent_mean", "latent_sigma", "deterministic_vector"), strict=True):
        _check(ours, arrays[name], 5e-6)


@every_np
@torch.inference_mode()
def test_np_logits_at_image_size_are_the_originals(np_net: Recorded) -> None:
    """Recorded of the AugSeg host, which resizes inside; here the read-out does."""
    _, arrays, _, network = np_net
    for key in [k for k in arrays if k.startswith("logits_full")]:
        size = tuple(map(int, key.split("_")[2].split("x")))
        logits = network(golden.image(*size), torch.from_numpy(arrays["eps_T5"]))
        full = F.interpolate(logits[:, 0], size=size, mode="bilinear", align_corners=True)
        _check(full[:, :, ::4, ::4], arrays[key][:, 0], _np_logits(arrays[key]))


@every_np
@torch.inference_mode()
def test_the_np_head_alone_reproduces_the_original(np_net: Recorded) -> None:
    _, arrays, _, network = np_net
    assert isinstance(network, NpNetwork)
    height, width = arrays["head_only_logits_25x33"].shape[-2:]
    rng = np.random.Generator(np.random.PCG64(0))
    x = torch.from_numpy(rng.normal(size=(1, network.head.channels, height, width)).astype(np.float32))
    logits = network.head.decode(network.head.encode(x), torch.from_numpy(arrays["eps_T5"]))
    _check(logits, arrays["head_only_logits_25x33"], _np_logits(arrays["head_only_logits_25x33"]))
    names = ("head_only_mean", "head_only_sigma", "head_only_deterministic_vector")
    for ours, name in zip(network.head.latent(x), names, strict=True):
        _check(ours, arrays[name], 5e-6)


@every_np
@torch.inference_mode()
def test_np_with_memories_of_zero_reproduces_the_original_too(np_net: Recorded) -> None:
    _, arrays, _, network = np_net
    assert isinstance(network, NpNetwork)
    latent = network.head.latent
    centres = {name: buffer.clone() for name, buffer in latent.named_buffers()}
    try:
        for buffer in latent.buffers():
            buffer.zero_()
        logits = network(golden.image(97, 129), torch.from_numpy(arrays["eps_T5"]))
        mean, sigma, _ = latent(network.host(golden.image(97, 129)))
    finally:
        for name, buffer in latent.named_buffers():
            buffer.copy_(centres[name])
    _check(logits, arrays["zerobank_logits_low_97x129"], _np_logits(arrays["zerobank_logits_low_97x129"]))
    _check(mean, arrays["zerobank_mean"], 5e-6)
    _check(sigma, arrays["zerobank_sigma"], 5e-6)


@every_np
@torch.inference_mode()
def test_the_split_head_equals_the_plain_form_of_the_paper(np_net: Recorded) -> None:
    *_, network = np_net
    assert isinstance(network, NpNetwork)
    head = network.head
    x = torch.from_numpy(np.random.Generator(np.random.PCG64(3)).normal(0, 1, (2, head.channels, 23, 31))).float()
    noise = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(0))
    assert isinstance(head, PublishedHead)
    plain = decode_plain(head, x, noise)
    split = head.decode(head.encode(x), noise)
    assert (plain - split).abs().max() <= 1e-5 * max(1.0, plain.abs().max())


# -- layouts without recorded outputs, and the protocols of all ------------------------------------


def _names(network: str, config: object) -> set[str]:
    """The tensors that a network wants."""
    with torch.device("meta"):
        state = find_method(network).build(config).state_dict()
    return {name for name in state if not name.endswith("num_batches_tracked")}


def _siblings(prefixes: dict[str, str], classifier: str = "classifier.") -> dict[str, Tensor]:
    """The names of a sibling of CPS, from those of our branches: prefix of ours -> prefix of theirs."""
    parts = {"aspp.": "head.aspp.", "low.": "head.reduce.", "fuse.": "head.last_conv.", "classifier.": classifier}
    theirs = {}
    for name in _names("cps", CpsConfig(21)):
        branch, _, rest = name.partition(".")
        part = next((part for part in parts if rest.startswith(part)), "")
        if branch in prefixes:
            theirs[prefixes[branch] + parts.get(part, "") + rest.removeprefix(part)] = torch.zeros(1)
    return theirs


def test_gct_files_are_two_branches_and_their_flaw_detector_is_left_out() -> None:
    theirs = _siblings({"branch1": "l_model.", "branch2": "r_model."})
    train_only = ("fd_model.conv.weight", "flawmap_handler.blur.op.1.weight", "fdgt_generator.blur.op.1.weight")
    content = {"model": theirs | dict.fromkeys(train_only, torch.zeros(1))}
    part = read_published(content, find_method("cps"), where="a.pth")
    assert part.tensors.keys() == _names("cps", CpsConfig(21)) and part.train_only == train_only
    assert part.tensors["branch1.classifier.weight"] is theirs["l_model.classifier.weight"]


def test_cct_files_are_one_branch_and_their_auxiliary_decoders_are_left_out() -> None:
    train_only = tuple(f"aux_decoders.{i}.upsample.classifier.weight" for i in range(12))
    theirs = _siblings({"branch1": ""}, "main_decoder.upsample.classifier.")
    part = read_published(
        {"model": theirs | dict.fromkeys(train_only, torch.zeros(1))}, find_method("cps"), where="a.pth"
    )
    assert part.tensors.keys() == _names("cps", CpsConfig(21, branches=1)) and part.train_only == train_only
    assert part.tensors["branch1.aspp.red_conv.weight"] is theirs["head.aspp.red_conv.weight"]


def _assembled(method: str, shapes: dict[str, tuple[int, ...]], blocks: dict[str, int]) -> Assembly:
    """From the shapes that decide, and the number of blocks under a prefix."""
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    tensors |= {f"{stage}.{i}.conv1.weight": torch.zeros(1) for stage, n in blocks.items() for i in range(n)}
    upstream = find_method(method).upstream
    assert upstream
    return upstream.assemble({upstream.layouts[0].name: tensors})


def _np(channels: int, num_classes: int, *, blocks: int = 6) -> Assembly:
    shapes = {"head.latent.reduce.0.weight": (32, channels, 1, 1), "head.classifier.weight": (num_classes, 256, 1, 1)}
    return _assembled("np_semiseg", shapes, {"encoder.layer3": blocks})


def test_memories_of_zero_and_missing_memories_are_warned_of() -> None:
    (layout, memories), assemble = np_upstream.UPSTREAM.layouts, np_upstream.UPSTREAM.assemble
    weights = {
        "head.latent.reduce.0.weight": torch.zeros(32, 304, 1, 1), "head.classifier.weight": torch.zeros(21, 256, 1, 1),
    } | {f"encoder.layer3.{i}.conv1.weight": torch.zeros(1) for i in range(6)}  # fmt: skip
    zero, filled = (dict.fromkeys(np_upstream.MEMORIES.values(), torch.full((21, 32), x)) for x in (0.0, 1.0))
    for parts, warned in (
        ({layout.name: weights}, True),
        ({layout.name: weights | zero}, True),
        ({layout.name: weights | filled}, False),
        ({layout.name: weights | zero, memories.name: filled}, False),
    ):
        warnings = assemble(parts).warnings
        assert bool(warnings) == warned
        assert all("the same for every image" in warning for warning in warnings)
    with pytest.raises(BadCheckpoint, match="memories alone"):
        assemble({memories.name: filled})


def test_memories_are_swapped_beside_the_weights_among_them_and_alone() -> None:
    marked = dict.fromkeys(np_upstream.NP.markers, torch.zeros(1))
    memories = {"latent_memory": torch.full((21, 32), 1.0), "deterministic_memory": torch.full((21, 32), 2.0)}
    for content in ({"model_state": marked, **memories}, marked | memories, memories):
        part = read_published(content, find_method("np_semiseg"), where="a.pth")
        held = part.beside | part.tensors
        assert held["head.latent.context_centres"].unique() == 1 and held["head.latent.latent_centres"].unique() == 2


@pytest.mark.parametrize(("blocks", "depth"), [(6, 50), (23, 101)])
def test_depth_and_classes_are_read_from_counts_and_shapes(blocks: int, depth: int) -> None:
    cps = _assembled("cps", {"branch1.classifier.weight": (7, 256, 1, 1)}, {"branch1.backbone.layer3": blocks})
    assert (cps.config.num_classes, cps.config.backbone.depth) == (7, depth)
    for channels, host in ((512, u2pl), (304, augseg)):
        assert _np(channels, 7, blocks=blocks).config == host(7, depth)  # type: ignore[arg-type]


def test_an_unknown_depth_or_host_is_refused() -> None:
    with pytest.raises(BadCheckpoint, match="7 blocks"):
        _assembled("cps", {"branch1.classifier.weight": (7, 256, 1, 1)}, {"branch1.backbone.layer3": 7})
    with pytest.raises(BadCheckpoint, match="500 input channels"):
        _np(500, 21)


@pytest.mark.parametrize(("num_classes", "size", "stride", "num_windows"), [(21, 512, 342, 18), (19, 800, 534, 8)])
def test_the_published_cps_protocol_is_branch_1_in_windows_two_thirds_apart(
    num_classes: int, size: int, stride: int, num_windows: int
) -> None:
    shapes = {f"{branch}.classifier.weight": (num_classes, 256, 1, 1) for branch in ("branch1", "branch2")}
    assembly = _assembled("cps", shapes, {"branch1.backbone.layer3": 6})
    run, plan = assembly.published, cover(1024, 2048, assembly.published.window)
    assert assembly.config.branches == 1 and run.unused == ("branch2.",) and run.readout.average == "logits"
    assert (run.window.height, plan.starts_x[1], plan.num_windows) == (size, stride, num_windows)
    assert (run.window.blend, run.window.padding, run.window.centred) == ("uniform", "mean_or_black", True)
    assert assembly.ours_config.branches == 2 and assembly.ours.readout.average == "probabilities"


def test_the_published_np_protocols_are_those_of_their_hosts_and_data_sets() -> None:
    whole, city = _np(512, 21).published, _np(512, 19).published
    assert whole.window == WindowSpec(0, 0) and whole.readout.softmax_at == city.readout.softmax_at == "feature"
    assert whole.default_samples == city.default_samples == 20 and city.noise_per == "window"
    plan = cover(1024, 2048, city.window)
    assert (plan.starts_y, plan.starts_x) == ((0, 255), (0, 513, 1026, 1279))
    assert (city.window.height, city.window.padding, city.window.centred) == (769, "mean", True)
    whole, city = _np(304, 21).published, _np(304, 19).published
    assert whole.window == WindowSpec(0, 0) and whole.readout.average == "logits"
    assert whole.default_samples == city.default_samples == 5 and city.readout == Readout()
    plan = cover(1024, 2048, city.window)
    assert plan.clipped and (plan.starts_y, plan.starts_x) == ((0, 533), (0, 533, 1066, 1599))


def test_our_np_protocol_has_windows_of_512_px_and_8_samples() -> None:
    ours = _np(512, 21).ours
    assert (ours.window, ours.default_samples, ours.readout) == (WindowSpec(512, 512), 8, Readout())


def cps_state(prefixes: tuple[str, ...], classifier: str = "classifier") -> dict[str, Tensor]:
    """Files of TorchSemiSeg from a fresh network of ours: one DeepLabv3+ per prefix."""
    state = find_method("cps").build(CpsConfig(21, branches=len(prefixes))).state_dict()
    content = {}
    for number, prefix in enumerate(prefixes, 1):
        names = {f"branch{number}.{ours}": theirs for theirs, ours in cps_upstream._branch("", "").items()}
        names[f"branch{number}.classifier."] = f"{classifier}."
        for name, tensor in state.items():
            fitting = [ours for ours in names if name.startswith(ours)]
            content |= {f"{prefix}{names[ours]}{name.removeprefix(ours)}": tensor for ours in fitting}
    return content


@pytest.mark.parametrize("prefixes", [("branch1.", "branch2."), ("l_model.", "r_model.")], ids=["cps", "gct"])
def test_the_published_protocol_says_that_it_drops_the_second_network_and_how_to_keep_it(
    prefixes: tuple[str, ...], tmp_path: Path
) -> None:
    content = {"model": cps_state(prefixes)}
    imported, _ = _import("cps", content, tmp_path, count=21)
    (warning,) = imported.warnings
    assert re.search(rf"leaves \d+ of the file's tensors out \({prefixes[1]}", warning)
    assert "no mutual information" in warning and "--protocol penumbra to keep branch1 and branch2" in warning
    kept, _ = _import("cps", content, tmp_path, count=21, protocol="penumbra")
    assert not kept.warnings and kept.card.sampling.members == ("branch1", "branch2")


def test_one_network_with_one_pass_is_said_to_have_no_disagreement(tmp_path: Path) -> None:
    content = {"model": cps_state(("",), "main_decoder.upsample.classifier")}
    for protocol in ("published", "penumbra"):
        (warning,) = _import("cps", content, tmp_path, count=21, protocol=protocol)[0].warnings
        assert "one pass" in warning and "penumbra ensemble" in warning
