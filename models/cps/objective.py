"""Training of the DeepLabv3+ branches: CPS, its baseline, and the alternatives that its paper discusses (sec. 4).

    L = L_s + w(t) * L_u
    L_s  sum over branches of CE(branch(labelled), Y*), Y* the ground truth
    L_u  says what branches are to agree on beyond the labels; every objective has its own

w(t) grows linearly between two points of the schedule, and before the first only L_s is computed.
DEVIATION: the papers' w is constant, since they start from ImageNet weights; ours start from random ones.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from penumbra.models.blocks.losses import at_size, cross_entropy, mixed, ramp, soft_cross_entropy
from penumbra.models.card import IGNORE
from penumbra.models.contract import Views
from penumbra.models.cps.net import CpsNetwork
from penumbra.models.errors import BadOption
from penumbra.models.strict import read_strict


@dataclass(frozen=True, slots=True)
class Ramped:
    """weight: the final w. start, full: shares of the schedule where it begins to grow and is reached."""

    weight: float = 1.5
    start: float = 0.1
    full: float = 0.3


@dataclass(frozen=True, slots=True)
class SupervisedOptions:
    """There is nothing to choose."""

    weight, start, full = 0.0, 0.0, 1.0


@dataclass(frozen=True, slots=True)
class CpsOptions:
    """cps_weight: lambda, the final w. start, full: as in `Ramped`."""

    cps_weight: float = 1.5
    start: float = 0.1
    full: float = 0.3

    @property
    def weight(self) -> float:
        return self.cps_weight


class SemiSupervised(nn.Module):
    """The form of every objective, and with a weight of 0 the baseline, which learns from labelled pictures alone.

    It holds the network and its running average, which is served but teaches nobody. For the loop only. The baseline's
    unlabelled views are drawn, so that its labelled ones are those of a semi-supervised run, and never looked at.
    """

    def __init__(
        self, network: CpsNetwork, average: CpsNetwork, options: Ramped | CpsOptions | SupervisedOptions
    ) -> None:
        super().__init__()
        self.network, self.average, self.options = network, average, options

    def forward(self, batch: Views, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        weight = ramp(progress, self.options.start, self.options.full) * self.options.weight
        if weight == 0:
            supervised = self.supervise(batch)
            return {"total": supervised, "supervised": supervised}
        supervised, unsupervised = self.losses(batch)
        return {"total": supervised + weight * unsupervised, "supervised": supervised, "unsupervised": unsupervised}

    def supervise(self, batch: Views) -> Tensor:
        """Compute L_s alone."""
        return supervision(self.network.encode(batch.image_B3hw), batch.label_Bhw)

    def losses(self, batch: Views) -> tuple[Tensor, Tensor]:
        """Compute L_s and L_u."""
        raise NotImplementedError

    def encode_with(self, batch: Views, others_B3hw: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return L_s, and per branch logits of the labelled pictures and the others, from one pass."""
        logits = self.network.encode(torch.cat((batch.image_B3hw, others_B3hw)))
        return supervision([x[: len(batch.image_B3hw)] for x in logits], batch.label_Bhw), list(logits)

    def encode_mixed(self, batch: Views) -> tuple[Tensor, list[Tensor]]:
        """Return L_s, and per branch logits of the mixed strong pictures."""
        supervised, logits = self.encode_with(batch, mixed(batch.strong_B3hw, batch.mix_B1hw))
        return supervised, [x[len(batch.image_B3hw) :] for x in logits]


class CpsObjective(SemiSupervised):
    """Cross Pseudo Supervision with CutMix (Chen et al. 2021, sec. 3 and 4.2): two branches supervise each other.

        L_u = CE(branch1(x), Y2) + CE(branch2(x), Y1)

    x are mixed unlabelled pictures, and Y_i, without a gradient, is the argmax of branch i on the two unmixed pictures,
    mixed with the same mask. A single branch (`pseudo`, which the paper compares CPS with) teaches itself: with the
    same picture on both sides its own hard label would teach it nothing but confidence.
    DEVIATION: the second picture of a mix is the batch rolled by one instead of a second batch, and labelled and
    mixed pictures share one forward pass (and so BatchNorm statistics): half the cost on two cores.
    DEVIATION: mixed pictures have changed colours, which the paper's have not.
    """

    def losses(self, batch: Views) -> tuple[Tensor, Tensor]:
        pseudo = pseudo_labels(self.network, batch)
        supervised, strong = self.encode_mixed(batch)
        return supervised, cross_supervision(strong, pseudo)


class PlainCpsObjective(SemiSupervised):
    """CPS without CutMix: x are labelled and unlabelled pictures, and Y_i is the argmax of the same pass."""

    def losses(self, batch: Views) -> tuple[Tensor, Tensor]:
        known_Bhw = known_pixels(batch)
        supervised, logits = self.encode_with(batch, batch.weak_B3hw)
        pseudo = [at_size(x.detach(), known_Bhw).argmax(1).masked_fill(~known_Bhw, IGNORE) for x in logits]
        return supervised, cross_supervision(logits, pseudo)


