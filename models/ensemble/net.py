"""Networks of any methods side by side. Each sees the image as it was trained to, and gives its members' logits."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penumbra.models import find_method
from penumbra.models.card import InputSpec, Readout, Sampling
from penumbra.models.contract import Features, Network
from penumbra.models.errors import BadOption
from penumbra.models.strict import read_strict

OF_TORCH = ("torchscript",)
"""The format that torch's programs have in common; networks that are no programs have every format."""


@dataclass(frozen=True, slots=True)
class MemberConfig:
    """One network: its method and configuration, and the facts of its card about pixels and logits."""

    name: str
    method: str
    config: dict[str, Any]
    input: InputSpec
    readout: Readout


@dataclass(frozen=True, slots=True)
class EnsembleConfig:
    """The networks. input: how the ensemble's own input is normalised."""

    num_classes: int
    input: InputSpec
    networks: tuple[MemberConfig, ...]


class EnsembleNetwork(Network):
    """encode runs every network; decode puts their members in front.

    A network with named members gives them all; one that draws samples gives one member, with its latent at the mean
    or with nothing dropped. Prompts and extra maps of the networks are not offered.
    """

    def __init__(self, config: EnsembleConfig) -> None:
        super().__init__()
        shapes = {(m.method, repr(sorted(m.config.items())), m.readout.align_corners) for m in config.networks}
        members = [Member(member, config.input, resized=len(shapes) > 1) for member in config.networks]
        self.members = nn.ModuleList(members)
        names = tuple(name for member in members for name in member.names)
        self.sampling = Sampling(kind="members", members=names, default_samples=len(names))
        formats = [member.network.formats for member in members]
        graphs = [member.names[0] for member in members if "torchscript" not in (member.network.formats or OF_TORCH)]
        if 0 < len(graphs) < len(members):
            raise BadOption(
                f"{graphs[0]} is an ONNX program and others are none; an ensemble is of ONNX programs alone or without "
                "any: bring its module"
            )
        self.formats = formats[0] if graphs else OF_TORCH * any(formats)

    def encode(self, image_B3hw: Tensor) -> Features:
        return (torch.cat([member(image_B3hw) for member in self.members]).transpose(0, 1),)

    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        return features[0].transpose(0, 1)


class Member(nn.Module):
    """One network as a part of the ensemble: image_B3hw as the ensemble has it -> logits_MBKhw of its M members.

    Logits are divided by the network's temperature, and resized to the window where the networks' shapes differ.
    """

    def __init__(self, config: MemberConfig, source: InputSpec, *, resized: bool) -> None:
        super().__init__()
        method = find_method(config.method)
        where = f"config of {config.name}"
        self.network: Network = method.build(read_strict(method.config, config.config, where=where))
        self.readout, self.resized = config.readout, resized
        self.names = [f"{config.name}.{name}" for name in self.network.sampling.members] or [config.name]
        for (fact, own), first in zip(reading(config.input).items(), reading(source).values(), strict=True):
            if own != first:
                raise BadOption(
                    f"{config.name} has the {fact} {own}, and the first of the ensemble {first}; all members of an "
                    "ensemble read what the first does"
                )
        self.exchanged = source.order != config.input.order
        factor_311, offset_311 = renormalisation(source, config.input)
        self.factor_311 = nn.Buffer(factor_311, persistent=False)
        self.offset_311 = nn.Buffer(offset_311, persistent=False)

    def forward(self, image_B3hw: Tensor) -> Tensor:
        sampling = self.network.sampling
        shape = (len(self.names), image_B3hw.shape[0], sampling.noise_length)
        # Nothing is random under masks of 1, and at a latent's mean.
        noise_MBL = image_B3hw.new_ones(shape) if sampling.kind == "dropout" else image_B3hw.new_zeros(shape)
        return self.read_out(self.network(self.renormalise(image_B3hw), noise_MBL), image_B3hw)

    def renormalise(self, image_B3hw: Tensor) -> Tensor:
        """Make the image what the network learned from."""
        channels_B3hw = image_B3hw.flip(1) if self.exchanged else image_B3hw
        return channels_B3hw * self.factor_311 + self.offset_311

    def read_out(self, logits_MBKhw: Tensor, image_B3hw: Tensor) -> Tensor:
        """Make the network's logits the ensemble's, of a window of the image's size."""
        logits_MBKhw = logits_MBKhw / self.readout.temperature
        if not self.resized:
            return logits_MBKhw
        size, align = image_B3hw.shape[2:], self.readout.align_corners
        full = F.interpolate(logits_MBKhw.flatten(0, 1), size=size, mode="bilinear", align_corners=align)
        return full.reshape(logits_MBKhw.shape[:3] + size)


def reading(spec: InputSpec) -> dict[str, str]:
    """Say what of its reading a network cannot undo, so that all members share it; of a clip, the range of values."""
    ends = zip(spec.low or (0.0,) * spec.num_bands, spec.high or (spec.scale,) * spec.num_bands, strict=True)
    ranges = [f"{low:g} to {high:g}" for low, high in ends][:: -1 if spec.order == "BGR" else 1]
    rule = spec.resolution
    return {
        "bands": ", ".join(spec.bands), "type": spec.dtype, "clip": ", ".join(ranges) if spec.clip else "none",
        "resolution": f"{rule.kind}:{rule.value:g}",
    }  # fmt: skip


def renormalisation(source: InputSpec, target: InputSpec) -> tuple[Tensor, Tensor]:
    """Return factor and offset [3, 1, 1] from one normalisation to another, in the target's channel order."""
    (from_factor, from_offset), (to_factor, to_offset) = (
        torch.tensor(spec.factor_offset, dtype=torch.float64)[..., None, None] for spec in (source, target)
    )
    if source.order != target.order:
        from_factor, from_offset = from_factor.flip(0), from_offset.flip(0)
    factor = to_factor / from_factor
    return factor.float(), (to_offset - from_offset * factor).float()
