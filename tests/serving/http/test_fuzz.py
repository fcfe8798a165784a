"""Whatever the OpenAPI document allows, and what it forbids: the server answers, and never with a fault of its own."""

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.serving.server import Server

SECONDS, EXAMPLES = 60, 15


@pytest.mark.slow
def test_no_request_made_from_the_document_ends_in_a_server_error(
    server: Server, client: httpx.Client, tmp_path: Path
) -> None:
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/docs.json", "--checks", "not_a_server_error",
        "--phases", "examples,coverage,fuzzing", "--max-examples", str(EXAMPLES), "--max-time", str(SECONDS),
        "--generation-database", "none", "--suppress-health-check", "all", "--no-color", "--continue-on-failure",
        "--request-timeout", "60", "--seed", "1",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=10 * SECONDS)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "Server error" not in done.stdout
    assert client.get("/readyz").json()["ready"]
