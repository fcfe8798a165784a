"""Tests of this folder run on the device that TEST_DEVICE names, `cuda` unless it says otherwise; `cpu` shows that
they run. Without a GPU they skip.
"""

import os

import pytest
import torch

DEVICE = os.environ.get("TEST_DEVICE", "cuda")


@pytest.fixture(scope="session")
def device() -> str:
    """The device under test."""
    if DEVICE != "cpu" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return DEVICE
