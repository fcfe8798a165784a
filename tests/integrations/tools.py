"""The environment of other tools' SDKs (`.venv/tools`, by `make`), apart from ours: they pin other versions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = Path(sys.executable).parents[1] / "tools" / "bin" / "python"
ENVIRONMENT = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "integrations" / "client")}


def needs(module: str) -> pytest.MarkDecorator:
    """Skip, and say so, where the tools' environment lacks a package."""
    done = subprocess.run([PYTHON, "-c", f"import {module}"], capture_output=True) if PYTHON.exists() else None
    is_there = done is not None and done.returncode == 0
    return pytest.mark.skipif(not is_there, reason=f"{module} is not in .venv/tools; `make .venv/tools` installs it")
