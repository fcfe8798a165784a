"""The whole way of windows on a GPU, rehearsed on fake CUDA tensors: nothing waits for the device, nothing but finished
rows leaves it, and what a batch launches does not grow with what is in it."""

from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from penumbra.serving.engine import canvas as surfaces
from penumbra.serving.engine.canvas import Transfers
from penumbra.serving.engine.options import PROBABILITIES
from penumbra.serving.engine.request import QueuedRequest
from tests.models.small import IN_TORCH
from tests.serving.engine.gpu.rehearsal import Count, rehearse, request, runtime_of
from tests.serving.engine.gpu.test_pipeline import asked
from tests.serving.engine.gpu.watch import CUDA, STEPS, Stream, Watch

SIZE = (100, 130)
"""Two rows of two windows; each row finishes a band."""
EVERY, PER_CHUNK = 8, 4
"""Launches of the steps: of a batch (cut; accumulate and two for its flags; blend, zeros for the rows' sums, the flags
beside the rows, read out), and of every further chunk of its samples (accumulate and three for the flags)."""
OWN_MAPS, PAINT = 5, 38
"""The same of a network's own maps, and of boxes that become masks."""
PRECISIONS = ("fp32", "bf16", "fp16")
CASES = [(name, precision) for name in IN_TORCH for precision in PRECISIONS]
QUICK = [
    ("toy latent", "fp32", False), ("toy boxed", "fp32", True), ("toy tagged", "fp16", True),
    ("np_semiseg film", "bf16", False), ("self_correcting linear", "fp16", True), ("proto_seg dropout", "bf16", False),
    ("cpal cam", "fp32", True), ("cps single", "fp16", False), ("np_semiseg linear", "fp16", False),
]  # fmt: skip


def requests_of(
    name: str, precision: str, number: int, *, prompted: bool, samples: int, size: tuple[int, int] = SIZE
) -> list[QueuedRequest]:
    """Requests that begin with the next batch. samples: where their number is free."""
    runtime, _ = runtime_of(name, precision)
    card = runtime.card
    free = card.sampling_with(prompt=prompted and card.prompt.kind != "none").is_stochastic
    options = asked(card, prompted=prompted)
    if free:
        options = replace(options, samples=samples, outputs=(*card.maps(samples), PROBABILITIES))
    return [request(runtime, size, options) for _ in range(number)]


def bytes_up(requests: list[QueuedRequest]) -> dict[torch.dtype, int]:
    """What may go up: every row of a picture once, the windows' noise and blend weights, and prompts, but no masks."""
    expected = dict.fromkeys((torch.uint8, torch.uint16, torch.float32, torch.int32), 0)
    for one in requests:
        windows, card, boxes = one.plan.windows, one.plan.card, one.plan.options.boxes
        kind = getattr(torch, card.input.dtype)
        expected[kind] += kind.itemsize * card.input.num_bands * windows.height * windows.width
        weights = sum(map(len, (*windows.weights_y, *windows.weights_x)))
        prompt = card.num_classes if one.plan.options.tags else len(boxes) > 0 and card.prompt.alpha is not None
        noise = one.plan.noise.draw(0).size
        expected[torch.float32] += 4 * (weights + windows.num_windows * (noise + int(prompt)))
        expected[torch.int32] += 20 * windows.num_windows * (1 + len(boxes)) if boxes else 0
    return expected


def bytes_down(requests: list[QueuedRequest]) -> int:
    """What may come down: four bytes a window, labels, what was requested, and of every row three sums. A band ends at
    a multiple of four and begins at one of eight."""
    total = 0
    for one in requests:
        windows, card, outputs = one.plan.windows, one.plan.card, one.plan.options.outputs
        planes = len(outputs) + (card.num_classes - 1) * (PROBABILITIES in outputs)
        total += 4 * windows.num_windows + (4 * planes + 1) * windows.height * windows.width
        total += 24 * windows.height + (3 + 4) * len(windows.starts_y)
    return total


