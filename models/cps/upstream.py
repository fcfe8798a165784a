"""Names of the published CPS checkpoints (TorchSemiSeg) and what they are called here, by prefix."""

RENAMES = {
    f"{branch}.{theirs}": f"{branch}.{ours}"
    for branch in ("branch1", "branch2")
    for theirs, ours in {
        "backbone.": "backbone.",
        "head.aspp.": "aspp.",
        "head.reduce.": "low.",
        "head.last_conv.": "fuse.",
        "classifier.": "classifier.",
    }.items()
}
TRAIN_ONLY: tuple[str, ...] = ()
