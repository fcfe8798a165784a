"""The front door: the `penumbra` command, a table of contents of its verbs.

Exit codes: 0 done, 2 the command line was wrong, 1 it failed; a failure is one sentence on stderr.
"""

import dataclasses
import json
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path, PurePath
from typing import Any

import click
from click.core import ParameterSource

from penumbra import options as shared
from penumbra.cards import card_forms, models
from penumbra.failures import Verbs, sentence_of
from penumbra.importing import import_files
from penumbra.models.errors import BadOption, DiskFull, reason_of
from penumbra.promoting import promote
from penumbra.ranking import rank
from penumbra.serving.engine.quota import num_cores
from penumbra.serving.process import print_version
from penumbra.tuning import MINUTES, tune, tune_model

BENTOML = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "runpy.run_module('bentoml', run_name='__main__', alter_sys=True)"
)
"""`python -m bentoml`, which Ctrl-C ends without a traceback also while it is being imported."""
ENGINE = click.option(
    "--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
    help="Here, or on the Ray cluster that RAY_ADDRESS names.",
)  # fmt: skip


@click.group(cls=Verbs)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=print_version, help="Print it and leave."
)
def main() -> None:
    """Serve trained segmentation checkpoints and say, per pixel, how sure they are."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("penumbra.disk").setLevel(logging.CRITICAL)  # a verb says it itself
    if num_cores() < len(os.sched_getaffinity(0)):  # torch, which is imported later, knows of no quota
        os.environ.setdefault("OMP_NUM_THREADS", str(num_cores()))


@main.command()
@shared.STORE
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to bind; 0.0.0.0 for all.")
@click.option("--port", type=click.IntRange(1, 65535), default=3000, show_default=True, help="For HTTP.")
@click.option("--grpc-port", type=click.IntRange(0, 65535), default=3001, show_default=True, help="For gRPC; 0: none.")
def serve(store: Path, host: str, port: int, grpc_port: int) -> None:
    """Serve a store over HTTP and gRPC; an empty one is filled with the demo models first."""
    from penumbra.export.zoo import fill_store
    from penumbra.serving.process import check_port, own_directory
    from penumbra.serving.settings import check_settings, paths_of

    if port == grpc_port:
        raise click.UsageError(f"--port and --grpc-port are both {port}; give two, or --grpc-port 0 for no gRPC")
    settings = check_settings()[0]
    check_port(host, port, "--port")
    grpc_address = check_port(host, grpc_port, "--grpc-port") if grpc_port else ""
    home = own_directory(Path(tempfile.gettempdir()) / f"penumbra-{os.getuid()}-{port}")
    fill_store(store)
    environment = (
        os.environ
        | {"PENUMBRA_JOBS": str(home / "jobs")}
        | paths_of(settings)
        | {
            "PENUMBRA_STORE": str(store.resolve()),
            "PENUMBRA_GRPC_ADDRESS": grpc_address,
            "BENTOML_HOME": str(home),  # two servers with one home delete each other's files
            "BENTOML_DO_NOT_TRACK": "True",
        }
    )
    command = ["serve", "penumbra.serving.service:Penumbra", "--host", host, "--port", str(port)]
    command += ["--working-dir", str(Path(__file__).parents[1])]
    if settings.tls_cert:  # the worker brings the certificate itself; this is for BentoML's own line of the address
        options = os.environ.get("BENTOML_CONFIG_OPTIONS", "")
        environment["BENTOML_CONFIG_OPTIONS"] = f"{options} services.penumbra.ssl.enabled=true"
        command += [f"--ssl-{kind}file={environment[f'PENUMBRA_TLS_{kind.upper()}']}" for kind in ("cert", "key")]
    sys.stdout.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # one that Python has noted and not handled yet would be lost
    os.execve(sys.executable, [sys.executable, "-c", BENTOML, *command], environment)


@main.command()
@click.argument("images", nargs=-1, required=True, type=shared.FILE_OR_URL)
@shared.MODEL
@click.option("--output", "-o", type=shared.ANY_FOLDER, default="out", show_default=True)
@ENGINE
@shared.of_answers
@shared.STORE
@shared.JSON
def predict(
    images: tuple[Path | str, ...], model: str | None, output: Path, store: Path, as_json: bool, engine: str,
    **options: Any,
) -> None:  # fmt: skip
    """Segment picture files, or s3://..., without a server; writes labels, overlay and uncertainty maps."""
    from penumbra.export.zoo import fill_store
    from penumbra.serving.engine.options import DEFAULT, check_options, parse_options
    from penumbra.serving.engine.segmenter import Segmenter
    from penumbra.serving.engine.store import find_artifact
    from penumbra.serving.files.cluster import on_ray
    from penumbra.serving.files.predict import IN_MEMORY, predict_files
    from penumbra.serving.files.report import outcome_facts, report

    if len({PurePath(path).stem for path in images}) < len(images):
        raise BadOption("two pictures have the same name, and their files would too; predict them into two directories")
    fill_store(store)
    requested = parse_options(shared.given(options))
    requested = dataclasses.replace(requested.with_maps((DEFAULT,)), model=shared.the_model(store, model))
    failures = []
    with Segmenter(limits=IN_MEMORY) as segmenter:
        artifact = find_artifact(store, requested.model or "")
        check_options(requested, segmenter.load(artifact), segmenter.limits)
        spread = on_ray(artifact) if engine == "ray" else None
        for path, outcome in predict_files(segmenter, images, requested, output, spread=spread):
            if isinstance(outcome, Exception):
                failures.append(outcome)
                why = sentence_of(outcome) if isinstance(outcome, OSError | DiskFull) else reason_of(outcome)
                is_named = why.startswith(f"{path}: ") or (isinstance(path, str) and path in why)
                click.echo(f"penumbra: {why}" if is_named else f"penumbra: {path}: {why}", err=True)
            elif as_json:
                click.echo(json.dumps(outcome_facts(outcome)))
            else:
                report(outcome)
    if failures:
        raise SystemExit(2 if all(isinstance(failure, BadOption) for failure in failures) else 1)


