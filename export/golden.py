"""Golden windows: pictures of a network's input, and what the network itself answers to them.

They are drawn, or cut out of pictures; the gate holds an export to the answers, and every load of an artifact does.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penumbra.models.card import Card, Sampling
from penumbra.models.contract import Features, Network, Prompt
from penumbra.models.errors import BadImage, BadOption, TooLarge
from penumbra.serving.engine.decode import open_image
from penumbra.serving.engine.layout import Reading
from penumbra.serving.engine.noise import SeededNoise
from penumbra.serving.engine.options import Limits
from penumbra.serving.engine.raster import Pixels, Raster
from penumbra.serving.engine.scale import at_card_scale
from penumbra.serving.engine.store import Golden, Recorded
from penumbra.serving.engine.windows import cover, cut, normalise

log = logging.getLogger("penumbra")

GOLDEN_WINDOWS, GOLDEN_SAMPLES = 2, 3
WHOLE_IMAGE_EXAMPLE = (128, 160)
"""Golden size for models whose window is the whole image, where it is drawn."""
WHOLE_IMAGE_LEAST, WHOLE_IMAGE_MOST, WHOLE_IMAGE_STEP = 64, 512, 32
"""Least and most of a side of a picture that such a model's golden windows keep, and what sides are multiples of."""


def ask(network: Network, card: Card, windows_BChw: Tensor | None = None) -> Golden:
    """Record the network's own answers to windows, drawn by default: by the card's sampling, S = 3 where S is free."""
    image_B3hw = golden_image(card) if windows_BChw is None else windows_BChw
    with torch.inference_mode():
        features = network.encode(image_B3hw)
        plain = _answer(network, features, card.sampling)
        extras_BEhw = features[-1] if card.extra_maps else None
        if card.prompt.kind == "none":
            return Golden(image_B3hw, plain, extras_BEhw=extras_BEhw)
        prompt = golden_prompt(card, image_B3hw)
        prompted = _answer(network, network.take_prompt(image_B3hw, features, prompt), card.sampling_with(prompt=True))
        return Golden(image_B3hw, plain, prompt, prompted, extras_BEhw)


def _answer(network: Network, features: Features, sampling: Sampling) -> Recorded:
    fixed = sampling.kind in ("members", "single")
    noise_SBL = noise_of(sampling, range(len(features[0])), num_samples=0 if fixed else GOLDEN_SAMPLES)
    return Recorded(noise_SBL, network.decode(features, noise_SBL))


def noise_of(sampling: Sampling, seeds: Iterable[int] = (0,), *, num_samples: int = 0, window: int = 0) -> Tensor:
    """Draw noise_SBL as the engine does, for each seed's window of this index; 0 samples are the usual number."""
    num_samples = num_samples or sampling.default_samples
    noises = [SeededNoise(sampling, seed=seed, num_samples=num_samples).draw(window) for seed in seeds]
    return torch.from_numpy(np.stack(noises, axis=1))


def example_size(height: int, width: int) -> tuple[int, int]:
    """Give the size of windows, or where these are whole pictures that of one."""
    return (height, width) if height else WHOLE_IMAGE_EXAMPLE


def golden_image(card: Card) -> Tensor:
    """Draw a reproducible smooth picture with edges, normalised, B = 2; its values are those that pictures have."""
    height, width = example_size(card.window.height, card.window.width)
    rng = np.random.Generator(np.random.PCG64(0))
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    planes = []
    for _ in range(GOLDEN_WINDOWS * card.input.num_bands):
        fy, fx, phase, cut = (rng.uniform(*limits) for limits in ((0.005, 0.06), (0.005, 0.06), (0, 6.28), (0.2, 0.8)))
        edge = np.where(x < cut * width, 0.5, -0.5)
        planes.append(np.sin(fy * y + fx * x + phase) + edge + rng.normal(0, 0.1, y.shape))
    planes_BChw = np.stack(planes).reshape(GOLDEN_WINDOWS, -1, height, width)  # from -1.5 to 1.5, and a little noise
    least_C11, most_C11 = (np.array(ends)[:, None, None] for ends in card.input.extent)
    return torch.from_numpy((least_C11 + most_C11) / 2 + (most_C11 - least_C11) / 3 * planes_BChw).float()


