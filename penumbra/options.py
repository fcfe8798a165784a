"""Options that several verbs of the command share."""

from pathlib import Path
from typing import Any

import click

from penumbra.models.errors import BadOption


def _of_known_environment(_: click.Context, __: click.Parameter, store: Path) -> Path:
    """Raises BadOption for an unknown PENUMBRA_*: what was meant to name the store would be passed over in silence."""
    from penumbra.serving.settings import check_environment

    try:
        check_environment()
    except ValueError as error:
        raise BadOption(str(error)) from None
    return store


STORE = click.option(
    "--store", type=click.Path(path_type=Path, file_okay=False), default=Path("store"), envvar="PENUMBRA_STORE",
    show_default=True, help="Directory of artifacts.", callback=_of_known_environment,
)  # fmt: skip
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")


def of_answers(verb: Any) -> Any:
    """The options of an answer, which are those of `POST /segment`."""
    for option in (
        click.option("--max-risk", type=float, help="Withhold uncertain pixels until at most this share is wrong."),
        click.option("--alpha", type=float, help="Weight of the network that sees the boxes."),
        click.option("--tags", help="For models that take them: classes in the picture, comma-separated."),
        click.option("--boxes", help="For models that take them: JSON list of [x0, y0, x1, y1, class]."),
        click.option("--outputs", help="Maps to write, comma-separated; a model's own too."),
        click.option("--overlap", type=float, help="Share of a window that its neighbour covers too, 0 to 0.9."),
        click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same answer."),
        click.option("--samples", type=int, help="How many samples to draw."),
    ):
        verb = option(verb)
    return verb


def of_frames(verb: Any) -> Any:
    """The options of a verb that asks about labelled frames (`penumbra.training.evaluation.run.Question`)."""
    for option in (
        click.option(
            "--every", type=click.IntRange(min=1), default=1, show_default=True, help="Every n-th frame only."
        ),
        click.option(
            "--seed", type=int, default=0, show_default=True, help="Of the first frame, and of random splits."
        ),
        click.option("--samples", type=click.IntRange(min=1), help="How many samples to draw; the card's by default."),
        click.option("--version", type=int, help="The newest by default."),
        click.option("--split", default="val", show_default=True, help="Which of the data's splits."),
        click.option("--set", "data_set", default="camvid", show_default=True, help="Or voc, cityscapes, folder."),
        click.option("--data", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path)),
    ):
        verb = option(verb)
    return verb
