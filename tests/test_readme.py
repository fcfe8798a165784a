"""Every code block of the README runs, against a server with the demo models."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.serving.server import Server, serving

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory):
    """A folder with a picture, a demo store and the zoo, and a server over the store."""
    folder = tmp_path_factory.mktemp("readme")
    rng = np.random.Generator(np.random.PCG64(0))
    tiles = Image.fromarray(rng.integers(0, 255, (18, 24, 3), dtype=np.uint8))
    tiles.resize((480, 360), Image.Resampling.BICUBIC).save(folder / "street.jpg")
    (folder / "models").symlink_to(ROOT / "models")
    with serving(folder / "store", folder) as server:
        yield folder, server


@pytest.mark.slow
@pytest.mark.parametrize(("language", "code"), BLOCKS, ids=[code.split("\n")[0][:40] for _, code in BLOCKS])
def test_a_code_block_of_the_readme_runs(workplace: tuple[Path, Server], language: str, code: str) -> None:
    folder, server = workplace
    code = code.replace("localhost:3000", server.url.removeprefix("http://"))
    code = code.replace("localhost:3001", server.grpc_address)
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euo", "pipefail", "-c", code]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PENUMBRA_")} | {
        "PATH": path, "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_blocks_leave_the_pictures_the_readme_speaks_of(workplace: tuple[Path, Server]) -> None:
    folder, _ = workplace
    with Image.open(folder / "labels.png") as labels:
        assert labels.mode == "P"
        assert labels.size == (480, 360)
    assert (folder / "out" / "street_overlay.png").exists()


def test_the_two_commands_of_the_readme_are_targets_of_the_makefile() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    commands = re.findall(r"^    make (\w+)", README, flags=re.MULTILINE)
    assert commands == ["serve", "test"]
    assert set(commands) <= set(targets)
