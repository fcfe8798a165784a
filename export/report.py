"""Print what the command line says of an import and of an export's proof."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import click
from rich.console import Console
from rich.table import Column, Table

from penumbra.export.importer import Imported
from penumbra.export.parity import TOLERANCES
from penumbra.models.card import Card, Parity
from penumbra.serving.watch import how_to_serve

FEW = 12
"""Lines of a table, above which names are counted instead."""


def print_imported(imported: Imported, output: Path) -> None:
    """Print what inference does not need, then what the checkpoint is and what to do with it."""
    card = imported.card
    table = Table(Column("not imported", overflow="fold"), "tensors")
    for name, count in _grouped(imported.train_only).items():
        table.add_row(name, str(count))
    for entry in imported.entries:
        table.add_row(f"{entry} (beside the tensors)", "")
    if table.row_count:
        Console(markup=False, emoji=False).print(table)
    click.echo(f"{output}: {card.method}, {card.num_classes} classes, {_sample_axis(card)}")
    click.echo(f"next: penumbra export {output}")


def _grouped(tensors: tuple[str, ...]) -> Counter[str]:
    """Count few tensors by name, many by the first two words of their names."""
    return Counter(".".join(name.split(".")[:2]) if len(tensors) > FEW else name for name in tensors)


def _sample_axis(card: Card) -> str:
    names = f" ({', '.join(card.sampling.members)})" if card.sampling.members else ""
    text = f"{card.sampling.kind}{names}, {card.sampling.default_samples} samples"
    if card.prompt.kind == "none":
        return text
    return f"{text}; with {card.prompt.kind}: {', '.join(card.prompt.members or card.sampling.members)}"


def print_parity(card: Card, directory: Path, *, as_json: bool, measured: Parity | None = None) -> None:
    """Print the gate's figures beside what is allowed. measured: here and now, if not at export."""
    assert card.export
    figures, allowed = measured or card.export.parity, TOLERANCES[card.export.precision]
    if as_json:
        click.echo(json.dumps({"directory": str(directory), "parity": dataclasses.asdict(figures)}))
        return
    limits = {
        "relative": f"<= {allowed.relative:g}", "extras_relative": f"<= {allowed.relative:g}",
        "label_flips_percent": f"<= {allowed.flips_percent:g}",
        "entropy_rank_correlation": f">= {allowed.rank_correlation:g}",
        "variance_ratio": f"1 +- {allowed.variance:g}",
    }  # fmt: skip
    click.echo(directory)
    for name, value in dataclasses.asdict(figures).items():
        click.echo(f"  {name:26} {'none' if value is None else f'{value:.6g}':12} {limits.get(name, '')}".rstrip())
    if measured is None:
        click.echo(how_to_serve(card.name), err=True)
