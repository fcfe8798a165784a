"""The card: every fact about a model that is not a weight, as frozen values with a strict JSON form.

A checkpoint carries a card in its metadata (`export` is None), an artifact carries it as `card.json`
with `export` filled in. Reading is strict: an unknown, missing or mistyped field is an error that names it.
"""

import dataclasses
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from penumbra.models.errors import BadArtifact
from penumbra.models.exported import AboveZero, Positive
from penumbra.models.exported import ExportFacts as ExportFacts
from penumbra.models.exported import Parity as Parity
from penumbra.models.exported import Tuned as Tuned
from penumbra.models.inputs import RGB as RGB
from penumbra.models.inputs import InputSpec as InputSpec
from penumbra.models.inputs import ScaleRule as ScaleRule
from penumbra.models.inputs import failures_of_input
from penumbra.models.references import Calibration as Calibration
from penumbra.models.references import Novelty as Novelty
from penumbra.models.references import Share, failures_of_references, maps_of_novelty
from penumbra.models.strict import read_strict

CARD_FORMAT = 1
IGNORE = 255
"""Label of pixels that are void in the data or abstained in an answer; hence at most 255 classes."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""A model's name is a directory, a label of metrics and a part of URLs."""
MAP_NAME = re.compile(r"(?!labels$|probabilities$|default$|image$)[a-z][a-z0-9_]{0,39}")

MAPS = ("confidence", "margin", "entropy", "expected_entropy", "mutual_information")
"""The maps of every answer of several samples, defined in `penumbra.serving.engine.uncertainty`."""
MAPS_OF_ONE = (*MAPS[:-1], "seam")
"""Those of one sample: it contradicts no other, and what overlapping windows disagree about is told by itself."""
KNOWN_MAPS = (*MAPS, "seam")
"""Maps whose name is taken, and whose meaning and unit are the same for every model."""
UNITLESS = ("confidence", "margin")
"""Those that are probabilities; the others are in nats."""

Views = Literal["none", "flip", "d4", "scales"]
NUM_VIEWS: dict[str, int] = {"none": 1, "flip": 2, "d4": 8, "scales": 3}
"""Views of a window, each of which is a member of every sample: test-time augmentation."""

Count = Annotated[int, Field(ge=0)]
Byte = Annotated[int, Field(ge=0, le=255)]


@dataclass(frozen=True, slots=True)
class ClassInfo:
    """One class: its name and its colour in indexed PNGs and overlays (RGB, 0..255)."""

    name: str
    color: tuple[Byte, Byte, Byte]


@dataclass(frozen=True, slots=True)
class WindowSpec:
    """How an image is cut into windows and stitched again.

    height, width: px; both 0 means one window of the image's own size (a published whole-image protocol).
    overlap: share of a window that its neighbour covers again, [0, 0.9].
    blend: weight of a pixel by its place in the window; `gaussian` has sigma = window / 8.
    padding: what stands beyond an image smaller than its window. `mirror` repeats the picture, `mean` puts
    zeros after normalisation, `black` zeros before it, `mean_or_black` the first where the whole image fits into one
    window and else the second (CPS). centred: half of it before the image, half after.
    last: the last row and column of windows are shifted inward to end at the border, or clipped at it (AugSeg).
    trained: (height, width) of the windows that the network's results hold for, where they depend on it; an answer
    from other windows carries a warning. max_pixels: of an image that is seen whole, where the network's memory grows
    faster than the image; 0 leaves it to the server's limit.
    """

    height: int
    width: int
    overlap: Annotated[float, Field(ge=0, le=0.9)] = 0.25
    blend: Literal["gaussian", "uniform"] = "gaussian"
    padding: Literal["mirror", "mean", "black", "mean_or_black"] = "mirror"
    centred: bool = False
    last: Literal["shift", "clip"] = "shift"
    trained: tuple[Positive, Positive] | None = None
    max_pixels: Count = 0


