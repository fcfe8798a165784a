"""The support bank: instance prototypes of training images, and their summary, the context prototypes (CPAL).

Training only: one thread pushes, `summarise` reads, `Context.adopt` takes the summary into the network.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from penumbra.models.errors import BadData

BANK_SIZE = 1000
"""Instance prototypes that are kept (the paper's size; that it is per class is OURS)."""
MAX_ROUNDS = 100
"""Rounds of k-means; it stops earlier when no row changes its cluster."""


class SupportBank:
    """The last `size` instance prototypes of every foreground class, first in, first out."""

    def __init__(self, num_foreground: int, channels: int, size: int = BANK_SIZE) -> None:
        self._rows = [torch.empty(0, channels) for _ in range(num_foreground)]
        self._size = size

    def push(self, instances_BND: Tensor, present_BN: Tensor) -> None:
        """Append the instances of the classes that are present, image by image. Detached and kept on the CPU."""
        instances = instances_BND.detach().float().cpu()
        for n, present_B in enumerate((present_BN > 0).cpu().unbind(1)):
            self._rows[n] = torch.cat((self._rows[n], instances[present_B, n]))[-self._size :]

    def rows(self, foreground_class: int) -> Tensor:
        """rows_RD of one class, oldest first, R <= size."""
        return self._rows[foreground_class]

    def restore(self, rows: Sequence[Tensor]) -> None:
        """Take over what `rows` gave for every class."""
        self._rows = list(rows)

    def smallest(self) -> int:
        """Instances of the class that has fewest."""
        return min(len(rows_RD) for rows_RD in self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def summarise(bank: SupportBank, num_prototypes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """context_centres_NPD and shift_ND of a bank; the generator is of the CPU.

    delta_n = mean over i, q of (p_i - P_nq): from the mean instance to the mean context prototype.
    Raises BadData when a class has fewer instances than prototypes.
    """
    centres, shifts = [], []
    for n in range(len(bank)):
        rows_RD = bank.rows(n)
        if len(rows_RD) < num_prototypes:
            raise BadData(f"class {n + 1} has {len(rows_RD)} instances in the bank; {num_prototypes} are wanted")
        centres_PD = cluster(rows_RD, num_prototypes, generator)
        centres.append(centres_PD)
        shifts.append(centres_PD.mean(0) - rows_RD.mean(0))
    return torch.stack(centres), torch.stack(shifts)


def cluster(rows_RD: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Centroids [count, D] of k-means (Lloyd) from k-means++ seeds; the same generator state gives the same bytes."""
    centres_PD = scatter_seeds(rows_RD, count, generator)
    nearest_R = torch.cdist(rows_RD, centres_PD).argmin(1)
    for _ in range(MAX_ROUNDS):
        centres_PD = _means(rows_RD, nearest_R, centres_PD)
        before, nearest_R = nearest_R, torch.cdist(rows_RD, centres_PD).argmin(1)
        if torch.equal(before, nearest_R):
            break
    return centres_PD


def scatter_seeds(rows_RD: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++: every next seed is drawn with a chance in proportion to its squared distance from those before."""
    chosen = [rows_RD[int(torch.randint(len(rows_RD), (1,), generator=generator))]]
    for _ in range(count - 1):
        distance_R = torch.cdist(rows_RD, torch.stack(chosen)).amin(1).square()
        chance_R = distance_R if bool(distance_R.sum() > 0) else torch.ones_like(distance_R)
        chosen.append(rows_RD[int(torch.multinomial(chance_R, 1, generator=generator))])
    return torch.stack(chosen)


def _means(rows_RD: Tensor, nearest_R: Tensor, centres_PD: Tensor) -> Tensor:
    """Mean of every cluster's rows; an empty cluster stays where it was."""
    sums_PD = torch.zeros_like(centres_PD).index_add(0, nearest_R, rows_RD)
    counts_P1 = torch.bincount(nearest_R, minlength=len(centres_PD))[:, None]
    return torch.where(counts_P1 > 0, sums_PD / counts_P1.clamp_min(1), centres_PD)