@main.command()
@click.argument("source", metavar="INPUT")
@click.argument("output")
@shared.MODEL
@click.option("--format", "-f", default="png", show_default=True, help="png, json, npz, geojson, gpkg or tif.")
@shared.from_table("picture")
@ENGINE
@shared.of_answers
@shared.STORE
@shared.JSON
def batch(source: str, output: str, model: str | None, store: Path, as_json: bool, engine: str, **options: Any) -> None:
    """Answer all images of INPUT, a folder, 'a/*.png' or s3://..., into OUTPUT; goes on where it was stopped."""
    from penumbra.export.zoo import fill_store
    from penumbra.serving.files.batch import parse_batch, run_batch
    from penumbra.serving.files.report import summarise

    fill_store(store)
    fields = shared.given(options)
    request = parse_batch(store, shared.the_model(store, model), fields.pop("format"), fields)
    counts, reasons = run_batch(request, source, output, engine=engine)
    for line in summarise(reasons):
        click.echo(f"penumbra: {line}", err=True)
    summary = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    click.echo(json.dumps(counts) if as_json else f"{output}: {summary}")
    if counts["failed"]:
        raise SystemExit(1)


main.add_command(rank)
main.add_command(models)


@main.command()
@click.argument("recipe", type=shared.FILE)
@click.option("--data", required=True, type=shared.FOLDER)
@click.option("--devices", type=click.IntRange(min=1), default=1, show_default=True, help="GPUs, or CPU processes.")
@click.option("--precision", type=click.Choice(["32-true", "bf16-mixed", "16-mixed"]), help="Instead of the recipe's.")
@click.option("--threads", type=click.IntRange(min=1), help="Cores per device; all by default.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Length by the clock instead of steps.")
def train(recipe: Path, data: Path, **options: Any) -> None:
    """Train a recipe to a checkpoint; a run that was stopped goes on where it was.

    For many machines, start it with torchrun on each.
    """
    from penumbra.training.progress import follow
    from penumbra.training.recipe import read_recipe

    click.echo(follow(read_recipe(recipe), data, **options))


main.add_command(import_files)


