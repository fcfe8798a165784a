"""`make test-gpu`: run the steps that have no result yet, and write the file of results and the page.

python -m benchmarks.gpu [--budget 600] [--again] [--only STEP ...] [--device cuda] [--output FILE] [--page]
python -m benchmarks.gpu --device cpu --quick      every step's code on small shapes, to show that it runs
"""

from pathlib import Path

import click
import torch

from benchmarks.gpu.page import PAGE, write_page
from benchmarks.gpu.runner import run_all, run_here
from benchmarks.gpu.sheet import DONE, NOT_HERE, Results, Sheet, describe, read, write
from benchmarks.gpu.steps import ROOT, STEPS
from benchmarks.rounds import RESULTS

NAMES = [step.name for step in STEPS]


@click.command()
@click.option("--budget", "budget_s", default=600.0, show_default=True, help="Seconds of all steps together.")
@click.option("--again", is_flag=True, help="Measure again what has a result for these sources and this card.")
@click.option("--only", multiple=True, type=click.Choice(NAMES), help="These steps and no others.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="The file of results, benchmarks/results/gpu.json.")
@click.option("--quick", is_flag=True, help="Small shapes, to show that it runs; the results go to build/.")
@click.option(
    "--page", "page_only", is_flag=True, help=f"Write {PAGE.relative_to(ROOT)} from the results, run nothing."
)
@click.option("--here", type=click.Choice(NAMES), hidden=True)
@click.option("--until", type=float, default=0.0, hidden=True)
def main(
    budget_s: float, again: bool, only: tuple[str, ...], device: str, output: Path | None, quick: bool,
    page_only: bool, here: str | None, until: float,
) -> None:  # fmt: skip
    output = output or (ROOT / "build/gpu-quick.json" if quick else RESULTS / "gpu.json")
    if page_only:
        return write_page(read(output))
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        return click.echo("there is no CUDA GPU that torch can use here, so nothing is checked or measured")
    steps = {step.name: step for step in STEPS}
    if here:
        return run_here(steps[here], Sheet(output, here, torch.device(device), quick=quick), until=until)
    facts = describe(torch.device(device))
    write(output, read(output) | {"on": facts})
    asked = [step for step in STEPS if not only or step.name in only]
    run_all(asked, output, device, facts["card"], budget_s=budget_s, quick=quick, again=again)
    results = read(output)
    if not quick:
        write_page(results)
    conclude(results, [step.name for step in asked], quick=quick)


def conclude(results: Results, names: list[str], *, quick: bool) -> None:
    """Say in the end how every step stands. Exits with 1 where one failed, ran out of time or misses a bar.

    quick: bars of speed mean nothing, and none is missed.
    """
    well = True
    for name in names:
        entry = results["steps"].get(name, {"state": "not begun"})
        missed = [bar for bar, found in entry.get("bars", {}).items() if not (quick or found.get("holds", True))]
        well &= entry["state"] in (DONE, NOT_HERE) and not missed
        why = f": {entry['why']}" if "why" in entry else ""
        click.echo(f"{name:10} {entry['state']}{why}{'; misses ' + ', '.join(missed) if missed else ''}")
    if not well:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
