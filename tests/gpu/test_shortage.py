"""Memory of a GPU that is short: the request is still answered, and from then on batches are smaller."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from penumbra.export.bundle import export_network
from penumbra.models.card import WindowSpec
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from tests.gpu.test_pipeline import agree, picture
from tests.models.small import card_of, seeded

NAME, WINDOWS, SAMPLES = "np_semiseg published", 16, 8
SPEC = WindowSpec(512, 512, overlap=0)
IMAGE = (2048, 2048)
"""One batch of WINDOWS windows."""
LEAST_BYTES = 2**26
"""Of room that is left: smaller, and one window does not fit beside what libraries allocate."""


def fill(device: torch.device, room_bytes: int) -> torch.Tensor:
    """Take all memory that is free but for some room."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return torch.empty(max(0, free - room_bytes), dtype=torch.uint8, device=device)


def test_a_batch_that_does_not_fit_is_run_in_halves_and_batches_are_smaller_from_then_on(
    device: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    if device == "cpu":
        pytest.skip("the memory of a CPU is not to be filled")
    card = replace(card_of(NAME), window=SPEC)
    directory = export_network(seeded(NAME), card, tmp_path)
    tuning = Tuning(windows_per_batch=WINDOWS, samples_per_call=SAMPLES)
    with Segmenter(device=device, tuning=tuning) as segmenter:
        segmenter.load(directory)
        options = SegmentOptions(samples=SAMPLES)
        segmenter.segment(picture(IMAGE), options)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        expected = segmenter.segment(picture(IMAGE), options)
        needed = torch.cuda.max_memory_allocated() - before
        record_property("bytes of a batch", needed)
        block = fill(torch.device(device), max(LEAST_BYTES, needed // 2))
        answered = segmenter.segment(picture(IMAGE), options)
        agree(expected, answered, record_property)
        left = segmenter.find(None).windows_per_batch
        record_property("windows per batch that are left", left)
        assert len(block) and 1 <= left <= WINDOWS // 2
        del block
        assert np.isfinite(segmenter.segment(picture(IMAGE), options).maps["entropy"]).all()
