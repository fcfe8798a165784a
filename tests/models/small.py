"""A small configuration of every network, with weights from a fixed seed, its card and its inputs."""

import copy
import warnings
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from penumbra.models import find_method
from penumbra.models.blocks.efficientnet import EfficientNetConfig
from penumbra.models.blocks.resnet import ResNetConfig
from penumbra.models.card import Card, ClassInfo, InputSpec, Readout, WindowSpec
from penumbra.models.contract import Network, Prompt
from penumbra.models.cpal.config import CpalConfig
from penumbra.models.cps.net import CpsConfig
from penumbra.models.ensemble.net import EnsembleConfig, MemberConfig
from penumbra.models.np_semiseg.linear import LinearConfig
from penumbra.models.np_semiseg.net import NpConfig
from penumbra.models.plain.net import PlainConfig, PlainNetwork
from penumbra.models.proto_seg.net import ProtoConfig
from penumbra.models.proto_seg.trunks import DeepLabConfig, HrnetConfig, LiteConfig
from penumbra.models.self_correcting.net import SelfCorrectingConfig
from penumbra.models.toy.net import ToyConfig
from penumbra.serving.engine.noise import SeededNoise
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from tests.models.programs import masked_program, tiny_program

BACKBONE = ResNetConfig(depth=18, width=8)
LITE = EfficientNetConfig("efficientnet_lite", width=0.25, depth=0.5)
SELF_CORRECTING = SelfCorrectingConfig(
    3, ResNetConfig(depth=18, stem="plain", width=4, output_stride=8, dilation="rest"),
    aspp_channels=8, low_channels=8, decoder_channels=8, correction_hidden=8,
)  # fmt: skip
HRNET = HrnetConfig(width=2, stem=4, bottlenecks=1, modules=(1, 1, 1), blocks=1)
PUBLISHED = NpConfig(3, BACKBONE, aspp_channels=16, low_channels=8, latent_length=8, hidden=16, head="published")
FILM = NpConfig(3, BACKBONE, aspp_channels=16, low_channels=8, latent_length=8, hidden=16, film_channels=16)
SMALL_CPS = CpsConfig(3, backbone=BACKBONE, aspp_channels=16, low_channels=8, decoder_channels=16)
SMALL: dict[str, Any] = {
    "toy": ToyConfig(),
    "toy latent": ToyConfig(form="latent"),
    "toy dropout": ToyConfig(form="dropout"),
    "toy opposed": ToyConfig(form="opposed"),
    "toy boxed": ToyConfig(form="boxed"),
    "toy tagged": ToyConfig(form="tagged"),
    "toy bright": ToyConfig(form="bright"),
    "toy bands": ToyConfig(4, form="latent"),
    "toy grey": ToyConfig(2),
    "cps": SMALL_CPS,
    "cps single": replace(SMALL_CPS, branches=1),
    "cps lite": replace(SMALL_CPS, branches=1, backbone=LITE),
    "np_semiseg film": FILM,
    "np_semiseg linear": replace(FILM, head="linear", linear=LinearConfig(rank=4, hidden=8)),
    "np_semiseg linear-kept": replace(FILM, head="linear", linear=LinearConfig(rank=4, hidden=8, keep_answer=True)),
    "np_semiseg published": PUBLISHED,
    "np_semiseg lite": replace(FILM, backbone=replace(LITE, num_stages=5)),
    "np_semiseg dropout": replace(PUBLISHED, dropout=0.1, sampling="dropout"),
    "ensemble": EnsembleConfig(
        3,
        InputSpec(),
        (
            MemberConfig("cps", "cps", asdict(SMALL_CPS), InputSpec(), Readout()),
            MemberConfig("np", "np_semiseg", asdict(PUBLISHED), InputSpec(order="BGR"), Readout(temperature=2.0)),
        ),
    ),
    "self_correcting primary": replace(SELF_CORRECTING, ancillary=False, correction="none"),
    "self_correcting ancillary": replace(SELF_CORRECTING, correction="none"),
    "self_correcting linear": SELF_CORRECTING,
    "self_correcting convolutional": replace(SELF_CORRECTING, correction="convolutional"),
    "self_correcting lite": replace(SELF_CORRECTING, backbone=LITE),
    "self_correcting dropout": replace(SELF_CORRECTING, sampling="dropout"),
    "proto_seg prototype": ProtoConfig(3, num_prototypes=4, hrnet=HRNET),
    "proto_seg channel": ProtoConfig(3, num_prototypes=4, normalise="channel", hrnet=HRNET),
    "proto_seg dropout": ProtoConfig(3, num_prototypes=4, sampling="dropout", hrnet=HRNET),
    "proto_seg deeplab": ProtoConfig(3, "parametric", trunk="deeplab", deeplab=DeepLabConfig(50, width=2, channels=8)),
    "proto_seg lite": ProtoConfig(3, num_prototypes=4, normalise="channel", trunk="lite", lite=LiteConfig(LITE, 8)),
    "proto_seg parametric": ProtoConfig(3, head="parametric", hrnet=HRNET),
    "proto_seg parametric-dropout": ProtoConfig(3, head="parametric", sampling="dropout", hrnet=HRNET),
    **{f"plain {form}": PlainConfig(3, form, len(tiny_program(form))) for form in ("onnx", "torchscript", "pt2")},  # type: ignore[arg-type]
    "plain dropout": PlainConfig(3, "pt2", len(masked_program()), masks=((8, 0.8),)),
    "cpal cam": CpalConfig(3, depth=18, width=4),
    "cpal scales": CpalConfig(3, depth=18, width=4, scales=(1.0, 0.5, 1.5), flip=True, members=("is_cam",)),
    "cpal context": CpalConfig(
        3, depth=18, width=4, flip=True, members=("cam", "pacam"), context=4, context_channels=8, neighbours=2
    ),
    "cpal everywhere": CpalConfig(
        3, depth=18, width=4, members=("cam", "pacam"), background=False, context=4, context_channels=8, neighbours=2
    ),
    "cpal lite": CpalConfig(
        3, width=4, lite=LITE, members=("cam", "pacam"), context=4, context_channels=8, neighbours=2
    ),
    "cpal lite-deeplabv2": CpalConfig(3, "deeplabv2", lite=LITE, scales=(1.0, 0.5), members=("scale1", "scale0.5")),
    "cpal deeplabv2": CpalConfig(3, "deeplabv2", width=2, scales=(1.0, 0.5, 0.75), members=("max",)),
    "cpal deeplabv2-scales": CpalConfig(3, "deeplabv2", width=2, scales=(1.0, 0.5), members=("scale1", "scale0.5")),
    "cpal wrn38": CpalConfig(3, "wrn38", width=1, members=("logits",)),
    "cpal wrn38-dropout": CpalConfig(3, "wrn38", width=1, members=("logits",), sampling="dropout"),
}
"""Configurations by name; the first word is the method's."""
IN_TORCH = [name for name in SMALL if name != "plain onnx"]
"""Those that torch runs; an ONNX program is onnxruntime's, on the CPU."""
SIZE = (37, 53)
INPUTS = {
    "toy bands": InputSpec((0,) * 4, (1,) * 4, 10_000.0, bands=("blue", "green", "red", "nir"), dtype="uint16"),
    "toy grey": InputSpec((0,), (1,), bands=("grey",)),
}
"""What of these networks does not see red, green and blue of 8 bits sees."""


