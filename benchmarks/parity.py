"""What every export format keeps of every zoo checkpoint: the gate's figures, as the table of docs/export.md.

python -m benchmarks.parity --data DIR [--every N] [--only BACKEND] [NAME ...]

Every figure is what `penumbra export --data DIR` measures and stores in the card. What the gate refuses, or what takes
longer than the limit, stays in the table with the reason. Results are kept beside those of earlier runs.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.progress import track

from benchmarks.rounds import RESULTS, save
from export.zoo import ZOO

FORMATS = (
    ("torchscript", "fp32"), ("onnx", "fp32"), ("openvino", "fp32"), ("aot", "fp32"),
    ("torchscript", "bf16"), ("openvino", "bf16"), ("aot", "bf16"),
)  # fmt: skip
COLUMNS = {
    "max_abs": ("largest difference", "{:.1e}"), "label_flips_percent": ("flips, %", "{:.4f}"),
    "entropy_rank_correlation": ("entropy rank", "{:.6f}"), "variance_ratio": ("variance", "{:.4f}"),
    "extras_relative": ("own maps, relative", "{:.1e}"), "miou_change": ("mIoU change", "{:+.3f}"),
}  # fmt: skip


def export(name: str, backend: str, precision: str, *, data: Path, every: int, limit_s: float) -> dict[str, Any]:
    """The card's figures, or why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "penumbra", "export", str(ZOO / f"{name}.safetensors"), "--json"),
            *("--backend", backend, "--precision", precision, "--store", folder, "--data", str(data)),
            *("--every", str(every)),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
        except subprocess.TimeoutExpired:
            return {"failed": f"took more than {limit_s:g} s"}
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1]}
    figures: dict[str, Any] = json.loads(done.stdout)["parity"]
    return figures


def row(case: str, figures: dict[str, Any]) -> str:
    if "failed" in figures:
        return f"| {case} | {figures['failed']} |" + " |" * (len(COLUMNS) - 1)
    return f"| {case} | " + " | ".join(form.format(figures[key]) for key, (_, form) in COLUMNS.items()) + " |"


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--every", default=12, show_default=True, help="Every n-th validation frame only.")
@click.option("--only", multiple=True, help="These backends.")
@click.option("--limit", "limit_s", default=300.0, show_default=True, help="Seconds for one export.")
@click.argument("names", nargs=-1)
def main(data: Path, every: int, only: tuple[str, ...], limit_s: float, names: tuple[str, ...]) -> None:
    """Export, measure, keep, and print the table of all that is kept."""
    chosen = names or tuple(sorted(path.stem for path in ZOO.glob("*.safetensors")))
    formats = [each for each in FORMATS if not only or each[0] in only]
    for name, (backend, precision) in track([(name, each) for each in formats for name in chosen], "Exporting"):
        figures = export(name, backend, precision, data=data, every=every, limit_s=limit_s)
        save("parity", {f"{name} | {backend} {precision}": figures}, keep=True)
    kept = json.loads((RESULTS / "parity.json").read_text())
    print("| model | format |", " | ".join(title for title, _ in COLUMNS.values()), "|")
    print("\n".join(row(case, figures) for case, figures in sorted(kept.items()) if case != "on"))


if __name__ == "__main__":
    main()
