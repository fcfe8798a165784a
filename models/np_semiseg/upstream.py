"""Published NP-SemiSeg checkpoints of both hosts, and how their evaluation runs them.

The class centres ("memories") stand beside the state dict, under swapped names: every official call passes
`latent_memory` to the deterministic path and `deterministic_memory` to the latent path.
"""

from penumbra.models.card import InputSpec, Readout, WindowSpec
from penumbra.models.errors import BadCheckpoint
from penumbra.models.layout import CITY_CLASSES, Assembly, Layout, Parts, Protocol, Upstream, read_depth
from penumbra.models.np_semiseg.net import augseg, u2pl

HOSTS = {512: u2pl, 304: augseg}
"""Hosts by the channels of the decoder feature that the head reduces."""
MEMORIES = {"latent_memory": "head.latent.context_centres", "deterministic_memory": "head.latent.latent_centres"}
HEAD = "decoder.classifier1."

NP = Layout(
    name="NP-SemiSeg",
    markers=(f"{HEAD}memory_dim_transform.Conv_1.0.weight", f"{HEAD}decoder.Conv_Decoder.0.weight"),
    containers=("teacher_state", "model_state"),
    renames={
        "encoder.": "encoder.",
        "decoder.low_conv.": "low.",
        "decoder.aspp.conv1.1.": "aspp.pool.0.",
        "decoder.aspp.conv1.2.": "aspp.pool.1.",
        "decoder.aspp.conv2.": "aspp.branches.0.",
        "decoder.aspp.conv3.": "aspp.branches.1.",
        "decoder.aspp.conv4.": "aspp.branches.2.",
        "decoder.aspp.conv5.": "aspp.branches.3.",
        "decoder.head.": "fuse.",
        f"{HEAD}memory_dim_transform.Conv_1.": "head.latent.reduce.",
        f"{HEAD}mean_logvar_net.MLP.L0.": "head.latent.statistics.0.",
        f"{HEAD}mean_logvar_net.MLP.L1.": "head.latent.statistics.2.",
        f"{HEAD}decoder.Conv_Decoder.0.": "head.conv1.",
        f"{HEAD}decoder.Conv_Decoder.3.": "head.conv2.",
        f"{HEAD}decoder.Conv_Decoder.6.": "head.classifier.",
        **MEMORIES,  # in a flat file
    },
    train_only=("decoder.classifier.", "decoder.representation.", "auxor."),
    beside=MEMORIES,
)
CENTRES = Layout(
    name="NP-SemiSeg memories", markers=tuple(MEMORIES), absent=NP.markers, containers=(), renames=MEMORIES
)
"""A file of the two memories alone: the AugSeg host does not save them."""

ZERO = (
    "the class centres are all zero, as official training saves them: attention is then uniform, and the latent's mean "
    "and sigma are the same for every image"
)


def assemble(parts: Parts) -> Assembly:
    """Read host, depth and class count off shapes. Raises BadCheckpoint: no network, an unknown host or depth."""
    tensors = parts.get(NP.name)
    if tensors is None:
        raise BadCheckpoint("memories alone make no network; give the file with the weights too")
    channels = tensors["head.latent.reduce.0.weight"].shape[1]
    if channels not in HOSTS:
        raise BadCheckpoint(f"the head has {channels} input channels; 512 (U2PL) or 304 (AugSeg) are known")
    host = HOSTS[channels]
    config = host(tensors["head.classifier.weight"].shape[0], read_depth(tensors, "encoder.layer3."))
    centres = [held[name] for held in parts.values() for name in MEMORIES.values() if name in held]
    return Assembly(
        config=config,
        input=InputSpec(),
        published=(published_u2pl if host is u2pl else published_augseg)(config.num_classes),
        ours=Protocol(window=WindowSpec(512, 512), default_samples=8),
        warnings=() if any(centre.any() for centre in centres) else (ZERO,),
    )


def published_u2pl(num_classes: int) -> Protocol:
    """Evaluate as `eval.py`: VOC as whole images, Cityscapes in windows of 769 px; T = 20, softmax at stride 4."""
    window = WindowSpec(0, 0)
    if num_classes == CITY_CLASSES:
        window = WindowSpec(769, 769, overlap=256 / 769, blend="uniform", padding="mean", centred=True)
    return Protocol(window, Readout(softmax_at="feature"), default_samples=20, noise_per="window")


def published_augseg(num_classes: int) -> Protocol:
    """Validate as while training, T = 5: Cityscapes in windows of 800 px, 533 apart; VOC averages logits."""
    if num_classes == CITY_CLASSES:
        window = WindowSpec(800, 800, overlap=267 / 800, blend="uniform", padding="mean", last="clip")
        return Protocol(window, default_samples=5, noise_per="window")
    return Protocol(WindowSpec(0, 0), Readout(average="logits"), default_samples=5, noise_per="window")


UPSTREAM = Upstream(
    layouts=(NP, CENTRES), assemble=assemble, source="Jianf-Wang/NP-SemiSeg afd967276c2728c2d7cb03c5f0d6ad0358f6bc96"
)
