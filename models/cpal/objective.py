"""Training of CPAL in two stages, one recipe each: maps from tags, then a segmentation network from their masks.

Stage 1 (Tang et al. 2024, on SIPE, Chen et al. 2022) learns activation maps from the tags of views alone:

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

Stage 2: a segmentation network learns the pseudo masks that stage 1 draws from the tags of views:

    L = mean over the network's members s of CE(logits_s(strong view), Y)
    Y = argmax over tagged classes of the mean over CAM and PACAM of softmax(log map), of the weak view

Masks are drawn view by view, so they are as fresh as the views and nothing is stored. Every scale of DeepLabV2 is a
member and has its own loss, as in the public code of kazuto1011.
DEVIATION: no CRF and no random walk between the stages; no mean over scales with flips, unless the checkpoint has it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penumbra.models.blocks.layers import draw_noise
from penumbra.models.blocks.losses import at_size, cross_entropy, ramp
from penumbra.models.card import IGNORE
from penumbra.models.checkpoint import load_checkpoint
from penumbra.models.contract import Network, Views
from penumbra.models.cpal.context import BANK_SIZE, SupportBank, summarise
from penumbra.models.cpal.net import CamNetwork, Localisation, View, divide_by_maximum
from penumbra.models.errors import BadOption
from penumbra.models.strict import read_strict


def build_objective(network: Network, average: Network, options: Mapping[str, Any]) -> nn.Module:
    """Build the objective of the network's stage. Raises BadOption, or BadArtifact naming an option."""
    if isinstance(network, CamNetwork) and isinstance(average, CamNetwork):
        return CamObjective(network, average, read_cam_options(options))
    return MaskObjective(network, average, read_strict(MaskOptions, dict(options), where="recipe.objective"))


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
            found = self.network.localise(view, mask_BKhw)
            self._remember(found)
            classification = F.multilabel_soft_margin_loss(view.score_BN, tags_BN)
            agreement = self_supervision(found.cam_BKhw, self._second_map(found) * mask_BKhw)
        weight = self.options.self_weight * ramp(progress, self.options.start, self.options.full)
        total = classification + weight * agreement
        context = self.has_context.float()
        return {"total": total, "classification": classification, "self_supervised": agreement, "context": context}

    def _mask(self, tags_BN: Tensor, inside_Bhw: Tensor, view: View) -> Tensor:
        """Return SIPE's mask_BKhw: 1 for a tagged class where the map shows the picture."""
        inside_B1hw = F.interpolate(inside_Bhw[:, None].float(), view.raw_BNhw.shape[-2:], mode="nearest-exact")
        return self.network.complete(tags_BN)[..., None, None] * inside_B1hw

    def _second_map(self, found: Localisation) -> Tensor:
        """Return what the CAM is compared with: PACAM_BKhw, or IS-CAM_BKhw as long as there is no context."""
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
        if min(map(len, self.bank.rows)) >= max(options.least_rows, num_prototypes):
            summary = summarise(self.bank, num_prototypes, generator)
            ours.adopt(*summary)
            theirs.adopt(*summary)  # averages of centroids would mix clusters that have changed their places
            self.has_context.fill_(True)

    def get_extra_state(self) -> list[Tensor]:
        """Return the bank's rows, class by class, for `state_dict`."""
        return list(self.bank.rows)

    def set_extra_state(self, state: list[Tensor]) -> None:
        self.bank.rows = list(state)


def read_cam_options(options: Mapping[str, Any]) -> CamOptions:
    """Read the options of stage 1. Raises BadArtifact naming an unknown or mistyped option, BadOption."""
    read = read_strict(CamOptions, dict(options), where="recipe.objective")
    if min(read.summarise_every, read.least_rows, read.bank_rows - read.least_rows + 1) < 1:
        raise BadOption(
            f"recipe.objective has bank_rows {read.bank_rows}, least_rows {read.least_rows} and summarise_every "
            f"{read.summarise_every}; positive ones with least_rows <= bank_rows are wanted"
        )
    return read


def read_tags(batch: Views) -> Tensor:
    """Return tags_BK in float32, whatever the precision of the step. Raises BadOption where the recipe has none."""
    if batch.tags_BK is None:
        raise BadOption("cpal learns from tags; the recipe wants weak_labels: tags")
    return batch.tags_BK.float()


def self_supervision(cam_BKhw: Tensor, other_BKhw: Tensor) -> Tensor:
    """Return mean |M - M'|, M' over its largest value in each class (SIPE's GSC loss; CPAL's with PACAM)."""
    return (cam_BKhw - divide_by_maximum(other_BKhw)).abs().mean()


@dataclass(frozen=True, slots=True)
class MaskOptions:
    """maps: the checkpoint of stage 1."""

    maps: str


class MaskObjective(nn.Module):
    """Holds the network, its running average and the frozen network of stage 1. For the loop only, once per step.

    Raises BadCheckpoint, and BadOption where the file of stage 1 is another network's.
    """

    def __init__(self, network: Network, average: Network, options: MaskOptions) -> None:
        super().__init__()
        self.network, self.average = network, average
        card, teacher = load_checkpoint(Path(options.maps))
        if not isinstance(teacher, CamNetwork):
            wanted = "one of cpal that draws maps (net: cam) is wanted"
            raise BadOption(f"{options.maps} is a network of {card.method}; {wanted}")
        self.teacher = teacher

    def train(self, mode: bool = True) -> "MaskObjective":
        """Set the mode as every module does, but leave the teacher's BatchNorm as it is."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: Views, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        pseudo_Bhw = draw_masks(self.teacher, batch)
        sampling = self.network.sampling
        num_samples = 1 if sampling.is_stochastic else sampling.default_samples
        noise_SBL = draw_noise(sampling, num_samples, len(batch.strong_B3hw), generator)
        logits_SBKhw = self.network(batch.strong_B3hw, noise_SBL.to(batch.strong_B3hw.device))
        loss = torch.stack([cross_entropy(logits_BKhw, pseudo_Bhw) for logits_BKhw in logits_SBKhw]).mean()
        return {"total": loss}


@torch.no_grad()
def draw_masks(teacher: CamNetwork, batch: Views) -> Tensor:
    """Draw pseudo_Bhw of the weak views, as the server would answer with these tags; IGNORE beyond the picture."""
    image_B3hw, tags_BK = batch.weak_B3hw.float(), read_tags(batch)
    if tags_BK.shape[1] != teacher.num_classes:
        raise BadOption(f"the maps are of {teacher.num_classes} classes, the data has {tags_BK.shape[1]}")
    with torch.autocast(image_B3hw.device.type, enabled=False):
        features = teacher.take_prompt(image_B3hw, teacher.encode(image_B3hw), (tags_BK,))
        logits_SBKhw = teacher.decode(features, image_B3hw.new_zeros(len(teacher.members), len(image_B3hw), 0))
        prob_BKhw = torch.stack([at_size(each, batch.inside_Bhw).softmax(1) for each in logits_SBKhw]).mean(0)
    return prob_BKhw.argmax(1).masked_fill(~batch.inside_Bhw, IGNORE)
