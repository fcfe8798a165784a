"""`penumbra rank`: which pictures of a folder a person should look at first."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from penumbra import options as shared
from penumbra.serving.engine.options import RANKED_BY


@click.command()
@click.argument("source", metavar="INPUT")
@shared.MODEL
@click.option("--by", type=click.Choice(RANKED_BY), default=RANKED_BY[0], show_default=True,
              help="The score that is looked for.")  # fmt: skip
@click.option("--budget", type=click.IntRange(min=1), help="Only so many, which differ from each other.")
@click.option("--sheet", type=shared.ANY_FILE, help="Write a page of thumbnails here, an .html.")
@shared.from_table("overlap")
@shared.from_table("seed")
@shared.from_table("views")
@shared.from_table("samples")
@shared.STORE
@shared.JSON
def rank(
    source: str, model: str | None, by: str, budget: int | None, sheet: Path | None, store: Path, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """List the images of INPUT, a folder or 'a/*.png', by what a person should look at first, as CSV."""
    from penumbra.export.zoo import fill_store
    from penumbra.models.errors import BadOption
    from penumbra.serving.engine.options import parse_options
    from penumbra.serving.engine.segmenter import Segmenter
    from penumbra.serving.engine.store import find_artifact
    from penumbra.serving.files.predict import IN_MEMORY
    from penumbra.serving.files.rank import Ranker, rank_images, rows_of, spread, write_csv, write_sheet
    from penumbra.serving.files.receipts import check_replaceable
    from penumbra.serving.files.report import summarise

    if sheet:
        if sheet.suffix != ".html":
            raise BadOption(f"sheet is {sheet}; a page is written, so a name that ends in .html is wanted")
        check_replaceable([sheet])
        sheet.parent.mkdir(parents=True, exist_ok=True)  # a place that cannot be is told before the work, not after it
    fill_store(store)
    requested = dataclasses.replace(parse_options(shared.given(options)), model=shared.the_model(store, model))
    with Segmenter(limits=IN_MEMORY) as segmenter:
        segmenter.load(find_artifact(store, requested.model or ""))
        ranked, reported = rank_images(Ranker(segmenter, requested, by=by, draws=sheet is not None), source)
    chosen = spread(ranked, by, budget) if budget else ranked
    click.echo(json.dumps(rows_of(chosen)) if as_json else write_csv(chosen), nl=as_json)
    if sheet:
        write_sheet(sheet, chosen, f"{source} by {by.replace('_', ' ')}")
    for line in summarise(reported):
        click.echo(f"penumbra: {line}", err=True)
    if any(result.outcome == "failed" for result in reported):
        raise SystemExit(1)