@main.command()
@click.argument("checkpoints", nargs=-1, required=True, type=shared.FILE)
@click.option("--output", "-o", required=True, type=shared.ANY_FILE, help="A .safetensors.")
def ensemble(checkpoints: tuple[Path, ...], output: Path) -> None:
    """Join checkpoints of the same classes into one, whose members they are."""
    from penumbra.export.ensemble import losses, make_ensemble

    card = make_ensemble(checkpoints, output)
    for loss in losses(checkpoints):
        click.echo(f"penumbra: warning: {loss}", err=True)
    click.echo(f"{output}: {len(card.sampling.members)} members: {', '.join(card.sampling.members)}")
    click.echo(f"next: penumbra export {output}")


@main.command()
@click.argument("checkpoint", metavar="CHECKPOINT|NAME", type=click.Path(path_type=Path))
@click.option("--target", type=click.Choice(["store", "triton"]), default="store", show_default=True,
              help="Where to: the store, or a Triton model repository, also of a NAME that the store has.")  # fmt: skip
@click.option("--output", "-o", type=shared.ANY_FOLDER, help="The Triton repository.")
@click.option("--backend", show_default="torchscript, or onnx for an ONNX program",
              help="Or onnx, openvino, aot, tensorrt, tensorrt_rtx.")  # fmt: skip
@click.option("--precision", default="fp32", show_default=True, help="Or bf16, fp16, int8, if the backend has it.")
@click.option("--device", default="cpu", show_default=True, help="Where the graphs are to run: cpu or cuda.")
@click.option("--data", type=shared.FOLDER, help="Labelled pictures, on which the export is measured too.")
@shared.pictures("for the gate's windows, and for int8, which needs them")
@click.option("--tune", is_flag=True, help="Then tune it, as penumbra tune does.")
@MINUTES
@shared.from_table("views")
@shared.DATA_SET
@shared.SPLIT
@shared.EVERY
@shared.STORE
@shared.JSON
def export(
    checkpoint: Path, target: str, output: Path | None, backend: str | None, precision: str, device: str,
    data: Path | None, pictures: list[Path], data_set: str, split: str, every: int, store: Path, as_json: bool,
    views: Any, tune: bool, minutes: float,
) -> None:  # fmt: skip
    """Export a checkpoint into a store, proved against the checkpoint, or not at all."""
    from rich.console import Console

    from penumbra.export.bundle import export_checkpoint
    from penumbra.export.report import print_parity
    from penumbra.serving.engine.store import open_artifact

    own = ("backend", "precision", "device", "data", "pictures", "views", "tune") if target == "triton" else ("output",)
    context = click.get_current_context()
    if said := [name for name in own if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]:
        raise click.UsageError(f"--{said[0]} is not for --target {target}; leave it out")
    if target == "triton":
        return _export_repository(checkpoint, store, output, as_json=as_json)
    if not checkpoint.is_file():
        raise BadOption(f"there is no file {str(checkpoint)!r}; a checkpoint is wanted")
    frames = _read_frames(checkpoint, every, data=data, data_set=data_set, split=split) if data else ()
    with Console(stderr=True).status(
        f"Building {backend or 'graphs'} {precision} of {checkpoint.name}, and measuring it"
    ):
        directory = export_checkpoint(
            checkpoint, store, backend=backend, precision=precision, device=device, frames=frames, views=views,
            pictures=pictures,
        )  # fmt: skip
    if not (tune and as_json):  # one document is printed
        print_parity(open_artifact(directory).card, directory, as_json=as_json)
    if tune:
        tune_model(
            directory.parent.name, store, minutes=minutes, as_json=as_json, data=data, data_set=data_set, split=split,
            every=every, device=device, checkpoint=checkpoint, pictures=pictures,
        )  # fmt: skip


def _read_frames(checkpoint: Path, every: int, **where: Any) -> list[Any]:
    """Every n-th labelled frame, as `penumbra.export.parity` takes them."""
    from penumbra.models.checkpoint import read_card
    from penumbra.training.evaluation.run import Question, as_rasters, load_frames

    card = read_card(checkpoint)
    frames: list[Any] = as_rasters(load_frames(Question(checkpoint.stem, **where), card), card.input, every=every)
    return frames


def _export_repository(source: Path, store: Path, repository: Path | None, *, as_json: bool) -> None:
    from penumbra.export.triton import export_repository

    if repository is None:
        raise BadOption("a Triton repository needs a directory; add -o DIRECTORY")
    names = export_repository(str(source), store, repository)
    click.echo(json.dumps({"directory": str(repository), "models": names}) if as_json else "\n".join(names))


