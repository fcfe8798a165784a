"""`make load`: a mix of callers against a server that is started for it, and a verdict.

    python -m loadtests.run [--seconds 120] [--users 12] [--output DIR] [CLASS ...]

Writes DIR/report.html, DIR/summary.json and the logs. Fails on any 5xx, wrong answer or lost request, when the server
counts other answers than its callers saw, and when it still has work after they have gone.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from prometheus_client.parser import text_string_to_metric_families

from penumbra.export.bundle import export_network
from penumbra.models.card import WindowSpec
from tests.serving.server import MEASURED, Server, serving, until
from tests.toys import toy_card

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
SETTLE_S = 30
TOYS, WINDOW = ("pointwise", "latent"), WindowSpec(256, 256)


def fill(store: Path) -> None:
    """Toy models, whose right answers are known."""
    for form in TOYS:
        card, network = toy_card(form, window=WINDOW)
        export_network(network, card, store)


def scrape(server: Server) -> dict[str, float]:
    """Sums over labels of what the server counts, and the answers by status."""
    with server.client() as client:
        page = client.get("/metrics").text
    counted: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            name = sample.name
            if name == "penumbra_request_seconds_count":
                name = f"answers {sample.labels['status']}"
            counted[name] = counted.get(name, 0.0) + sample.value
    return counted


def ask(server: Server, output: Path, *, seconds: int, users: int, classes: tuple[str, ...]) -> dict[str, Any]:
    """Run locust; its summary, with its exit code."""
    summary = output / "locust.json"
    command = [
        sys.executable, "-m", "locust", "--locustfile", str(LOCUSTFILE), "--headless", "--host", server.url,
        "--grpc", server.grpc_address, "--users", str(users), "--spawn-rate", str(users), "--run-time", f"{seconds}s",
        "--stop-timeout", "120", "--html", str(output / "report.html"), "--summary", str(summary), "--only-summary",
        *classes,
    ]  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(LOCUSTFILE.parents[1]), os.environ.get("PYTHONPATH", "")]))
    }
    with (output / "locust.log").open("wb") as log:
        done = subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=seconds + 300)
    if not summary.exists():
        raise click.ClickException(f"locust ended with {done.returncode} and no summary; {log.name} says why")
    return {"exit_code": done.returncode, **json.loads(summary.read_text())}


def judge(seen: dict[str, Any], counted: dict[str, float]) -> list[str]:
    """What is wrong with a run; nothing when it is well."""
    wrong = list(seen["errors"])
    if seen["requests"] == 0:
        wrong.append("no request was sent")
    answered_5xx = sum(count for name, count in counted.items() if name.startswith("answers 5"))
    if answered_5xx:
        wrong.append(f"the server counts {answered_5xx:g} answers with 5xx")
    cancelled = seen["by_name"].get("http cancelled", {"requests": 0})["requests"]
    refused = sum(seen["refused"].values())
    bad = sum(entry["requests"] for name, entry in seen["by_name"].items() if name.startswith("bad: "))
    good = seen["requests"] - cancelled - refused - bad
    counted_good = counted.get("answers 200", 0) + counted.get("answers OK", 0)
    if not good <= counted_good <= good + cancelled:
        by_status = {name.split()[1]: value for name, value in counted.items() if name.startswith("answers ")}
        wrong.append(
            f"callers saw {good} answers and cancelled {cancelled}; the server counts {counted_good:g} of {by_status}"
        )
    left = {gauge: counted.get(gauge, 0) for gauge in ("penumbra_inflight", "penumbra_queue_windows")}
    return wrong + [f"{name} is {value:g} after the last caller has gone" for name, value in left.items() if value]


@click.command()
@click.option("--seconds", type=click.IntRange(min=1), default=120, show_default=True)
@click.option("--users", type=click.IntRange(min=1), default=12, show_default=True, help="Of the closed loop.")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=Path("build/load"), show_default=True
)
@click.argument("classes", nargs=-1)
def main(seconds: int, users: int, output: Path, classes: tuple[str, ...]) -> None:
    """Load a server and judge it. CLASSES: of loadtests/locustfile.py; all of them by default."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        fill(store)
        with serving(store, Path(folder), threads=0, **MEASURED) as server:
            seen = ask(server, output, seconds=seconds, users=users, classes=classes)
            with suppress(AssertionError):  # the verdict says what was left
                until(lambda: not scrape(server)["penumbra_inflight"], bound_s=SETTLE_S)
            counted = scrape(server)
            shutil.copy(server.log, output)
    wrong = judge(seen, counted)
    kept = {name: value for name, value in counted.items() if name.startswith(("answers", "penumbra_"))
            and not name.endswith(("_bucket", "_created", "_sum"))}  # fmt: skip
    (output / "summary.json").write_text(json.dumps({"wrong": wrong, "seen": seen, "server": kept}, indent=2) + "\n")
    print(
        f"{seen['requests']} requests, {seen['requests_per_s']:g} per second, {sum(seen['refused'].values())} refused"
    )
    for name, entry in sorted(seen["by_name"].items()):
        print(f"  {name:26} {entry['requests']:6}   p50 {entry['p50_ms']:6g} ms   p99 {entry['p99_ms']:6g} ms")
    if wrong:
        raise click.ClickException("; ".join(wrong))


if __name__ == "__main__":
    main()
