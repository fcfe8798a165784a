"""Training of self-correcting networks (Ibrahim, Vahdat, Ranjbar, Macready 2020, sec. 3) from masks and boxes.

    F  labelled pictures, with masks (and the boxes round them); W  unlabelled pictures, with boxes only
    primary     L = CE(p, F) + w(t) * mean over W of -sum_k q_k log p_k,   q carries no gradient
    ancillary   L = CE(p_anc, F), p_anc sees the boxes
    correction  none           q = p_anc
                linear         q = argmin KL(q || p) + alpha KL(q || p_anc), alpha falling from 30 to 0.5
                convolutional  q = softmax(CNN(l, l_anc)), L = CE(q, F)

Stages by progress. none, linear: the ancillary on F; then the primary on F and W, the ancillary frozen.
convolutional: the ancillary on half of F; primary and correction on F, the ancillary frozen; then all three, the
ancillary on its half, the correction on F, the primary on F and W.
DEVIATION: the half of F is half of every labelled batch, for a batch does not say which frames are in it. The paper
keeps the other half unseen, so that q meets a p_anc as unsure as on W; here it sees all of F, half as often.
DEVIATION: when its stage ends, the ancillary becomes its running average, for the rate has not fallen by then.
OURS: with `config.partial` the ancillary is taught with all boxes of half of the views and with some of the others', so
that what a request does not box is not read as absent. q is made with all boxes, as before.
DEVIATION: w ramps up, since we train from scratch and the paper from ImageNet weights. alpha's curve is OURS,
exponential; the paper names its ends. The ancillary sees W as it is, the primary with changed colours.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn

from penumbra.models.blocks.losses import at_size, cross_entropy, ramp, soft_cross_entropy
from penumbra.models.contract import Views
from penumbra.models.errors import BadOption
from penumbra.models.self_correcting.net import SelfCorrectingNetwork, correct_by_convolution, correct_linearly
from penumbra.models.strict import read_strict


class Stage(IntEnum):
    """A stage of the schedule; `INITIAL` is the convolutional correction's alone."""

    ANCILLARY = 1
    INITIAL = 2
    ALL = 3


@dataclass(frozen=True, slots=True)
class SelfCorrectingOptions:
    """ancillary_share, initial_share: of the schedule, the first and the second stage.

    weak_weight: of the term on W; it is reached `ramp_share` of the schedule after the last stage has begun.
    alpha_start, alpha_end: of the linear correction, in the last stage.
    """

    ancillary_share: float = 0.25
    initial_share: float = 0.2
    weak_weight: float = 1.0
    ramp_share: float = 0.1
    alpha_start: float = 30.0
    alpha_end: float = 0.5


