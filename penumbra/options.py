"""Options that several verbs of the command share."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from penumbra.models.errors import BadOption
from penumbra.serving.engine.options import OPTIONS


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
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
ANY_PATH = click.Path(exists=True, path_type=Path)
ANY_FILE = click.Path(dir_okay=False, path_type=Path)
ANY_FOLDER = click.Path(file_okay=False, path_type=Path)
MODEL = click.option("--model", "-m", help="Which model; may be left out when the store has one.")
VERSION = click.option("--version", type=int, help="The newest by default.")
DATA_SET = click.option("--set", "data_set", default="camvid", show_default=True, help="Or voc, cityscapes, folder.")
SPLIT = click.option("--split", default="val", show_default=True, help="Or train, or train/0001: names that begin so.")
DEVICE = click.option("--device", default="", help="cpu or cuda; a GPU where there is one.")
EVERY = click.option("--every", type=click.IntRange(min=1), default=1, show_default=True, help="Every n-th frame only.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")


class FileOrUrl(click.Path):
    """A file that is there, or a URL of fsspec, which stays text."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if "://" in str(value) else super().convert(value, param, ctx)


FILE_OR_URL = FileOrUrl(exists=True, dir_okay=False, path_type=Path)


def the_model(store: Path, model: str | None) -> str:
    """The model that was named, or the only one. Raises BadOption."""
    from penumbra.serving.engine.store import versions

    names = list(versions(store))
    if model is None and len(names) > 1:
        raise BadOption(f"{store} has several models, so --model is needed; there are {', '.join(names)}")
    return model or "".join(names)


def from_table(name: str) -> Callable[[Any], Any]:
    """An option of `POST /segment` as an option of the command."""
    schema = OPTIONS[name].schema
    kind: Any = {"integer": int, "number": float, "string": str}[schema["type"]]
    kind = click.Choice(schema["enum"]) if kind is str and "enum" in schema else kind
    default = 0 if name == "seed" else None  # the others stay unsaid, also in the question that a batch keeps
    flag = f"--{name.replace('_', '-')}"
    return click.option(flag, type=kind, default=default, show_default=True, help=OPTIONS[name].about)


def _find_pictures(_: click.Context, __: click.Parameter, source: Path | None) -> list[Path]:
    from penumbra.serving.files.inputs import find_images

    return [Path(name) for name in find_images(str(source)).images] if source else []


def pictures(what_for: str) -> Callable[[Any], Any]:
    """Make an option that names a picture or a folder, of which the verb gets a list of files."""
    about = f"A picture or a folder: {what_for}."
    return click.option("--pictures", type=ANY_PATH, callback=_find_pictures, help=about)


def given(options: Mapping[str, Any]) -> dict[str, str]:
    """Give those options as text that were said or have a default."""
    return {name: str(value) for name, value in options.items() if value is not None}


def of_answers(verb: Any) -> Any:
    """The options of an answer that a file can have too."""
    risks, prompts = ("max_class_risk", "max_risk"), ("alpha", "tags", "boxes")
    for name in (*risks, *prompts, "bands", "scale", "outputs", "overlap", "views", "seed", "samples"):
        verb = from_table(name)(verb)
    return verb


def of_frames(verb: Any) -> Any:
    """The options of a verb that asks about labelled frames (`penumbra.training.evaluation.run.Question`)."""
    about = "For the first frame's noise, and random splits."
    seed = click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help=about)
    samples = click.option("--samples", type=click.IntRange(min=1), help="How many to draw; the card's by default.")
    for option in (EVERY, seed, samples, VERSION, SPLIT, DATA_SET, click.option("--data", required=True, type=FOLDER)):
        verb = option(verb)
    return from_table("views")(verb)
