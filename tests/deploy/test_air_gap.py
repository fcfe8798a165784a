"""From a folder of wheels to an answer without a network: the recipe of docs/operate/deploy.md, in a namespace that has
nothing but its own loopback.

torch alone is not packed again, for its 700 MB: the new environment sees the installed one's by a link.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

from penumbra.models.checkpoint import save_checkpoint
from tests.serving.server import free_ports
from tests.test_packaging import wheel  # noqa: F401  (the project's own)
from tests.toys import toy_card

ROOT = Path(__file__).parents[2]
ALONE = ["unshare", "--user", "--map-root-user", "--net"]
LINKED = ("torch", "torchgen", "functorch")
NOT_PACKED = ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")
RECIPE = """
set -eu
ip link set lo up
"$PYTHON" -m venv --without-pip server && echo "$LINKS" > "$(echo server/lib/python3*/site-packages)/links.pth"
"$PYTHON" -m pip --isolated --python server/bin/python install --quiet --no-index --find-links wheels --no-compile \
    -c "$CONSTRAINTS" penumbra-serving
server/bin/penumbra export toy.safetensors --store store
server/bin/penumbra serve --store store --port "$PORT" --grpc-port "$GRPC" > server.log 2>&1 & server=$!
trap 'kill $server; wait $server' EXIT
until server/bin/python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:$PORT/readyz')" 2>/dev/null; do
    kill -0 $server; sleep 0.2
done
server/bin/python -c "
import urllib.request as u
headers = {'Content-Type': 'image/png', 'Accept': 'image/png'}
asked = u.Request('http://127.0.0.1:$PORT/segment', open('photo.png', 'rb').read(), headers)
open('labels.png', 'wb').write(u.urlopen(asked).read())"
"""


def needed() -> dict[str, Distribution]:
    """What a serving install consists of, by name."""
    todo = [
        Requirement(text) for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ]
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    while todo:
        wanted = todo.pop()
        for extra in {"", *wanted.extras}:
            if (wanted.name, extra) in seen:
                continue
            seen.add((wanted.name, extra))
            found[wanted.name.lower()] = one = distribution(wanted.name)
            further = [Requirement(text) for text in one.requires or []]
            todo += [each for each in further if each.marker is None or each.marker.evaluate({"extra": extra})]
    return found


def pack(installed: Distribution, folder: Path) -> None:
    """Make a wheel of an installed package."""
    name = re.sub(r"[-.]", "_", installed.metadata["Name"])
    tag = re.findall(r"^Tag: (\S+)$", installed.read_text("WHEEL") or "", re.MULTILINE)[-1]
    files = [file for file in installed.files or [] if file.parts[0] != ".." and "__pycache__" not in file.parts]
    (about,) = {file.parts[0] for file in files if file.parts[0].endswith(".dist-info")}
    with zipfile.ZipFile(folder / f"{name}-{installed.version}-{tag}.whl", "w") as archive:
        kept = [file for file in files if file.name not in NOT_PACKED or file.parts[0] != about]
        for file in kept:
            archive.write(file.locate(), str(file))
        archive.writestr(f"{about}/RECORD", "".join(f'"{file}",,\n' for file in [*kept, f"{about}/RECORD"]))


@pytest.mark.slow
def test_wheels_a_checkpoint_and_no_network_make_a_server_that_answers(wheel: Path, tmp_path: Path) -> None:  # noqa: F811
    if not shutil.which("ip") or not shutil.which("unshare") or subprocess.run([*ALONE, "true"]).returncode:
        pytest.skip("a network namespace cannot be made here: unshare or ip is missing, or it is not allowed")
    wheels, links = tmp_path / "wheels", tmp_path / "links"
    wheels.mkdir(), links.mkdir()
    shutil.copy(wheel, wheels)
    for name, installed in needed().items():
        if name != "torch":
            pack(installed, wheels)
            continue
        place = Path(str(installed.locate_file("")))
        for folder in (*LINKED, f"torch-{installed.version}.dist-info"):
            (links / folder).symlink_to(place / folder)
    save_checkpoint(tmp_path / "toy.safetensors", *toy_card("pointwise"))
    image_HW3 = np.random.Generator(np.random.PCG64(1)).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(image_HW3).save(tmp_path / "photo.png")
    port, grpc = free_ports(2)
    environment = {
        "PATH": f"/usr/sbin:/sbin:{os.environ['PATH']}", "HOME": str(tmp_path), "TMPDIR": str(tmp_path),
        "PYTHON": sys.executable, "LINKS": str(links), "CONSTRAINTS": str(ROOT / "constraints.txt"),
        "PORT": str(port), "GRPC": str(grpc), "PENUMBRA_THREADS": "1", "PENUMBRA_PREDRAIN_S": "0",
    }  # fmt: skip
    alone = [*ALONE, sys.executable, "-c", "import socket; print(*(name for _, name in socket.if_nameindex()))"]
    assert "lo" in (seen := subprocess.run(alone, capture_output=True, text=True, check=True).stdout.split())
    assert not {*seen} & ({name for _, name in socket.if_nameindex()} - {"lo"}), "it has a way out"
    done = subprocess.run(
        [*ALONE, "bash", "-c", RECIPE], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    with Image.open(tmp_path / "labels.png") as labels:
        labels_HW = np.asarray(labels)
    is_clear_HW = np.diff(np.sort(image_HW3.astype(int), axis=-1))[:, :, -1] > 0
    assert (labels_HW == image_HW3.argmax(-1))[is_clear_HW].all()
