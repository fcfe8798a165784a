"""Every code block of docs/protocols.md runs, against the toys."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.serving.server import ROOT, Server

BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "docs" / "protocols.md").read_text(), flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize(("language", "code"), BLOCKS, ids=range(len(BLOCKS)))
def test_a_code_block_runs(server: Server, tmp_path: Path, rng: np.random.Generator, language: str, code: str) -> None:
    Image.fromarray(rng.integers(0, 230, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "street.jpg")
    code = code.replace("localhost:3000", server.url.removeprefix("http://")).replace("np_semiseg-camvid", "toy-latent")
    code = code.replace("localhost:3001", server.grpc_address).replace("curl -s", "curl -sS --fail-with-body")
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euo", "pipefail", "-c", code]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-1000:]
