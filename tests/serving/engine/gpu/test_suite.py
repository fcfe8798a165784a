"""The engine's own tests hold, word for word, where windows stay on the device: here a CPU with plain operators."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
OF_THE_CPU = {
    "test_pace.py::test_a_slow_networks_pace_is_known_before_its_first_request": "its clock is moved by the CPU's sums",
    "test_pace.py::test_a_slow_networks_first_answer_is_in_time": "the same",
    "test_cuda_graphs.py::test_warming_up_captures_the_sizes_that_it_found": "it looks into the CPU's moments",
    "test_backend_lanes.py::test_both_openings_of_a_loaded_model_reproduce_its_golden_window": "lanes share cores",
    "test_backend_lanes.py::test_sizes_and_speed_are_measured_in_the_opening_that_serves": "the same",
}
"""Tests that know how the CPU's way is made, and how."""
LEAST = 900
"""So many at least must have run, or the tests have gone elsewhere."""


@pytest.mark.slow
def test_the_engines_tests_hold_where_windows_stay_on_the_device() -> None:
    engine = Path(__file__).parents[1].relative_to(ROOT)
    command = [sys.executable, "-m", "pytest", "-p", "tests.serving.engine.gpu.stays", str(engine), "-m", "not slow"]
    command += [f"--ignore={engine / 'gpu'}", *(f"--deselect={engine / name}" for name in OF_THE_CPU)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", ended.stdout)
    assert ended.returncode == 0 and passed and int(passed[1]) >= LEAST, ended.stdout[-4000:] + ended.stderr[-1000:]
