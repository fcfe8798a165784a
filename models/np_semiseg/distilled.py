"""Training of the linear head on a frozen host: an ensemble's mean and its disagreement are distilled into it.

    L = CE(teacher's mean, mean) + w * mean (sqrt(MI + e) - sqrt(MI_teacher + e))^2 + NLL(mean, label)

per pixel; mean and MI, the mutual information, are of S samples by the head's law; NLL is 0 where there is no label.
The teacher's members are the host, at its latent's mean, and other networks. Unlike Malinin et al. 2020, who match the
members' likelihood, we match two moments, as the samples have no order; roots, as most of the mutual information is
near 0 and differs there too. Some unlabelled views are strong: on what it was trained on, an ensemble agrees.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penumbra.models.blocks.layers import draw_noise, resize_like
from penumbra.models.blocks.losses import at_grid, mixed
from penumbra.models.card import IGNORE, Card
from penumbra.models.checkpoint import load_checkpoint
from penumbra.models.contract import Network, Views
from penumbra.models.errors import BadOption
from penumbra.models.np_semiseg.linear import LinearHead, class_products
from penumbra.models.np_semiseg.net import NpNetwork

FLOOR_NATS = 1e-5
"""e: a root's slope is bounded by it."""
STANDARDISING = 0.05
"""Share of the schedule in which the features' mean and variance are measured; after it they stay."""
STRIDE = 2
"""Every other row and column of the features is learnt from, for speed."""


@dataclass(frozen=True, slots=True)
class DistilledOptions:
    """host: the checkpoint with a film head that is frozen. teachers: checkpoints of the other members.

    samples: S. spread_weight: w. strong_every: of so many unlabelled views one is a strong one, the others weak.
    shrinkage: of the classes' covariances, for the density.
    """

    host: str
    teachers: tuple[str, ...]
    samples: int = 8
    spread_weight: float = 4.0
    strong_every: int = 2
    shrinkage: float = 0.02


