"""Draw a data set without files: bright discs and boxes on noise, for tests of the loop."""

from pathlib import Path

import torch
from torch import Tensor

from penumbra.models.card import IGNORE, ClassInfo
from penumbra.models.errors import BadData
from penumbra.training.frames import Frames

CLASSES = (ClassInfo("ground", (0, 0, 0)), ClassInfo("disc", (220, 60, 60)), ClassInfo("box", (60, 60, 220)))
HEIGHT, WIDTH = 48, 64
SEEDS = {"train": 0, "val": 1}


def draw_split(folder: Path, split: str) -> Frames:
    """Draw 16 training or 8 validation frames; `folder` is not read."""
    if split not in SEEDS:
        raise BadData(f"the shapes have no split {split!r}; there are {' and '.join(SEEDS)}")
    generator = torch.Generator().manual_seed(SEEDS[split])
    frames = [_draw(generator) for _ in range(16 if split == "train" else 8)]
    names = tuple(f"{split}{i:02}" for i in range(len(frames)))
    return Frames(names, torch.stack([f[0] for f in frames]), torch.stack([f[1] for f in frames]))


def _draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    rows, columns = torch.arange(HEIGHT)[:, None], torch.arange(WIDTH)[None]
    image_3HW = torch.randint(0, 80, (3, HEIGHT, WIDTH), generator=generator)
    label_HW = torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8)
    for label in (1, 2):
        y = int(torch.randint(8, HEIGHT - 8, (), generator=generator))
        x = int(torch.randint(8, WIDTH - 8, (), generator=generator))
        distance = ((rows - y) ** 2 + (columns - x) ** 2).sqrt()
        inside = distance < 9 if label == 1 else torch.maximum((rows - y).abs(), (columns - x).abs()) < 8
        color_3 = torch.tensor(CLASSES[label].color)
        image_3HW = torch.where(inside, color_3[:, None, None] + image_3HW // 4, image_3HW)
        label_HW[inside] = label
    label_HW[:, 0] = IGNORE
    return image_3HW.clamp(0, 255).to(torch.uint8), label_HW
