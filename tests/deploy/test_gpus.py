"""Several GPUs in one machine: a server for each behind nginx, and what Triton needs in an image without a compiler."""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import pytest
import yaml

from tests.deploy.test_docker import DOCKER, ROOT, stages
from tests.reliability.test_callers import proxied

GPUS = yaml.safe_load((DOCKER / "gpus.yaml").read_text())
SERVERS = {name: service for name, service in GPUS["services"].items() if name != "nginx"}


def test_every_gpu_has_one_server_with_jobs_of_its_own_and_ports_that_nginx_knows() -> None:
    devices = [
        device["device_ids"]
        for server in SERVERS.values()
        for device in server["deploy"]["resources"]["reservations"]["devices"]
    ]
    assert devices == [["0"], ["1"]]
    jobs = [volume for server in SERVERS.values() for volume in server["volumes"] if volume.endswith(":/jobs")]
    assert len(set(jobs)) == len(SERVERS)
    ports = {word for server in SERVERS.values() for word in server["command"] if word.isdigit()}
    conf = (ROOT / "deploy/nginx/penumbra.conf").read_text().replace("# server 127", "server 127")
    assert set(re.findall(r"server 127\.0\.0\.1:(\d+)", conf)) == ports
    assert all(server["read_only"] and server["cap_drop"] == ["ALL"] for server in SERVERS.values())


@contextmanager
def naming_itself() -> Iterator[SimpleNamespace]:
    """A server that answers everything with its own address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = str(self.server.server_port).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        yield SimpleNamespace(url=f"http://{address}", grpc_address=address, port=str(server.server_port))
        server.shutdown()


def test_a_job_is_asked_where_it_was_taken_and_all_else_of_every_server(tmp_path: Path) -> None:
    with naming_itself() as first, naming_itself() as second, proxied([first, second], tmp_path) as (port, _):
        asked = {
            path: {urlopen(f"http://127.0.0.1:{port}{path}", timeout=20).read().decode() for _ in range(8)}
            for path in ("/jobs", "/jobs/ID", "/jobs/ID/result", "/models", "/segment")
        }
    for path, ports in asked.items():
        assert ports == ({first.port} if path.startswith("/jobs") else {first.port, second.port}), path


def run(command: list[str], **environment: str) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_triton_finds_its_module_in_an_image_that_has_no_compiler(tmp_path: Path) -> None:
    """The Dockerfile's own lines, at paths of this test, with a library of the driver's symbols and no driver."""
    pytest.importorskip("triton", reason="needs triton")
    built, home, tools = tmp_path / "triton", tmp_path / "home", tmp_path / "tools"
    for directory in (home, tools):
        directory.mkdir()
    for name in ("sh", "mkdir", "cp", "file"):  # no gcc; what `file` says of Python is in the cache's key
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    (step,) = (rest for word, rest in stages()["build-cuda"] if word == "RUN" and "libcuda" in rest)
    step = step.replace("/opt/penumbra/triton", str(built))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    assert run(["sh", "-c", step + " && echo made"], PATH=path, TRITON_LIBCUDA_PATH=str(tmp_path)).endswith("made\n")
    (module,) = built.glob("*/cuda_utils*.so")
    missing = re.findall(r" U (cu\w+)", run(["nm", "-D", str(module)], PATH=path))
    (tmp_path / "shell.c").write_text("".join(f"int {name}(void) {{ return 999; }}\n" for name in missing))
    driver = ["gcc", "-shared", "-o", str(tmp_path / "libcuda.so.1"), "-Wl,-soname,libcuda.so.1"]
    run([*driver, str(tmp_path / "shell.c")], PATH=path)
    (entry,) = (rest for word, rest in stages()["cuda"] if word == "ENTRYPOINT")
    entrypoint = [word.replace("/opt/penumbra/triton", str(built)) for word in yaml.safe_load(entry)]
    use = [sys.executable, "-c", "from triton.backends.nvidia.driver import CudaUtils; print(CudaUtils().launch)"]
    asked = {"PATH": str(tools), "TRITON_LIBCUDA_PATH": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path)}
    for _ in range(2):  # a container that starts again
        assert "built-in function launch" in run([*entrypoint, *use], HOME=str(home), **asked)
    assert "Failed to find C compiler" in run(use, HOME=str(tmp_path), **asked)
