"""Published evaluations as data: the card of an imported checkpoint makes the engine give the original scores.

Of the card only the windows' size is changed: the recordings were made with small crops.
"""

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from penumbra.export.bundle import export_network
from penumbra.export.importer import import_checkpoint
from penumbra.models.card import Card, ClassInfo, Readout, WindowSpec
from penumbra.models.checkpoint import load_checkpoint
from penumbra.models.contract import Network
from penumbra.models.np_semiseg.upstream import published_u2pl
from penumbra.serving.engine.moments import Statistics
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.windows import WindowPlan, cover
from tests.conftest import toy_card
from tests.models import golden

pytestmark = pytest.mark.slow
MEMORIES = ("latent_memory", "deterministic_memory")
Loaded = tuple[dict, golden.Arrays, Card, Network]


def recorded(pattern: str) -> pytest.MarkDecorator:
    skipped = pytest.param("", marks=pytest.mark.skip(f"no recorded outputs in {golden.GOLDEN}"))
    return pytest.mark.parametrize("loaded", golden.fixtures(pattern) or [skipped], indirect=True)


@pytest.fixture(scope="module")
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The fixture, and its network as imported from a file with the published protocol."""
    facts, arrays = golden.load(request.param)
    weights = request.param if "state_dict" in facts else facts["weights"].split()[-1]
    of_weights = golden.load(weights)[0]
    state = golden.state_dict(of_weights, tame=weights.endswith("_tame"))
    content: dict = {"model": state}
    if weights.startswith("np"):
        content = {"teacher_state": {f"module.{key}": value for key, value in state.items()}, "model_state": {}}
        content |= {name: golden.fill(name, of_weights["banks"][name], {}) for name in MEMORIES}
    folder = tmp_path_factory.mktemp("published")
    torch.save(content, folder / "original.pth")
    classes = tuple(ClassInfo(f"class {k}", (k, k, k)) for k in range(of_weights["num_classes"]))
    method = "np_semiseg" if weights.startswith("np") else "cps"
    import_checkpoint(method, [folder / "original.pth"], folder / "ours.safetensors", classes=classes)
    return facts, arrays, *load_checkpoint(folder / "ours.safetensors")


@contextmanager
def served(card: Card, network: Network, window: WindowSpec, store: Path) -> Iterator[Segmenter]:
    export_network(network, dataclasses.replace(card, window=window), store)
    with Segmenter.open(store, device="cpu", threads=1, tuning=Tuning(2, 4)) as segmenter:
        yield segmenter


def merged(segmenter: Segmenter, image: np.ndarray, noise: "Stream | None" = None) -> tuple[np.ndarray, np.ndarray]:
    """What samples and windows were averaged to, [K, H, W], and the labels."""
    request, bands = segmenter.bands(image, SegmentOptions(), noise=noise), []
    for band in request:
        assert request.surface
        ring = request.surface.canvas_RCW.numpy()[:, : request.plan.card.num_classes]
        bands.append((ring[np.arange(band.y0, band.y0 + len(band.labels)) % len(ring)], band.labels))
    scores_HKW, labels_HW = (np.concatenate(parts) for parts in zip(*bands, strict=True))
    return scores_HKW.transpose(1, 0, 2), labels_HW


class Stream:
    """The recordings' noise: one generator per image, T draws per window, windows in row-major order."""

    def __init__(self, num_windows: int, num_samples: int, length: int) -> None:
        rng = np.random.Generator(np.random.PCG64(1))
        self._draws = [
            np.stack([rng.standard_normal((1, length))[0] for _ in range(num_samples)]).astype(np.float32)
            for _ in range(num_windows)
        ]

    def draw(self, window_index: int) -> np.ndarray:
        return self._draws[window_index]


def times_counted(plan: WindowPlan) -> np.ndarray:
    """How many windows cover each pixel, [H, W]."""
    counts = np.zeros((plan.height, plan.width), int)
    for w in plan:
        counts[max(w.y0, 0) : w.y0 + w.height, max(w.x0, 0) : w.x0 + w.width] += 1
    return counts


def sizes(arrays: golden.Arrays, pattern: str) -> list[tuple[str, int, int]]:
    found = [(name, re.fullmatch(pattern, name)) for name in arrays]
    return [(name, int(match[1]), int(match[2])) for name, match in found if match]


