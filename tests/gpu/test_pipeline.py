"""The whole way of a picture on a GPU, against the same way on the CPU: every small network, every map, every prompt.

Graphs are exported on the CPU, and both sides open the same ones.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import pytest

from penumbra.export.bundle import export_network
from penumbra.models.card import Card
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.options import PROBABILITIES, SegmentOptions
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from tests.models.small import SMALL, card_of, seeded
from tests.models.small import picture as any_picture

ROUNDING = 1e-3
"""Of probabilities and nats between processors, in float32; the share of labels that may differ, too."""
SIZES = ((100, 120), (64, 80), (37, 190), (133, 90))
"""Pictures of several windows, of exactly one, and of sizes that no window divides."""
Note = Callable[[str, object], None]


def picture(size: tuple[int, int] = SIZES[0], seed: int = 3) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (*size, 3), dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class Pair:
    """The same artifact, opened on the CPU (here) and on the device under test (there)."""

    card: Card
    here: Segmenter
    there: Segmenter

    def options(self, *, prompt: bool = False, seed: int = 5) -> SegmentOptions:
        """Ask for everything that an answer can have."""
        given = {
            "none": {}, "boxes": {"boxes": ((3.0, 3.0, 60.0, 50.0, 1),)}, "tags": {"tags": (1,)},
        }[self.card.prompt.kind if prompt else "none"]  # fmt: skip
        outputs = (*self.card.maps(self.card.sampling_with(prompt=prompt).default_samples), PROBABILITIES)
        return SegmentOptions(outputs=outputs, seed=seed, **given)


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest, device: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    name = request.param
    store = tmp_path_factory.mktemp("store")
    directory = export_network(seeded(name), replace(card_of(name), name="small"), store)
    tuning = Tuning(windows_per_batch=4, samples_per_call=2)
    with ExitStack() as stack:
        opened = [stack.enter_context(Segmenter(device=at, tuning=tuning)) for at in ("cpu", device)]
        cards = [segmenter.load(directory) for segmenter in opened]
        yield Pair(cards[0], *opened)


def difference(one: Prediction, other: Prediction) -> float:
    """The largest difference of any map; a value that is not finite on one side alone is infinitely far."""
    worst = 0.0
    named = [
        side.maps | ({} if side.prob_KHW is None else {PROBABILITIES: side.prob_KHW}) for side in (one, other)
    ]  # fmt: skip
    assert named[0].keys() == named[1].keys()
    for key, values in named[0].items():
        assert values.shape == named[1][key].shape, key
        worst = max(worst, float(np.nan_to_num(np.abs(values - named[1][key]), nan=np.inf).max()))
    return worst


def agree(one: Prediction, other: Prediction, note: Note) -> None:
    flips = float(np.mean(one.labels_HW != other.labels_HW))
    apart = difference(one, other)
    note("largest share of labels that differ", flips)
    note("largest difference of a map", apart)
    assert one.members == other.members
    assert flips <= ROUNDING and apart <= ROUNDING


@pytest.mark.parametrize("pair", SMALL, indirect=True)
def test_every_network_gives_on_the_device_the_maps_of_the_cpu_without_and_with_its_prompt(
    pair: Pair, record_property: Note
) -> None:
    for prompt in [False] + [True] * (pair.card.prompt.kind != "none"):
        here, there = (
            side.segment(any_picture(pair.card, SIZES[0], 3), pair.options(prompt=prompt))
            for side in (pair.here, pair.there)
        )
        agree(here, there, record_property)


@pytest.mark.parametrize("pair", SMALL, indirect=True)
def test_the_same_seed_gives_the_same_bytes(pair: Pair) -> None:
    one, again = (pair.there.segment(any_picture(pair.card, SIZES[0], 3), pair.options()) for _ in range(2))
    assert np.array_equal(one.labels_HW, again.labels_HW)
    assert difference(one, again) == 0


@pytest.mark.parametrize("pair", SMALL, indirect=True)
def test_requests_that_share_batches_are_answered_as_alone(pair: Pair, record_property: Note) -> None:
    pictures = [any_picture(pair.card, size, seed) for seed, size in enumerate(SIZES)]

    def ask(number: int) -> Prediction:
        return pair.there.segment(pictures[number], pair.options(seed=number))

    alone = [ask(number) for number in range(len(pictures))]
    with ThreadPoolExecutor(len(pictures)) as callers:
        together = list(callers.map(ask, range(len(pictures))))
    for one, other in zip(alone, together, strict=True):
        agree(one, other, record_property)
