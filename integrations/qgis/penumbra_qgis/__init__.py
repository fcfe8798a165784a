"""A Processing provider of QGIS: a raster goes to a Penumbra server, and labels or a map of uncertainty come back.

One file, without a package that QGIS does not have. The raster is sent as a job, piece by piece, and its answer, a
Cloud-Optimized GeoTIFF that lies where the raster does, is written to the disk as it comes.
"""

from __future__ import annotations  # QGIS has Python 3.9 in places

import http.client
import json
import shutil
import socket
import time
import urllib.parse
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from qgis.core import (
    QgsApplication,
    QgsProcessingAlgorithm,
    QgsProcessingContext,
    QgsProcessingException,
    QgsProcessingFeedback,
    QgsProcessingOutputNumber,
    QgsProcessingParameterDefinition,
    QgsProcessingParameterRasterDestination,
    QgsProcessingParameterRasterLayer,
    QgsProcessingParameterString,
    QgsProcessingProvider,
)

LOOK_S = 0.5
"""Between two looks at a job."""
BUSY, AWAY = (429, 503), (0, 502, 504)
"""Statuses of a server that is full or not ready; of one that is not reached, or not by the proxy before it."""
LOST = (ConnectionError, socket.timeout, http.client.HTTPException)
BUSY_S, PATIENCE_S = 5, 120
"""How long to wait for a server that is full or loading and does not say so itself, and in all."""
KINDS: dict[str, type[http.client.HTTPConnection]] = {
    "http": http.client.HTTPConnection, "https": http.client.HTTPSConnection,
}  # fmt: skip
SCORES = ("expected_error", "novelty")
T = TypeVar("T")


class Server:
    """A Penumbra server, asked with what Python has."""

    def __init__(self, url: str, key: str) -> None:
        """Raises QgsProcessingException for what is no URL of a server."""
        self._url, self._headers = url.rstrip("/"), {"Connection": "close"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._parts = urllib.parse.urlsplit(self._url)
        if self._parts.scheme not in KINDS:
            raise QgsProcessingException(f"the server is {url!r}; a URL is wanted, as http://localhost:3000")

    def submit(self, path: Path, options: dict[str, str]) -> dict[str, Any]:
        """Send a raster. Raises QgsProcessingException."""
        headers = {"Content-Type": "image/tiff", "Accept": "image/tiff", "Content-Length": str(path.stat().st_size)}
        return dict(self._ask("POST", f"/jobs?{urllib.parse.urlencode(options)}", json.load, BUSY, headers, path))

    def get(self, path: str, read: Callable[[Any], T]) -> T:
        """Read what there is of a job, which outlasts its server's restart. Raises QgsProcessingException."""
        return self._ask("GET", path, read, (*BUSY, *AWAY), {}, None)

    def remove(self, job: dict[str, Any]) -> None:
        """Cancel a job and remove its files; one that is gone already is as it should be, with its server too."""
        with suppress(*LOST):
            self._open("DELETE", job["url"], {}, None).close()

    def _ask(
        self, method: str, path: str, read: Callable[[Any], T], passing: tuple[int, ...], headers: dict[str, str],
        source: Path | None,
    ) -> T:  # fmt: skip
        """Read an answer, after refusals that pass. Raises QgsProcessingException."""
        left_s = float(PATIENCE_S)
        while True:
            started = time.monotonic()
            try:
                with source.open("rb") if source else nullcontext() as body:
                    answer = self._open(method, path, headers, body)
                with answer:
                    if answer.status < 300:
                        return read(answer)
                    status, again, why = answer.status, answer.headers.get("Retry-After", ""), _sentence(answer)
            except LOST as error:
                status, again, left_s = 0, "", left_s - (time.monotonic() - started)
                why = f"{self._url} cannot be asked ({error}); is a Penumbra server running there?"
            wait_s = max(1, int(again)) if again.isdecimal() else BUSY_S
            if status not in passing or wait_s > left_s:
                raise QgsProcessingException(why)
            time.sleep(wait_s)
            left_s -= wait_s

    def _open(self, method: str, path: str, headers: dict[str, str], body: Any) -> http.client.HTTPResponse:
        """Ask, and read how the answer begins: also that of a server that refuses before it has the whole body."""
        try:
            connection = KINDS[self._parts.scheme](self._parts.netloc, timeout=120)
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, self._parts.path + path, body, {**self._headers, **headers})
            return connection.getresponse()
        except OSError as error:
            raise ConnectionError(str(error)) from None


def _sentence(answer: http.client.HTTPResponse) -> str:
    """What a refusal says."""
    text = answer.read(2000).decode(errors="replace")
    try:
        return str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {answer.status}: {text[:200]}"


