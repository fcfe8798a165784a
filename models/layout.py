"""Published checkpoint layouts as data: what a method's original files hold, and what it is called here.

Every method's `upstream.py` states its layouts with these values; `penumbra.export.importer` reads files by them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from penumbra.models.card import InputSpec, Readout, WindowSpec
from penumbra.models.errors import BadCheckpoint

CITY_CLASSES = 19
"""Cityscapes has a published protocol of its own with several methods."""
DEPTHS: dict[int, Literal[50, 101]] = {6: 50, 23: 101}
"""Depth of a ResNet of bottlenecks by the number of blocks in its third stage."""

Parts = Mapping[str, Mapping[str, Tensor]]
"""Tensors by our name, by the name of the layout that their file has."""


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
    """A method's published files. assemble: from the parts of all files given together to an Assembly.

    It raises BadCheckpoint when the files make no network together (a part is missing, class counts differ), and
    KeyError for a tensor that it looks for in vain.
    """

    layouts: tuple[Layout, ...]
    assemble: Callable[[Parts], Assembly]
    source: str = ""
    """Repository and commit that the layouts were read from."""


def only_part(parts: Parts) -> tuple[str, Mapping[str, Tensor]]:
    """Return layout name and tensors of the one file that makes a network. Raises BadCheckpoint: there are several."""
    if len(parts) != 1:
        raise BadCheckpoint(f"files of {' and '.join(parts)} make no network together; one file is wanted")
    return next(iter(parts.items()))


def count_items(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Count the items of the list of modules whose tensors' names begin with `prefix`."""
    return len({name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)})


def read_depth(tensors: Mapping[str, Tensor], stage: str) -> Literal[50, 101]:
    """Read a ResNet's depth off its third stage, whose names begin with `stage`. Raises BadCheckpoint: another one."""
    blocks = count_items(tensors, stage)
    if blocks not in DEPTHS:
        raise BadCheckpoint(f"the third stage of the ResNet has {blocks} blocks; 6 (R50) or 23 (R101) are known")
    return DEPTHS[blocks]
