"""Noise: a draw depends on seed, sample and, where the law says so, window; and on nothing else."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penumbra.models.blocks.layers import draw_noise
from penumbra.models.card import Sampling
from penumbra.serving.engine.noise import SeededNoise

LATENT = Sampling(kind="latent", noise_length=16)
PAIRS = dataclasses.replace(LATENT, law="antithetic")
MASKS = Sampling(kind="dropout", noise_length=16, keep=0.8)
LAWS = [LATENT, PAIRS, MASKS, *(dataclasses.replace(law, noise_per="window") for law in (LATENT, PAIRS, MASKS))]
seeds = st.integers(0, 2**63 - 1)


def draw(sampling: Sampling, *, seed: int = 0, num_samples: int = 4, window: int = 0) -> np.ndarray:
    return SeededNoise(sampling, seed=seed, num_samples=num_samples).draw(window)


@given(st.sampled_from(LAWS), seeds, st.integers(0, 10_000))
def test_the_same_seed_gives_the_same_bytes(sampling: Sampling, seed: int, window: int) -> None:
    once, again = (draw(sampling, seed=seed, window=window) for _ in range(2))
    assert once.dtype == np.float32 and once.shape == (4, 16)
    assert once.tobytes() == again.tobytes()


@given(st.sampled_from(LAWS), seeds, st.integers(1, 12), st.integers(0, 50))
def test_a_sample_is_the_same_however_many_are_drawn(sampling: Sampling, seed: int, num: int, window: int) -> None:
    few, many = (draw(sampling, seed=seed, num_samples=n, window=window) for n in (num, 12))
    assert np.array_equal(few, many[:num])


@pytest.mark.parametrize("sampling", LAWS)
def test_windows_differ_exactly_where_the_law_says_so(sampling: Sampling) -> None:
    noise = SeededNoise(sampling, seed=3, num_samples=4)
    first, other, first_again = noise.draw(0), noise.draw(7), noise.draw(0)
    assert np.array_equal(first, first_again)
    assert np.array_equal(first, other) == (sampling.noise_per == "image")


@pytest.mark.parametrize("sampling", LAWS)
def test_samples_and_seeds_differ(sampling: Sampling) -> None:
    samples = draw(sampling, seed=1, num_samples=8)
    assert len({row.tobytes() for row in samples}) == 8
    assert not np.array_equal(samples, draw(sampling, seed=2, num_samples=8))


def test_latents_are_standard_normal() -> None:
    values = draw(dataclasses.replace(LATENT, noise_length=5000), num_samples=20)
    assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02
    assert abs(np.corrcoef(values[0], values[1])[0, 1]) < 0.05


def test_dropouts_of_several_rates_follow_each_other_in_one_mask() -> None:
    several = Sampling(kind="dropout", noise_length=3000, keep=0.7, keeps=((1000, 0.5), (2000, 0.8)))
    torch_like = draw_noise(several, 8, 1, torch.Generator().manual_seed(0))[:, 0].numpy()
    for values in (draw(several, num_samples=8), torch_like):
        assert set(np.unique(values[:, :1000])) == {0, np.float32(2)}
        assert set(np.unique(values[:, 1000:])) == {0, np.float32(1.25)}
        assert abs(values[:, 1000:].mean() - 1) < 0.02
    assert np.array_equal(draw(several)[:, :1000] > 0, draw(Sampling("dropout", 3000, keep=0.5))[:, :1000] > 0)


def test_masks_keep_or_drop_and_leave_the_mean_at_one() -> None:
    values = draw(dataclasses.replace(MASKS, noise_length=5000), num_samples=20)
    assert set(np.unique(values)) == {np.float32(0), np.float32(1 / 0.8)}
    assert abs(values.mean() - 1) < 0.01


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(kind="members", members=("a", "b"), default_samples=2)])
def test_members_and_single_passes_have_noise_of_length_zero(sampling: Sampling) -> None:
    assert draw(sampling, num_samples=2).shape == (2, 0)


@given(seeds, st.integers(1, 12), st.sampled_from(["image", "window"]), st.integers(0, 50))
def test_an_odd_antithetic_sample_is_minus_the_one_before_it(seed: int, num: int, per: str, window: int) -> None:
    pairs, free = (dataclasses.replace(law, noise_per=per) for law in (PAIRS, LATENT))  # type: ignore[arg-type]
    values = draw(pairs, seed=seed, num_samples=num, window=window)
    assert np.array_equal(values[::2], draw(free, seed=seed, num_samples=num, window=window)[::2])
    assert np.array_equal(values[1::2], -values[::2][: num // 2])


@given(st.integers(1, 9), st.integers(1, 3))
def test_the_noise_of_training_keeps_the_law_too(num: int, num_images: int) -> None:
    values = draw_noise(PAIRS, num, num_images, torch.Generator().manual_seed(0))
    assert values.shape == (num, num_images, 16)
    assert torch.equal(values[1::2], -values[::2][: num // 2])
    assert len({row.numpy().tobytes() for row in values.flatten(0, 1)}) == num * num_images
