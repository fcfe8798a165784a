"""What views cost: an answer and a window in V views over one and over V without; a network of the zoo, one core.

python -m benchmarks.views
"""

import dataclasses
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.rounds import measure, save
from penumbra.export.bundle import export_network
from penumbra.models.card import NUM_VIEWS, WindowSpec
from penumbra.models.checkpoint import load_checkpoint
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter

CHECKPOINT = Path(__file__).parents[1] / "models" / "zoo" / "supervised-camvid.safetensors"
SIZE, ROUNDS = 384, 9
"""Of the square window, which quarter turns need, and of the picture."""


def main() -> None:
    torch.set_num_threads(1)
    image_HW3 = np.random.Generator(np.random.PCG64(0)).integers(0, 255, (SIZE, SIZE, 3), np.uint8)
    card, network = load_checkpoint(CHECKPOINT)
    card = dataclasses.replace(card, window=WindowSpec(SIZE, SIZE))
    with tempfile.TemporaryDirectory() as folder:
        export_network(network, card, Path(folder))
        with Segmenter.open(Path(folder), device="cpu", threads=1, tuning=Tuning(1, 1)) as segmenter:
            runtime = segmenter.find(None)
            window = runtime.golden_inputs()[0]
            asked: dict[str, Callable[[], object]] = {}
            for views in NUM_VIEWS:
                options = SegmentOptions(views=views, outputs=("entropy",))
                asked[f"answer/{views}"] = partial(segmenter.segment, image_HW3, options)
                asked[f"window/{views}"] = partial(runtime.run, [dataclasses.replace(window, views=views)])
            seconds = measure(asked, rounds=ROUNDS)
    results = {f"seconds/{name}": value for name, value in seconds.items()}
    for views, num_views in list(NUM_VIEWS.items())[1:]:
        for what in ("answer", "window"):
            ratio = seconds[f"{what}/{views}"] / seconds[f"{what}/none"]
            results[f"{what} in {views} over one without"] = ratio
            results[f"{what} in {views} over {num_views} without"] = ratio / num_views
    save("views", results)


if __name__ == "__main__":
    main()
