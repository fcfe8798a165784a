"""Checkpoints: one `.safetensors` file, its weights beside its card. Never a pickle."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from penumbra.models import find_method
from penumbra.models.card import NAME, Card, dump_card, parse_card
from penumbra.models.contract import Network
from penumbra.models.errors import BadArtifact, BadCheckpoint, BadOption
from penumbra.models.files import write_whole
from penumbra.models.strict import read_strict

SUFFIX = ".safetensors"
COUNTER = "num_batches_tracked"
"""A counter of BatchNorm: never needed, sometimes missing, sometimes a float."""
SHOWN = 4
"""Names in a sentence about many."""


def check_replaceable(path: Path, *, made_by: str, sources: Sequence[Path] = ()) -> None:
    """Raise BadOption where a new checkpoint would replace a source, or what is not its maker's own.

    made_by: how the recipe begins in the cards of the checkpoints that this maker may replace.
    """
    if not os.path.lexists(path):
        return
    if any(path.exists() and path.samefile(source) for source in sources):
        raise BadOption(f"{path} is one of the files to read, and the output would take its place; name another output")
    try:
        recipe = read_card(path).provenance.recipe
    except BadCheckpoint:
        recipe = ""
    if not recipe.startswith(made_by):
        what = f"no checkpoint of ours that says {made_by.strip()!r} of where it comes from"
        raise BadOption(f"{path} is in the way, and is {what}; move it, or name another output")


def check_output(output: Path, *, made_by: str, sources: Sequence[Path]) -> None:
    """Raise BadOption where a checkpoint cannot have this name, or as `check_replaceable`."""
    if output.suffix != SUFFIX or not NAME.fullmatch(output.stem):
        raise BadOption(f"the output is {output.name!r}; a plain name that ends in {SUFFIX} is wanted")
    check_replaceable(output, made_by=made_by, sources=sources)


def save_checkpoint(path: Path, card: Card, network: Network, *, half: bool = False) -> None:
    """Write weights and card. half: store floats as fp16 (they are fp32 again when loaded).

    Raises BadCheckpoint where a value is not finite, in fp16 if so stored; what is there is kept then.
    """
    tensors = {
        key: value.half().contiguous() if half and value.is_floating_point() else value.contiguous()
        for key, value in network.state_dict().items()
        if not key.endswith(COUNTER)
    }
    for key in (key for key, value in tensors.items() if not value.isfinite().all()):
        beyond = f", or a value beyond the {torch.finfo(torch.half).max:g} of fp16" * half
        raise BadCheckpoint(f"{path} is not written: {key} holds NaN or infinity{beyond}")
    write_whole(path, save(tensors, metadata={"card": dump_card(card)}))
    path.chmod(0o644)


def read_card(path: Path) -> Card:
    """Read the card of a checkpoint, without its weights. Raises BadCheckpoint."""
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("card")
    except FileNotFoundError:
        raise BadCheckpoint(f"there is no checkpoint {path}") from None
    except (SafetensorError, OSError) as error:
        raise BadCheckpoint(f"{path} is not a safetensors file ({error})") from None
    if text is None:
        raise BadCheckpoint(f"{path} carries no card; only files written by Penumbra can be read")
    try:
        return parse_card(text)
    except BadArtifact as error:
        raise BadCheckpoint(f"{path}: {error}") from None


def build_network(card: Card) -> Network:
    """Build the card's network in eval mode with fresh weights.

    Raises BadOption (unknown method), and BadArtifact when config, classes or sampling do not fit the network.
    """
    method = find_method(card.method)
    config: Any = read_strict(method.config, card.config, where="card.config")
    if config.num_classes != card.num_classes:
        raise BadArtifact(f"card.config.num_classes is {config.num_classes}; the card names {card.num_classes} classes")
    network = method.build(config).eval()
    own, chosen = ((s.kind, s.noise_length, s.masks, s.members) for s in (network.sampling, card.sampling))
    if own != chosen:  # the rest is the card's to choose
        raise BadArtifact(f"card.sampling is {chosen}; the network has {own}")
    if network.prompt != card.prompt:
        raise BadArtifact(f"card.prompt is {card.prompt}; the network has {network.prompt}")
    if network.extra_maps != card.extra_maps:
        raise BadArtifact(f"card.extra_maps are {card.extra_maps}; the network has {network.extra_maps}")
    return network


def load_checkpoint(path: Path) -> tuple[Card, Network]:
    """Load card and network (eval mode, fp32, CPU).

    Raises BadCheckpoint: the card does not fit its network, or a tensor is missing, extra, of the wrong shape, or
    holds NaN or infinity.
    """
    card = read_card(path)
    try:
        network = build_network(card)
    except (BadArtifact, BadOption) as error:
        raise BadCheckpoint(f"{path}: {error}") from None
    with safe_open(path, framework="pt") as file:
        fill_network(network, {key: file.get_tensor(key) for key in file.keys()}, where=str(path))  # noqa: SIM118
    return card, network.requires_grad_(False)


def fill_network(
    network: nn.Module, tensors: Mapping[str, Tensor], *, where: str, theirs: Mapping[str, str] | None = None
) -> None:
    """Copy tensors into a network, by name. theirs: what a tensor is called where it comes from, if otherwise.

    Raises BadCheckpoint: a tensor is missing, extra, of the wrong shape, or holds NaN or infinity.
    """
    expected = {key: value for key, value in network.state_dict().items() if not key.endswith(COUNTER)}

    def called(key: str) -> str:
        original = (theirs or {}).get(key, key)
        return key if original == key else f"{key} (there {original})"

    missing = [called(key) for key in expected if key not in tensors]
    if missing:
        raise BadCheckpoint(f"{where} lacks the tensor {few(missing)}")
    extra = [called(key) for key in tensors if key not in expected]
    if extra:
        raise BadCheckpoint(f"{where} has a tensor that the network lacks: {few(extra)}")
    misfits = [
        f"{called(key)} is {_describe(tensors[key])} and should be {_describe(parameter)}"
        for key, parameter in expected.items()
        if tensors[key].shape != parameter.shape or tensors[key].is_floating_point() != parameter.is_floating_point()
    ]
    if misfits:
        raise BadCheckpoint(f"{where}: {few(misfits)}")
    for key, parameter in expected.items():
        parameter.copy_(tensors[key])
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise BadCheckpoint(f"{where}: {called(key)} holds NaN or infinity")


def few(names: Sequence[str]) -> str:
    """Join the first of the names, and how many they are, for a sentence."""
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown}, ... ({len(names)} in all)"


def _describe(tensor: Tensor) -> str:
    return f"{'' if tensor.is_floating_point() else 'whole numbers '}{list(tensor.shape)}"
