"""Stage 1 of CPAL (Tang et al. 2024, on SIPE, Chen et al. 2022): activation maps from the tags of views alone.

    L = L_cls + w(t) * L_self
    L_cls   multi-label soft margin loss: binary cross-entropy of the pooled raw CAM against the tags, mean over classes
    L_self  mean over the K classes and all pixels of |M - M'|, M the CAM and M' the PACAM over its maximum

Both maps hold the tagged classes only, and both get gradients. A support bank takes the instance prototypes of tagged
classes; every `summarise_every` steps its k-means centroids and shifts become the network's context. Until every class
has `least_rows` instances, and in a network without context, SIPE's IS-CAM plays PACAM's part.

DEVIATION: all stages are trained and BatchNorm uses the batch; SIPE freezes stages 0 to 2 and the statistics of
ImageNet weights, and here there are none.
DEVIATION: w(t) ramps up, since maps of a random network have nothing to teach each other.
OURS, for the paper's values are not public: when the bank is summarised and from how many rows on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penumbra.models.blocks.losses import ramp
from penumbra.models.card import read_strict
from penumbra.models.contract import Views
from penumbra.models.cpal.bank import BANK_SIZE, SupportBank, summarise
from penumbra.models.cpal.net import CamNetwork, Localisation, View
from penumbra.models.cpal.seeds import divide_by_maximum
from penumbra.models.errors import BadOption


@dataclass(frozen=True, slots=True)
class CamOptions:
    """self_weight: of L_self; start, full: shares of the schedule where it begins to grow and is reached.

    bank_rows: instances kept per class. least_rows: instances of every class before the first summary.
    """

    self_weight: float = 1.0
    start: float = 0.1
    full: float = 0.3
    bank_rows: int = BANK_SIZE
    least_rows: int = 50
    summarise_every: int = 100


class CamObjective(nn.Module):
    """Holds the network, its running average and the support bank. For the loop only, once per step.

    Every call adds to the bank; some change the context of both networks, before anything is computed.
    """

    def __init__(self, network: CamNetwork, average: CamNetwork, options: CamOptions) -> None:
        super().__init__()
        self.network, self.average, self.options = network, average, options
        channels = network.context.project.out_channels if network.context else 0
        self.bank = SupportBank(network.num_foreground, channels, options.bank_rows)
        self.step = nn.Buffer(torch.zeros((), dtype=torch.int64))
        self.has_context = nn.Buffer(torch.zeros((), dtype=torch.bool))

    def forward(self, batch: Views, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        tags_BN = read_tags(batch)[:, -self.network.num_foreground :]
        self._adopt(generator)
        view = View(*(each.float() for each in self.network.observe(batch.strong_B3hw)))
        with torch.autocast(batch.strong_B3hw.device.type, enabled=False):
            mask_BKhw = self._mask(tags_BN, batch.inside_Bhw, view)
            found = self.network.localise_view(view, mask_BKhw)
            self._remember(found)
            classification = F.multilabel_soft_margin_loss(view.score_BN, tags_BN)
            agreement = self_supervision(found.cam_BKhw, self._second_map(found) * mask_BKhw)
        weight = self.options.self_weight * ramp(progress, self.options.start, self.options.full)
        total = classification + weight * agreement
        context = self.has_context.float()
        return {"total": total, "classification": classification, "self_supervised": agreement, "context": context}

    def _mask(self, tags_BN: Tensor, inside_Bhw: Tensor, view: View) -> Tensor:
        """mask_BKhw of SIPE: 1 for a tagged class where the map shows the picture."""
        inside_B1hw = F.interpolate(inside_Bhw[:, None].float(), view.raw_BNhw.shape[-2:], mode="nearest-exact")
        return self.network.complete(tags_BN)[..., None, None] * inside_B1hw

    def _second_map(self, found: Localisation) -> Tensor:
        """What the CAM is compared with: PACAM_BKhw, or IS-CAM_BKhw as long as there is no context."""
        context = self.network.context
        if context is None or not self.has_context:
            return found.is_cam_BKhw
        return self.network.draw_pacam(context, found.view, found.cam_BKhw, found.is_cam_BKhw)

    @torch.no_grad()
    def _remember(self, found: Localisation) -> None:
        """Push the instance prototypes of classes that the masked CAM sees anywhere, so of tagged ones only."""
        context = self.network.context
        if context is None:
            return
        cam_BNhw = found.cam_BKhw[:, -self.network.num_foreground :]
        seen_BN = cam_BNhw.amax((2, 3)) > context.threshold
        self.bank.push(context.instances(found.view.hierarchical_BDhw, cam_BNhw), seen_BN)

    def _adopt(self, generator: torch.Generator) -> None:
        """Count the step; now and then, give both networks the same summary of the bank."""
        ours, theirs, options = self.network.context, self.average.context, self.options
        self.step.add_(1)
        if ours is None or theirs is None or int(self.step) % options.summarise_every != 0:
            return
        num_prototypes = ours.context_centres.shape[1]
        if self.bank.smallest() >= max(options.least_rows, num_prototypes):
            summary = summarise(self.bank, num_prototypes, generator)
            ours.adopt(*summary)
            theirs.adopt(*summary)  # averages of centroids would mix clusters that have changed their places
            self.has_context.fill_(True)

    def get_extra_state(self) -> list[Tensor]:
        """The bank's rows, class by class, for `state_dict`."""
        return [self.bank.rows(n) for n in range(len(self.bank))]

    def set_extra_state(self, state: list[Tensor]) -> None:
        self.bank.restore(state)


def read_cam_options(options: Mapping[str, Any]) -> CamOptions:
    """Raises BadArtifact naming an unknown or mistyped option, BadOption."""
    read = read_strict(CamOptions, dict(options), where="recipe.objective")
    if min(read.summarise_every, read.least_rows, read.bank_rows - read.least_rows + 1) < 1:
        raise BadOption(
            f"recipe.objective has bank_rows {read.bank_rows}, least_rows {read.least_rows} and summarise_every "
            f"{read.summarise_every}; positive ones with least_rows <= bank_rows are wanted"
        )
    return read


def read_tags(batch: Views) -> Tensor:
    """tags_BK in float32, whatever the precision of the step. Raises BadOption where the recipe asks for none."""
    if batch.tags_BK is None:
        raise BadOption("cpal learns from tags; the recipe wants weak_labels: tags")
    return batch.tags_BK.float()


def self_supervision(cam_BKhw: Tensor, other_BKhw: Tensor) -> Tensor:
    """L_self = mean |M - M'|, M' over its largest value in each class (SIPE's GSC loss; CPAL's with PACAM)."""
    return (cam_BKhw - divide_by_maximum(other_BKhw)).abs().mean()