main.add_command(tune)
main.add_command(card_forms)


@main.command()
@click.argument("name")
@shared.VERSION
@shared.pictures("what a tuned one is asked for, in place of its golden windows")
@shared.DEVICE
@shared.STORE
@shared.JSON
def verify(name: str, version: int | None, pictures: list[Path], device: str, store: Path, as_json: bool) -> None:
    """Check an artifact's hashes, measure it on this machine against its checkpoint, and how fast a tuned one is."""
    from penumbra.export.bundle import verify_artifact
    from penumbra.export.load import remeasure
    from penumbra.export.report import print_parity
    from penumbra.serving.engine.store import artifact_card, find_artifact
    from penumbra.serving.settings import read_settings

    directory = find_artifact(store, name, version)
    threads = read_settings().threads
    measured = verify_artifact(directory, device, threads=threads)
    speed = remeasure(directory, pictures, device=device, threads=threads)
    print_parity(artifact_card(directory), directory, as_json=as_json, measured=measured, speed=speed)


@main.command()
@click.argument("name")
@click.option("--key", required=True, type=shared.ANY_FILE, help="Private, Ed25519, PEM.")
@shared.VERSION
@shared.STORE
def sign(name: str, key: Path, version: int | None, store: Path) -> None:
    """Sign an artifact whose hashes hold, for servers that serve signed ones alone."""
    from penumbra.serving.engine.signature import read_private_key, sign_card
    from penumbra.serving.engine.store import find_artifact, open_artifact

    artifact = open_artifact(find_artifact(store, name, version))
    path = sign_card(artifact.directory, artifact.card_bytes, read_private_key(key))
    click.echo(f"{path}: signed {artifact.card.name} version {artifact.card.version}")


main.add_command(promote)


@main.command()
@click.argument("name")
@shared.of_frames
@click.option("--json", "json_file", type=shared.ANY_FILE, help="Write all figures here.")
@click.option("--plots", type=shared.ANY_FOLDER, help="Draw curves and pictures here.")
@click.option("--control", is_flag=True, help="Of a sampled model, its single pass at a temperature of its own.")
@click.option("--shift", is_flag=True, help="Also on corrupted and rescaled frames, and with objects pasted in.")
@click.option("--hidden", default="", metavar="CLASS", help="Also how a class that was void in training stands out.")
@shared.STORE
def evaluate(
    name: str, store: Path, json_file: Path | None, plots: Path | None, control: bool, shift: bool, **options: Any
) -> None:  # fmt: skip
    """Measure a model on labelled pictures as it is served: accuracy, calibration, and its uncertainty."""
    from penumbra.training.evaluation.answers import Question
    from penumbra.training.evaluation.verb import check_document, evaluate_artifact, report, write_document

    if json_file:
        check_document(json_file)
    for folder in (json_file and json_file.parent, plots):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)  # a place that cannot be is told before the work, not after it
    measured = evaluate_artifact(Question(name, **options), store, plots=plots, control=control, shift=shift)
    report(measured)
    if json_file:
        write_document(json_file, measured)


@main.command()
@click.argument("name")
@shared.of_frames
@click.option("--risks", default="0.01,0.02,0.05,0.1", show_default=True, help="What max_risk shall be possible.")
@click.option("--class-risks", default="0.1,0.2", show_default=True, help="What max_class_risk shall be possible.")
@shared.STORE
@shared.JSON
def calibrate(name: str, store: Path, risks: str, class_risks: str, as_json: bool, **options: Any) -> None:
    """Fit a model's temperature, abstention thresholds and novelty reference; they become its next version."""
    from penumbra.training.calibrate import calibrate_artifact, report
    from penumbra.training.evaluation.run import Question

    shares = []
    for option, text in (("risks", risks), ("class_risks", class_risks)):
        try:
            shares.append([float(risk) for risk in text.split(",") if risk.strip()])
        except ValueError:
            raise BadOption(f"{option} is {text[:60]!r}; shares with commas between them are wanted") from None
    calibrated, place = calibrate_artifact(Question(name, **options), store, risks=shares[0], class_risks=shares[1])
    if as_json:
        click.echo(json.dumps(calibrated.document() | {"directory": str(place)}, allow_nan=False))
        return
    report(calibrated, place)


if __name__ == "__main__":
    main()
