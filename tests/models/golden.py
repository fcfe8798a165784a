"""Recorded outputs of the original networks: where they are, and the weights that made them.

The weights are a deterministic function of each key (the recipe is the `filler` text of every fixture).
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(os.environ.get("PENUMBRA_GOLDEN", Path(__file__).parents[3] / "shared" / "golden"))


def fixtures(pattern: str) -> list[str]:
    return sorted(p.stem for p in GOLDEN.glob(f"{pattern}.json"))


def load(stem: str) -> tuple[dict, dict[str, np.ndarray]]:
    return json.loads((GOLDEN / f"{stem}.json").read_text()), dict(np.load(GOLDEN / f"{stem}.npz"))


def _rng(key: str) -> np.random.Generator:
    digest = hashlib.sha256(key.encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))


def fill(key: str, shape: list[int], keys: dict, *, tame: bool) -> torch.Tensor:
    rng, stem = _rng(key), key.rpartition(".")[0]
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if key.endswith(".running_mean") or key.endswith(".bias"):
        value = rng.normal(0, 0.1, shape)
    elif key.endswith(".running_var") or (key.endswith(".weight") and f"{stem}.running_var" in keys):
        value = rng.uniform(0.5, 1.5, shape)
    elif key.endswith(".weight") and len(shape) >= 2:
        value = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
    else:
        value = rng.normal(0, 1, shape)
    value = value.astype(np.float32)
    if tame and key.endswith(".bn3.weight"):
        value = value * np.float32(0.2)
    return torch.from_numpy(value)


def state_dict(facts: dict, *, tame: bool) -> dict[str, torch.Tensor]:
    keys = facts["state_dict"]
    return {key: fill(key, entry["shape"], keys, tame=tame) for key, entry in keys.items()}


def rename(
    state: dict[str, torch.Tensor], renames: dict[str, str], dropped: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """Keys as they are called here; a key that no prefix knows is an error."""
    ours = {}
    for key, value in state.items():
        if key.startswith(dropped):
            continue
        prefix = next(p for p in sorted(renames, key=len, reverse=True) if key.startswith(p))
        ours[renames[prefix] + key[len(prefix) :]] = value
    return ours


def image(height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(
        np.random.Generator(np.random.PCG64(0)).normal(0, 1, (1, 3, height, width)).astype(np.float32)
    )
