"""What a cut at the dropout saves: T samples from one encode against T full passes, by the same graphs of an artifact.

python -m benchmarks.dropout [--samples 8] [--rounds 3] ARTIFACT ...
"""

from pathlib import Path

import click
import torch

from benchmarks.rounds import measure, save
from penumbra.models.blocks.layers import draw_noise
from penumbra.serving.engine.backends import load_backend
from penumbra.serving.engine.store import open_artifact


def time_artifact(directory: Path, num_samples: int, rounds: int) -> dict[str, float]:
    """Ratios of one window of the size that the card names."""
    artifact = open_artifact(directory)
    card, image_BChw = artifact.card, artifact.golden.image_B3hw[:1]
    assert card.export
    graphs = load_backend(card, directory, torch.device("cpu"))
    noise_SBL = draw_noise(card.sampling, num_samples, 1, torch.Generator().manual_seed(0))
    variants = {
        "one": lambda: graphs.decode(graphs.encode(image_BChw), noise_SBL[:1]),
        "split": lambda: graphs.decode(graphs.encode(image_BChw), noise_SBL),
        "full": lambda: [graphs.decode(graphs.encode(image_BChw), noise_BL[None]) for noise_BL in noise_SBL],
    }
    seconds = measure(variants, rounds=rounds)
    name = f"{card.name} {card.export.backend} {card.window.height}x{card.window.width}"
    return {
        f"{name}: {num_samples} full passes over split": seconds["full"] / seconds["split"],
        f"{name}: split over one pass": seconds["split"] / seconds["one"],
    }


@click.command()
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--samples", default=8)
@click.option("--rounds", default=3)
def main(artifacts: tuple[Path, ...], samples: int, rounds: int) -> None:
    """Time every artifact."""
    results: dict[str, float] = {}
    for directory in artifacts:
        results |= time_artifact(directory, samples, rounds)
    save("dropout", results)


if __name__ == "__main__":
    main()
