"""What is installed is what is declared."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_a_bento_installs_the_serving_dependencies_of_the_project() -> None:
    declared = {d.partition(";")[0].strip() for d in _project()["dependencies"]}
    packed = yaml.safe_load((ROOT / "bentofile.yaml").read_text())["python"]["packages"]
    assert set(packed) == declared


def test_a_serving_install_pulls_no_training_library() -> None:
    serving = [r for r in requires("penumbra-serving") or [] if "extra ==" not in r]
    names = {re.split(r"[^A-Za-z0-9_.-]", r)[0].lower() for r in serving}
    assert not names & {"lightning", "lightning-fabric", "torchmetrics", "torchvision", "pytest", "ruff"}


def test_the_lock_names_every_declared_dependency_and_no_index() -> None:
    lock = (ROOT / "constraints.txt").read_text()
    locked = {line.partition("==")[0].lower().replace("_", "-") for line in lock.splitlines() if "==" in line}
    groups = [_project()["dependencies"], *_project()["optional-dependencies"].values()]
    declared = {re.split(r"[^A-Za-z0-9_.-]", d)[0].lower() for group in groups for d in group}
    assert declared <= locked
    assert "://" not in lock


def test_the_supervisor_and_a_full_store_are_reached_without_torch() -> None:
    code = "import sys, penumbra.serving.service, penumbra.export.zoo; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr


FOLDERS = ("models", "serving", "export", "training")
"""What stands at the root of the repository and is imported under `penumbra`."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from a copy of its sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("penumbra", *FOLDERS):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.mark.slow
def test_a_wheel_installs_one_name_and_its_licences(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"penumbra", "penumbra_serving"}
    assert {name.split("/")[1] for name in names if name.startswith("penumbra/") and name.count("/") > 1} == {*FOLDERS}
    for wanted in ("penumbra/models/zoo/cps-camvid.safetensors", "penumbra/serving/playground/index.html",
                   "penumbra/training/recipes/cps-camvid.yaml", "penumbra/models/cps/README.md"):  # fmt: skip
        assert wanted in names
    metadata = next(name for name in names if name.endswith("/METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    assert "Name: penumbra-serving\n" in text and "License-Expression: Apache-2.0\n" in text
    assert {Path(name).name for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}


@pytest.mark.slow
def test_an_installed_wheel_works_beside_folders_of_the_same_names(wheel: Path, tmp_path: Path) -> None:
    target, home = tmp_path / "installed", tmp_path / "project"
    zipfile.ZipFile(wheel).extractall(target)
    for name in FOLDERS:
        (home / name).mkdir(parents=True)
        (home / name / "__init__.py").write_text("VALUE = 'theirs'\n")
    Image.new("RGB", (96, 64), (120, 90, 60)).save(home / "street.png")
    code = (
        "import sys, models, export, penumbra.models.card\n"
        "from penumbra.__main__ import main\n"
        f"assert penumbra.models.card.__file__.startswith({str(target)!r})\n"
        "assert (models.VALUE, export.VALUE) == ('theirs', 'theirs')\n"
        "main(['predict', 'street.png', '--model', 'cps-camvid'])"
    )
    environment = os.environ | {"PYTHONPATH": f"{home}:{target}"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=home, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert (home / "out" / "street_labels.png").exists()


@pytest.mark.slow
def test_a_bento_holds_the_package_whole(tmp_path: Path) -> None:
    environment = os.environ | {"BENTOML_HOME": str(tmp_path), "BENTOML_DO_NOT_TRACK": "True", "PYTHONPATH": str(ROOT)}
    build = [sys.executable, "-m", "bentoml", "build", ".", "--output", "tag"]
    done = subprocess.run(build, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    (source,) = tmp_path.glob("bentos/penumbra/*/src")
    code = (
        "import penumbra.serving.service, penumbra.export.zoo as zoo\n"
        "print(penumbra.serving.service.__file__, len([*zoo.ZOO.glob('*.safetensors')]))"
    )
    environment = environment | {"PYTHONPATH": str(source)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=source, env=environment
    )
    num_checkpoints = len([*(ROOT / "models" / "zoo").glob("*.safetensors")])
    assert done.stdout.split() == [str(source / "serving" / "service.py"), str(num_checkpoints)], done.stderr


def test_no_module_is_imported_or_started_by_its_folder_alone() -> None:
    """A folder's own name is importable from the root of the repository, so a test here would not notice it."""
    alone = re.compile(
        rf"^\s*(?:from|import) (?:{'|'.join(FOLDERS)})\b|[\"'](?:{'|'.join(FOLDERS)})\.[a-z_]+[.:\"']", re.M
    )
    sources = [path for folder in ("penumbra", *FOLDERS) for path in sorted((ROOT / folder).rglob("*.py"))]
    found = {f"{path.relative_to(ROOT)}: {hit}" for path in sources for hit in alone.findall(path.read_text())}
    assert not found


def test_make_serve_installs_the_server_and_nothing_else() -> None:
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--no-print-directory", "--always-make", "--dry-run", "serve"]
    recipe = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, env=alone).stdout
    installs = [line.split()[-1] for line in recipe.splitlines() if "pip install" in line]
    assert installs == ["torch==2.13.0", "."]
    assert recipe.count("\n") < 10 and recipe.splitlines()[-1].split()[:2] == [".venv/bin/penumbra", "serve"]
