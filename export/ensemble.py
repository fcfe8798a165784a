"""Join several checkpoints into one whose sample axis has them as members."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from penumbra.export.golden import example_size
from penumbra.models import find_method
from penumbra.models.card import Card, Provenance, Readout
from penumbra.models.checkpoint import check_output, load_checkpoint, read_card, save_checkpoint
from penumbra.models.ensemble.net import EnsembleConfig, MemberConfig
from penumbra.models.errors import BadOption

JOINED = "ensemble of "
"""How the recipe of an ensemble begins."""


def make_ensemble(checkpoints: Sequence[Path], output: Path) -> Card:
    """Write an ensemble of checkpoints with the same classes; members are named by their files' stems.

    Windows, palette and normalisation are the first checkpoint's; every network still gets pixels normalised as its
    own card says. Raises BadOption (fewer than two, equal names, other classes, one that the first's windows do not
    suit) and BadCheckpoint.
    """
    stems = [path.stem for path in checkpoints]
    if len(stems) < 2 or len(set(stems)) < len(stems):
        raise BadOption(f"an ensemble is made of two or more files with different names; given are {', '.join(stems)}")
    check_output(output, made_by=JOINED, sources=checkpoints)
    cards, networks = zip(*(load_checkpoint(path) for path in checkpoints), strict=True)
    first = cards[0]
    for stem, card in zip(stems, cards, strict=True):
        _check_classes(stems[0], first, stem, card)
    members = [
        MemberConfig(stem, card.method, card.config, card.input, card.readout)
        for stem, card in zip(stems, cards, strict=True)
    ]
    config = EnsembleConfig(first.num_classes, first.input, tuple(members))
    network: Any = find_method("ensemble").build(config).eval()
    for member, trained in zip(network.members, networks, strict=True):
        member.network.load_state_dict(trained.state_dict())
    _check_runs(network, stems, first)
    # figures of the members do not hold for the ensemble, so none are carried over
    data, licences = (
        "; ".join(dict.fromkeys(filter(None, texts)))
        for texts in zip(*((card.provenance.data, card.provenance.licence) for card in cards), strict=True)
    )
    card = Card(
        output.stem, 1, "ensemble", dataclasses.asdict(config), first.classes, first.input, first.window,
        network.sampling, Readout(align_corners=first.readout.align_corners),
        provenance=Provenance(data, licences, recipe=f"{JOINED}{', '.join(stems)}"),
        views=first.views if {one.views for one in cards} == {first.views} else "none",
    )  # fmt: skip
    save_checkpoint(output, card, network)
    return card


def _check_runs(network: Any, stems: Sequence[str], first: Card) -> None:
    """Run every member once in a window of the first one's. Raises BadOption by the name of one that cannot be."""
    height, width = example_size(first.window.height, first.window.width)
    for stem, member in zip(stems, network.members, strict=True):
        try:
            with torch.no_grad():
                member(torch.zeros(1, len(first.input.bands), height, width))
        except Exception as error:  # whatever a program raises
            reason = [type(error).__name__, *filter(str.strip, str(error).splitlines())][-1].strip()
            raise BadOption(
                f"{stem} cannot be run in windows of {width}x{height}, those of {stems[0]} ({reason[:200]}); name it "
                "first, or bring it with its axes free"
            ) from None


def losses(checkpoints: Sequence[Path]) -> list[str]:
    """List in sentences what the networks say alone and not as members."""
    sentences, views = list[str](), {read_card(path).views for path in checkpoints}
    for path in checkpoints:
        card = read_card(path)
        if len(views) > 1 and card.views != "none":
            sentences.append(f"{path.stem} has the views {card.views} and others have not: the ensemble has none")
        if card.sampling.is_stochastic:
            still = "with its latent at the mean" if card.sampling.kind == "latent" else "with nothing dropped"
            sentences.append(f"{path.stem} draws no samples in an ensemble, where it is one member {still}")
        if card.prompt.kind != "none":
            sentences.append(f"{path.stem} takes no {card.prompt.kind} in an ensemble")
        if card.extra_maps:
            sentences.append(f"{path.stem} has no {' and '.join(own.name for own in card.extra_maps)} in an ensemble")
    return sentences


def _check_classes(first_stem: str, first: Card, stem: str, card: Card) -> None:
    names, expected = ([info.name for info in one.classes] for one in (card, first))
    if names != expected:
        different = next((pair for pair in zip(expected, names, strict=False) if pair[0] != pair[1]), None)
        why = f"{different[1]!r} where {first_stem} has {different[0]!r}" if different else f"{len(names)} classes"
        raise BadOption(f"{stem} has {why}; all members of an ensemble need the same classes in the same order")
