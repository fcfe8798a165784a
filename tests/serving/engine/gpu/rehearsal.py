"""Networks on fake CUDA tensors, and batches of requests for them, as the scheduler makes them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from penumbra.export.parts import _Decode, _Encode, _TakePrompt
from penumbra.models.contract import Network
from penumbra.models.plain.net import PlainNetwork
from penumbra.serving.engine import runtime as runtimes
from penumbra.serving.engine.backends import DTYPES, Backend
from penumbra.serving.engine.canvas import Landing
from penumbra.serving.engine.options import Limits, SegmentOptions
from penumbra.serving.engine.plan import plan_request, resolve
from penumbra.serving.engine.raster import Raster
from penumbra.serving.engine.request import QueuedRequest
from penumbra.serving.engine.runtime import Runtime
from penumbra.serving.engine.store import Artifact
from penumbra.serving.engine.uncertainty import Band
from penumbra.serving.engine.windows import Window
from tests.models.small import card_of, seeded
from tests.serving.engine.gpu.watch import CUDA, FAKE, Watch

PARTS = {"encode": _Encode, "prompt": _TakePrompt, "decode": _Decode}
Turn = tuple[QueuedRequest, Window]


@dataclass(frozen=True)
class Count:
    """What a batch took: launches by part, and copies up that any batch has (beside those of requests' beginnings)."""

    launches: dict[str, int]
    num_up: int
    num_down: int


@cache
def runtime_of(name: str, precision: str) -> tuple[Runtime, Watch]:
    """The small network of that name, cut as it is exported, on the fake device."""
    card, watch, dtype = card_of(name), Watch(), DTYPES[precision]
    network = move(seeded(name), dtype)

    def graph(part: str) -> Callable[..., object]:
        module = PARTS[part](network, dtype).eval()

        def run(*arguments: object) -> object:
            with watch.within(part):
                return module(*arguments)

        return run

    graphs = {part: graph(part) for part in PARTS}
    backend = Backend(graphs, device=CUDA, one_at_a_time=False)
    with watch.on(), patch.object(runtimes, "load_backend", lambda *_: backend):
        return Runtime(Artifact(Path(name), card, None, b""), device=CUDA), watch  # type: ignore[arg-type]


def move(network: Network, dtype: torch.dtype) -> Network:
    """Put parameters and buffers on the fake device; `Module.to` cannot. Other tensors stay where they are."""
    if isinstance(network, PlainNetwork):
        network.load()
    with FAKE:
        for module in network.modules():
            for table in (module._parameters, module._buffers):
                for key, tensor in table.items():
                    if tensor is not None:
                        kind = dtype if tensor.is_floating_point() else tensor.dtype
                        layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
                        there = torch.empty(tensor.shape, dtype=kind, device=CUDA, memory_format=layout)
                        table[key] = nn.Parameter(there, requires_grad=False) if table is module._parameters else there
    return network


def request(runtime: Runtime, size: tuple[int, int], options: SegmentOptions) -> QueuedRequest:
    """A request for a picture of that size, which is in no queue."""
    limits = Limits()
    plan = plan_request(runtime, resolve(options, runtime.card, limits), *size, limits=limits)
    return QueuedRequest(None, plan, Raster(np.zeros((*size, runtime.card.input.num_bands), runtime.card.input.dtype)))  # type: ignore[arg-type]


def batches(requests: Sequence[QueuedRequest], size: int) -> Iterator[list[Turn]]:
    """Let requests take turns, a window each."""
    turns = [[(one, window) for window in one.plan.windows] for one in requests]
    order = [turn for turns_of_all in zip_longest(*turns) for turn in turns_of_all if turn]
    for first in range(0, len(order), size):
        yield order[first : first + size]


def rehearse(
    runtime: Runtime, watch: Watch, requests: Sequence[QueuedRequest], size: int
) -> tuple[list[Count], list[list[Band]]]:
    """Run requests in batches of `size` windows: what each batch took, and each request's bands."""
    counts, landings = list[Count](), dict[QueuedRequest, list[Landing]]((one, []) for one in requests)
    runtime.windows_per_batch = size
    watch.clear()
    with watch.on():
        for batch in batches(requests, size):
            before = watch.launches.copy(), watch.num_up, watch.num_down
            for (one, _), answer in zip(
                batch, runtime.run([one.input_of(w, one.num_samples) for one, w in batch]), strict=True
            ):
                assert isinstance(answer, Landing)
                landings[one].append(answer)
            launches = dict(watch.launches - before[0])
            counts.append(Count(launches, watch.num_up - before[1], watch.num_down - before[2]))
    assert all(answer.is_finite for answers in landings.values() for answer in answers)
    return counts, [[band for answer in answers for band in answer.bands()] for answers in landings.values()]
