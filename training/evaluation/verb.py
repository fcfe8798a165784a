"""`penumbra evaluate`: an artifact and a labelled data set to figures, curves, shifts, a table and pictures."""

import dataclasses
import json
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from penumbra.models.errors import BadOption
from penumbra.models.files import write_whole
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.store import find_artifact
from penumbra.serving.files.receipts import check_replaceable
from penumbra.training.evaluation.answers import LIMITS, Answer, Question
from penumbra.training.evaluation.intervals import WITH_INTERVALS
from penumbra.training.evaluation.run import Measured, evaluate, load_frames, segment_frames
from penumbra.training.evaluation.shift import find_class, find_strange, measure_shift
from penumbra.training.evaluation.temperature import control_cards
from penumbra.training.frames import FrameSet, hide_classes

PLOTS = ("reliability", "risk_coverage", "pavpu", "confusion", "contact_sheet", "samples", "shift")
"""What `penumbra.training.plots` may draw."""


def typical(measured: Measured, segmenter: Segmenter, frames: FrameSet) -> list[tuple[str, Answer]]:
    """Choose the frames of least, lower-quartile, median and highest accuracy: a title and the answer of each."""
    ranked = sorted(pair for pair in zip(measured.accuracies, measured.cards, strict=True) if not math.isnan(pair[0]))
    last, shown = len(ranked) - 1, []
    for title, rank in {"worst": 0, "lower quartile": last // 4, "median": last // 2, "best": last}.items():
        index = ranked[rank][1]
        (answer,) = segment_frames(segmenter, measured.question, frames, {index: measured.cards[index]}, title=title)
        shown.append((f"{title}: {frames.names[index]}", answer))
    return shown


def evaluate_artifact(
    question: Question, store: Path, *, plots: Path | None = None, control: bool = False, shift: bool = False,
    seen: Collection[str] | None = None,
) -> Measured:  # fmt: skip
    """Load an artifact, measure it, and draw what was measured. control: its single pass at a temperature of its own.
    shift: `measure_shift` too, of what is `seen`. Of a hidden class it measures how its pixels stand out.

    Raises any PenumbraError.
    """
    if question.every < 1:
        raise BadOption(f"every is {question.every}; 1 or more is possible")
    if plots:
        check_replaceable(plots / f"{name}.{suffix}" for name in PLOTS for suffix in ("png", "svg", "pdf"))
    with Segmenter(limits=LIMITS) as segmenter:
        card = segmenter.load(find_artifact(store, question.name, question.version))
        whole, hidden, beyond = load_frames(question, card), question.hidden, {}
        frames = hide_classes(whole, [find_class(card, hidden)]) if hidden else whole
        indices = list(range(0, len(frames), question.every))
        cards = control_cards(segmenter, question, frames, indices) if control else None
        measured = evaluate(segmenter, question, frames, compare=plots is not None, cards=cards)
        if shift:
            beyond["shift"] = measure_shift(segmenter, measured, frames, seen=seen)
        if hidden:
            beyond["hidden"] = {hidden: find_strange(segmenter, measured, whole, frames)}
        measured = dataclasses.replace(measured, beyond=beyond)
        if plots:
            from penumbra.training.plots import draw_all  # matplotlib is only needed here

            draw_all(measured.document(), card, typical(measured, segmenter, frames), plots)
    return measured


def check_document(path: Path) -> None:
    """Raise BadOption where an evaluation's document would take the place of a file that is none."""
    if not path.is_file():  # there is none yet, or it is a pipe
        return
    try:
        document = json.loads(path.read_bytes() or '{"figures": 0, "curves": 0}')  # nothing is lost with an empty file
        is_own = {"figures", "curves"} <= document.keys()
    except (ValueError, AttributeError):
        is_own = False
    if not is_own:
        raise BadOption(f"{path} is in the way, and is no evaluation; move it, or name another file")


def write_document(path: Path, measured: Measured) -> None:
    """Write what was measured as JSON; into a pipe, or a file as a whole."""
    data = json.dumps(measured.document(), allow_nan=False).encode() + b"\n"
    if path.exists() and not path.is_file():
        path.write_bytes(data)
    else:
        write_whole(path.resolve(), data)


def report(measured: Measured) -> None:
    """Print the figures as a table."""
    document, console = measured.document(), Console(markup=False, emoji=False)
    console.print(
        f"{document['model']} version {document['version']} on {document['set']} {document['split']}: "
        f"{document['frames']} frames, {document['pixels']:,} labelled pixels, {document['samples']} samples, "
        f"seed {document['seed']}", highlight=False,
    )  # fmt: skip
    table = Table("figure", "value", "95 % interval", "binning error at most")
    for name, value in document["figures"].items():
        error, interval = document["errors"].get(name), document["intervals"].get(name)
        table.add_row(
            name, "undefined" if value is None else f"{value:.4f}",
            "" if interval is None else "{:.4f} to {:.4f}".format(*interval), "" if error is None else f"{error:.0e}",
        )  # fmt: skip
    console.print(table)
    for part, rows in tables_of(document):
        heads = (Column(name.replace("_", " "), overflow="fold") for name in next(iter(rows.values())))
        beyond = Table(Column(part, min_width=max(map(len, rows))), *heads)
        for name, row in rows.items():
            beyond.add_row(name, *("" if value is None else f"{value:.4f}" for value in row.values()))
        console.print(beyond)


def tables_of(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, dict[str, float | None]]]]:
    """Choose from a document what is shown of samples and shifts: a title, and rows of figures by name."""
    if rows := document.get("against_samples"):
        yield "samples", {str(row.pop("samples")): row for row in map(dict, rows)}
    if shift := document.get("shift"):
        rows = {}
        for name, row in shift["variants"].items():
            told = {f"told by {score}": value for score, value in row.get("separation", {}).items()}
            mark = " (seen)" if name.rpartition("-")[0] in shift["seen"] else ""
            rows[name + mark] = {figure.partition("/")[2]: row["figures"][figure] for figure in WITH_INTERVALS} | told
        yield "pictures", rows
        yield "pasted objects", shift["objects"]
    for class_name, maps in document.get("hidden", {}).items():
        yield f"pixels of {class_name}", maps
