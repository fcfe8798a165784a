"""Stage 2 of CPAL: a segmentation network learns the pseudo masks that stage 1 draws from the tags of views.

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

from penumbra.models.blocks.losses import at_size, cross_entropy
from penumbra.models.card import IGNORE, read_strict
from penumbra.models.checkpoint import load_checkpoint
from penumbra.models.contract import Network, Views
from penumbra.models.cpal.net import CamNetwork
from penumbra.models.cpal.objective_cam import read_tags
from penumbra.models.errors import BadOption


@dataclass(frozen=True, slots=True)
class MaskOptions:
    """maps: the checkpoint of stage 1."""

    maps: str


class MaskObjective(nn.Module):
    """Holds the network, its running average and the frozen network of stage 1. For the loop only, once per step."""

    def __init__(self, network: Network, average: Network, options: MaskOptions) -> None:
        super().__init__()
        self.network, self.average = network, average
        self.teacher = load_maps(Path(options.maps))

    def train(self, mode: bool = True) -> "MaskObjective":
        """As of every module, but the teacher's BatchNorm stays as it is."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: Views, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        pseudo_Bhw = draw_masks(self.teacher, batch)
        noise_SBL = self._noise(len(batch.strong_B3hw), generator).to(batch.strong_B3hw.device)
        logits_SBKhw = self.network(batch.strong_B3hw, noise_SBL)
        loss = torch.stack([cross_entropy(logits_BKhw, pseudo_Bhw) for logits_BKhw in logits_SBKhw]).mean()
        return {"total": loss}

    def _noise(self, num: int, generator: torch.Generator) -> Tensor:
        """One dropout mask per picture, or what the members do not look at."""
        law = self.network.sampling
        if law.kind != "dropout":
            return torch.zeros(law.default_samples, num, 0)
        return torch.bernoulli(torch.full((1, num, law.noise_length), law.keep), generator=generator) / law.keep


def read_mask_options(options: Mapping[str, Any]) -> MaskOptions:
    """Raises BadArtifact naming an unknown or missing option."""
    return read_strict(MaskOptions, dict(options), where="recipe.objective")


def load_maps(path: Path) -> CamNetwork:
    """The network of stage 1, frozen. Raises BadCheckpoint, and BadOption where the file is another network's."""
    card, network = load_checkpoint(path)
    if not isinstance(network, CamNetwork):
        raise BadOption(f"{path} is a network of {card.method}; one of cpal that draws maps (net: cam) is wanted")
    return network


@torch.no_grad()
def draw_masks(teacher: CamNetwork, batch: Views) -> Tensor:
    """pseudo_Bhw of the weak views, as the server would answer with these tags; IGNORE beyond the picture."""
    image_B3hw, tags_BK = batch.weak_B3hw.float(), read_tags(batch)
    if tags_BK.shape[1] != teacher.num_classes:
        raise BadOption(f"the maps are of {teacher.num_classes} classes, the data has {tags_BK.shape[1]}")
    with torch.autocast(image_B3hw.device.type, enabled=False):
        features = teacher.take_prompt(image_B3hw, teacher.encode(image_B3hw), (tags_BK,))
        logits_SBKhw = teacher.decode(features, image_B3hw.new_zeros(len(teacher.members), len(image_B3hw), 0))
        prob_BKhw = torch.stack([at_size(each, batch.inside_Bhw).softmax(1) for each in logits_SBKhw]).mean(0)
    return prob_BKhw.argmax(1).masked_fill(~batch.inside_Bhw, IGNORE)
