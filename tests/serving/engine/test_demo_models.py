"""The demo models through the engine: trained weights, real sizes."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from penumbra.export.zoo import DEMO, fill_store
from penumbra.serving.engine.moments import Moments
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.runtime import Runtime
from penumbra.serving.engine.segmenter import Segmenter

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Segmenter]:
    store = tmp_path_factory.mktemp("demo") / "store"
    fill_store(store)
    with Segmenter.open(store) as opened:
        assert [card.name for card in opened.cards()] == sorted(DEMO)
        yield opened


def _moments(runtime: Runtime, batch: int, chunk: int) -> list[Moments]:
    inputs = runtime.golden_inputs()
    runtime.samples_per_call = chunk
    answers = runtime.run([inputs[i % len(inputs)] for i in range(batch)])
    assert all(isinstance(answer, Moments) for answer in answers)
    return [answer for answer in answers if isinstance(answer, Moments)]


@pytest.mark.parametrize("name", DEMO)
def test_a_window_has_the_same_bytes_alone_and_in_any_batch_and_chunk(segmenter: Segmenter, name: str) -> None:
    runtime = segmenter.find(name)
    alone = segmenter.scheduler.call(lambda: _moments(runtime, 1, 1))[0]
    for batch, chunk in ((2, 1), (3, 8), (1, 8), (5, 3)):
        together = segmenter.scheduler.call(lambda b=batch, c=chunk: _moments(runtime, b, c))[0]
        assert torch.equal(together.stats_hCw, alone.stats_hCw)


def test_the_latent_of_the_np_model_matters_in_the_interior(segmenter: Segmenter, rng: np.random.Generator) -> None:
    image = np.repeat(np.repeat(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8), 40, 0), 40, 1)
    prediction = segmenter.segment(image, SegmentOptions("np_semiseg-camvid", samples=16, seed=1))
    interior = prediction.maps["mutual_information"][40:-40, 40:-40]
    assert interior.mean() > 1e-3, f"mean mutual information {interior.mean()} nats is noise"


def test_another_seed_gives_other_samples_and_the_same_seed_the_same(
    segmenter: Segmenter, rng: np.random.Generator
) -> None:
    image = rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)
    maps = [
        segmenter.segment(image, SegmentOptions("np_semiseg-camvid", seed=seed)).maps["mutual_information"].tobytes()
        for seed in (1, 1, 2)
    ]
    assert maps[0] == maps[1] != maps[2]
