"""What the README and the docs show is true: code blocks run, in their order, and commands exist with their options."""

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from penumbra.__main__ import main
from penumbra.serving.settings import Settings
from tests.serving.server import MEASURED, Server, serving

ROOT = Path(__file__).parents[1]
INDEX = ROOT / "docs" / "README.md"
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "adr")]
BLOCKS = [
    pytest.param(language, code, id=f"{page.stem}: {code.splitlines()[0][:40]}")
    for page in PAGES
    for language, code in re.findall(r"^```(bash|python)\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
]
"""A block that needs what a test cannot have (a cluster, an index of packages) is indented instead, and only read."""


def shown(program: str) -> list[str]:
    """Every command line of a program in fenced, indented and inline code."""
    code = re.compile(rf"^ *(?:\$ )?({program} .*?[^\\])$|`({program} [^`\n]*)`", flags=re.MULTILINE | re.DOTALL)
    texts = [page.read_text() for page in PAGES]
    return sorted(
        {(a or b).partition("  #")[0].replace("\\\n", " ").strip() for text in texts for a, b in code.findall(text)}
    )


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory):
    """A folder with a picture, a demo store and the zoo, and a server over the store."""
    folder = tmp_path_factory.mktemp("docs")
    rng = np.random.Generator(np.random.PCG64(0))
    tiles = Image.fromarray(rng.integers(0, 255, (18, 24, 3), dtype=np.uint8))
    tiles.resize((480, 360), Image.Resampling.BICUBIC).save(folder / "street.jpg")
    Image.open(folder / "street.jpg").save(folder / "scene.tif")
    (folder / "models").symlink_to(ROOT / "models")
    with serving(folder / "store", folder, **MEASURED) as server:
        yield folder, server


@pytest.mark.slow
@pytest.mark.parametrize(("language", "code"), BLOCKS)
def test_a_code_block_runs(workplace: tuple[Path, Server], language: str, code: str) -> None:
    folder, server = workplace
    code = code.replace("localhost:3000", server.url.removeprefix("http://"))
    code = code.replace("localhost:3001", server.grpc_address).replace("curl -s", "curl -sS --fail-with-body -m 120")
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euo", "pipefail", "-c", code]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PENUMBRA_")} | {
        "PATH": path, "PYTHONPATH": f"{ROOT}:{ROOT / 'integrations' / 'client'}",
    }  # fmt: skip
    if "localhost:8001" in code:
        compile(code, "a client of Triton", "exec")  # tests/export/test_triton.py asks a real one the same
        return
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-1000:]


@pytest.mark.slow
def test_the_blocks_leave_the_pictures_the_readme_speaks_of(workplace: tuple[Path, Server]) -> None:
    folder, _ = workplace
    with Image.open(folder / "labels.png") as labels:
        assert labels.mode == "P"
        assert labels.size == (480, 360)
    assert (folder / "out" / "street_overlay.png").exists()


@pytest.mark.parametrize("line", shown("penumbra"))
def test_a_command_that_is_shown_has_its_verb_and_options(line: str) -> None:
    _, *words = shlex.split(line.replace("...", ""))
    assert isinstance(main, click.Group)
    command: click.Command = main if words[0].startswith("-") else main.commands[words.pop(0)]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    options = {word.strip("[]").partition("=")[0] for word in words if word.strip("[]").startswith("-")}
    assert options <= known | {"--help"}


@pytest.mark.parametrize("line", shown("python -m"))
def test_a_module_that_is_shown_is_there(line: str) -> None:
    assert find_spec(line.split()[2]) is not None


def test_the_two_commands_of_the_readme_are_targets_of_the_makefile() -> None:
    targets = re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert re.findall(r"^    make (\w+)", PAGES[0].read_text(), flags=re.MULTILINE) == ["serve", "test"]
    assert {line.split()[1] for line in shown("make") if line.count(" ") == 1} <= set(targets)


def test_every_page_is_in_the_index() -> None:
    linked = {(INDEX.parent / link).resolve() for link in re.findall(r"\]\(([^)]+\.md)\)", INDEX.read_text())}
    assert {page for page in PAGES[1:] if page != INDEX} <= linked
    assert all(page.exists() for page in linked)


def test_the_files_that_contributing_names_are_there() -> None:
    named = re.findall(r"`([\w./-]+(?:\.py|\.c|\.toml|/))`", (ROOT / "CONTRIBUTING.md").read_text())
    roots = [ROOT, *(ROOT / part for part in ("serving", "serving/engine", "models/np_semiseg", "tests"))]
    found = {name for name in named for root in roots if (root / name).exists()}
    assert {name for name in named if "NAME" not in name} <= found
    assert len(found) > 60


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_in_the_docs(name: str) -> None:
    assert any(f"`PENUMBRA_{name.upper()}" in page.read_text() for page in PAGES)
