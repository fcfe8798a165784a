"""Recipes that train within seconds on the procedural shapes."""

from pathlib import Path
from typing import Any

import torch

from penumbra.models.card import WindowSpec
from penumbra.models.contract import Views
from penumbra.training.augment import cutmix_masks
from penumbra.training.recipe import Recipe

BACKBONE = {"depth": 18, "stem": "plain", "width": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "np_semiseg": {
        "backbone": BACKBONE, "aspp_channels": 16, "low_channels": 8, "hidden": 16, "film_channels": 16,
        "latent_length": 8,
    },
    "cps": {"backbone": BACKBONE, "aspp_channels": 16, "low_channels": 8, "decoder_channels": 16},
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "np_semiseg": {"start": 0.0, "full": 0.1, "confidence": 0.5},
    "cps": {"start": 0.0, "full": 0.1},
}


def recipe(method: str, folder: Path, *, steps: int, batch: int | None = None) -> Recipe:
    return Recipe(
        name=f"{method}-shapes",
        method=method,
        config=CONFIGS[method],
        data="shapes",
        checkpoint=str(folder / "tiny.safetensors"),
        window=WindowSpec(48, 64),
        crop=(48, 64),
        steps=steps,
        scale=(0.9, 1.1),
        labelled_batch=batch or 3,
        unlabelled_batch=batch or 2,
        average_decay=0.9,
        precision="32-true",
        objective=OPTIONS[method],
    )


def batch(*, num: int = 2, size: tuple[int, int] = (32, 48), num_classes: int = 3) -> Views:
    """Noise with random labels."""
    generator = torch.Generator().manual_seed(0)
    image, weak = torch.randn(2, num, 3, *size, generator=generator)
    label_Bhw = torch.randint(num_classes, (num, *size), generator=generator)
    inside_Bhw = torch.ones(num, *size, dtype=torch.bool)
    return Views(image, label_Bhw, weak, weak + 0.1, inside_Bhw, cutmix_masks(num, size, generator=generator))