class DistilledObjective(nn.Module):
    """Teaches the pointwise layers of a linear head; the rest is the host's and stays, statistics too."""

    def __init__(self, network: NpNetwork, average: NpNetwork, options: DistilledOptions) -> None:
        super().__init__()
        if not options.teachers or options.samples < 2 or options.strong_every < 1:
            found = f"teachers are {len(options.teachers)}, samples {options.samples} and"
            raise BadOption(f"{found} strong_every {options.strong_every}; at least 1, 2 and 1 are wanted")
        self.network, self.average, self.options = network, average, options
        card, host = load_checkpoint(Path(options.host))
        for ours in (network, average):
            copy_host(host, ours, path=options.host)
        network.requires_grad_(False)
        for taught in (self.head.pointwise, self.head.last):
            taught.requires_grad_(True)
        self.teachers = nn.ModuleList(load_teacher(path, like=card) for path in options.teachers)

    @property
    def head(self) -> LinearHead:
        assert isinstance(self.network.head, LinearHead)
        return self.network.head

    def train(self, mode: bool = True) -> "DistilledObjective":
        return super().train(False)

    def forward(self, batch: Views, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        unlabelled_B3hw, every = batch.weak_B3hw.clone(), self.options.strong_every
        unlabelled_B3hw[every - 1 :: every] = mixed(batch.strong_B3hw, batch.mix_B1hw)[every - 1 :: every]
        image_B3hw = torch.cat((batch.image_B3hw, unlabelled_B3hw))
        with torch.no_grad():
            x_BDhw = self.network.host(image_B3hw)
            base_BKhw, g_BMhw = self.head.answer(x_BDhw)
            members = [base_BKhw[None], *(answer(teacher, image_B3hw, base_BKhw) for teacher in self.teachers)]  # type: ignore[arg-type]
            target_BKhw, target_Bhw = moments(thinned(torch.cat(members)))
        self.head.standardise.train(progress < STANDARDISING)
        features = self.head.spread(*map(thinned, (x_BDhw, g_BMhw, base_BKhw)))
        noise_SBL = draw_noise(self.network.sampling, self.options.samples, len(image_B3hw), generator)
        log_p_BKhw, mutual_Bhw = moments(self.head.decode(features, noise_SBL.to(image_B3hw.device)))
        label_Bhw = torch.full_like(target_Bhw, IGNORE, dtype=torch.int64)
        label_Bhw[: len(batch.label_Bhw)] = thinned(at_grid(batch.label_Bhw, *x_BDhw.shape[-2:]))
        root_Bhw, target_root_Bhw = ((mi_Bhw + FLOOR_NATS).sqrt() for mi_Bhw in (mutual_Bhw, target_Bhw))
        parts = {
            "answer": -(target_BKhw.exp() * log_p_BKhw).sum(1).mean(),
            "spread": self.options.spread_weight * (root_Bhw - target_root_Bhw).square().mean(),
            "labels": F.nll_loss(log_p_BKhw, label_Bhw, ignore_index=IGNORE, reduction="sum") / label_Bhw.numel(),
        }
        return {"total": sum(parts.values(), torch.zeros(())), **parts, "mutual": mutual_Bhw.detach().mean()}

    @torch.no_grad()
    def finish(self, labelled: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Fit the density to the features of labelled pictures, given as image_B3hw and label_Bhw."""
        products_KNN = torch.zeros(())
        for image_B3hw, label_Bhw in labelled:
            g_BMhw = self.head.density.cells(self.head.answer(self.network.host(image_B3hw))[1])
            label_Bhw = at_grid(label_Bhw, *g_BMhw.shape[-2:])
            products_KNN = products_KNN + class_products(g_BMhw, label_Bhw, self.network.config.num_classes)
        for ours in (self.network, self.average):
            assert isinstance(ours.head, LinearHead)
            ours.head.density.fit(products_KNN, shrinkage=self.options.shrinkage)


def copy_host(host: Network, network: NpNetwork, *, path: str) -> None:
    """Copy a host's weights into a network with a linear head. Raises BadOption: more than their heads differ."""
    if (
        not isinstance(host, NpNetwork)
        or replace(network.config, head="film", linear=host.config.linear) != host.config
    ):
        raise BadOption(f"the host {path} is not the film network of recipe.config; copy its recipe's config")
    network.load_state_dict(host.state_dict(), strict=False)


def load_teacher(path: str, *, like: Card) -> Network:
    """Load a frozen member. Raises BadOption: it has other classes than the host or another input; BadCheckpoint."""
    card, teacher = load_checkpoint(Path(path))
    if (card.classes, card.input) != (like.classes, like.input):
        raise BadOption(f"the teacher {path} has {card.num_classes} classes and {card.input}; it must be as the host")
    return teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def answer(teacher: Network, image_B3hw: Tensor, like_BKhw: Tensor) -> Tensor:
    """Return logits_SBKhw at the size of `like`: of every member, or of one sample at the mean of the noise."""
    sampling = teacher.sampling
    shape = (max(1, len(sampling.members)), len(image_B3hw), sampling.noise_length)
    noise_SBL = image_B3hw.new_full(shape, float(sampling.kind == "dropout"))
    return torch.stack([resize_like(logits_BKhw, like_BKhw) for logits_BKhw in teacher(image_B3hw, noise_SBL)])


def moments(logits_SBKhw: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log of the mean probabilities [B, K, h, w], and the mutual information [B, h, w] in nats."""
    log_p_SBKhw = logits_SBKhw.float().log_softmax(2)
    log_mean_BKhw = log_p_SBKhw.logsumexp(0) - math.log(len(logits_SBKhw))
    divergence_SBKhw = log_p_SBKhw.exp() * (log_p_SBKhw - log_mean_BKhw)
    return log_mean_BKhw, divergence_SBKhw.sum(2).mean(0).clamp(min=0)


def thinned(x: Tensor) -> Tensor:
    return x[..., ::STRIDE, ::STRIDE]
