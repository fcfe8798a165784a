"""Print what the command line says of an import and of an export's proof."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import click
from rich.console import Console
from rich.table import Column, Table

from penumbra.export.importer import Imported
from penumbra.export.load import Speed
from penumbra.export.parity import held
from penumbra.export.tune import DRAWN, Outcome
from penumbra.models.card import Card, Parity
from penumbra.serving.engine.store import artifact_card
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


def print_parity(
    card: Card, directory: Path, *, as_json: bool, measured: Parity | None = None,
    speed: tuple[Speed, bool] | None = None,
) -> None:  # fmt: skip
    """Print the gate's figures beside what is allowed. measured: here and now, if not at export. speed: of a tuned one,
    likewise, and whether it can be compared."""
    assert card.export
    figures = measured or card.export.parity
    if as_json:
        document = {"directory": str(directory), "parity": dataclasses.asdict(figures)}
        click.echo(json.dumps(document | ({"speed": speed[0]._asdict(), "is_alike": speed[1]} if speed else {})))
        return
    click.echo(directory)
    limits = {name: figure.limit for name, figure in held(figures, card).items()}
    for name, value in dataclasses.asdict(figures).items():
        click.echo(f"  {name:26} {'none' if value is None else f'{value:.6g}':12} {limits.get(name, '')}".rstrip())
    if card.export.num_int8:
        kept = f"; the gate left out {', '.join(card.export.kept)}" if card.export.kept else ""
        click.echo(f"  {card.export.num_int8} layers are in int8{kept}")
    if (tuned := card.tuned) and speed:
        for name, value in speed[0]._asdict().items():
            before = f"{getattr(tuned, name):.6g} when it was tuned" if speed[1] else ""
            click.echo(f"  {name:26} {value:<12.6g} {before}".rstrip())
        click.echo(f"  tuned on {tuned.processor} with {tuned.threads} threads, for {tuned.load}")
        if not speed[1]:
            click.echo("  pictures or machine are not those of then: its speed there is no figure to compare this with")
    if measured is None:
        if card.export.measured == "graph":
            click.echo("  measured on the graph that the engines were built from; a GPU that loads them measures them")
        _print_origin(card)
        click.echo(how_to_serve(card.name), err=True)


def _print_origin(card: Card) -> None:
    """Print that a version that was just written in half precision or int8 has thresholds of another export, if any."""
    if card.export and card.export.precision != "fp32" and (card.calibration or card.novelty):
        remedy = f"`penumbra calibrate {card.name} --data DIR` finds them in {card.export.precision}"
        click.echo(f"its thresholds and its reference for novelty are of another export; {remedy}")


def print_tuned(outcome: Outcome, *, as_json: bool) -> None:
    """Print what was measured, what it was measured on, and what became the next version."""
    tuned, front = outcome.tuned, outcome.front
    if as_json:
        document = dataclasses.asdict(outcome) | {"directory": str(outcome.directory)}
        click.echo(json.dumps(document | {"front": [row.name for row in front]}))
        return
    console, accuracy = Console(markup=False, emoji=False), [f"{name} change" for name in outcome.chosen.changes]
    heads = ("windows/s", "p95, ms", "MiB", "flips, %", "variance", *accuracy)
    first = (Column(name, no_wrap=True) for name in ("", "format", "sizes"))
    table = Table(*first, *heads)
    for row in sorted(outcome.rows, key=lambda row: -row.windows_per_s):
        table.add_row(
            "*" * (row in front) + ">" * (row == outcome.chosen), row.name, "x".join(map(str, row.sizes or ())),
            f"{row.windows_per_s:.1f}", f"{row.p95_ms:.1f}", f"{row.memory_mb:.0f}", f"{row.label_flips_percent:.3f}",
            f"{row.variance_ratio:.3f}", *(f"{change:+.4f}" for change in row.changes.values()),
        )  # fmt: skip
    console.print(table)
    click.echo("> chosen, * on the Pareto front; sizes are windows per batch x samples per call x lanes")
    for name, why in outcome.refused.items():
        click.echo(f"{name}: {why}")
    if not outcome.is_complete:
        click.echo("the search was ended before it was over; this is the best so far")
    click.echo(f"the gate was held on {tuned.gate}, speed measured for {tuned.load} on {tuned.processor}")
    if tuned.gate == DRAWN:
        click.echo("half precision flips far fewer labels on photographs than on drawn windows; tune on --pictures")
    now = outcome.rows[0]
    if outcome.chosen is now:
        click.echo("nothing was faster by 3 % than what is there, so it stays; --always writes the fastest anyway")
    elif outcome.chosen.windows_per_s <= now.windows_per_s:
        click.echo(f"the version before is faster as it is ({now}); remove this one, or tune for longer")
    if outcome.chosen is not now:
        _print_origin(artifact_card(outcome.directory))
    click.echo(f"{outcome.directory}: {outcome.chosen}")
    click.echo(how_to_serve(outcome.directory.parent.name), err=True)
