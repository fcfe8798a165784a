"""The pseudo-mask network: image -> class activation maps -> image-specific or context-aware maps of present classes.

Without context prototypes this is SIPE (Chen et al. 2022), whose IS-CAM plays the part of CPAL's PACAM. No map depends
on the image's labels: they only say which classes take part in `decode`. Maps of K classes have the background first,
if there is one. Maps, seeds and prototypes (SIPE, sec. 3) want float32 or wider.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penumbra.models.blocks.backbone import build_backbone
from penumbra.models.blocks.layers import resize_like
from penumbra.models.blocks.resnet import ResNetConfig
from penumbra.models.card import PromptSpec
from penumbra.models.contract import Features, Network, Prompt
from penumbra.models.cpal.config import CpalConfig, choose_sampling
from penumbra.models.cpal.context import Context
from penumbra.models.cpal.pyramid import Pyramid

EPS = 1e-5
"""Beside the maximum of a map and the length of a feature, as in the released code."""
TINY = 1e-12
"""Keeps 0 / 0 of a pixel without any feature finite; changes nothing else."""
BACKGROUND_WEIGHT = 0.5
"""Weight of the background's overlap when classes compete for a pixel, as in the released code."""
SMALLEST = 1e-5
"""A map's value from which down its logarithm is taken as one: keeps logits finite."""
ABSENT = -200.0
"""Logit of a class that is not in the image: probability 0 in float32, yet of the size of a logit."""


class View(NamedTuple):
    """What one pass over an image shows. N foreground classes."""

    score_BN: Tensor
    raw_BNhw: Tensor
    hierarchical_BDhw: Tensor
    deep_BDhw: Tensor


class Localisation(NamedTuple):
    """What the training network of SIPE computes from an image and its labels."""

    view: View
    cam_BKhw: Tensor
    overlap_BKhw: Tensor
    seeds_BKhw: Tensor
    prototypes_BKD: Tensor
    is_cam_BKhw: Tensor


