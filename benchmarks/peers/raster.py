"""One large picture in windows, by Penumbra's engine and by MONAI's sliding window: time, peak memory, labels.

    python -m benchmarks.peers.raster penumbra|monai ARTIFACT SIDE BATCH BUFFER LABELS.npy

Each side runs in a process of its own and prints its figures as JSON; `benchmarks.peers` puts them side by side. The
time of the network alone is that of a bare loop over as many windows of the same size in the same batches. What is
more than that is stitching: reading windows, blending, and labels at the end.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.rounds import forget_peak, measure, peak_memory
from penumbra.serving.engine.allocator import give_memory_back

ROUNDS = 3
MEBI = 2**20


def picture(side: int) -> np.ndarray:
    """Soft blots, the same for both sides: uint8 [side, side, 3]."""
    rng = np.random.Generator(np.random.PCG64(0))
    small = Image.fromarray(rng.integers(0, 255, (side // 32, side // 32, 3), dtype=np.uint8))
    return np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))


def run(whole: Callable[[], np.ndarray], bare: dict[str, Callable[[], object]], labels: Path) -> dict[str, Any]:
    """Peak memory of the first run, then median seconds of everything and of the bare loops, taking turns."""
    give_memory_back()  # what finding sizes or warming up has left is not there to be used again
    before = forget_peak()
    np.save(labels, whole())
    figures = {"peak MB": (peak_memory() - before) / MEBI}
    return figures | {f"{name} s": taken for name, taken in measure({"total": whole, **bare}, rounds=ROUNDS).items()}


def of_penumbra(artifact: Path, side: int, batch: int, buffer: int, labels: Path) -> dict[str, Any]:
    """`network` is the graphs alone, `moments` with the mean probabilities and entropies of every window."""
    from benchmarks.lanes import in_lanes
    from benchmarks.peers.network import THREADS
    from penumbra.serving.engine.options import SegmentOptions
    from penumbra.serving.engine.raster import Raster
    from penumbra.serving.engine.runtime import Tuning
    from penumbra.serving.engine.segmenter import Segmenter
    from penumbra.serving.engine.steps import WindowInput
    from penumbra.serving.engine.windows import cover, cut

    image = picture(side)
    with Segmenter(threads=THREADS, tuning=Tuning(windows_per_batch=batch)) as segmenter:
        card = segmenter.load(artifact)
        runtime, window = segmenter.find(card.name), card.window
        plan = cover(*image.shape[:2], window)
        num_batches, first = -(-plan.num_windows // runtime.windows_per_batch), next(iter(plan))
        pixels = cut(image, first, plan, spec=window, norm=card.input)
        inputs = [WindowInput(Raster(image), first, plan, np.zeros((1, 0), np.float32))] * runtime.windows_per_batch
        image_B3hw = torch.from_numpy(np.stack([pixels] * len(inputs))).permute(0, 3, 1, 2)
        noise_SBL, graphs = torch.zeros(1, len(inputs), 0), runtime._backend

        def loop(work: Callable[[], object]) -> Callable[[], object]:
            return lambda: in_lanes(segmenter.cores, [work] * num_batches)

        bare = {
            "network": loop(lambda: graphs.decode(graphs.encode(image_B3hw), noise_SBL)),
            "moments": loop(lambda: runtime.run(inputs)),
        }
        bare["network"]()  # its own memory is no stitching's, on either side
        figures = run(lambda: segmenter.segment(image, SegmentOptions(outputs=())).labels_HW, bare, labels)
        return figures | {"batch": len(inputs), "windows": num_batches * len(inputs)}


def of_monai(artifact: Path, side: int, batch: int, buffer: int, labels: Path) -> dict[str, Any]:
    """As MONAI is used: logits at the window's size, blended by its own gaussian. `network` is that predictor alone.

    buffer: its `buffer_steps`, batches whose windows it keeps together before it blends them; 0 is its default, none.

    The labels kept are of what Penumbra blends, probabilities, by its gaussian, whose centre is half a pixel off; how
    many labels these two choices change is told.
    """
    from benchmarks.peers.network import Network, sliding_window
    from penumbra.serving.engine.allocator import keep_freed_memory
    from penumbra.serving.engine.windows import cover

    keep_freed_memory()
    network, slide, image = Network(artifact, whole=True), sliding_window(), picture(side)
    window = network.card.window
    size = (window.height, window.width)

    @torch.inference_mode()
    def whole(predict: Callable[[torch.Tensor], torch.Tensor] = network.logits, **weights: torch.Tensor) -> np.ndarray:
        image_13HW = network.normalised(image[None])
        how = {"overlap": window.overlap, "mode": "gaussian", "buffer_steps": buffer or None} | weights
        merged_1KHW = slide(image_13HW, size, batch, predict, **how)
        labels_HW: np.ndarray = merged_1KHW.max(1).indices[0].to(torch.uint8).numpy()
        return labels_HW

    num_batches = -(-cover(*image.shape[:2], window).num_windows // batch)
    image_B3hw = network.normalised(np.stack([image[: window.height, : window.width]] * batch))

    @torch.inference_mode()
    def bare() -> None:
        for _ in range(num_batches):
            network.logits(image_B3hw)

    with torch.inference_mode():
        network.logits(image_B3hw)  # as above
    figures = run(whole, {"network": bare}, labels)
    of_probabilities = whole(lambda x: network.logits(x).softmax(1), roi_weight_map=gaussian(size))
    figures["labels that its logits and gaussian change"] = float((np.load(labels) != of_probabilities).mean())
    np.save(labels, of_probabilities)
    return figures | {"batch": batch, "buffer": buffer, "windows": num_batches * batch}


def gaussian(size: tuple[int, int]) -> torch.Tensor:
    """The weights of a window as `penumbra.models.card.WindowSpec` has them, [h, w]."""
    across = [torch.exp(-0.5 * ((torch.arange(n) - (n - 1) / 2) / (n / 8)) ** 2).clamp(min=1e-3) for n in size]
    return torch.outer(*across)


if __name__ == "__main__":
    name, artifact, side, batch, buffer, labels = sys.argv[1:]
    side_of = {"penumbra": of_penumbra, "monai": of_monai}[name]
    print(json.dumps(side_of(Path(artifact), int(side), int(batch), int(buffer), Path(labels))))