def _save(target: Path, answer: http.client.HTTPResponse) -> Any:
    """Write an answer to a file as it comes, and give its headers. Raises IncompleteRead."""
    with target.open("wb") as file:
        shutil.copyfileobj(answer, file)
    if answer.length:
        raise http.client.IncompleteRead(b"", answer.length)
    return answer.headers


class Segment(QgsProcessingAlgorithm):  # type: ignore[misc]
    """The algorithm `penumbra:segment`."""

    def name(self) -> str:
        return "segment"

    def displayName(self) -> str:
        return "Segment a raster"

    def shortHelpString(self) -> str:
        return (
            "Sends a raster to a Penumbra server and loads what it answers: class labels, or a map that says where "
            "not to believe them. Picture is labels, overlay, confidence, entropy, mutual_information or another map "
            "of the model. Options are those of POST /segment, as samples=8&overlap=0.5&max_risk=0.02."
        )

    def createInstance(self) -> Segment:
        return Segment()

    def initAlgorithm(self, config: dict[str, Any] | None = None) -> None:
        self.addParameter(QgsProcessingParameterRasterLayer("INPUT", "Raster"))
        self.addParameter(QgsProcessingParameterString("SERVER", "Server", "http://localhost:3000"))
        for name, title, default in (
            ("MODEL", "Model (may be left out where one is served)", ""),
            ("PICTURE", "Picture: labels, overlay, or a map", "labels"),
            ("OPTIONS", "Further options, as samples=8&overlap=0.5", ""),
            ("KEY", "API key, where the server wants one", ""),
        ):
            parameter = QgsProcessingParameterString(name, title, default, optional=True)
            if name in ("OPTIONS", "KEY"):
                parameter.setFlags(parameter.flags() | QgsProcessingParameterDefinition.FlagAdvanced)
            self.addParameter(parameter)
        self.addParameter(QgsProcessingParameterRasterDestination("OUTPUT", "Answer"))
        for name in SCORES:
            self.addOutput(QgsProcessingOutputNumber(name.upper(), name.replace("_", " ")))

    def processAlgorithm(
        self, parameters: dict[str, Any], context: QgsProcessingContext, feedback: QgsProcessingFeedback
    ) -> dict[str, Any]:
        def text(name: str) -> str:
            return str(self.parameterAsString(parameters, name, context)).strip()

        layer = self.parameterAsRasterLayer(parameters, "INPUT", context)
        path = Path(layer.source() if layer else "")
        if not path.is_file():
            raise QgsProcessingException(f"{str(path)!r} is no file on this disk; export the layer as GeoTIFF first")
        options = dict(urllib.parse.parse_qsl(text("OPTIONS"), keep_blank_values=True))
        options |= {"picture": text("PICTURE") or "labels"} | ({"model": text("MODEL")} if text("MODEL") else {})
        server, target = Server(text("SERVER"), text("KEY")), self.parameterAsOutputLayer(parameters, "OUTPUT", context)
        job = server.submit(path, options)
        feedback.pushInfo(f"The server has it as {job['url']}")
        results = self._follow(server, job, target, feedback)
        server.remove(job)
        return results

    def _follow(
        self, server: Server, job: dict[str, Any], target: str, feedback: QgsProcessingFeedback
    ) -> dict[str, Any]:
        """Show how far the job is, and fetch its answer. A user who cancels ends it on the server too."""
        while not job["finished"]:
            time.sleep(LOOK_S)
            if feedback.isCanceled():
                return {}
            job = server.get(job["url"], json.load)
            feedback.setProgress(job["percent"])
        if job["error"]:
            server.remove(job)
            raise QgsProcessingException(job["error"])
        headers = server.get(job["result"], partial(_save, Path(target)))
        if warning := urllib.parse.unquote(headers.get("X-Penumbra-Warning", "")):
            feedback.pushWarning(warning)
        scores = {name: headers.get(f"X-Penumbra-{name.replace('_', '-').title()}") for name in SCORES}
        return {"OUTPUT": target} | {name.upper(): float(score) for name, score in scores.items() if score}


class Provider(QgsProcessingProvider):  # type: ignore[misc]
    """The provider `penumbra` of the Processing toolbox."""

    def id(self) -> str:
        return "penumbra"

    def name(self) -> str:
        return "Penumbra"

    def loadAlgorithms(self) -> None:
        self.addAlgorithm(Segment())


class Plugin:
    """What QGIS loads and unloads."""

    def __init__(self) -> None:
        self._provider: Provider | None = None

    def initProcessing(self) -> None:
        self._provider = Provider()
        QgsApplication.processingRegistry().addProvider(self._provider)

    def initGui(self) -> None:
        self.initProcessing()

    def unload(self) -> None:
        QgsApplication.processingRegistry().removeProvider(self._provider)


def classFactory(interface: object) -> Plugin:
    """What QGIS calls."""
    return Plugin()