@dataclass(frozen=True, slots=True)
class CrossProbabilityOptions(Ramped):
    """distance: d. weight: lambda."""

    distance: Literal["l2", "kl"] = "l2"


class CrossProbabilityObjective(SemiSupervised):
    """Cross probability consistency (Chen et al. 2021, sec. 4): two branches agree on soft instead of hard labels.

        L_u = mean over pixels of d(p1, p2), p_i = softmax(branch_i(x)), x labelled and unlabelled pictures
        l2   d = |p1 - p2|^2
        kl   d = KL(p1 || p2) + KL(p2 || p1)

    The gradient flows into both branches. The code is not released: lambda and that KL is symmetric are our choices.
    """

    options: CrossProbabilityOptions

    def losses(self, batch: Views) -> tuple[Tensor, Tensor]:
        known_Bhw = known_pixels(batch)
        supervised, logits = self.encode_with(batch, batch.weak_B3hw)
        one_BKhw, two_BKhw = (at_size(x, known_Bhw) for x in logits)
        distance = squared_distance if self.options.distance == "l2" else symmetric_divergence
        return supervised, mean_where(distance(one_BKhw, two_BKhw), known_Bhw)


@dataclass(frozen=True, slots=True)
class MeanTeacherOptions(Ramped):
    """weight: w. decay: a."""

    weight: float = 100.0
    decay: float = 0.99


