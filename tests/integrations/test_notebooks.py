"""The notebooks of the client run against a real server, cell by cell, and are committed without outputs."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.integrations.tools import ROOT
from tests.serving.server import Server

FOLDER = ROOT / "integrations" / "client" / "notebooks"
pytestmark = pytest.mark.slow


def shown_by(name: str) -> list[Any]:
    """What the cells of a notebook that end in an expression show."""
    cells = [cell for cell in json.loads((FOLDER / name).read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    names: dict[str, Any] = {}
    shown = []
    for cell in cells:
        *statements, last = ast.parse("".join(cell["source"])).body
        is_shown = isinstance(last, ast.Expr)
        exec(compile(ast.Module(statements if is_shown else [*statements, last], []), name, "exec"), names)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), name, "eval"), names))
    if "client" in names:
        names["client"].close()
    return shown


@pytest.fixture(autouse=True)
def _place(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PENUMBRA_URL", server.url)


def test_asking_shows_shares_and_what_is_unsure(capsys: pytest.CaptureFixture[str]) -> None:
    models, shares, picture = shown_by("ask.ipynb")
    assert models and sum(shares.values()) == pytest.approx(1)
    assert isinstance(picture, Image.Image) and picture.size == (160, 120)
    said = capsys.readouterr().out
    assert "expected error" in said and "there is no model 'nobody'" in said


def test_the_order_of_labelling_begins_with_the_largest_error(tmp_path: Path) -> None:
    order, (state, has_bytes) = shown_by("first.ipynb")
    errors = [error for _, error in order]
    assert errors == sorted(errors, reverse=True) and len(order) == 4
    assert state == ("done", 100) and has_bytes and (tmp_path / "first.tif").is_file()