@dataclass(frozen=True, slots=True)
class Sampling:
    """What the sample axis S is: draws of a latent, dropout masks, named members, or a single pass.

    members: their names; a single pass has one where it is one of several networks. noise_length: L of noise_SBL.
    noise_per: whether windows of one image share a draw or have their own. law: of a latent's draws; `antithetic` ones
    come in pairs, sample 2k + 1 is minus sample 2k, so with an even S what is linear in them cancels in the mean.
    keep: probability that a channel survives (dropout only). keeps: where several dropouts have rates of their own,
    how many channels of the noise in turn have which; `keep` is then their mean. default_samples: S when a request
    names none.
    """

    kind: Literal["latent", "dropout", "members", "single"] = "single"
    noise_length: Count = 0
    noise_per: Literal["image", "window"] = "image"
    law: Literal["independent", "antithetic"] = "independent"
    keep: Share = 1.0
    keeps: tuple[tuple[Positive, Share], ...] = ()
    members: tuple[str, ...] = ()
    default_samples: Positive = 1

    @property
    def is_stochastic(self) -> bool:
        """Whether samples are drawn, so that a request may ask for any number of them."""
        return self.kind in ("latent", "dropout")

    @property
    def masks(self) -> tuple[tuple[int, float], ...]:
        """Return how many channels of a mask have which keep rate, in the order of the noise."""
        return self.keeps or ((self.noise_length, self.keep),)


@dataclass(frozen=True, slots=True)
class PromptSpec:
    """What a request may bring beside the picture: `boxes` round objects, `tags` that name the classes in it.

    members: the sample axis with the prompt, where it differs from the axis without. background: a class that is
    always there and is neither boxed nor tagged. alpha: default of the option `alpha`; None where there is none.
    partial: the network learned from some of a picture's boxes too, so that what is not boxed may still be there.
    """

    kind: Literal["none", "boxes", "tags"] = "none"
    members: tuple[str, ...] = ()
    background: Count | None = None
    alpha: Annotated[float, Field(ge=0)] | None = None
    partial: bool = False


@dataclass(frozen=True, slots=True)
class ExtraMap:
    """A map that a method has beside `KNOWN_MAPS`: its name, what it is, and its unit or range."""

    name: str
    description: str
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Readout:
    """How logits become probabilities.

    softmax_at `window`: logits are resized to the window, then softmax (exact for mutual information).
    `feature`: softmax first, then resize (only where a published protocol demands it).
    align_corners: of the bilinear resize. temperature: logits are divided by it before the softmax.
    average: what is averaged over samples and overlapping windows. `logits` belongs to published protocols: labels
    are theirs, and the mutual information is then the difference of two entropies, not an information.
    """

    softmax_at: Literal["window", "feature"] = "window"
    align_corners: bool = True
    temperature: AboveZero = 1.0
    average: Literal["probabilities", "logits"] = "probabilities"


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where the weights come from. metrics: measured figures, named, on the split that the key names."""

    data: str = ""
    licence: str = ""
    recipe: str = ""
    commit: str = ""
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Card:
    """The facts about one model. `config` are the hyperparameters that rebuild its network.

    views: those of a request that names none.
    """

    name: str
    version: int
    method: str
    config: dict[str, Any]
    classes: tuple[ClassInfo, ...]
    input: InputSpec
    window: WindowSpec
    sampling: Sampling
    readout: Readout
    prompt: PromptSpec = PromptSpec()
    extra_maps: tuple[ExtraMap, ...] = ()
    calibration: Calibration | None = None
    novelty: Novelty | None = None
    provenance: Provenance = field(default_factory=Provenance)
    export: ExportFacts | None = None
    views: Views = "none"
    format: int = CARD_FORMAT

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def tuned(self) -> Tuned | None:
        """Return by what measurement an artifact was chosen, if by any."""
        return self.export.tuned if self.export else None

    @property
    def maps_of_novelty(self) -> tuple[str, ...]:
        """Name the maps whose means can say how strange a picture is, whether there is a reference or not."""
        own = [extra.name for extra in self.extra_maps if extra.name == "density"]
        return maps_of_novelty(self.novelty.map if self.novelty else (*own, "entropy")[0])

    def maps(self, num_samples: int) -> tuple[str, ...]:
        """Return names of the maps that an answer of so many samples has, the model's own last: all that is offered.

        Views count as samples here (`num_members`).
        """
        return (*(MAPS_OF_ONE if num_samples == 1 else MAPS), *(extra.name for extra in self.extra_maps))

    def unit_of(self, name: str) -> str:
        """Give the unit or range of a map; empty where it has none."""
        own = {extra.name: extra.unit for extra in self.extra_maps}
        return own.get(name, "nats" if name in KNOWN_MAPS and name not in UNITLESS else "")

    def num_members(self, num_samples: int, views: str | None = None) -> int:
        """Count what the axis S holds: every sample in every view, the card's views by default."""
        return num_samples * NUM_VIEWS[views or self.views]

    def fits(self, views: str) -> bool:
        """Tell whether windows have a size in all of these views: those that are turned on their side are square."""
        return views != "d4" or self.window.height == self.window.width

    def sampling_with(self, *, prompt: bool) -> Sampling:
        """Return the sample axis of an answer, which a prompt may change to members of its own."""
        members = self.prompt.members
        if not prompt or not members:
            return self.sampling
        return Sampling(kind="members", members=members, default_samples=len(members))


