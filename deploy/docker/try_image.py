"""Run an unpacked image with runc as strictly as deploy/ does, and hold it to what docs/operate/deploy.md says of it.

python3 try_image.py ROOT_DIRECTORY IMAGE_JSON BUNDLE_DIRECTORY    (by build-without-docker.sh)
"""

import json
import os
import signal
import struct
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

LAYER_GB, SHOWN_GB = 1.1, 0.05
NAME = f"penumbra-{os.getpid()}"
PORT = 3000
START_S, END_S = 180, 60
PICTURE = Path(__file__).parents[2] / "serving" / "playground" / "street.jpg"


def bundle(root: Path, config: dict, directory: Path) -> None:
    """An OCI bundle: the image's own command and user, no capabilities, root file system read-only."""
    directory.mkdir(parents=True, exist_ok=True)
    user = int(config["User"].partition(":")[0])
    for name in ("store", "jobs"):
        (directory / name).mkdir(exist_ok=True)
        os.chown(directory / name, user, user)
    hosts = directory / "hosts"
    hosts.write_text("127.0.0.1 localhost\n")
    subprocess.run(["runc", "spec", "--bundle", str(directory)], check=False)
    spec = json.loads((directory / "config.json").read_text())
    spec["root"] = {"path": str(root), "readonly": True}
    spec["process"] |= {
        "terminal": False, "args": config["Cmd"], "env": config["Env"], "user": {"uid": user, "gid": user},
        "noNewPrivileges": True, "capabilities": {}, "rlimits": [], "cwd": "/",
    }  # fmt: skip
    spec["mounts"] += [
        {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"]},
        *(
            {"destination": f"/{name}", "type": "bind", "source": str(directory / name), "options": ["bind", "rw"]}
            for name in ("store", "jobs")
        ),
        {"destination": "/etc/hosts", "type": "bind", "source": str(hosts), "options": ["bind", "ro"]},
    ]
    spec["linux"]["namespaces"] = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]
    spec["linux"].pop("resources", None)
    (directory / "config.json").write_text(json.dumps(spec))


def inside(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["runc", "exec", NAME, *command], capture_output=True, text=True, timeout=60)


def ask(path: str, picture: bytes | None = None) -> bytes:
    headers = {"Content-Type": "image/jpeg", "Accept": "image/png"} if picture else {}
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", picture, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


def is_healthy(check: list[str]) -> bool:
    return inside(*check).returncode == 0


def check_contents(root: Path, config: dict) -> float:
    """What can be seen without running it; returns the size of the Python layer in GB."""
    labels = config["Labels"]
    assert {"title", "description", "version", "revision"} <= {name.rpartition(".")[2] for name in labels}, labels
    compilers = [
        p for n in ("gcc", "cc", "g++", "clang", "make", "pip") for p in root.glob(f"**/bin/{n}*") if p.is_file()
    ]
    assert not compilers, compilers
    sizes = [p.lstat().st_size for p in (root / "opt" / "penumbra").rglob("*") if not p.is_dir()]
    size_gb = sum(sizes) / 1e9
    (packages,) = (root / "opt" / "penumbra").glob("lib/python3*/site-packages")
    for part in (*packages.iterdir(), *(packages / "torch" / "lib").iterdir()):
        part_gb = sum(p.lstat().st_size for p in (part, *part.rglob("*")) if not p.is_dir()) / 1e9
        if part_gb > SHOWN_GB:
            print(f"  {part.relative_to(packages)}: {part_gb:.2f} GB")
    assert size_gb < LAYER_GB, f"the Python layer has {size_gb:.2f} GB"
    return size_gb


def check_running(config: dict) -> None:
    """Who it runs as, what it may write, and that it answers."""
    status = inside("cat", "/proc/1/status").stdout
    assert f"Uid:\t{config['User'].partition(':')[0]}\t" in status, status
    assert "CapEff:\t0000000000000000" in status and "NoNewPrivs:\t1" in status
    for place in ("/x", "/opt/penumbra/x", "/usr/x", "/home/x"):
        assert inside("touch", place).returncode != 0, place
    assert inside("touch", "/tmp/x").returncode == 0
    names = [model["name"] for model in json.loads(ask("/models"))["models"]]
    labels = ask(f"/segment?model={names[0]}&samples=2", PICTURE.read_bytes())
    assert labels.startswith(b"\x89PNG") and labels[16:24] == struct.pack(">II", 480, 360), labels[:99]
    assert b"penumbra_request_seconds_count" in ask("/metrics")


def main(root: Path, image: Path, directory: Path) -> None:
    docker = json.loads(image.read_text())["Docker"]
    config = docker["config"]
    print(f"python layer: {check_contents(root, config):.2f} GB of {LAYER_GB} GB")
    bundle(root, config, directory)
    for start in ("first, fills its store", "second"):
        began = time.monotonic()
        with (directory / "log").open("w") as log:
            process = subprocess.Popen(["runc", "run", "--bundle", str(directory), NAME], stdout=log, stderr=log)
        try:
            while not is_healthy(config["Healthcheck"]["Test"][1:]):
                assert process.poll() is None, (directory / "log").read_text()
                assert time.monotonic() - began < START_S, "it never became healthy"
                time.sleep(0.2)
            print(f"start to healthy ({start}): {time.monotonic() - began:.1f} s")
            check_running(config)
        finally:
            began = time.monotonic()
            subprocess.run(["runc", "kill", NAME, "TERM"], check=False)
            code = process.wait(END_S)
        assert code == 0, (code, (directory / "log").read_text()[-2000:])
        print(f"SIGTERM to exit 0: {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    main(*map(Path, sys.argv[1:]))