class CamNetwork(Network):
    """encode makes every member's maps of all classes and predicts the labels; decode is their logarithm.

    One scale: maps have the feature resolution (stride 16), and the logarithm is what gets resized by whoever reads
    it out. Several scales: maps are resized to the image and summed, as the published protocol does.
    """

    def __init__(self, config: CpalConfig) -> None:
        super().__init__()
        offered = ("cam", "is_cam", "pacam") if config.context else ("cam", "is_cam")
        self.sampling = choose_sampling(config, offered)
        self.prompt = PromptSpec(kind="tags", background=0 if config.background else None)
        self.num_classes, self.num_foreground = config.num_classes, config.num_foreground
        self.first_weight = BACKGROUND_WEIGHT if config.background else 1.0
        self.members, self.flip = config.members, config.flip
        self.tag_logit = math.log(config.tag_threshold / (1 - config.tag_threshold))
        self.pyramid = Pyramid(config.scales)
        resnet = ResNetConfig(config.depth, "plain", config.width, output_stride=16, dilation="none")
        self.backbone = build_backbone(config.lite or resnet)
        channels = (config.lite or resnet).stage_channels
        sides = [config.width * factor for factor in (2, 2, 4, 4)]
        pairs = zip(channels, sides, strict=True)
        self.sides = nn.ModuleList(nn.Conv2d(inside, outside, 1, bias=False) for inside, outside in pairs)
        self.classifier = nn.Conv2d(channels[-1], config.num_foreground, 1, bias=False)
        self.context = Context(config, sum(sides)) if config.context else None

    def encode(self, image_B3HW: Tensor) -> Features:
        """Return maps_BMKhw of M members, and the predicted label_BK (0 or 1, background first)."""
        views = [self.look(image) for image in self.pyramid(image_B3HW)]
        score_BN = torch.stack([view.score_BN for view in views]).mean(0)
        maps = [self.draw_maps(view) for view in views]
        if len(maps) > 1:
            flat = [resize_like(each.flatten(0, 1), image_B3HW, align_corners=False) for each in maps]
            maps = [each.unflatten(0, (-1, len(self.members))) for each in flat]
        return divide_by_maximum(torch.stack(maps).sum(0)), self.predict_tags(score_BN)

    def take_prompt(self, image_B3hw: Tensor, features: Features, prompt: Prompt) -> Features:
        return features[0], self.complete(prompt[0][:, -self.num_foreground :])

    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        """Return the log of the maps: softmax over the present classes gives each its share of their sum."""
        maps_BMKhw, label_BK = features
        present = label_BK[:, None, :, None, None] > 0
        logits_BMKhw = torch.where(present, maps_BMKhw.clamp_min(SMALLEST).log(), ABSENT)
        return logits_BMKhw.transpose(0, 1)

    def look(self, image_B3HW: Tensor) -> View:
        """Look at one scale. With `flip`, maps and features of image and mirror image are summed, scores averaged."""
        if not self.flip:
            return self.observe(image_B3HW)
        both = self.observe(torch.cat((image_B3HW, image_B3HW.flip(3))))
        score_2BN, *pairs = (each.unflatten(0, (2, -1)) for each in both)
        return View(score_2BN.mean(0), *(here + mirrored.flip(3) for here, mirrored in pairs))

    def observe(self, image_B3HW: Tensor) -> View:
        """Run the backbone: scores, raw CAM, hierarchical and deepest features.

        Hierarchical features join the unit-length side outputs of the four stages at the size of the third.
        """
        stages = self.backbone.stages(image_B3HW)
        sides = [unit_length(side(stage)) for side, stage in zip(self.sides, stages, strict=True)]
        sides = [resize_like(side, stages[2], align_corners=False) for side in sides]
        raw_BNhw = self.classifier(stages[3])
        return View(raw_BNhw.mean((2, 3)), raw_BNhw, torch.cat(sides, dim=1), stages[3])

    def draw_maps(self, view: View) -> Tensor:
        """Draw maps_BMKhw of the configured members at one scale."""
        cam_BKhw = self.normalise(view.raw_BNhw)
        maps = {"cam": cam_BKhw}
        if set(self.members) & {"is_cam", "pacam"}:
            seeds_BKhw = choose_seeds(overlap(cam_BKhw, view.hierarchical_BDhw, self.first_weight))
            prototypes_BKD = gather_prototypes(seeds_BKhw, view.hierarchical_BDhw)
            maps["is_cam"] = reactivate(view.hierarchical_BDhw, prototypes_BKD)
        if self.context is not None and "pacam" in self.members:
            maps["pacam"] = self.draw_pacam(self.context, view, cam_BKhw, maps["is_cam"])
        return torch.stack([maps[member] for member in self.members], dim=1)

    def draw_pacam(self, context: Context, view: View, cam_BKhw: Tensor, is_cam_BKhw: Tensor) -> Tensor:
        """Draw PACAM_BKhw. The public record has it for objects only; the background keeps SIPE's prototype (OURS)."""
        pacam_BNhw = context(view.hierarchical_BDhw, cam_BKhw[:, -self.num_foreground :])
        return torch.cat((is_cam_BKhw[:, :1], pacam_BNhw), dim=1)[:, -self.num_classes :]

    def normalise(self, raw_BNhw: Tensor) -> Tensor:
        """Return M_BKhw: the normalised CAM, the background's map first where there is one."""
        return normalise_cam(raw_BNhw)[:, -self.num_classes :]

    def complete(self, label_BN: Tensor) -> Tensor:
        """Return label_BK: the background, where there is one, is in every image."""
        return F.pad(label_BN, (1, 0), value=1.0)[:, -self.num_classes :]

    def predict_tags(self, score_BN: Tensor) -> Tensor:
        """Predict label_BK: the background, classes whose sigmoid(score) exceeds the threshold, always the best one."""
        best_B1 = score_BN.amax(1, keepdim=True)
        return self.complete(((score_BN > self.tag_logit) | (score_BN == best_B1)).to(score_BN.dtype))

    def localise(self, view: View, mask_BKhw: Tensor) -> Localisation:
        """Run what follows the backbone in SIPE's training: the CAM is masked, the deepest features find the seeds.

        mask: the label, as [B, K, 1, 1], times 0 where the map shows padding, as [B, 1, h, w].
        """
        cam_BKhw = self.normalise(view.raw_BNhw) * mask_BKhw
        overlap_BKhw = overlap(cam_BKhw, view.deep_BDhw, self.first_weight)
        seeds_BKhw = choose_seeds(overlap_BKhw) * mask_BKhw
        prototypes_BKD = gather_prototypes(seeds_BKhw, view.hierarchical_BDhw)
        is_cam_BKhw = reactivate(view.hierarchical_BDhw, prototypes_BKD)
        return Localisation(view, cam_BKhw, overlap_BKhw, seeds_BKhw, prototypes_BKD, is_cam_BKhw)


