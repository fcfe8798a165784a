"""Where samples come from: counter-based noise, made outside the graph.

A draw depends on (seed, sample, and for distributions that need it the window) and on nothing else, so an answer does
not depend on which other requests shared its batch, nor on how its samples were cut into calls.
"""

from typing import Protocol

import numpy as np

from penumbra.models.card import Sampling
from penumbra.serving.engine.kernels import FloatArray


class NoiseSource(Protocol):
    """A noise source gives noise_SL of one window, for all samples of a request."""

    def draw(self, window_index: int) -> FloatArray: ...


class SeededNoise:
    """Seeded noise follows the card's distribution: standard normal latents, dropout masks, or nothing ([S, 0]).

    Masks are 0 or 1 / keep, so that the expected activation is unchanged. By the law `antithetic` an odd sample is the
    one before it, negated; the even ones are those of independent draws.
    """

    def __init__(self, sampling: Sampling, *, seed: int, num_samples: int) -> None:
        self._sampling, self._seed, self._num_samples = sampling, seed, num_samples
        self._of_image: FloatArray | None = None

    def draw(self, window_index: int) -> FloatArray:
        if self._sampling.noise_per == "window":
            return self._draw_all(window_index + 1)
        if self._of_image is None:
            self._of_image = self._draw_all(0)
        return self._of_image

    def _draw_all(self, stream: int) -> FloatArray:
        if self._sampling.noise_length == 0:
            return np.zeros((self._num_samples, 0), np.float32)
        return np.stack([self._draw_one(sample, stream) for sample in range(self._num_samples)])

    def _draw_one(self, sample: int, stream: int) -> FloatArray:
        if self._sampling.law == "antithetic" and sample % 2:
            return -self._draw_one(sample - 1, stream)
        rng = np.random.Generator(np.random.Philox(key=self._seed, counter=[0, 0, stream, sample]))
        if self._sampling.kind == "dropout":
            masks = [(rng.random(length) < keep) / keep for length, keep in self._sampling.masks]
            return np.concatenate(masks).astype(np.float32)
        return rng.standard_normal(self._sampling.noise_length, dtype=np.float32)
