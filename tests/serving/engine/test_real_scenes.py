"""What a card says of its model is what the engine serves, on the real validation frames."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from penumbra.export.bundle import export_checkpoint
from penumbra.export.zoo import ZOO
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.segmenter import Segmenter
from tests.conftest import decode_image

FRAMES = Path(__file__).parents[4] / "shared" / "camvid" / "val"
EVERY = 3
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FRAMES.is_dir(), reason=f"the CamVid frames are not at {FRAMES}"),
]


@pytest.mark.parametrize("name", sorted(path.stem for path in ZOO.glob("*.safetensors")))
def test_the_served_accuracy_on_camvid_is_the_one_on_the_card(name: str, tmp_path: Path) -> None:
    export_checkpoint(ZOO / f"{name}.safetensors", tmp_path)
    confusion = np.zeros((11, 12), np.int64)
    with Segmenter.open(tmp_path) as segmenter:
        card = segmenter.find(name).card
        for path in sorted((FRAMES / "images").iterdir())[::EVERY]:
            image = decode_image(path.read_bytes(), segmenter.limits)
            labels = segmenter.segment(image, SegmentOptions(name, outputs=())).labels_HW
            with Image.open(FRAMES / "masks" / f"{path.stem}.png") as mask:
                pairs = labels.astype(np.int64).ravel() * 12 + np.asarray(mask).ravel()
            confusion += np.bincount(pairs, minlength=132).reshape(11, 12)
    labelled = confusion[:, :11]
    accuracy = np.trace(labelled) / labelled.sum()
    assert accuracy == pytest.approx(card.provenance.metrics["val/seg/accuracy"], abs=0.01)