def check_bytes(watch: Watch, requests: list[QueuedRequest], num_batches: int) -> None:
    for kind, expected in bytes_up(requests).items():
        assert watch.up_bytes[kind] == expected if kind != torch.int32 else watch.up_bytes[kind] <= expected, kind
    num_windows = sum(one.plan.windows.num_windows for one in requests)
    labels_at_least = sum(one.plan.windows.height * one.plan.windows.width for one in requests)
    assert labels_at_least < watch.down_bytes <= bytes_down(requests)
    planes = 7 + len(requests[0].plan.card.extra_maps)
    numbers = 7 + 11 + (4 + planes + 2) + 4 * 3  # of a window, its piece, a band, and four tensors
    assert watch.table_bytes <= 8 * (num_windows * numbers + 4 * num_batches)


def check(name: str, precision: str, prompted: bool) -> None:
    """A batch of 2 windows of one request, 2 samples each, against 32 windows of 8, with 64 samples, in one chunk."""
    runtime, watch = runtime_of(name, precision)
    runtime.samples_per_call, found = 64, list[Count]()
    for number, size, samples in ((1, 2, 2), (8, 32, 64)):
        requests = requests_of(name, precision, number, prompted=prompted, samples=samples)
        counts, bands = rehearse(runtime, watch, requests, size)
        check_bytes(watch, requests, len(counts))
        for one in bands:
            assert [band.y0 for band in one] == [0, 36] and sum(len(band.labels) for band in one) == SIZE[0]
        assert counts[0].num_up - counts[-1].num_up in (0, 2 * number), "a strip and weights, once a request"
        found += [Count(one.launches, 0, one.num_down) for one in counts]
    assert [one == found[0] for one in found] == [True] * 3, found
    card = runtime.card
    drawn = PAINT if prompted and card.prompt.kind == "boxes" else 0
    assert found[0].launches[STEPS] <= EVERY + drawn + (OWN_MAPS if card.extra_maps else 0)
    assert found[0].num_down == 1
    per_window = {
        "up": sum(watch.up_bytes.values()) / 32,
        "down": watch.down_bytes / 32,
        "tables": watch.table_bytes / 32,
    }
    print(f"\n{name:30} {precision} {'prompted' if prompted else '':8}", found[0].launches, per_window)


@pytest.mark.parametrize(("name", "precision", "prompted"), QUICK)
def test_launches_and_bytes_are_bounded_whatever_is_in_a_batch(name: str, precision: str, prompted: bool) -> None:
    check(name, precision, prompted)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision"), CASES)
def test_launches_and_bytes_of_every_network_are_bounded(name: str, precision: str) -> None:
    runtime, _ = runtime_of(name, precision)
    for prompted in (False, True)[: 1 + (runtime.card.prompt.kind != "none")]:
        check(name, precision, prompted)


def test_a_chunk_of_samples_costs_the_same_launches_whatever_is_in_it() -> None:
    runtime, watch = runtime_of("np_semiseg film", "fp32")
    found = []
    for chunk, samples in ((64, 64), (16, 64), (1, 4), (1, 1)):
        runtime.samples_per_call = chunk
        counts, _ = rehearse(
            runtime, watch, requests_of("np_semiseg film", "fp32", 1, prompted=False, samples=samples), 4
        )
        found.append(counts[0].launches)
    whole, in_four, one_by_one, single = found
    assert in_four[STEPS] == one_by_one[STEPS] == whole[STEPS] + 3 * PER_CHUNK
    assert in_four["decode"] == 4 * whole["decode"] and one_by_one["decode"] == 4 * single["decode"]
    assert single["decode"] <= whole["decode"] and single[STEPS] == whole[STEPS]


