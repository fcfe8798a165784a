"""Recorded outputs of the original networks: where they are, and the weights that made them.

The weights are a deterministic function of each key: the recipe is the `filler` text of every fixture.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(os.environ.get("PENUMBRA_GOLDEN", Path(__file__).parents[3] / "shared" / "golden"))
Arrays = dict[str, np.ndarray]


def fixtures(pattern: str) -> list[str]:
    """Names of the fixtures at hand. Protocol fixtures are asked for by their own pattern."""
    return sorted(p.stem for p in GOLDEN.glob(f"{pattern}.json") if p.with_suffix(".npz").exists())


def load(stem: str) -> tuple[dict, Arrays]:
    return json.loads((GOLDEN / f"{stem}.json").read_text()), dict(np.load(GOLDEN / f"{stem}.npz"))


def _rng(key: str) -> np.random.Generator:
    digest = hashlib.sha256(key.encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))


def fill(key: str, shape: list[int], keys: dict, *, seed_key: str | None = None) -> Tensor:
    """One tensor by the filler's rules; `keys` are the fixture's, for what stands beside this one."""
    rng = _rng(seed_key or key)
    is_norm = len(shape) == 1 or f"{key.rpartition('.')[0]}.running_var" in keys
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if key.endswith((".running_mean", ".bias")):
        value = rng.normal(0, 0.1, shape)
    elif key.endswith(".running_var") or (key.endswith(".weight") and is_norm):
        value = rng.uniform(0.5, 1.5, shape)
    elif key.endswith(".weight"):
        value = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
    else:
        value = rng.normal(0, 1, shape)
    return torch.from_numpy(np.asarray(value, np.float32))


def state_dict(
    facts: dict, arrays: Arrays | None = None, *, tame: bool = False, overrides: str = "override::"
) -> dict[str, Tensor]:
    """The original file's tensors. facts: a fixture's, or one of its parts, with a `state_dict` table.

    arrays: of a calibrated fixture, with its recorded BatchNorm statistics under `overrides`<key>.
    """
    keys, filled = facts["state_dict"], {}
    for key, entry in keys.items():
        source = entry.get("alias_of", key)
        if source in filled:
            filled[key] = filled[source].clone()
            continue
        value = fill(key, entry["shape"], keys, seed_key=entry.get("seed_key"))
        if tame and key.endswith(".bn3.weight"):
            value = value * torch.tensor(0.2)
        if arrays is not None and f"{overrides}{key}" in arrays:
            value = torch.from_numpy(arrays[f"{overrides}{key}"]).reshape(value.shape)
        filled[key] = value
    return filled


def wrong_tensors(facts: dict, state: dict[str, Tensor]) -> list[str]:
    """Names whose bytes are not the recorded ones, for fixtures that record them (`sha16`)."""
    return [
        key
        for key, entry in facts["state_dict"].items()
        if "sha16" in entry
        and hashlib.sha256(state[key].contiguous().numpy().tobytes()).hexdigest()[:16] != entry["sha16"]
    ]


def image(height: int, width: int) -> Tensor:
    """The recorded input: standard normal, taken as already normalised."""
    return torch.from_numpy(
        np.random.Generator(np.random.PCG64(0)).normal(0, 1, (1, 3, height, width)).astype(np.float32)
    )


def picture(height: int, width: int) -> np.ndarray:
    """The protocol fixtures' image: uint8 RGB [H, W, 3]."""
    return np.random.Generator(np.random.PCG64(2)).integers(0, 256, (height, width, 3)).astype(np.uint8)