def fresh(name: str, *, seed: int = 0) -> Network:
    """The small network of that name in train mode as it is made, but for class centres, which are drawn: at zero the
    latent sees nothing.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = find_method(name.split()[0]).build(SMALL[name])
        for key, buffer in network.named_buffers():
            if key.endswith("_centres"):
                nn.init.normal_(buffer)
    if isinstance(network, PlainNetwork):
        config = network.config
        program = masked_program(seed) if config.masks else tiny_program(config.form, seed)
        network.program.copy_(torch.frombuffer(bytearray(program), dtype=torch.uint8))
    return network.train()


def seeded(name: str, *, seed: int = 0) -> Network:
    """The same in eval mode, with normalisations that have the statistics of noise: else activations fade. It is the
    caller's own.
    """
    return copy.deepcopy(_calibrated(name, seed))


@cache
def _calibrated(name: str, seed: int) -> Network:
    with torch.inference_mode(False), torch.random.fork_rng(), torch.no_grad():
        network = fresh(name, seed=seed)
        torch.manual_seed(seed)
        calibrate(network, INPUTS.get(name, InputSpec()).num_bands)
    return network.eval()


def calibrate(network: Network, num_bands: int = 3) -> None:
    """Give every BatchNorm the mean and variance of a batch of noise."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    sampling = network.sampling
    image_B3hw = torch.randn(4, num_bands, 96, 96)
    features = network.encode(image_B3hw)
    network.decode(features, torch.ones(max(len(sampling.members), 1), 4, sampling.noise_length))
    if network.prompt.kind == "boxes":
        network.take_prompt(image_B3hw, features, (torch.ones(4, network.config.num_classes, 96, 96), torch.ones(4)))
    for name, buffer in network.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()  # checkpoints do not store it