class MeanTeacherObjective(SemiSupervised):
    """Mean Teacher (Tarvainen & Valpola 2017), as the code released with CPS has it.

        L_s = CE(student(labelled), Y*)
        L_u = mean over pixels and classes of (softmax(student(x)) - softmax(teacher(x)))^2
        teacher <- a * teacher + (1 - a) * student, before every step

    x are labelled and unlabelled pictures, the same views for both. branch1 is the student, branch2 the teacher, as in
    the published files, so it is saved with the network. The teacher begins as a copy, follows in its parameters alone
    (its BatchNorm statistics are those of its own passes), and gets no gradient. The published evaluation uses the
    student; here both are members.
    """

    options: MeanTeacherOptions

    def __init__(self, network: CpsNetwork, average: CpsNetwork, options: MeanTeacherOptions) -> None:
        super().__init__(network, average, options)
        for net in (network, average):
            net.get_submodule("branch2").load_state_dict(net.get_submodule("branch1").state_dict())
        self.teacher.requires_grad_(False)

    @property
    def student(self) -> nn.Module:
        return self.network.get_submodule("branch1")

    @property
    def teacher(self) -> nn.Module:
        return self.network.get_submodule("branch2")

    def forward(self, batch: Views, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        follow(self.teacher, self.student, decay=self.options.decay)
        return super().forward(batch, progress, generator)

    def supervise(self, batch: Views) -> Tensor:
        return cross_entropy(self.student(batch.image_B3hw), batch.label_Bhw)

    def losses(self, batch: Views) -> tuple[Tensor, Tensor]:
        image_B3hw, known_Bhw = torch.cat((batch.image_B3hw, batch.weak_B3hw)), known_pixels(batch)
        student_BKhw = self.student(image_B3hw)
        with torch.no_grad():
            target_BKhw = at_size(self.teacher(image_B3hw), known_Bhw).softmax(1)
        error_Bhw = (at_size(student_BKhw, known_Bhw).softmax(1) - target_BKhw).square().mean(1)
        supervised = cross_entropy(student_BKhw[: len(batch.image_B3hw)], batch.label_Bhw)
        return supervised, mean_where(error_Bhw, known_Bhw)


@dataclass(frozen=True, slots=True)
class PseudoSegOptions(Ramped):
    """weight: w. share: g, of the plain prediction in the label. temperature: T. The paper's g and T are 0.5."""

    weight: float = 1.0
    share: float = 0.5
    temperature: float = 0.5


class PseudoSegObjective(SemiSupervised):
    """PseudoSeg (Zou et al., ICLR 2021): calibrated soft labels of the weak view supervise the strong view.

        L_u = CE(net(strong), Y)
        Y = g * p + (1 - g) * sharpen(p, T), p = softmax(net(weak)) without a gradient
        sharpen(p, T)_k = p_k^(1/T) / sum_j p_j^(1/T)

    DEVIATION: the paper's Y is sharpen(g * softmax(p' / n) + (1 - g) * softmax(m' / n), T) of the decoder's logits p',
    a self-attention Grad-CAM m' and their common norm n. m' needs an image classifier that is trained along; without
    it there is nothing to bring to a common scale, and we fuse p with its own sharpened form.
    DEVIATION: strong views are mixed (CutMix), and Y alike; the paper's have boxes cut out.
    """

    options: PseudoSegOptions

    def losses(self, batch: Views) -> tuple[Tensor, Tensor]:
        (weak_BKhw,) = predict_weak(self.network, batch)
        target_BKhw = soft_labels(weak_BKhw, share=self.options.share, temperature=self.options.temperature)
        supervised, (strong_BKhw,) = self.encode_mixed(batch)
        inside_Bhw = mixed(batch.inside_Bhw, batch.mix_B1hw[:, 0])
        return supervised, soft_cross_entropy(strong_BKhw, mixed(target_BKhw, batch.mix_B1hw), inside_Bhw)


KINDS: dict[str, tuple[Callable[..., nn.Module], type, tuple[int, ...]]] = {
    "cps": (CpsObjective, CpsOptions, (2,)),
    "cps_plain": (PlainCpsObjective, CpsOptions, (2,)),
    "supervised": (SemiSupervised, SupervisedOptions, (1, 2)),
    "cross_probability": (CrossProbabilityObjective, CrossProbabilityOptions, (2,)),
    "mean_teacher": (MeanTeacherObjective, MeanTeacherOptions, (2,)),
    "pseudo": (CpsObjective, Ramped, (1,)),
    "pseudoseg": (PseudoSegObjective, PseudoSegOptions, (1,)),
}
"""By name: an objective, its options, and the numbers of branches that it can train."""


def build_objective(network: CpsNetwork, average: CpsNetwork, options: Mapping[str, Any]) -> nn.Module:
    """Build the objective that `kind` names (else `cps`), with the recipe's other options.

    Raises BadOption: an unknown kind, or branches that it cannot train; BadArtifact naming an unknown or mistyped
    option.
    """
    rest = dict(options)
    name, num_branches = str(rest.pop("kind", "cps")), len(network.names)
    if name not in KINDS:
        raise BadOption(f"recipe.objective.kind is {name!r}; one of {', '.join(KINDS)} is wanted")
    objective, kind, branches = KINDS[name]
    if num_branches not in branches:
        numbers = " or ".join(map(str, branches))
        raise BadOption(f"recipe.config.branches is {num_branches}; the objective {name!r} trains {numbers}")
    return objective(network, average, read_strict(kind, rest, where="recipe.objective"))


def supervision(logits: Sequence[Tensor], label_Bhw: Tensor) -> Tensor:
    """Sum the cross-entropy against ground truth over the branches."""
    return torch.stack([cross_entropy(x, label_Bhw) for x in logits]).sum()


def cross_supervision(logits: Sequence[Tensor], pseudo: Sequence[Tensor]) -> Tensor:
    """Sum the cross-entropy against the other branch's labels over the branches; a single one has its own."""
    return torch.stack([cross_entropy(x, y) for x, y in zip(logits, reversed(pseudo), strict=True)]).sum()


def mean_where(value_Bhw: Tensor, chosen_Bhw: Tensor) -> Tensor:
    """Average over the chosen pixels; 0 if none is."""
    return (value_Bhw * chosen_Bhw).sum() / chosen_Bhw.sum().clamp(min=1)


def known_pixels(batch: Views) -> Tensor:
    """Return known_Bhw of the labelled and the unlabelled pictures: pixels that can be compared.

    DEVIATION: void pixels of labelled pictures are left out, for they cannot be told from those beyond the picture.
    """
    return torch.cat((batch.label_Bhw != IGNORE, batch.inside_Bhw))


@torch.no_grad()
def predict_weak(network: CpsNetwork, batch: Views) -> list[Tensor]:
    """Predict per branch logits_BKhw of the weak views at their own size, without gradient (train-mode BatchNorm)."""
    logits = [at_size(x, batch.inside_Bhw) for x in network.encode(batch.weak_B3hw)]
    # Autocast has kept weights that were cast without gradient; the training pass must cast them anew.
    torch.clear_autocast_cache()
    return logits


def pseudo_labels(network: CpsNetwork, batch: Views) -> list[Tensor]:
    """Take per branch the argmax on the weak pictures, mixed as the strong ones are; IGNORE beyond the picture."""
    labels = [x.argmax(1).masked_fill(~batch.inside_Bhw, IGNORE) for x in predict_weak(network, batch)]
    return [mixed(label_Bhw, batch.mix_B1hw[:, 0]) for label_Bhw in labels]


def squared_distance(one_BKhw: Tensor, two_BKhw: Tensor) -> Tensor:
    """Return |p1 - p2|^2 of two sets of logits, per pixel, [0, 2]."""
    return (one_BKhw.softmax(1) - two_BKhw.softmax(1)).square().sum(1)


def symmetric_divergence(one_BKhw: Tensor, two_BKhw: Tensor) -> Tensor:
    """Return KL(p1 || p2) + KL(p2 || p1) = sum_k (p1 - p2) (log p1 - log p2) of two logits, per pixel, nats."""
    log_p1, log_p2 = one_BKhw.log_softmax(1), two_BKhw.log_softmax(1)
    return ((log_p1.exp() - log_p2.exp()) * (log_p1 - log_p2)).sum(1)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, *, decay: float) -> None:
    """Set teacher = decay * teacher + (1 - decay) * student, in place, parameters only."""
    for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        ours.lerp_(theirs, 1 - decay)


def soft_labels(logits_BKhw: Tensor, *, share: float, temperature: float) -> Tensor:
    """Return g * p + (1 - g) * sharpen(p, T); sharpening probabilities is dividing their logits by T."""
    return share * logits_BKhw.softmax(1) + (1 - share) * (logits_BKhw / temperature).softmax(1)
