"""`--engine ray` on two nodes, one of which is lost in the middle. Runs where the extra `ray` is installed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from penumbra.serving.files.batch import parse_batch, run_batch
from penumbra.serving.files.receipts import FOLDER
from tests.conftest import picture
from tests.serving.files.conftest import add_node

pytest.importorskip("ray", reason="the extra ray is not installed")
pytestmark = [
    pytest.mark.slow,
    # Ray and what it imports warn of their own deprecations, and leave sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore"),
]


def test_a_lost_node_loses_no_answer_and_repeats_none(
    toy_store: Path, tmp_path: Path, rng: np.random.Generator, cluster: Any
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for number in range(80):
        Image.fromarray(picture(rng, 200, 200)).save(folder / f"{number:02}.png")
    second = add_node(cluster, num_cpus=2)
    asked = parse_batch(toy_store, "toy-latent", "npz", {"samples": "16", "overlap": "0.5"})
    before: dict[str, int] = {}

    def lose_it() -> None:
        import time

        while len(before) < 10:
            time.sleep(0.05)
            before.update({path.name: path.stat().st_mtime_ns for path in out.glob("*.npz")})
        cluster.remove_node(second, allow_graceful=False)

    import threading

    thread = threading.Thread(target=lose_it, daemon=True)
    thread.start()
    counts, failures = run_batch(asked, str(folder), str(out), engine="ray")
    thread.join(60)
    assert not failures and counts["failed"] == 0 and counts["made"] + counts["kept"] == 80
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.npz")}
    assert len(after) == 80 and before.items() <= after.items() and 10 <= len(before) < 80
    left = [path.name for path in out.glob(".*") if path.suffix != ".part"]  # a process that is killed may leave those
    assert left == [FOLDER]
    here = tmp_path / "here"
    assert run_batch(asked, str(folder), str(here), engine="local")[0]["made"] == 80
    for path in here.glob("*.npz"):
        with np.load(path) as one, np.load(out / path.name) as other:
            for name in one:
                np.testing.assert_allclose(one[name], other[name], atol=1e-5)
