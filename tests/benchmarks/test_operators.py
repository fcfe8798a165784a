"""The benchmarks that call the engine's insides still fit them: each runs once, small."""

from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import identity, moments, sampling
from penumbra.serving.engine.segmenter import Segmenter
from tests.conftest import FIXED
from tests.models.small import PUBLISHED


def test_batches_and_chunks_are_compared_with_windows_alone(toy_store: Path) -> None:
    with Segmenter.open(toy_store, device="cpu", tuning=FIXED) as segmenter:
        runtime = segmenter.find("toy-latent")
        found = segmenter.scheduler.call(lambda: identity.compare(runtime))
        answers = segmenter.scheduler.call(lambda: runtime.run(runtime.golden_inputs()))
    assert len(found) == 2 * len(identity.SIZES) and set(found.values()) == {0.0}
    assert identity._furthest(answers, [answers[0]]) > 0


@torch.inference_mode()
def test_readings_of_moments_are_timed_in_every_form() -> None:
    assert all(seconds > 0 for seconds in (moments.reading_out(16, 32) | moments.stitching(8)).values())


@torch.inference_mode()
def test_samples_are_decoded_with_and_without_moments() -> None:
    network = sampling.build(replace(PUBLISHED, num_classes=sampling.CLASSES))
    image, noise_SBL = torch.randn(1, 3, 32, 48), torch.randn(2, 1, PUBLISHED.latent_length)
    assert sampling.peak_mb(network, image, noise_SBL) > 0
    sampling.decode_all(network, image, noise_SBL)
    sampling.decode_plainly(network, image, noise_SBL)