def dump_card(card: Card) -> str:
    """Write the card as JSON text that `parse_card` reads back to an equal value."""
    return json.dumps(dataclasses.asdict(card), indent=2, ensure_ascii=False) + "\n"


def parse_card(text: str) -> Card:
    """Read a card strictly.

    Raises BadArtifact: not JSON, another format version, an unknown, missing or mistyped field, or facts
    that contradict each other.
    """
    try:
        data = json.loads(text)
        json.dumps(data, ensure_ascii=False).encode()  # fails for half a surrogate pair, which no answer could hold
    except (ValueError, RecursionError) as error:
        raise BadArtifact(f"the card is not valid JSON ({error})") from None
    if isinstance(data, dict) and data.get("format") != CARD_FORMAT:
        raise BadArtifact(f"the card has format {data.get('format')!r}; this Penumbra reads format {CARD_FORMAT}")
    card = read_strict(Card, data, where="card")
    _check_facts(card)
    return card


def _check_facts(card: Card) -> None:
    """Raise BadArtifact, naming the first fact that is impossible or contradicts another, if any does."""
    window, sampling, prompt, num_members = card.window, card.sampling, card.prompt, len(card.sampling.members)
    extra = [extra_map.name for extra_map in card.extra_maps]
    names = [info.name for info in card.classes]
    twice = [name for name, count in Counter(names).items() if count > 1]
    failures = {
        "name is no directory's; up to 100 letters, digits, '.', '_' and '-' are": not NAME.fullmatch(card.name),
        f"has 1 class, {''.join(names)!r}, which every pixel would have; 2 "
        f"to {IGNORE} can be served, and the background is one too": card.num_classes == 1,
        f"has {card.num_classes} classes; 2 to {IGNORE} can be served": not 1 <= card.num_classes <= IGNORE,
        f"has several classes with the name {', '.join(twice)!r:.60}; each has a name of its own": twice != [],
        f"window is {window.height}x{window.width}; both 0 or both positive":
            (window.height == 0) != (window.width == 0) or min(window.height, window.width) < 0,
        f"has {num_members} members and {sampling.default_samples} default_samples; members fix the number of samples":
            sampling.kind == "members" and sampling.default_samples != num_members,
        f"has the members {', '.join(sampling.members)} and takes {sampling.kind} samples":
            num_members > (1 if sampling.kind == "single" else 0) and sampling.kind != "members",
        f"sampling.keeps are of {sum(length for length, _ in sampling.keeps)} channels and sampling.noise_length is "
        f"{sampling.noise_length}":
            sampling.keeps != () and sum(length for length, _ in sampling.keeps) != sampling.noise_length,
        f"sampling.law is {sampling.law!r} and sampling.kind {sampling.kind!r}; only a latent's draws have a law":
            sampling.law != "independent" and sampling.kind != "latent",
        f"has the views d4, which turn a window on its side, and windows of {window.height}x{window.width}; square "
        "ones are wanted, or flip": not card.fits(card.views),
        f"prompt.background is {prompt.background}; the classes are 0 to {card.num_classes - 1}":
            (prompt.background or 0) >= card.num_classes,
        f"extra_maps are {', '.join(extra)}; plain names are wanted, each once and none of {', '.join(KNOWN_MAPS)}":
            len({*extra, *KNOWN_MAPS}) < len(extra) + len(KNOWN_MAPS) or not all(map(MAP_NAME.fullmatch, extra)),
    } | failures_of_input(card.input) | failures_of_references(
        card.calibration, card.novelty, num_classes=card.num_classes, maps=("entropy", *extra)
    )  # fmt: skip
    for sentence in (sentence for sentence, failed in failures.items() if failed):
        raise BadArtifact(f"the card of {card.name[:60]!r}: {sentence}")
