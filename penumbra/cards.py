"""`penumbra models` and `penumbra card`: what is in a store, and a model's card in the forms of others."""

import dataclasses
import json
from pathlib import Path

import click

from penumbra import options as shared


@click.command()
@shared.STORE
@shared.JSON
def models(store: Path, as_json: bool) -> None:
    """List the models of a store."""
    from rich.console import Console
    from rich.table import Table

    from penumbra.models.errors import BadArtifact, UnknownModel
    from penumbra.serving.engine.store import open_artifact, versions

    if not versions(store):
        raise UnknownModel(f"there are no models in {store}; `penumbra export CHECKPOINT --store {store}` adds one")
    cards = []
    for directory in [store / name / str(v) for name, numbers in versions(store).items() for v in numbers]:
        try:
            cards.append(open_artifact(directory).card)
        except BadArtifact as error:  # said beside the list, so that one broken model does not hide the others
            click.echo(f"penumbra: {error}", err=True)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(card) for card in cards]))
        return
    table = Table("model", "version", "method", "classes", "sampling", "backend", "data")
    for card in cards:
        backend = f"{card.export.backend} {card.export.precision}" if card.export else ""
        table.add_row(
            card.name, str(card.version), card.method, str(card.num_classes), card.sampling.kind, backend,
            card.provenance.data,
        )  # fmt: skip
    Console(markup=False, emoji=False).print(table)


@click.command("card")
@click.argument("name")
@click.option("--as", "kind", required=True, type=click.Choice(["huggingface", "stac", "bioimageio"]))
@click.option("--output", "-o", type=shared.ANY_FOLDER, help="Write it there, and do not print it.")
@shared.VERSION
@shared.STORE
def card_forms(name: str, kind: str, output: Path | None, version: int | None, store: Path) -> None:
    """Write a model's card as Hugging Face, a STAC catalogue or bioimage.io has it."""
    from penumbra.export.cards import write_card
    from penumbra.serving.engine.store import find_artifact, open_artifact

    click.echo(write_card(open_artifact(find_artifact(store, name, version)), kind, output), nl=False)
