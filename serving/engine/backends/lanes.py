"""Graphs of libraries that bring threads of their own, on a CPU: one opening for all cores, and one for a lane's share.

Lanes run side by side, each with its share of the cores (`penumbra.serving.engine.scheduler`); a graph that used all of
them, one call at a time, would have every other lane wait for it, and leave cores idle wherever it cannot fill them.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class LaneGraph:
    """A lane graph runs with as many threads as torch has in the thread that calls it, where it was opened for that
    number last, and else on all cores, those of the thread that made it.

    open_for: opens it for so many threads a call, and so many calls at a time.
    """

    def __init__(self, open_for: Callable[[int, int], Run]) -> None:
        self._open_for, self._total = open_for, torch.get_num_threads()
        self._opened, self._share = {self._total: open_for(self._total, 1)}, self._total

    def open(self, threads: int) -> bool:
        """Open the graph for calls of so many threads, beside one another, and tell whether it was not before."""
        if is_new := threads not in self._opened:
            self._opened[threads] = self._open_for(threads, max(1, self._total // threads))
        self._share = threads
        return is_new

    def __call__(self, *arguments: object) -> Sequence[Tensor]:
        threads = torch.get_num_threads()
        return self._opened[threads if threads == self._share else self._total](pytree.tree_leaves(arguments))
