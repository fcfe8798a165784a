"""What a program or a notebook has: the names of `penumbra`, and an answer that shows itself."""

import ast
import base64
import dataclasses
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import penumbra
from penumbra import PenumbraError, Segmenter, SegmentOptions, export_module
from penumbra.serving.engine.runtime import Tuning


def test_every_public_name_is_there_and_the_import_alone_loads_nothing_heavy() -> None:
    assert all(getattr(penumbra, name).__doc__ for name in penumbra.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Segmentor'"):
        _ = penumbra.Segmentor  # type: ignore[attr-defined]
    asked = "import sys, penumbra; assert not {'torch', 'numpy'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", asked], check=True)


@pytest.fixture(scope="module")
def segmenter(toy_store: Path) -> Iterator[Segmenter]:
    with Segmenter.open(toy_store, threads=1, tuning=Tuning(1, 1)) as opened:
        yield opened


def test_an_answer_shows_itself_with_pictures_legend_and_warnings(segmenter: Segmenter) -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 900, 3), np.uint8)
    prediction = segmenter.segment(image, SegmentOptions(model="toy-latent", samples=4))
    said = dataclasses.replace(prediction, warnings=("a sky < the sea",))
    shown = said._repr_html_()
    pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^']+)'", shown)]
    assert [picture.size for picture in pictures] == [(480, 32)] * 2
    assert "toy-latent" in shown and "4 samples" in shown and "a sky &lt; the sea" in shown
    assert all(prediction.card.classes[k].name in shown for k in np.unique(prediction.labels_HW))
    assert f"{prediction.scores.expected_error:.1%}" in shown


def test_an_answer_without_its_picture_or_maps_shows_its_labels(segmenter: Segmenter) -> None:
    image = np.zeros((40, 50, 3), np.uint8)
    prediction = segmenter.segment(image, SegmentOptions(model="toy-pointwise", outputs=()))
    shown = dataclasses.replace(prediction, image=None)._repr_html_()
    assert shown.count("<img") == 1 and "<td>100.0%</td>" in shown


def test_an_error_is_one_class(segmenter: Segmenter) -> None:
    with pytest.raises(PenumbraError, match="there is no model"):
        segmenter.segment(np.zeros((4, 4, 3), np.uint8), SegmentOptions(model="nobody"))


NOTEBOOK = Path(__file__).parents[1] / "docs" / "extend" / "notebook.ipynb"


def test_the_notebook_runs_and_shows_its_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    shown = []
    for cell in cells:
        *statements, last = ast.parse("".join(cell["source"])).body
        if isinstance(last, ast.Expr):
            exec(compile(ast.Module(statements, []), "cell", "exec"), names)
            shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names))
        else:
            exec("".join(cell["source"]), names)
    html = shown[0]._repr_html_()
    assert "streets" in html and "8 samples" in html and html.count("<img") == 2
    assert shown[1][0] == (120, 160) and shown[1][1] > 0
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)


def test_a_module_is_exported_as_it_is_and_left_as_it_was(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout2d(0.5)).train()
    with pytest.warns(UserWarning, match="nothing names the network's 4 classes"):
        directory = export_module(module, "mine", tmp_path, input={"size": 32, "mean": 0, "std": 1}, sampling="none")
    assert directory == tmp_path / "mine" / "1" and module.training and module[0].weight.requires_grad
    with Segmenter.open(tmp_path, threads=1, tuning=Tuning(1, 1)) as opened:
        image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
        labels = opened.segment(image, SegmentOptions()).labels_HW
    with torch.inference_mode():
        logits = module[0](torch.from_numpy(image).permute(2, 0, 1)[None] / 255)
    assert np.array_equal(labels, logits.argmax(1)[0])
    with pytest.raises(PenumbraError, match="5 classes are named, and the network gives 4"):
        export_module(module, "mine", tmp_path, input={"size": 32, "mean": 0, "std": 1}, classes=[*"abcde"])
