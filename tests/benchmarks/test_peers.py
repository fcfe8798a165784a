"""What the comparison with peers rests on: they answer as we do, every caller counts, the best is the bar."""

import io
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.overhead import family_of
from benchmarks.peers.__main__ import against_best, agreement, labels_of
from benchmarks.peers.network import Network
from benchmarks.peers.raster import gaussian
from benchmarks.peers.servers import NEEDS, Up
from benchmarks.peers.traffic import CLIENTS, Slices, run_slice
from penumbra.export.bundle import export_network
from penumbra.models.card import WindowSpec
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.windows import cover
from tests.serving.server import until
from tests.toys import toy_card


@pytest.mark.parametrize("form", ["pointwise", "latent"])
@pytest.mark.parametrize("backend", ["torchscript", "openvino"])
def test_what_peers_run_gives_our_labels_for_pictures_of_several_sizes_at_once(
    form: str, backend: str, tmp_path: Path
) -> None:
    card, network = toy_card(form, name="toy", window=WindowSpec(0, 0))
    artifact = export_network(network, card, tmp_path, backend=backend)
    rng = np.random.Generator(np.random.PCG64(0))
    images = [rng.integers(0, 255, (*size, 3), dtype=np.uint8) for size in ((40, 60), (32, 48), (40, 60))]
    answers = Network(artifact, whole=True).answer([png_of(image) for image in images])
    with Segmenter(threads=1) as segmenter:
        segmenter.load(artifact)
        ours = [segmenter.segment(image, SegmentOptions()).labels_HW for image in images]
    assert agreement([labels_of(answer) for answer in answers], ours) > 0.999


@pytest.mark.parametrize("backend", ["torchscript", "openvino"])
def test_what_peers_run_in_windows_takes_pictures_that_are_smaller(backend: str, tmp_path: Path) -> None:
    if not NEEDS["monai"].exists():
        pytest.skip("needs MONAI; make .venv/peers fetches it")
    card, network = toy_card("pointwise", name="toy", window=WindowSpec(32, 48))
    artifact = export_network(network, card, tmp_path, backend=backend)
    rng = np.random.Generator(np.random.PCG64(0))
    images = [rng.integers(0, 255, (*size, 3), dtype=np.uint8) for size in ((20, 30), (32, 48), (40, 60))]
    answers = Network(artifact, whole=False).answer([png_of(image) for image in images])
    with Segmenter(threads=1) as segmenter:
        segmenter.load(artifact)
        ours = [segmenter.segment(image, SegmentOptions()).labels_HW for image in images]
    assert agreement([labels_of(answer) for answer in answers], ours) > 0.99


def test_a_server_and_all_that_it_started_rest_but_for_its_turns() -> None:
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'], start_new_session=True)"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as process:
        until(lambda: len(family_of(process.pid)) == 2)
        server, family = Up(process.pid, lambda: bytes), family_of(process.pid)
        with server.asleep():
            until(lambda: states(family) == {"T"})
            with server.turn():
                until(lambda: states(family) == {"S"})
            until(lambda: states(family) == {"T"})
        process.communicate(b"\n", timeout=30)
    assert process.returncode == 0


def states(family: list[int]) -> set[str]:
    """What the kernel says that processes are at: T is stopped, S sleeps."""
    return {Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[0] for one in family}


def png_of(image_HW3: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HW3).save(buffer, "PNG")
    return buffer.getvalue()


def test_every_caller_asks_for_every_picture_as_often_and_begins_with_another() -> None:
    seen: list[bytes] = []
    asked: list[bytes] = []
    together = threading.Barrier(CLIENTS)

    def connect():
        turn = iter(range(10**9))

        def ask(jpeg: bytes) -> bytes:
            asked.append(jpeg)
            if next(turn) == 0:
                seen.append(jpeg)
                together.wait(30)
            return jpeg

        return ask

    slices = Slices()
    run_slice(connect, [b"a", b"b"], slices, requests=4)
    assert sorted(seen) == [b"a"] * (CLIENTS // 2) + [b"b"] * (CLIENTS // 2)
    assert sorted(asked) == [b"a"] * (2 * CLIENTS) + [b"b"] * (2 * CLIENTS)
    assert slices.answers == len(slices.latencies_s) == 4 * CLIENTS
    assert slices.figures()["requests/s"] == pytest.approx(slices.answers / slices.seconds)


def test_a_fault_of_a_server_ends_its_slice_and_is_told() -> None:
    def connect():
        def ask(_: bytes) -> bytes:
            raise RuntimeError("answered 500")

        return ask

    with pytest.raises(RuntimeError, match="answered 500"):
        run_slice(connect, [b"a"], Slices(), requests=1000)


def test_the_peer_with_the_most_requests_per_second_is_the_bar() -> None:
    def of(rate: float) -> dict[str, float]:
        return {"requests/s": rate, "p50 ms": 100 / rate, "p99 ms": 300 / rate}

    of_all = {"penumbra": of(30), "litserve": of(10), "triton": of(20)}
    of_all |= {"penumbra, tuned": of(60), "litserve, tuned file": of(40), "triton, tuned file": of(30)}
    ratios = against_best({
        "supervised-camvid, mixed sizes, run whole": of_all,
        "net, one size": {"penumbra": of(30), "litserve": of(40)},
        "requests of a client in a slice": 5,
    })  # fmt: skip
    assert ratios == {
        "supervised-camvid, mixed sizes, run whole: same file, requests/s over triton, the best (bar 1.1)": 1.5,
        "supervised-camvid, mixed sizes, run whole: same file, p50 and p99 over triton": [0.667, 0.667],
        "supervised-camvid, mixed sizes, run whole: tuned, requests/s over triton, the best (bar 2.0)": 3.0,
        "supervised-camvid, mixed sizes, run whole: tuned, p50 and p99 over triton": [0.333, 0.333],
        "supervised-camvid, mixed sizes, run whole: tuned, and peers with that file, requests/s over litserve, tuned "
        "file, the best": 1.5,
        "supervised-camvid, mixed sizes, run whole: tuned, and peers with that file, p50 and p99 over litserve, tuned "
        "file": [0.667, 0.667],
        "net, one size: same file, requests/s over litserve, the best": 0.75,
        "net, one size: same file, p50 and p99 over litserve": [1.333, 1.333],
    }


def test_the_weights_given_to_monai_are_ours() -> None:
    plan = cover(96, 80, WindowSpec(64, 48, overlap=0.25))
    weight_hw = gaussian((64, 48)).numpy()
    blended = np.zeros((96, 80))
    for window in plan:
        blended[window.y0 : window.y0 + 64, window.x0 : window.x0 + 48] += weight_hw
    ours = plan.weights_y[0][:, None] * plan.weights_x[0]
    np.testing.assert_allclose(weight_hw / blended[:64, :48], ours, rtol=1e-4)
