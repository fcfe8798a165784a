"""Moments and stitching: the compiled kernel, the plain form, and everything at once.

    python -m benchmarks.moments

19 classes, five samples of stride-4 logits read out at 1024x2048; then stitching one 512x512 window of 19 classes
into a canvas in each memory order, as the network's channels-last output and as the moments' rows.
"""

import torch
from torch.nn import functional as F

from benchmarks.rounds import measure, save
from penumbra.serving.engine import operators, plain
from penumbra.serving.engine.allocator import keep_freed_memory

SAMPLES, CLASSES, HEIGHT, WIDTH, WINDOW, ROUNDS = 5, 19, 1024, 2048, 512, 5


def all_at_once(logits: torch.Tensor) -> None:
    """Every sample's probabilities in memory, as one would write it first."""
    p_SKhw = F.interpolate(logits, (HEIGHT, WIDTH), mode="bilinear", align_corners=True).softmax(1)
    entropy = -(p_SKhw * p_SKhw.clamp(min=1e-37).log()).sum(1)
    p_SKhw.sum(0), entropy.sum(0)


def stitching() -> dict[str, float]:
    """Seconds for adding one weighted window into a wide canvas."""
    weight = torch.rand(WINDOW, WINDOW)
    last = torch.rand(1, CLASSES, WINDOW, WINDOW).contiguous(memory_format=torch.channels_last)[0]
    first_canvas = torch.zeros(CLASSES, WINDOW, 4 * WINDOW)
    last_canvas = torch.zeros(WINDOW, 4 * WINDOW, CLASSES)
    rows, rows_canvas = torch.zeros(WINDOW, CLASSES, WINDOW), torch.zeros(WINDOW, CLASSES, 4 * WINDOW)
    one, place = torch.ones(WINDOW), [0, 0, 0, 0, WINDOW, 0, WINDOW, 0, 0, WINDOW, WINDOW]
    return measure(
        {
            "channels-last window into channels-first canvas": lambda: first_canvas[:, :, :WINDOW].add_(last * weight),
            "channels-last window into channels-last canvas": lambda: last_canvas[:, :WINDOW].add_(
                last.permute(1, 2, 0) * weight[..., None]
            ),
            "rows into rows (ours)": lambda: operators.blend(
                rows[None], [rows_canvas], [one], place, num_sums=CLASSES, scale=1.0
            ),
        },
        rounds=4 * ROUNDS,
    )


@torch.inference_mode()
def main() -> None:
    keep_freed_memory()
    torch.manual_seed(0)
    logits = 3 * torch.randn(SAMPLES, CLASSES, HEIGHT // 4, WIDTH // 4)
    stats = torch.zeros(1, HEIGHT, CLASSES + 1, WIDTH)
    rule = {"first": False, "align_corners": True, "temperature": 1.0, "average_logits": False}
    seconds = measure(
        {
            "all at once": lambda: all_at_once(logits),
            "plain": lambda: plain.accumulate(logits[:, None], stats, *rule.values()),
            "accumulate": lambda: operators.accumulate(logits[:, None], stats, **rule),
        },
        rounds=ROUNDS,
    )
    stitch = stitching()
    save("moments", {
        **{f"ms/{name}": 1e3 * value for name, value in (seconds | stitch).items()},
        "kernel over all at once": seconds["accumulate"] / seconds["all at once"],
        "kernel over plain": seconds["accumulate"] / seconds["plain"],
    })  # fmt: skip


if __name__ == "__main__":
    main()
