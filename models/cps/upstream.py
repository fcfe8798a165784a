"""Published checkpoints of CPS and its siblings in TorchSemiSeg, and how their evaluation runs them.

CPS and Mean Teacher have the same names, so a file does not say which of them it is; Mean Teacher's branch1 is the
student, which its evaluation uses. GCT's `l_model` is evaluated too. CCT has one network, without a prefix.
"""

from penumbra.models.blocks.resnet import ResNetConfig
from penumbra.models.card import InputSpec, Readout, WindowSpec
from penumbra.models.cps.net import CpsConfig
from penumbra.models.layout import CITY_CLASSES, Assembly, Layout, Parts, Protocol, Upstream, only_part, read_depth


def _branch(theirs: str, ours: str, classifier: str = "classifier.") -> dict[str, str]:
    """List the renames of one DeepLabv3+, for a prefix of theirs and one of ours."""
    names = {
        "backbone.": "backbone.",
        "head.aspp.": "aspp.",
        "head.reduce.": "low.",
        "head.last_conv.": "fuse.",
        classifier: "classifier.",
    }
    return {f"{theirs}{there}": f"{ours}{here}" for there, here in names.items()}


CPS = Layout(
    name="CPS or Mean Teacher (branch1, branch2)",
    markers=("branch1.head.aspp.red_conv.weight", "branch2.head.aspp.red_conv.weight"),
    renames=_branch("branch1.", "branch1.") | _branch("branch2.", "branch2."),
)
GCT = Layout(
    name="GCT (l_model, r_model)",
    markers=("l_model.head.aspp.red_conv.weight", "r_model.head.aspp.red_conv.weight"),
    renames=_branch("l_model.", "branch1.") | _branch("r_model.", "branch2."),
    train_only=("fd_model.", "flawmap_handler.", "fdgt_generator."),
)
CCT = Layout(
    name="CCT (main_decoder)",
    markers=("head.aspp.red_conv.weight", "main_decoder.upsample.classifier.weight"),
    renames=_branch("", "branch1.", "main_decoder.upsample.classifier."),
    train_only=("aux_decoders.",),
)


def assemble(parts: Parts) -> Assembly:
    """Read the configuration from counts and shapes. Raises BadCheckpoint: more than one file, an unknown depth."""
    _, tensors = only_part(parts)
    num_classes = tensors["branch1.classifier.weight"].shape[0]
    backbone = ResNetConfig(depth=read_depth(tensors, "branch1.backbone.layer3."))
    both = any(key.startswith("branch2.") for key in tensors)
    return Assembly(
        config=CpsConfig(num_classes, backbone, branches=1),
        input=InputSpec(),
        published=published(num_classes),
        ours=Protocol(window=WindowSpec(512, 512)),
        ours_config=CpsConfig(num_classes, backbone, branches=2 if both else 1),
    )


def published(num_classes: int) -> Protocol:
    """Evaluate as `Evaluator.sliding_eval`: branch1, windows of 512 (VOC) or 800 px (Cityscapes) two thirds apart.

    DEVIATION: upstream adds up overlapping logits without dividing by their number; the labels are the same, but a
    softmax of sums is overconfident, so they are averaged here.
    """
    size = 800 if num_classes == CITY_CLASSES else 512
    window = WindowSpec(size, size, overlap=1 / 3, blend="uniform", padding="mean_or_black", centred=True)
    return Protocol(window=window, readout=Readout(average="logits"), unused=("branch2.",))


UPSTREAM = Upstream(
    layouts=(CPS, GCT, CCT),
    assemble=assemble,
    source="charlesCXK/TorchSemiSeg 5e0c29c02738728b6848a732817db15620a6e034",
)