@recorded("cps_*_protocol")
def test_cps_scores_and_labels_are_the_original_evaluators(loaded: Loaded, tmp_path: Path) -> None:
    facts, arrays, card, network = loaded
    crop = int(re.search(r"crop_size (\d+)", " ".join(facts["notes"]))[1])  # type: ignore[index]
    window = dataclasses.replace(card.window, height=crop, width=crop)
    cases = sizes(arrays, r"scores_\w+_(\d+)x(\d+)_stride2")
    assert cases and card.sampling.kind == "single" and card.config["branches"] == 1
    with served(card, network, window, tmp_path) as segmenter:
        for name, height, width in cases:
            mean_KHW, labels_HW = merged(segmenter, golden.picture(height, width))
            sums_HWK = (mean_KHW * times_counted(cover(height, width, window))).transpose(1, 2, 0)
            wanted = arrays[name]
            assert np.abs(sums_HWK[::2, ::2] - wanted).max() <= 1e-5 * np.abs(wanted).max()
            assert np.array_equal(labels_HW, arrays[name.replace("scores", "pred").replace("_stride2", "")])


@recorded("np-u2pl_*_protocol")
def test_np_probabilities_of_twenty_samples_in_windows_are_the_original_evaluations(
    loaded: Loaded, tmp_path: Path
) -> None:
    _, arrays, card, network = loaded
    crops = {int(c) for c in re.findall(r"prob_crop(\d+)_", " ".join(arrays))}
    (crop,) = crops
    assert card.sampling.default_samples == 20 and card.sampling.noise_per == "window"
    window = dataclasses.replace(published_u2pl(19).window, height=crop, width=crop)
    cases = sizes(arrays, rf"prob_crop{crop}_(?:pad_)?(\d+)x(\d+)_stride2")
    assert len(cases) >= 2
    with served(card, network, window, tmp_path) as segmenter:
        for name, height, width in cases:
            noise = Stream(cover(height, width, window).num_windows, 20, card.sampling.noise_length)
            image = golden.picture(130, 170)[:height, :width]
            assert np.abs(merged(segmenter, image, noise)[0][:, ::2, ::2] - arrays[name]).max() <= 1e-5


@recorded("np-u2pl_*_protocol")
def test_np_probabilities_of_the_whole_image_are_the_original_evaluations(loaded: Loaded, tmp_path: Path) -> None:
    _, arrays, card, network = loaded
    with served(card, network, dataclasses.replace(card.window, height=0, width=0), tmp_path) as segmenter:
        for name, height, width in sizes(arrays, r"prob_whole_(\d+)x(\d+)_stride2"):
            noise = Stream(1, 20, card.sampling.noise_length)
            prob_KHW, _ = merged(segmenter, golden.picture(height, width), noise)
            assert np.abs(prob_KHW[:, ::2, ::2] - arrays[name]).max() <= 1e-5


def moments(network: Network, noise: np.ndarray, height: int, width: int, readout: Readout) -> np.ndarray:
    """Mean probabilities [K, H, W] of the recorded input."""
    with torch.inference_mode():
        logits_SKhw = network(golden.image(height, width), torch.from_numpy(noise))[:, 0]
    classes = tuple(ClassInfo(str(k), (k, k, k)) for k in range(logits_SKhw.shape[1]))
    card = dataclasses.replace(toy_card("latent")[0], classes=classes, readout=readout)
    statistics = Statistics(card, 1, (height, width), torch.device("cpu"))
    statistics.add(logits_SKhw[:, None])
    statistics.finish()
    return statistics.stats_BhCw[0, :, :-1].numpy().transpose(1, 0, 2) / len(noise)


@recorded("np-*_tame")
def test_np_moments_are_the_original_mean_probabilities_and_entropy(loaded: Loaded) -> None:
    """Of the tame weights only: the plain ones saturate every softmax."""
    _, arrays, _, network = loaded
    at_features = Readout(softmax_at="feature")
    for name, noise, readout in (
        ("prob_T20_(\\d+)x(\\d+)_stride2", "eps_T20", at_features),
        ("prob_T5_logits_upsampled_first_(\\d+)x(\\d+)_stride2", "eps_T5", Readout()),
        ("entropy_nats_T5_(\\d+)x(\\d+)", "eps_T5", Readout()),
    ):
        for array, height, width in sizes(arrays, name):
            prob_KHW = moments(network, arrays[noise], height, width, readout)
            if array.startswith("entropy"):
                ours = -(prob_KHW * np.log(np.maximum(prob_KHW, 1e-37))).sum(0)
                assert np.abs(ours - arrays[array][0]).max() <= 1e-5
            else:
                assert np.abs(prob_KHW[:, ::2, ::2] - arrays[array][0]).max() <= 1e-5
