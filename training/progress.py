"""Show a training so that a person or a log file can follow it."""

import dataclasses
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from penumbra.training.devices import start_devices
from penumbra.training.loop import train
from penumbra.training.recipe import Precision, Recipe


def follow(
    recipe: Recipe, data: Path, *, devices: int, precision: Precision | None, threads: int | None, minutes: float | None
) -> Path:
    """Train with a progress bar on a terminal and plain lines elsewhere; only the first of several devices reports."""
    recipe = dataclasses.replace(recipe, precision=precision or recipe.precision)
    fabric = start_devices(devices=devices, precision=recipe.precision)
    run = partial(train, recipe, data, threads=threads, minutes=minutes, fabric=fabric)
    if not fabric.is_global_zero:
        return run()
    console = Console()
    if not console.is_terminal:  # one line per report, at once, for log files
        return run(report=lambda share, line: print(f"{100 * share:5.1f} %  {line}", flush=True))
    columns = (TextColumn(recipe.name), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("loading", total=1.0)

        def report(share: float, line: str) -> None:
            bar.update(task, completed=share, description=line)
            if share == 1:
                console.print(line)  # the bar's own text is cut to the width of the terminal

        return run(report=report)
