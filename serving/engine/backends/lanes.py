"""Graphs of libraries that bring threads of their own, on a CPU: opened once for every number of cores of a lane.

Lanes run side by side, each with its share of the cores (`penumbra.serving.engine.scheduler`); a graph that used all of
them, one call at a time, would have every other lane wait for it, and leave cores idle wherever it cannot fill them.
"""

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from penumbra.serving.engine.backends import Graph, flat
from penumbra.serving.engine.quota import num_cores

Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def in_lanes(open_for: Callable[[int, int], Run]) -> Graph:
    """Make a graph that runs with as many threads as torch has in the thread that calls it.

    open_for: opens it for so many threads a call, and so many calls at a time; so many take all cores. It is opened for
    the thread that makes the graph at once, so that a broken file is told there, and for another number of cores when
    a lane first has that. Numbers are rounded down to powers of two, lest there be one for each.
    """
    total, opened, opening = num_cores(), dict[int, Run](), threading.Lock()

    def opened_here() -> Run:
        cores = torch.get_num_threads()
        threads = cores if cores >= total else 1 << (cores.bit_length() - 1)
        if threads not in opened:
            with opening:
                if threads not in opened:
                    opened[threads] = open_for(threads, max(1, total // threads))
        return opened[threads]

    opened_here()
    return flat(lambda inputs: opened_here()(inputs))
