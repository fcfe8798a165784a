"""What the steps found, for people: the last section of docs/measure/gpu.md."""

from collections.abc import Iterator

from benchmarks.gpu.sheet import Results
from benchmarks.gpu.steps import ROOT, STEPS

PAGE = ROOT / "docs/measure/gpu.md"
HEADING = "## Results\n"
NOT_RUN = """**Not run on a GPU.** No figure of this repository is from one. Proven instead, on CPUs:

* the whole way of a picture, run on a CPU, gives what the CPU's own way gives, for every network
  (`tests/serving/engine/gpu/test_pipeline.py`);
* on CUDA tensors that are fake it stays on the device, waits for nothing, sends down finished rows alone, and launches
  no more for more windows, samples or bands (`tests/serving/engine/gpu/test_rehearsal.py`);
* the Triton kernels give numpy's values by Triton's interpreter, and compile for sm_80, sm_90 and sm_120
  (`tests/serving/engine/gpu/test_kernels.py`);
* captured calls are replayed with the same bits by a stand-in (`tests/serving/engine/test_cuda_graphs.py`);
* TensorRT-RTX builds engines of every network from graphs whose values are right (`tests/export/test_tensorrt_rtx.py`).
"""


def write_page(results: Results) -> None:
    """Put results in the place of those that the page has. Everything above its last heading stays."""
    above = PAGE.read_text().partition(HEADING)[0]
    PAGE.write_text(f"{above}{HEADING}\n{render(results)}")


def render(results: Results) -> str:
    """Give the results as Markdown: the card, every bar, every step, and all figures."""
    found = {step.name: results["steps"][step.name] for step in STEPS if step.name in results["steps"]}
    if not found:
        return NOT_RUN
    facts = "; ".join(f"{name} {value}" for name, value in results.get("on", {}).items())
    sections = [
        f"{facts}.",
        table("bar | figure | bound | held", bars(found)),
        table("step | state | s", states(found)),
    ]
    for name, entry in found.items():
        figures = [f"{what} | {shown(value)}" for what, value in entry.get("found", {}).items()]
        sections += [f"### {name}", table("what | figure", figures)] if figures else []
    return "\n\n".join(sections) + "\n"


def bars(found: Results) -> Iterator[str]:
    for name, entry in found.items():
        for bar, measured in entry.get("bars", {}).items():
            if "why" in measured:
                yield f"{name}: {bar} | not measured: {measured['why']} | |"
            else:
                held = "yes" if measured["holds"] else "**no**"
                yield f"{name}: {bar} | {shown(measured['figure'])} | {measured['bar']} | {held}"


def states(found: Results) -> Iterator[str]:
    for name, entry in found.items():
        why = f": {entry['why']}" if "why" in entry else ""
        yield f"{name} | {entry['state']}{why} | {entry.get('seconds', '')}"


def shown(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def table(head: str, rows: Iterator[str] | list[str]) -> str:
    lines = [head, "|".join(["---"] * (head.count("|") + 1)), *rows]
    return "\n".join(f"| {line} |" for line in lines)
