"""What lanes would do with nothing else to do: works run beside each other, on a lane's share of the cores each."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from penumbra.serving.engine.throughput import Cores


def in_lanes(cores: Cores, works: Sequence[Callable[[], object]]) -> None:
    def lane(number: int) -> None:
        torch.set_num_threads(cores.least)
        for work in works[number :: cores.lanes]:
            work()

    with ThreadPoolExecutor(cores.lanes) as threads:
        list(threads.map(lane, range(cores.lanes)))