class SelfCorrectingObjective(nn.Module):
    """Holds the network and its running average, which is served but teaches only at the end of the first stage.

    For the loop only. settled: whether the ancillary has become its running average; a resumed run must know.
    """

    settled: Tensor

    def __init__(
        self, network: SelfCorrectingNetwork, average: SelfCorrectingNetwork, options: SelfCorrectingOptions
    ) -> None:
        super().__init__()
        self.network, self.average, self.options = network, average, options
        self.convolutional = network.config.correction == "convolutional"
        self.settled = nn.Buffer(torch.tensor(False))

    def forward(self, batch: Views, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        boxes_BKhw, label_boxes_BKhw = self._boxes(batch)
        stage = self.stage(progress)
        if stage == Stage.ANCILLARY:
            ancillary = self._teach_ancillary(batch, label_boxes_BKhw, generator)
            return {"total": ancillary, "ancillary": ancillary}
        self._settle()
        weight = self.weak_weight(progress)
        num, image_B3hw = len(batch.image_B3hw), batch.image_B3hw
        if weight > 0:
            image_B3hw = torch.cat((image_B3hw, batch.strong_B3hw))
        logits_BKhw = self.network.primary(image_B3hw)
        parts = {"supervised": cross_entropy(logits_BKhw[:num], batch.label_Bhw)}
        if self.convolutional:
            corrected_BKhw = self.correct(batch.image_B3hw, logits_BKhw[:num], label_boxes_BKhw, progress)
            parts["correction"] = cross_entropy(corrected_BKhw, batch.label_Bhw)
            if stage == Stage.ALL:
                parts["ancillary"] = self._teach_ancillary(batch, label_boxes_BKhw, generator)
        total = torch.stack(list(parts.values())).sum()
        if weight > 0:
            q_BKhw = self._soft_labels(batch, logits_BKhw[num:], boxes_BKhw, progress)
            parts["weak"] = soft_cross_entropy(logits_BKhw[num:], q_BKhw, batch.inside_Bhw)
            total = total + weight * parts["weak"]
        return {"total": total, **parts}

    def stage(self, progress: float) -> Stage:
        """Return the stage of the schedule that `progress` is in."""
        if progress < self.options.ancillary_share:
            return Stage.ANCILLARY
        return Stage.INITIAL if progress < self._last_stage() else Stage.ALL

    def begin_of(self, part: nn.Module) -> float:
        """Return the progress at which a part of the network is first trained."""
        return self.options.ancillary_share if part in self.network.primary.modules() else 0.0

    def weak_weight(self, progress: float) -> float:
        """Return w(t)."""
        start = self._last_stage()
        return self.options.weak_weight * ramp(progress, start, start + self.options.ramp_share)

    def alpha(self, progress: float) -> float:
        """Return the linear correction's weight of the ancillary, falling exponentially over the last stage."""
        o, share = self.options, ramp(progress, self._last_stage(), 1.0)
        return o.alpha_start * math.pow(o.alpha_end / o.alpha_start, share)

    def correct(self, image_B3hw: Tensor, logits_BKhw: Tensor, boxes_BKhw: Tensor, progress: float) -> Tensor:
        """Return logits of q. Only the correction's own weights have a gradient from it."""
        with torch.no_grad():
            ancillary_BKhw: Tensor = self.network.ancillary.eval()(image_B3hw, boxes_BKhw)
        members_BMKhw = torch.stack((logits_BKhw.detach(), ancillary_BKhw), dim=1)
        if self.convolutional:
            return correct_by_convolution(members_BMKhw, image_B3hw, self.network.correction)[:, -1]
        if self.network.config.correction == "linear":
            alpha_B = members_BMKhw.new_full((len(members_BMKhw),), self.alpha(progress), dtype=torch.float32)
            return correct_linearly(members_BMKhw, alpha_B)[:, -1]
        return ancillary_BKhw

    @torch.no_grad()
    def _soft_labels(self, batch: Views, logits_BKhw: Tensor, boxes_BKhw: Tensor, progress: float) -> Tensor:
        """Return q_BKhw of W, at the pictures' size."""
        corrected_BKhw = self.correct(batch.weak_B3hw, logits_BKhw, boxes_BKhw, progress)
        return at_size(corrected_BKhw, batch.inside_Bhw).softmax(1)

    def _teach_ancillary(self, batch: Views, boxes_BKhw: Tensor, generator: torch.Generator) -> Tensor:
        """Return CE(p_anc, F), or over half of it. BatchNorm sees all: the pooled branch has one value per picture."""
        num = len(batch.image_B3hw)
        if self.network.config.partial and batch.label_boxes_BKhw is not None:
            boxes_BKhw = boxes_BKhw * draw_kept(batch.label_boxes_BKhw, generator)
        half = (num + 1) // 2 if self.convolutional else num
        logits_BKhw = self.network.ancillary.train()(batch.image_B3hw, boxes_BKhw)
        return cross_entropy(logits_BKhw[:half], batch.label_Bhw[:half])

    @torch.no_grad()
    def _settle(self) -> None:
        """Make the ancillary its running average, once, when its first stage is over."""
        if not self.settled:
            self.network.ancillary.load_state_dict(self.average.ancillary.state_dict())
            self.settled.fill_(True)

    def _last_stage(self) -> float:
        """Return the progress at which the last stage begins."""
        return self.options.ancillary_share + (self.options.initial_share if self.convolutional else 0.0)

    def _boxes(self, batch: Views) -> tuple[Tensor, Tensor]:
        """Return boxes of W and of F; none of the class that lies outside of every box, as in a request."""
        if batch.boxes_BKhw is None or batch.label_boxes_BKhw is None:
            raise BadOption(
                "the batches have no boxes, which self_correcting learns from; weak_labels 'boxes' is wanted"
            )
        kept_K11 = torch.ones_like(batch.boxes_BKhw[0, :, :1, :1])
        if (background := self.network.prompt.background) is not None:
            kept_K11[background] = 0
        return batch.boxes_BKhw.sign() * kept_K11, batch.label_boxes_BKhw.sign() * kept_K11


def draw_kept(number_BKhw: Tensor, generator: torch.Generator) -> Tensor:
    """Draw which boxes a view keeps, by their numbers: all in half of the views, else each with a chance of the view's.

    Returns 1 where a kept box lies and 0 elsewhere, BKhw.
    """
    num, num_boxes = len(number_BKhw), int(number_BKhw.max())
    chance_B1 = 2 * torch.rand(num, 1, generator=generator)
    kept_BN = torch.rand(num, num_boxes + 1, generator=generator) < chance_B1
    kept_BN[:, 0] = False  # no box
    index_BN = number_BKhw.flatten(1).long()
    return kept_BN.to(number_BKhw).gather(1, index_BN).view_as(number_BKhw)


def build_objective(
    network: SelfCorrectingNetwork, average: SelfCorrectingNetwork, options: Mapping[str, Any]
) -> SelfCorrectingObjective:
    """Build the objective from a recipe's options.

    Raises BadArtifact naming an unknown or mistyped one, BadOption: the network has no ancillary.
    """
    if not network.config.ancillary:
        raise BadOption("recipe.config.ancillary is false; self-correction learns from the network that sees boxes")
    settings = read_strict(SelfCorrectingOptions, dict(options), where="recipe.objective")
    return SelfCorrectingObjective(network, average, settings)