def test_a_large_picture_goes_up_once_strip_by_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surfaces, "STRIP_BYTES", 3 * 300 * 100)
    runtime, watch = runtime_of("toy latent", "fp32")
    runtime.samples_per_call, options = 4, asked(runtime.card, overlap=0.8)
    requests = [request(runtime, (900, 300), options), request(runtime, (333, 300), options)]
    counts, _ = rehearse(runtime, watch, requests, 8)
    check_bytes(watch, requests, len(counts))
    strips = sum(count.num_up - 1 for count in counts) - len(requests)
    assert 9 + 4 <= strips <= 12 + 5, "weights once a request, and a strip at a time"
    most = max(count.launches[STEPS] for count in counts)
    assert most <= EVERY + len(requests), "a new strip is joined to an old one"
    assert sum(count.launches[STEPS] for count in counts) <= EVERY * len(counts) + strips


def test_pictures_with_black_and_with_zeros_beyond_them_share_a_batch() -> None:
    runtime, watch = runtime_of("toy", "fp32")
    card = replace(runtime.card, window=replace(runtime.card.window, padding="mean_or_black"))
    found = []
    for pairs in (1, 8):
        with patch.object(runtime, "card", card), patch.object(runtime._steps, "card", card):
            requests = [request(runtime, (50, width), asked(card)) for width in (60, 130) * pairs]
            counts, _ = rehearse(runtime, watch, requests, 3 * pairs)
        found.append(counts[0].launches)
    assert found[0] == found[1] and found[0][STEPS] == EVERY


MISTAKES: dict[str, Callable[[torch.Tensor], object]] = {
    "_local_scalar_dense waits": lambda x: x.sum().item(),
    "aten::index by a mask waits": lambda x: x[x > 0],
    "index_put_ by a mask waits": lambda x: x.index_put_((x > 0,), x.new_empty(())),
    "masked_select waits": lambda x: x.masked_select(x > 0),
    "equal waits": lambda x: torch.equal(x, x),
    "mixes host and device": lambda x: x + torch.from_numpy(np.zeros(4, np.float32)),
    "works on the host": lambda x: torch.arange(4).to(x),
    "_to_copy.default of .4,. waits": lambda x: torch.from_numpy(np.zeros(4, np.float32)).to(CUDA),
    "_to_copy.default of .. waits": lambda x: torch.tensor(3.0).to(CUDA, non_blocking=True),
    "_to_copy.default of .2,. waits": lambda x: torch.tensor([1.0, 2.0], device=CUDA),
    "_to_copy.default of .5,. waits": lambda x: torch.empty(5, pin_memory=True).to(CUDA),
    "_to_copy.default of .1, 4. waits": lambda x: x[None].cpu(),
    "copy_.default of .4,. waits": lambda x: torch.empty(4, pin_memory=True).copy_(x),
    "may still be at": lambda x: unordered(x),
    "was not told": lambda x: unrecorded(x),
}


def unordered(x: torch.Tensor) -> None:
    """A copy down on a stream that does not wait for what is copied."""
    computed = x.mul(1)
    with torch.cuda.stream(Stream()):  # type: ignore[arg-type]
        torch.empty(4, pin_memory=True).copy_(computed, non_blocking=True)


def unrecorded(x: torch.Tensor) -> None:
    """A copy down of memory that may be given away before it is done."""
    with patch.object(torch.Tensor, "record_stream", lambda *_: None):
        transfers = Transfers(CUDA)
        transfers.down(*transfers.room(8))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_watch_sees_what_would_wait_or_race(mistake: str) -> None:
    watch = Watch()
    with pytest.raises(AssertionError, match=mistake), watch.on():
        MISTAKES[mistake](torch.empty(4, device=CUDA))


def test_what_comes_down_is_there_once_it_was_waited_for() -> None:
    with Watch().on():
        transfers = Transfers(CUDA)
        copied = transfers.down(*transfers.room(8))
        before = copied.host.numpy().copy()
        assert np.isnan(before.view(np.float32)).all() and not copied.wait().any()
