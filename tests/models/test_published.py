"""The published CPS and NP-SemiSeg checkpoints, imported as a user would, reproduce the original code's outputs."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from export.importer import Imported, import_checkpoint
from models.card import ClassInfo
from models.checkpoint import load_checkpoint
from models.contract import Network
from models.np_semiseg.net import NpNetwork
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
    assert isinstance(network, NpNetwork) and not imported.warnings
    x = network.host(golden.image(97, 129))
    _check(x[:, ::8], arrays["features_stride8ch"], _relative(arrays["features_stride8ch"]))
    for ours, name in zip(network.head.latent(x), ("latent_mean", "latent_sigma", "deterministic_vector"), strict=True):
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
    decode_plain: Callable[[Tensor, Tensor], Tensor] = head.decode_plain
    plain = decode_plain(x, noise)
    split = head.decode(head.encode(x), noise)
    assert (plain - split).abs().max() <= 1e-5 * max(1.0, plain.abs().max())
