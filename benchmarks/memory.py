"""Canvas memory against image height: 8192 px wide, 11 classes, windows of 512x512 at 0.25 overlap.

    python -m benchmarks.memory

Every height runs in a process of its own; the peak is the growth of its resident set while every window of the
image is stitched and every finished band is read out. MONAI's canvas holds height x width x classes instead.
"""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import torch

from benchmarks.rounds import forget_peak, peak_memory, save
from penumbra.models.card import ClassInfo, WindowSpec
from penumbra.serving.engine.canvas import Surface, Transfers, Wanted, read_band
from penumbra.serving.engine.canvas import stitch as blend
from penumbra.serving.engine.raster import Raster
from penumbra.serving.engine.windows import cover
from tests.toys import toy_card

WIDTH, CLASSES, HEIGHTS = 8192, 11, (1024, 2048, 4096, 8192)
CARD = replace(toy_card("pointwise")[0], classes=tuple(ClassInfo(str(k), (k, k, k)) for k in range(CLASSES)))


def stitch(height: int) -> tuple[int, int, int]:
    """Stitch and read out a whole image; returns windows, the canvas' bytes and those that memory grows by."""
    before = forget_peak()
    plan = cover(height, WIDTH, WindowSpec(512, 512, overlap=0.25))
    stats_BhCw = torch.full((1, 512, CLASSES + 1, 512), 1 / CLASSES)
    surface = Surface(
        Raster(np.zeros((1, 1, 3), np.uint8)), plan, Wanted(CARD.maps(1)), transfers=Transfers(torch.device("cpu")),
        channels=CLASSES + 1, most=1,
    )  # fmt: skip
    for window in plan:
        blend(stats_BhCw, [(surface, window)], CARD, 1)
        if rows := surface.finished(window):
            band = read_band(surface.canvas_RCW, *surface.lay_out(rows, CARD, 1), CARD)
            assert abs(float(band.maps["confidence"].max()) - 1 / CLASSES) < 1e-4
    return plan.num_windows, surface.canvas_RCW.nbytes, peak_memory() - before


def main() -> None:
    if len(sys.argv) > 1:
        print(*stitch(int(sys.argv[1])))
        return
    results: dict[str, object] = {}
    for height in HEIGHTS:
        command = [sys.executable, "-m", "benchmarks.memory", str(height)]
        words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        windows, canvas_bytes, peak_bytes = map(int, words)
        results[f"{height}x{WIDTH}: canvas MB"] = canvas_bytes / 2**20
        results[f"{height}x{WIDTH}: peak growth MB, {windows} windows"] = peak_bytes / 2**20
        results[f"{height}x{WIDTH}: a whole-image canvas would hold MB"] = height * WIDTH * CLASSES * 4 / 2**20
    save("memory", results)


if __name__ == "__main__":
    main()
