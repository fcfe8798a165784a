"""What a careful user of any server writes around an artifact's two graphs: pictures in, label maps out.

Plain torch as its tuning guide has it: inference mode, channels-last, pictures of one size in one batch, all samples in
one call. Knows nothing of a server; `bento`, `lit` and `triton_model` each put it behind one.
"""

import io
import itertools
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from penumbra.models.card import Card
from penumbra.serving.engine.backends import load_backend
from penumbra.serving.engine.noise import SeededNoise
from penumbra.serving.engine.quota import num_cores
from penumbra.serving.engine.store import open_artifact
from penumbra.serving.render.pictures import palette

THREADS = num_cores()
"""Of torch, for every server alike."""
PEERS = Path(sys.prefix) / "peers"
"""`make .venv/peers` puts what we compare with there."""
TOGETHER = 4
"""Pictures or windows per call, at most: more were no faster on two cores and take memory by the sample."""


class Network:
    """An artifact's graphs. whole: pictures are run whole; else those larger than a window by MONAI's windows."""

    def __init__(self, artifact: Path, *, whole: bool) -> None:
        self.card: Card = open_artifact(artifact).card
        self._encode, self._decode = graphs_of(self.card, artifact)
        sampling, norm = self.card.sampling, self.card.input
        self.samples = sampling.default_samples
        self._noise_S1L = torch.from_numpy(SeededNoise(sampling, seed=0, num_samples=self.samples).draw(0))[:, None]
        self._scale_3 = torch.tensor(norm.scale) * torch.tensor(norm.std)
        self._shift_3 = torch.tensor(norm.mean) / torch.tensor(norm.std)
        self._palette = palette(self.card)
        self._sliding_window = None if whole else sliding_window()
        assert self.card.export
        self._is_of_any_size = self.card.export.backend == "torchscript"  # ONNX is of windows, to which MONAI pads

    @torch.inference_mode()
    def answer(self, jpegs: Sequence[bytes]) -> list[bytes]:
        """Label maps as indexed PNG, in order; pictures of one size are run together."""
        images = [np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")) for jpeg in jpegs]
        order = sorted(range(len(images)), key=lambda i: images[i].shape)
        answers: dict[int, bytes] = {}
        for _, alike in itertools.groupby(order, key=lambda i: images[i].shape):
            while places := list(itertools.islice(alike, TOGETHER)):
                labels_BHW = self.labels(np.stack([images[i] for i in places]))
                answers |= {i: self._png(labels_HW) for i, labels_HW in zip(places, labels_BHW, strict=True)}
        return [answers[i] for i in range(len(images))]

    def labels(self, images_BHW3: np.ndarray) -> np.ndarray:
        image_B3HW = self.normalised(images_BHW3)
        window = (self.card.window.height, self.card.window.width)
        pairs = list(zip(image_B3HW.shape[2:], window, strict=True))
        fits = all(size <= limit if self._is_of_any_size else size == limit for size, limit in pairs)
        if self._sliding_window is None or fits:
            merged_BKHW = self.probabilities(image_B3HW)
        else:
            merged_BKHW = self._sliding_window(
                image_B3HW, window, TOGETHER, self.probabilities, overlap=self.card.window.overlap, mode="gaussian"
            )
        return merged_BKHW.max(1).indices.to(torch.uint8).numpy()

    def normalised(self, images_BHW3: np.ndarray) -> Tensor:
        image_BHW3 = torch.from_numpy(images_BHW3) / self._scale_3 - self._shift_3
        return image_BHW3.permute(0, 3, 1, 2)  # channels-last in memory

    def logits(self, image_B3hw: Tensor) -> Tensor:
        """[S*B, K, h, w] at the pictures' size."""
        noise_SBL = self._noise_S1L.expand(-1, len(image_B3hw), -1)
        logits_NKhw = self._decode(self._encode(image_B3hw), noise_SBL).flatten(0, 1).float()
        align = self.card.readout.align_corners
        return F.interpolate(logits_NKhw, image_B3hw.shape[2:], mode="bilinear", align_corners=align)

    def probabilities(self, image_B3hw: Tensor) -> Tensor:
        """Mean over samples; of a single sample its logits, whose order is the same and which cost less."""
        if self.samples == 1:
            return self.logits(image_B3hw)
        return self.logits(image_B3hw).softmax(1).unflatten(0, (self.samples, -1)).mean(0)

    def _png(self, labels_HW: np.ndarray) -> bytes:
        picture, buffer = Image.fromarray(labels_HW), io.BytesIO()
        picture.putpalette(self._palette)
        picture.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()


def graphs_of(card: Card, artifact: Path) -> tuple[Any, Any]:
    """`encode` and `decode`: TorchScript in fp32 as torch's guide loads it, any other file by Penumbra's own loader."""
    assert card.export
    if (card.export.backend, card.export.precision) != ("torchscript", "fp32"):
        graphs = load_backend(card, artifact, torch.device("cpu"))
        return graphs.encode, graphs.decode
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        encode, decode = (torch.jit.load(artifact / name) for name in ("encode.ts", "decode.ts"))
    return encode, decode


def from_environment() -> Network:
    """The network that a server was started for; it is all that its process runs."""
    torch.set_num_threads(THREADS)
    return Network(Path(os.environ["PEER_ARTIFACT"]), whole=os.environ["PEER_WHOLE"] == "1")


def sliding_window() -> Any:
    """MONAI's."""
    sys.path.append(str(PEERS))
    sys.modules.setdefault("torch_tensorrt", None)  # type: ignore[arg-type]  # MONAI would load it, and it is not whole
    from monai.inferers import sliding_window_inference

    return sliding_window_inference
