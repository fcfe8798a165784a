"""Names of the published NP-SemiSeg checkpoints (both hosts) and what they are called here, by prefix.

The class centres live beside the state dict under the names of MEMORIES, which upstream swaps: every official
call passes `latent_memory` to the deterministic path and `deterministic_memory` to the latent path.
"""

RENAMES = {
    "encoder.": "encoder.",
    "decoder.low_conv.": "low.",
    "decoder.aspp.conv1.1.": "aspp.pool.0.",
    "decoder.aspp.conv1.2.": "aspp.pool.1.",
    "decoder.aspp.conv2.": "aspp.branches.0.",
    "decoder.aspp.conv3.": "aspp.branches.1.",
    "decoder.aspp.conv4.": "aspp.branches.2.",
    "decoder.aspp.conv5.": "aspp.branches.3.",
    "decoder.head.": "fuse.",
    "decoder.classifier1.memory_dim_transform.Conv_1.": "head.latent.reduce.",
    "decoder.classifier1.mean_logvar_net.MLP.L0.": "head.latent.statistics.0.",
    "decoder.classifier1.mean_logvar_net.MLP.L1.": "head.latent.statistics.2.",
    "decoder.classifier1.decoder.Conv_Decoder.0.": "head.conv1.",
    "decoder.classifier1.decoder.Conv_Decoder.3.": "head.conv2.",
    "decoder.classifier1.decoder.Conv_Decoder.6.": "head.classifier.",
}
TRAIN_ONLY = ("decoder.classifier.", "decoder.representation.", "auxor.")
MEMORIES = {
    "latent_memory": "head.latent.context_centres",
    "deterministic_memory": "head.latent.latent_centres",
}
