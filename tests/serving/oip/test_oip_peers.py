"""Programs that are too heavy to install for every test run: the `kserve` Python client, and `perf_analyzer`.

Each test runs where its program is: PENUMBRA_KSERVE_PYTHON names a Python that has kserve, PENUMBRA_PERF_ANALYZER the
binary (docs/use/protocols.md says how both are had).
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.serving.server import Server

KSERVE, PERF_ANALYZER = (os.environ.get(f"PENUMBRA_{name}", "") for name in ("KSERVE_PYTHON", "PERF_ANALYZER"))
pytestmark = pytest.mark.slow

KSERVE_CLIENTS = Path(__file__).with_name("kserve_clients.py")


@pytest.mark.skipif(not KSERVE, reason="PENUMBRA_KSERVE_PYTHON names no Python that has kserve")
def test_kserves_rest_and_grpc_clients_get_the_same_exact_labels(server: Server) -> None:
    command = [KSERVE, str(KSERVE_CLIENTS), server.url, server.grpc_address, "toy-pointwise"]
    done = subprocess.run(command, timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["json", "binary", "grpc"]


WAYS = {"http": ["-i", "http"], "grpc": ["-i", "grpc"], "stream": ["-i", "grpc", "--streaming", "--async"]}


@pytest.mark.skipif(not PERF_ANALYZER, reason="PENUMBRA_PERF_ANALYZER names no perf_analyzer")
@pytest.mark.parametrize("way", WAYS)
def test_perf_analyzer_measures_and_reads_the_statistics(server: Server, way: str) -> None:
    address = server.url.removeprefix("http://") if way == "http" else server.grpc_address
    command = [PERF_ANALYZER, *WAYS[way], "-m", "toy-pointwise", "-u", address, "--shape", "image:32,48,3"]
    command += ["--measurement-mode", "count_windows", "--measurement-request-count", "20", "-s", "999"]
    done = subprocess.run(command, timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    counted = re.search(r"Successful request count: (\d+)", done.stdout)
    assert counted and int(counted[1]) >= 20 and "compute infer" in done.stdout
