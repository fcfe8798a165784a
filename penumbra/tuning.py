"""`penumbra tune`: what is fastest here, of all that passes the gate, becomes a model's next version."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from penumbra import options as shared

if TYPE_CHECKING:
    from penumbra.serving.engine.segmenter import Segmenter

MINUTES = click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=5.0, show_default=True,
                       help="How long tuning may take.")  # fmt: skip


@click.command()
@click.argument("name")
@click.option("--latency", is_flag=True, help="For one caller alone, instead of as many as keep the machine busy.")
@click.option("--throughput", is_flag=True, help="For many callers, which is the default.")
@click.option("--target-ms", type=click.FloatRange(min=0, min_open=True), help="Answers that take longer do not count.")
@shared.pictures("the load, and what the gate is held on")
@click.option("--data", type=shared.FOLDER, help="Labelled pictures, for the gate and for changes of accuracy.")
@shared.DATA_SET
@shared.SPLIT
@shared.EVERY
@MINUTES
@click.option("--backend", "backends", multiple=True, help="A format to try, once for each; all by default.")
@click.option("--machine-code", is_flag=True, help="Also formats that run on this kind of machine only, as aot.")
@click.option("--always", is_flag=True, help="Write the fastest also where the version that is there is faster.")
@click.option("--checkpoint", type=shared.FILE, help="What NAME was exported from, where it is not found by itself.")
@shared.DEVICE
@shared.STORE
@shared.JSON
def tune(name: str, store: Path, as_json: bool, latency: bool, throughput: bool, **options: Any) -> None:
    """Measure every format, precision and size on this machine; the fastest that the gate passes is the next version.

    Ctrl-C ends it with the best so far.
    """
    if latency and throughput:
        raise click.UsageError("--latency and --throughput are two loads; one is tuned for at a time")
    tune_model(name, store, as_json=as_json, kind="latency" if latency else "throughput", **options)


def tune_model(
    name: str, store: Path, *, minutes: float, as_json: bool, kind: Any = "throughput", target_ms: float | None = None,
    pictures: list[Path], data: Path | None = None, every: int, data_set: str, split: str, **others: Any,
) -> None:  # fmt: skip
    """Tune a model of the store, on pictures and on labelled data where they are given, and print what was found."""
    ends = time.perf_counter() + 60 * minutes
    from penumbra.export.candidates import find_loadable
    from penumbra.export.load import Load
    from penumbra.export.report import print_tuned
    from penumbra.export.tune import TuneOptions, tune_artifact
    from penumbra.serving.engine.store import artifact_card
    from penumbra.serving.settings import read_settings

    threads = read_settings().threads
    options = TuneOptions(ends, Load(kind, target_ms or 0.0), pictures, threads=threads, **others)
    if data:
        from penumbra.training.evaluation.run import Question, as_rasters, evaluate, load_frames

        question = Question(name, data, data_set, split, every=every)
        card = artifact_card(find_loadable(store, name, options.device, lambda _: None, threads))
        frames = load_frames(question, card)

        def judge(segmenter: "Segmenter") -> dict[str, float]:
            figures = evaluate(segmenter, question, frames).evaluation.figures()
            return {figure.rpartition("/")[2]: figures[figure] for figure in ("seg/mIoU", "sc/AURC", "cal/ECE")}

        options = replace(options, frames=as_rasters(frames, card.input, every=every), judge=judge)
    print_tuned(tune_artifact(name, store, options, lambda line: click.echo(line, err=True)), as_json=as_json)
