"""Mean Teacher (Tarvainen & Valpola 2017), as the code released with CPS has it.

    L = CE(student(labelled), Y*) + w * mean over pixels and classes of (softmax(student(x)) - softmax(teacher(x)))^2
    teacher <- a * teacher + (1 - a) * student, before every step

x are labelled and unlabelled pictures, the same views for both. branch1 is the student, branch2 the teacher, as in the
published files. The teacher begins as a copy, follows in its parameters alone (its BatchNorm statistics are those of
its own passes), and gets no gradient. The published evaluation uses the student; here both are members.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from penumbra.models.blocks.losses import at_size, cross_entropy
from penumbra.models.contract import Views
from penumbra.models.cps.net import CpsNetwork
from penumbra.models.cps.objectives.semi_supervised import Ramped, SemiSupervised
from penumbra.models.cps.objectives.terms import mean_where, two_views


@dataclass(frozen=True, slots=True)
class MeanTeacherOptions(Ramped):
    """weight: w. decay: a."""

    weight: float = 100.0
    decay: float = 0.99


class MeanTeacherObjective(SemiSupervised):
    """The teacher's state is branch2 of the network, so it is saved with it."""

    def __init__(self, network: CpsNetwork, average: CpsNetwork, options: MeanTeacherOptions) -> None:
        super().__init__(network, average, options)
        self.decay = options.decay
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
        follow(self.teacher, self.student, decay=self.decay)
        return super().forward(batch, progress, generator)

    def supervise(self, batch: Views) -> Tensor:
        return cross_entropy(self.student(batch.image_B3hw), batch.label_Bhw)

    def losses(self, batch: Views) -> tuple[Tensor, Tensor]:
        image_B3hw, known_Bhw = two_views(batch)
        student_BKhw = self.student(image_B3hw)
        with torch.no_grad():
            target_BKhw = at_size(self.teacher(image_B3hw), known_Bhw).softmax(1)
        error_Bhw = (at_size(student_BKhw, known_Bhw).softmax(1) - target_BKhw).square().mean(1)
        supervised = cross_entropy(student_BKhw[: len(batch.image_B3hw)], batch.label_Bhw)
        return supervised, mean_where(error_Bhw, known_Bhw)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, *, decay: float) -> None:
    """teacher = decay * teacher + (1 - decay) * student, in place, parameters only."""
    for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        ours.lerp_(theirs, 1 - decay)
