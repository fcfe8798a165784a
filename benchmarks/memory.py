"""Canvas memory against image height: 8192 px wide, 11 classes, windows of 512x512 at 0.25 overlap.

    python -m benchmarks.memory

Every height runs in a process of its own; the peak is the growth of its resident set while every window of the
image is stitched and every finished band is read out. MONAI's canvas holds height x width x classes instead.
"""

import resource
import subprocess
import sys

import numpy as np

from benchmarks.rounds import save
from penumbra.models.card import WindowSpec
from penumbra.models.toy.cards import toy_card
from penumbra.serving.engine.canvas import Canvas
from penumbra.serving.engine.moments import Moments
from penumbra.serving.engine.uncertainty import read_out
from penumbra.serving.engine.windows import cover

CARD = toy_card("pointwise")[0]
WIDTH, CLASSES, HEIGHTS = 8192, 11, (1024, 2048, 4096, 8192)


def stitch(height: int) -> tuple[int, int, int]:
    """Stitch and read out a whole image; returns windows, the canvas' bytes and the peak growth in KiB."""
    spec = WindowSpec(512, 512, overlap=0.25)
    moments = Moments(np.full((512, CLASSES, 512), 1 / CLASSES, np.float32), np.ones((512, 512), np.float32), 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = cover(height, WIDTH, spec)
    canvas = Canvas(plan, CLASSES)
    for window in plan:
        canvas.add(window, moments)
        for y0, merged_hKW, expected_hW, _ in canvas.finished(window):
            band = read_out(y0, merged_hKW, expected_hW, card=CARD, num_samples=1)
            assert abs(float(band.maps["confidence"].max()) - 1 / CLASSES) < 1e-4
    return plan.num_windows, canvas.nbytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def main() -> None:
    if len(sys.argv) > 1:
        print(*stitch(int(sys.argv[1])))
        return
    results: dict[str, object] = {}
    for height in HEIGHTS:
        command = [sys.executable, "-m", "benchmarks.memory", str(height)]
        words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        windows, canvas_bytes, peak_kib = map(int, words)
        results[f"{height}x{WIDTH}: canvas MB"] = canvas_bytes / 2**20
        results[f"{height}x{WIDTH}: peak growth MB, {windows} windows"] = peak_kib / 1024
        results[f"{height}x{WIDTH}: a whole-image canvas would hold MB"] = height * WIDTH * CLASSES * 4 / 2**20
    save("memory", results)


if __name__ == "__main__":
    main()