def windows_of(pictures: Sequence[Path], card: Card, count: int = GOLDEN_WINDOWS) -> Tensor:
    """Cut golden windows out of pictures, from the first of the first to the last of the last, at the card's scale.

    Of a model that sees pictures whole, each is the middle of a picture, about as large as the smallest of these is.
    Raises BadOption, BadImage and TooLarge.
    """
    chosen = [pictures[i * (len(pictures) - 1) // (count - 1)] for i in range(count)]
    if not card.window.height:
        return _middles(chosen, card)
    windows = []
    for i, path in enumerate(chosen):
        image = at_card_scale(read_picture(path, card), card)
        plan = cover(*image.shape[:2], card.window)
        size = (card.window.height, card.window.width)
        whole = [one for one in plan if (one.height, one.width) == size]
        if not whole:
            raise BadOption(
                f"{path} is run at {image.shape[1]}x{image.shape[0]}; golden windows of {card.name} are cut from "
                f"pictures of {card.window.width}x{card.window.height} or more"
            )
        window = whole[i * (len(whole) - 1) // (count - 1)]
        windows.append(cut(image, window, plan, spec=card.window, norm=card.input).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(windows))


def _middles(pictures: Sequence[Path], card: Card) -> Tensor:
    """Cut the middle of each picture, at the card's scale, as large as all have it. Raises BadOption."""
    step, size, pixels = WHOLE_IMAGE_STEP, (WHOLE_IMAGE_MOST, WHOLE_IMAGE_MOST), list[NDArray[Any]]()
    for path in pictures:
        image = at_card_scale(read_picture(path, card), card)
        height, width = image.shape[:2]
        if min(height, width) < WHOLE_IMAGE_LEAST:
            raise BadOption(
                f"{path} is run at {width}x{height}; golden windows of {card.name} are cut from pictures of "
                f"{WHOLE_IMAGE_LEAST}x{WHOLE_IMAGE_LEAST} or more"
            )
        size = min(size[0], height // step * step), min(size[1], width // step * step)
        pixels.append(_middle(image, size).copy())  # the picture itself is let go
    return torch.from_numpy(np.stack([normalise(_middle(one, size), card.input).transpose(2, 0, 1) for one in pixels]))


def _middle(image_HWC: Pixels, size: tuple[int, int]) -> NDArray[Any]:
    y, x = ((length - most) // 2 for length, most in zip(image_HWC.shape[:2], size, strict=True))
    pixels_hwC: NDArray[Any] = image_HWC[y : y + size[0], x : x + size[1]]
    return pixels_hwC


def read_picture(path: Path, card: Card) -> Raster:
    """Read a picture's pixels as a network takes them, and log how, where its file does not state it.

    Raises BadImage and TooLarge with the file's name.
    """
    with naming(path):
        image = open_image(path, Limits(), Reading(card.input)).load()
    for sentence in image.warnings:
        _say(path, sentence)
    return image


@cache
def _say(path: Path, sentence: str) -> None:
    """Log a sentence about a file, once however often it is read."""
    log.warning("%s: %s", path, sentence)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an error of a picture say which one that is."""
    try:
        yield
    except (BadImage, BadOption, TooLarge) as error:
        raise type(error)(f"{path}: {error}; take it out of the pictures") from None


def golden_prompt(card: Card, image_B3hw: Tensor) -> Prompt:
    """Make a prompt for the golden windows: two overlapping boxes, or two tags, of the first classes to be named."""
    named = [k for k in range(card.num_classes) if k != card.prompt.background][:2]
    num_windows, _, height, width = image_B3hw.shape
    if card.prompt.kind == "tags":
        tags_BK = torch.zeros(num_windows, card.num_classes)
        tags_BK[:, named] = 1
        return (tags_BK,)
    boxes_BKhw = torch.zeros(num_windows, card.num_classes, height, width)
    boxes_BKhw[:, named[0], : height // 2, : width // 2] = 1
    boxes_BKhw[:, named[-1], height // 3 :, width // 3 :] = 1
    return (boxes_BKhw,) if card.prompt.alpha is None else (boxes_BKhw, torch.full((num_windows,), card.prompt.alpha))
