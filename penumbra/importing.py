"""`penumbra import`: a published checkpoint of a method, or any network, becomes a checkpoint of ours."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from penumbra import options as shared

if TYPE_CHECKING:
    from penumbra.export.importer import Imported


@click.command(name="import")
@click.argument("method", metavar="METHOD|FORM")
@click.argument("files", nargs=-1)
@click.option("--output", "-o", type=shared.ANY_FILE, help="x.safetensors; of a FORM by default named after the file.")
@click.option("--classes", metavar="NAME|FILE", help="voc, cityscapes, camvid, or a file of names.")
@click.option("--protocol", type=click.Choice(["published", "penumbra"]), default="published", show_default=True,
              help="Of a METHOD: run it as the paper's code does, or as we would.")  # fmt: skip
@click.option("--sampling", help="Of a METHOD with a choice: dropout, for one. Of a FORM: dropout, views or none.")
@shared.from_table("views")
@click.option("--weights", type=shared.FILE, help="Of a module: a file of torch.save or safetensors.")
@click.option("--input", metavar="FILE.json|FIELDS",
              help="Of a FORM: size=512x512 bands=red,green,blue mean=0.5 std=0.2 scale=255 dtype=uint8.")  # fmt: skip
@click.option("--tensor", help="Of onnx: which of its tensors is the answer.")
@shared.pictures("of a FORM, for the gate's windows")
@click.option("--backend", help="Of a FORM: the format to export.")
@click.option("--no-export", is_flag=True, help="Of a FORM: write the checkpoint alone.")
@click.option("--dry", is_flag=True, help="Of a FORM: say what it is and what would happen, and write nothing.")
@click.option("--try", "tried", metavar="PICTURE", type=shared.FILE,
              help="Of a FORM: answer a picture, too, as `penumbra predict` does.")  # fmt: skip
@shared.STORE
@shared.JSON
@click.pass_context
def import_files(
    context: click.Context, /, method: str, files: tuple[str, ...], output: Path | None, as_json: bool, store: Path,
    tried: Path | None, **options: Any,
) -> None:  # fmt: skip
    """Import FILES of a METHOD's authors, or any network: a FORM is onnx, torchscript, pt2, or module PACKAGE:BUILD.

    A network is exported into the store, too. No file of torch.save is run. A FILE alone is asked what it is.
    """
    from penumbra.export.kinds import find_form
    from penumbra.export.networks import FORMS
    from penumbra.export.report import print_imported, print_parity
    from penumbra.serving.engine.store import open_artifact

    if not files:
        method, files = find_form(Path(method)), (method,)
    if tried and (method not in FORMS or options["dry"] or options["no_export"]):
        raise click.UsageError("--try answers by what is exported: of a FORM, and without --dry and --no-export")
    directory = None
    if method in FORMS:
        imported, output, directory = _import_network(method, files, output, store, **options)
    else:
        imported, output = _import_published(method, files, output, **options)
    if as_json:
        facts = {"file": str(output), "directory": directory and str(directory)}
        click.echo(json.dumps(facts | dataclasses.asdict(imported)))
    else:
        print_imported(imported, output, is_last=options["dry"] or bool(directory))
        if directory:
            print_parity(open_artifact(directory).card, directory, as_json=False)
    if tried:
        verbs: Any = context.find_root().command
        context.invoke(
            verbs.commands["predict"], images=(tried,), model=imported.card.name, store=store, as_json=as_json
        )


def _import_published(
    method: str, files: tuple[str, ...], output: Path | None, *, classes: str | None, protocol: Any,
    sampling: str | None, **others: Any,
) -> tuple["Imported", Path]:  # fmt: skip
    from penumbra.export.importer import import_checkpoint
    from penumbra.models.classes import read_classes

    if foreign := [name for name, value in others.items() if value]:
        raise click.UsageError(f"--{foreign[0].replace('_', '-')} is for any network, and {method} is a method")
    named = read_classes(classes) if classes else None
    if output is None:
        raise click.UsageError("a method's checkpoint needs a name; add -o x.safetensors")
    paths = [Path(name) for name in files]
    imported = import_checkpoint(method, paths, output, classes=named, protocol=protocol, sampling=sampling)
    _warn(imported)
    return imported, output


def _import_network(
    form: str, files: tuple[str, ...], output: Path | None, store: Path, *, pictures: list[Path],
    backend: str | None, no_export: bool, dry: bool, protocol: str, **options: Any,
) -> tuple["Imported", Path, Path | None]:  # fmt: skip
    from penumbra.export.bring import Given
    from penumbra.export.bundle import export_checkpoint
    from penumbra.export.networks import checkpoint_name, import_network
    from penumbra.models.checkpoint import SUFFIX

    if len(files) != 1 or protocol != "published":
        raise click.UsageError(f"a {form} network is one file, and has no --protocol; {len(files)} files are named")
    given = Given(**options)
    output = output or Path(checkpoint_name(files[0], given) + SUFFIX)
    imported = import_network(form, files[0], None if dry else output, given)
    _warn(imported)
    if dry or no_export:
        return imported, output, None
    return imported, output, export_checkpoint(output, store, backend=backend, pictures=pictures)


def _warn(imported: "Imported") -> None:
    for sentence in imported.warnings:
        click.echo(f"penumbra: warning: {sentence}", err=True)
