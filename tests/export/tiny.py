"""A method with published files, as small as they come: two branches, and centres in a file of their own."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from penumbra.models.card import InputSpec, Readout, Sampling, WindowSpec
from penumbra.models.contract import Features, Method, Network
from penumbra.models.layout import Assembly, Layout, Protocol, Upstream


@dataclasses.dataclass(frozen=True, slots=True)
class TinyConfig:
    num_classes: int
    branches: int = 1
    sampling: Literal["latent", "dropout"] = "latent"


class TinyNetwork(Network):
    """One convolution and a BatchNorm per branch, and centres that some files lack."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.sampling = Sampling(kind=config.sampling, noise_length=4, default_samples=8)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, config.num_classes, 1), nn.BatchNorm2d(config.num_classes))
            for _ in range(config.branches)
        )
        self.centres = nn.Buffer(torch.ones(config.num_classes, 4))

    def encode(self, image_B3hw: Tensor) -> Features:
        return tuple(branch(image_B3hw) for branch in self.branches)

    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        return features[0].expand(len(noise_SBL), -1, -1, -1, -1)


def assemble(parts: Mapping[str, Mapping[str, Tensor]]) -> Assembly:
    tensors = parts["tiny"]
    num_classes = len(tensors["branches.0.0.weight"])
    has_centres = any("centres" in held for held in parts.values())
    return Assembly(
        config=TinyConfig(num_classes),
        input=InputSpec(mean=(0, 0, 0)),
        published=Protocol(WindowSpec(0, 0), Readout(average="logits"), 20, "window", unused=("branches.1.",)),
        ours=Protocol(WindowSpec(64, 64), default_samples=4),
        ours_config=TinyConfig(num_classes, branches=2),
        warnings=() if has_centres else ("the centres are zero",),
    )


def tiny(name: str) -> Method:
    main_file = Layout(
        name=name,
        markers=(f"{name}_a.conv.weight",),
        renames={
            f"{name}_{letter}.{theirs}": f"branches.{branch}.{ours}"
            for branch, letter in enumerate("ab")
            for theirs, ours in (("conv.", "0."), ("bn.", "1."))
        },
        containers=("teacher", "model"),
        aliases={"copy.": f"{name}_a."},
        train_only=("aux.", f"{name}_a.conv.helper."),
        beside={"memory": "centres"},
    )
    centres = Layout(name=f"{name} centres", markers=("memory",), renames={"memory": "centres"}, containers=())
    upstream = Upstream((main_file, centres), assemble, source="someone/tiny 0123abc")
    return Method(name=name, config=TinyConfig, build=TinyNetwork, upstream=upstream)


def state(name: str = "tiny", *, num_classes: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """A published state dict: two branches, and a helper of training."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for letter in "ab":
        conv, norm = f"{name}_{letter}.conv", f"{name}_{letter}.bn"
        tensors[f"{conv}.weight"] = torch.randn(num_classes, 3, 1, 1, generator=generator)
        for key in (f"{conv}.bias", *(f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var"))):
            tensors[key] = torch.rand(num_classes, generator=generator)
        tensors[f"{norm}.num_batches_tracked"] = torch.tensor(7)
    return tensors | {"aux.weight": torch.zeros(2)}
