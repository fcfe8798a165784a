"""A training that a person or a log file can follow."""

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from training.loop import train
from training.recipe import Recipe


def follow(recipe: Recipe, data: Path, *, threads: int | None, minutes: float | None) -> Path:
    """Train with a progress bar on a terminal and plain lines elsewhere."""
    console = Console()
    if not console.is_terminal:
        return train(recipe, data, threads=threads, minutes=minutes, report=print_line)
    columns = (TextColumn(recipe.name), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("loading", total=1.0)

        def report(share: float, line: str) -> None:
            bar.update(task, completed=share, description=line)
            if share == 1:
                console.print(line)  # the bar's own text is cut to the width of the terminal

        return train(recipe, data, threads=threads, minutes=minutes, report=report)


def print_line(share: float, line: str) -> None:
    """One line per report, at once, for log files."""
    print(f"{100 * share:5.1f} %  {line}", flush=True)
