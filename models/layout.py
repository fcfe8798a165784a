"""Published checkpoint layouts as data: what a method's original files hold, and what it is called here.

Every method's `upstream.py` states its layouts with these values; `penumbra.export.importer` reads files by them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from penumbra.models.card import InputSpec, Readout, WindowSpec


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of one kind of published file. Names are theirs, with a leading "module." taken off.

    name: of the kind, as its users call it. markers: names that together only this kind has; absent: names that it
    has not. containers: top-level entries that may hold the tensors, best first (a bare state dict is read too).
    renames: prefix of theirs -> prefix of ours, the longest match counts. aliases: prefix -> prefix of theirs that
    holds equal tensors; one copy is kept. train_only: prefixes of what inference does not need.
    beside: other top-level tensors -> ours; they may be absent, and are zero then.
    """

    name: str
    markers: tuple[str, ...]
    renames: Mapping[str, str]
    absent: tuple[str, ...] = ()
    containers: tuple[str, ...] = ("model", "state_dict", "net")
    aliases: Mapping[str, str] = field(default_factory=dict)
    train_only: tuple[str, ...] = ()
    beside: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a network is run and read out: the published evaluation, or ours.

    default_samples, noise_per: as in `penumbra.models.card.Sampling`, for networks that draw. unused: prefixes of our
    tensors that this run does without (a second branch).
    """

    window: WindowSpec
    readout: Readout = field(default_factory=Readout)
    default_samples: int = 1
    noise_per: Literal["image", "window"] = "image"
    unused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Assembly:
    """What renamed tensors turned out to be: a network's configuration, and the card's facts about running it.

    published: the protocol of the paper's code, as data. ours: the protocol we would choose; with `ours_config`
    where it needs another shape of the same weights. warnings: sentences for whoever imports.
    """

    config: Any
    input: InputSpec
    published: Protocol
    ours: Protocol
    ours_config: Any = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Upstream:
    """A method's published files. assemble: from {layout name: {our tensor name: tensor}} to an Assembly.

    Tensors of all files given together are joined under our names. `assemble` raises BadCheckpoint when the files do
    not make a network together (a part is missing, class counts differ).
    """

    layouts: tuple[Layout, ...]
    assemble: Callable[[Mapping[str, Mapping[str, Tensor]]], Assembly]
    source: str = ""
    """Repository and commit that the layouts were read from."""
