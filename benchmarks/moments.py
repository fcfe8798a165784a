"""Moments and stitching: the compiled kernel, the plain form, and everything at once.

    python -m benchmarks.moments

19 classes, five samples of stride-4 logits read out at 1024x2048; then stitching one 512x512 window of 19 classes
into a canvas in each memory order, as the network's channels-last output and as the moments' rows.
"""

import torch
from torch.nn import functional as F

from benchmarks.rounds import measure, save
from penumbra.models.card import Readout
from penumbra.serving.engine import operators, plain
from penumbra.serving.engine.allocator import keep_freed_memory

SAMPLES, CLASSES, HEIGHT, WIDTH, WINDOW, ROUNDS = 5, 19, 1024, 2048, 512, 5


def all_at_once(logits: torch.Tensor, size: tuple[int, int]) -> None:
    """Every sample's probabilities in memory, as one would write it first."""
    p_SKhw = F.interpolate(logits, size, mode="bilinear", align_corners=True).softmax(1)
    entropy = -(p_SKhw * p_SKhw.clamp(min=1e-37).log()).sum(1)
    p_SKhw.sum(0), entropy.sum(0)


def reading_out(height: int, width: int) -> dict[str, float]:
    """Seconds for the moments of samples at stride 4."""
    logits = 3 * torch.randn(SAMPLES, CLASSES, height // 4, width // 4)
    stats = torch.zeros(1, height, CLASSES + 1, width)
    return measure(
        {
            "all at once": lambda: all_at_once(logits, (height, width)),
            "plain": lambda: plain.accumulate(logits[:, None], stats, Readout(), first=False),
            "accumulate": lambda: operators.accumulate(logits[:, None], stats, Readout(), first=False),
        },
        rounds=ROUNDS,
    )


def stitching(size: int) -> dict[str, float]:
    """Seconds for adding one weighted window into a wide canvas."""
    weight = torch.rand(size, size)
    last = torch.rand(1, CLASSES, size, size).contiguous(memory_format=torch.channels_last)[0]
    first_canvas, last_canvas = torch.zeros(CLASSES, size, 4 * size), torch.zeros(size, 4 * size, CLASSES)
    rows, rows_canvas = torch.zeros(size, CLASSES, size), torch.zeros(size, CLASSES, 4 * size)
    one, place = torch.ones(size), [0, 0, 0, 0, size, 0, size, 0, 0, size, size]
    return measure(
        {
            "channels-last window into channels-first canvas": lambda: first_canvas[:, :, :size].add_(last * weight),
            "channels-last window into channels-last canvas": lambda: last_canvas[:, :size].add_(
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
    seconds, stitch = reading_out(HEIGHT, WIDTH), stitching(WINDOW)
    save("moments", {
        **{f"ms/{name}": 1e3 * value for name, value in (seconds | stitch).items()},
        "kernel over all at once": seconds["accumulate"] / seconds["all at once"],
        "kernel over plain": seconds["accumulate"] / seconds["plain"],
    })  # fmt: skip


if __name__ == "__main__":
    main()
