"""What is installed is what is declared."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import yaml

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
