"""What a card says of its model is what the engine serves, on the real validation frames."""

from bisect import bisect_left
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from penumbra.export.bundle import export_checkpoint
from penumbra.export.zoo import ZOO
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.segmenter import Segmenter
from tests.conftest import decode_image

ALARMS = ((0.95, 0.3), (0.75, 0.6))
"""Novelties, and the share of answers above them from which deploy/prometheus/rules.yaml fires PenumbraStrange."""
HALVES = 200

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


def test_dark_frames_are_strange_and_random_halves_are_not(tmp_path: Path, rng: np.random.Generator) -> None:
    """The alert on novelty fires for the one and not for the others: these are its numbers."""
    export_checkpoint(ZOO / "supervised-camvid.safetensors", tmp_path)
    usual, dark = list[float](), list[float]()
    with Segmenter.open(tmp_path) as segmenter:
        for path in sorted((FRAMES / "images").iterdir()):
            image = decode_image(path.read_bytes(), segmenter.limits)
            for means, light in ((usual, 1.0), (dark, 0.35)):
                shown = (image * light).astype(np.uint8)
                means += segmenter.segment(shown, SegmentOptions("supervised-camvid", outputs=())).scores.means

    def share_above(novelty: float, means: list[float], reference: list[float]) -> float:
        return float(np.mean([bisect_left(reference, mean) / len(reference) > novelty for mean in means]))

    for _ in range(HALVES):
        order = rng.permutation(len(usual))
        reference, rest = sorted(usual[i] for i in order[: len(usual) // 2]), order[len(usual) // 2 :]
        for novelty, alarm in ALARMS:
            assert share_above(novelty, [usual[i] for i in rest], reference) < alarm
            assert share_above(novelty, [dark[i] for i in rest], reference) == 1
