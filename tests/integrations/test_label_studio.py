"""The ML backend of Label Studio as a process, judged by the real `label_studio_sdk`; its order, by `penumbra rank`."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from penumbra_client import Client
from PIL import Image

from penumbra.__main__ import main
from tests.conftest import picture
from tests.integrations.tools import ENVIRONMENT, PYTHON, ROOT, needs
from tests.serving.server import Server, free_port, serving, until
from tests.toys import CLASSES

pytestmark = [pytest.mark.slow, needs("label_studio_sdk")]
COMMAND = [PYTHON, ROOT / "integrations" / "label_studio" / "penumbra_label_studio.py"]
MODEL = "toy-latent"
NAMES = [one.name for one in CLASSES]
CONFIG = (
    '<View><Image name="photo" value="$image"/><BrushLabels name="tag" toName="photo">'
    + "".join(f'<Label value="{name}"/>' for name in NAMES[:2])
    + "</BrushLabels></View>"
)
JUDGE = """
import json, sys
import numpy as np
from label_studio_sdk.converter.brush import decode_rle
from label_studio_sdk.label_interface import LabelInterface

asked = json.load(sys.stdin)
interface = LabelInterface(asked["config"])
for prediction in asked["results"]:
    assert interface.validate_prediction(prediction, return_errors=True) == []
masks = {}
for region in asked["results"][0]["result"]:
    size = region["original_height"], region["original_width"], 4
    masks[region["value"]["brushlabels"][0]] = (decode_rle(region["value"]["rle"]).reshape(size)[..., 3] > 0).tolist()
print(json.dumps(masks))
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number, brightest in enumerate((40, 250, 120)):
        Image.fromarray(picture(rng, 40, 60) * brightest // 250).convert("RGB").save(folder / f"{number}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def backend(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with backing(server, tmp_path_factory.mktemp("home"), tmp_path_factory.getbasetemp(), "--model", MODEL) as url:
        yield url


@contextmanager
def backing(server: Server, home: Path, root: Path, *words: str) -> Iterator[str]:
    """A backend of a server that reads local storage under a root."""
    port = free_port()
    command = [*COMMAND, "--penumbra", server.url, "--port", str(port), *words]
    environment = ENVIRONMENT | {"HOME": str(home), "LOCAL_FILES_DOCUMENT_ROOT": str(root)}
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"

    def is_up() -> bool:
        try:
            return httpx.get(f"{url}/health", trust_env=False).json()["status"] == "UP"
        except httpx.TransportError:
            assert process.poll() is None, (home / "log").read_text()
            return False

    try:
        until(is_up)
        yield url
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def ask(backend: str, base: Path, paths: list[Path], config: str = CONFIG) -> httpx.Response:
    """Ask for predictions of pictures in local storage, as Label Studio names them."""
    urls = [f"/data/local-files/?d={path.relative_to(base)}" for path in paths]
    tasks = [{"id": number, "data": {"image": url}} for number, url in enumerate(urls)]
    asked = {"tasks": tasks, "label_config": config, "project": "1.0"}
    return httpx.post(f"{backend}/predict", json=asked, timeout=120, trust_env=False)


def test_brush_masks_are_the_answers_labels_and_label_studios_sdk_takes_them(
    server: Server, backend: str, base: Path, pictures: list[Path]
) -> None:
    results = ask(backend, base, pictures[:1]).json()["results"]
    judged = subprocess.run(
        [PYTHON, "-c", JUDGE], input=json.dumps({"config": CONFIG, "results": results}), env=ENVIRONMENT,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert judged.returncode == 0, judged.stderr
    with Client(server.url) as client:
        prediction = client.segment(pictures[0], model="toy-latent")
    masks = json.loads(judged.stdout)
    assert {*masks} == {*NAMES[:2]} & {*prediction.shares} and masks
    for name, mask in masks.items():
        assert np.array_equal(np.array(mask), prediction.mask(name))
    assert results[0]["score"] == pytest.approx(1 - (prediction.scores.expected_error or 0), abs=1e-6)


def test_tasks_in_the_order_of_their_scores_are_those_of_rank(
    backend: str, base: Path, pictures: list[Path], toy_store: Path
) -> None:
    results = ask(backend, base, pictures).json()["results"]
    ranked = CliRunner().invoke(
        main, ["rank", str(pictures[0].parent), "-m", "toy-latent", "--store", str(toy_store), "--json"]
    )
    order = [Path(row["image"]).name for row in json.loads(ranked.stdout)]
    by_score = sorted(range(len(pictures)), key=lambda number: results[number]["score"])
    assert [pictures[number].name for number in by_score] == order


def test_the_version_is_that_of_the_answers(toy_store: Path, base: Path, pictures: list[Path], tmp_path: Path) -> None:
    first, second = (tmp_path / "store" / MODEL / number for number in "12")
    shutil.copytree(toy_store / MODEL / "1", first)
    with serving(first.parents[1], tmp_path, model_control=True) as server, backing(server, tmp_path, base) as backend:
        for version in (1, 2):
            answer = ask(backend, base, pictures[:1]).json()
            assert answer["model_version"] == answer["results"][0]["model_version"] == f"{MODEL} {version}"
            assert ask(backend, base, []).json() == {"results": [], "model_version": f"{MODEL} {version}"}
            if version == 1:
                shutil.copytree(first, second)
                card = (first / "card.json").read_text()
                (second / "card.json").write_text(card.replace('"version": 1', '"version": 2', 1))
                with server.client() as client:
                    assert client.post(f"/v2/repository/models/{MODEL}/load").status_code == 200


def test_it_does_not_start_without_the_name_of_one_of_several_models(server: Server) -> None:
    for words, said in (((), "--model is ''"), (("--model", "nobody"), "--model is 'nobody'")):
        command = [*COMMAND, "--penumbra", server.url, *words]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 2 and said in done.stderr and "; the server has toy-boxed," in done.stderr


def test_what_is_wrong_is_said(backend: str, base: Path, pictures: list[Path], tmp_path: Path) -> None:
    none = ask(backend, base, pictures, '<View><Image name="photo" value="$image"/></View>')
    assert none.status_code == 400 and "no BrushLabels" in none.json()["error"]
    (tmp_path / "bad.png").write_bytes(b"no picture")
    bad = ask(backend, base, [tmp_path / "bad.png"])
    assert bad.status_code == 502 and bad.json()["error"]
    for body, said in ((b"{", "Expecting"), (b"[]", "not as Label Studio writes it"), (b"{}", "label_config")):
        wrong = httpx.post(f"{backend}/predict", content=body, trust_env=False)
        assert wrong.status_code == 400 and said in wrong.json()["error"]
    assert httpx.post(f"{backend}/setup", json={}, trust_env=False).json() == {"model_version": "toy-latent 1"}
    assert httpx.post(f"{backend}/webhook", json={}, trust_env=False).status_code == 201