def normalise_cam(raw_BNhw: Tensor) -> Tensor:
    """Return M_BKhw in [0, 1]: ReLU, each class over its maximum, and 1 - max over classes as the background."""
    cam = divide_by_maximum(F.relu(raw_BNhw))
    return torch.cat((1 - cam.amax(1, keepdim=True), cam), dim=1)


def divide_by_maximum(maps: Tensor) -> Tensor:
    """Divide each map [..., h, w] by its own largest value."""
    return maps / (maps.amax((-2, -1), keepdim=True) + EPS)


def overlap(cam_BKhw: Tensor, feature_BDhw: Tensor, first_weight: float = BACKGROUND_WEIGHT) -> Tensor:
    """Return IoU_BKhw of every pixel's affinity map and every class's map, times a weight for the first class.

    A = ReLU(f^T f) of unit features; IoU_ki = sum_j A_ij M_kj / (sum_j A_ij + sum_j M_kj - sum_j A_ij M_kj). The sums
    of all classes are one matrix product: memory is (hw)^2, where the plain form takes K (hw)^2.
    """
    unit_BDp = unit_length(feature_BDhw).flatten(2)
    affinity_Bpp = F.relu(unit_BDp.transpose(1, 2) @ unit_BDp)
    cam_BKp = cam_BKhw.flatten(2)
    both_BKp = cam_BKp @ affinity_Bpp
    either_BKp = affinity_Bpp.sum(1, keepdim=True) + cam_BKp.sum(2, keepdim=True) - both_BKp
    iou_BKp = both_BKp / either_BKp.clamp_min(TINY)
    iou_BKp = torch.cat((first_weight * iou_BKp[:, :1], iou_BKp[:, 1:]), dim=1)
    return iou_BKp.unflatten(2, cam_BKhw.shape[2:])


def unit_length(feature_BDhw: Tensor) -> Tensor:
    """Scale features to length 1 over the channels."""
    return feature_BDhw / (feature_BDhw.norm(dim=1, keepdim=True) + EPS)


def choose_seeds(iou_BKhw: Tensor) -> Tensor:
    """Return seeds_BKhw, 1 at the class whose map overlaps most with a pixel's affinity."""
    return F.one_hot(iou_BKhw.argmax(1), iou_BKhw.shape[1]).movedim(-1, 1).to(iou_BKhw.dtype)


def gather_prototypes(seeds_BKhw: Tensor, feature_BDhw: Tensor) -> Tensor:
    """Return prototypes_BKD: mean over all pixels of seed times feature, zero for a class without a seed."""
    seeds_BKp, feature_BDp = seeds_BKhw.flatten(2), feature_BDhw.flatten(2)
    return seeds_BKp @ feature_BDp.transpose(1, 2) / seeds_BKp.shape[2]


def reactivate(feature_BDhw: Tensor, prototypes_BKD: Tensor) -> Tensor:
    """Return IS-CAM_BKhw = ReLU(cos(feature, prototype)); 0 for a zero prototype."""
    unit_BKD, unit_BDhw = F.normalize(prototypes_BKD, dim=2, eps=1e-8), F.normalize(feature_BDhw, dim=1, eps=1e-8)
    return F.relu(unit_BKD @ unit_BDhw.flatten(2)).unflatten(2, feature_BDhw.shape[2:])