def traced(network: Network, image_B3hw: Tensor, noise_SBL: Tensor, prompt: Prompt = ()) -> Any:
    """encode, decode and, with a prompt, take_prompt as TorchScript, traced with these examples alone."""
    features = network.encode(image_B3hw)
    calls: dict[str, Any] = {"encode": (image_B3hw,), "decode": (features, noise_SBL)}
    if prompt:
        calls["take_prompt"] = (image_B3hw, features, prompt)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return torch.jit.trace_module(network, calls, check_trace=False)


@cache
def card_of(name: str) -> Card:
    network, config = seeded(name), SMALL[name]
    classes = tuple(ClassInfo(f"class {k}", (k, k, k)) for k in range(config.num_classes))
    return Card(
        "small", 1, name.split()[0], asdict(config), classes, INPUTS.get(name, InputSpec()), WindowSpec(64, 80),
        network.sampling, Readout(), prompt=network.prompt, extra_maps=network.extra_maps,
    )  # fmt: skip


def image(num_windows: int = 2, size: tuple[int, int] = SIZE, *, name: str = "") -> Tensor:
    return torch.randn(
        num_windows, INPUTS.get(name, InputSpec()).num_bands, *size, generator=torch.Generator().manual_seed(1)
    )


def noise(name: str, num_samples: int, num_windows: int = 2, *, prompt: bool = False) -> Tensor:
    """noise_SBL by the network's own law; S is what it must be where members fix it."""
    card = card_of(name)
    sampling = card.sampling_with(prompt=prompt)
    if sampling.kind in ("members", "single"):
        num_samples = sampling.default_samples
    draws = [SeededNoise(sampling, seed=b, num_samples=num_samples).draw(0) for b in range(num_windows)]
    return torch.from_numpy(np.stack(draws, axis=1))


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((ours - theirs).abs().max() <= tolerance * max(1.0, float(theirs.abs().max())))


def picture(card: Card, size: tuple[int, int] = (70, 90), seed: int = 0) -> np.ndarray:
    """A picture of the card's bands and type, of any value that it holds."""
    rng = np.random.Generator(np.random.PCG64(seed))
    return rng.integers(0, np.iinfo(card.input.dtype).max + 1, (*size, card.input.num_bands), dtype=card.input.dtype)  # type: ignore[type-var,arg-type]


def is_served(card: Card, store: Path) -> None:
    """With and without its prompt, with every map, with the members the card names."""
    boxes = ((3.0, 3.0, 60.0, 50.0, 1),) if card.prompt.kind == "boxes" else ()
    tags = (1,) if card.prompt.kind == "tags" else ()
    plain, prompted = (card.maps(card.sampling_with(prompt=with_it).default_samples) for with_it in (False, True))
    with Segmenter.open(store, device="cpu", threads=1, tuning=Tuning(1, 1)) as segmenter:
        alone = segmenter.segment(picture(card), SegmentOptions(outputs=plain))
        told = segmenter.segment(picture(card), SegmentOptions(outputs=prompted, boxes=boxes, tags=tags))
    for prediction, members in ((alone, card.sampling.members), (told, card.prompt.members)):
        assert all(np.isfinite(values).all() for values in prediction.maps.values())
        assert prediction.members == (members or card.sampling.members)
