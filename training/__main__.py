"""`python -m training RECIPE --data DIR`: train a recipe."""

import sys
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from models.errors import PenumbraError
from training.loop import train
from training.recipe import Recipe, read_recipe


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Folder of the data set.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; all cores by default.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Length by the clock instead of steps.")
def main(recipe: Path, data: Path, threads: int | None, minutes: float | None) -> None:
    """Train RECIPE (a YAML file) on the data in DIR; run it again to go on after an interruption."""
    try:
        follow(read_recipe(recipe), data, threads=threads, minutes=minutes)
    except PenumbraError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


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


if __name__ == "__main__":
    main()
