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


def print_imported(imported: Imported, output: Path, *, is_last: bool = False) -> None:
    """Print what inference does not need, then what the checkpoint is and what to do with it."""
    card = imported.card
    table = Table(Column("not imported", overflow="fold"), "tensors")
    many = len(imported.train_only) > FEW  # by the first two words of their names
    for name, count in Counter(".".join(n.split(".")[:2]) if many else n for n in imported.train_only).items():
        table.add_row(name, str(count))
    for entry in imported.entries:
        table.add_row(f"{entry} (beside the tensors)", "")
    if table.row_count:
        Console(markup=False, emoji=False).print(table)
    for note in imported.notes:
        click.echo(note)
    sampling, prompt = card.sampling, card.prompt
    names = f" ({', '.join(sampling.members)})" if sampling.members else ""
    axis = f"{sampling.kind}{names}, {sampling.default_samples} samples"
    if card.views != "none":
        axis += f", in the views {card.views}"
    if prompt.kind != "none":
        axis += f"; with {prompt.kind}: {', '.join(prompt.members or sampling.members)}"
    click.echo(f"{output}: {card.method}, {card.num_classes} classes, {axis}")
    if not is_last:
        click.echo(f"next: penumbra export {output}")


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
        if card.export.measured == "graph":
            click.echo("  measured on the graph that the engines were built from; a GPU that loads them measures them")
        click.echo(how_to_serve(card.name), err=True)
