"""The Open Inference Protocol v2 without a transport: what it says of server and models, and how a request is answered.

`penumbra.serving.http.v2` and `penumbra.serving.oip.grpc` bring their bytes into an `InferRequest` and an
`InferResponse` into their bytes; all that lies between, and every document, is made here once, so that the two cannot
differ. Statuses are Triton's (docs/use/protocols.md). Request parameters are the options of `POST /segment`.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from penumbra.models.card import KNOWN_MAPS, Card
from penumbra.models.errors import (
    BadArtifact,
    BadOption,
    Cancelled,
    NotPromoted,
    PenumbraError,
    Restricted,
    UnknownModel,
)
from penumbra.serving import VERSION
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.options import DEFAULT, DEFAULT_MAPS, PROBABILITIES, SegmentOptions, parse_options
from penumbra.serving.engine.runtime import Runtime
from penumbra.serving.engine.store import artifact_card, find_artifact, promote, versions
from penumbra.serving.gateway import Gateway
from penumbra.serving.oip import tensors
from penumbra.serving.oip.request import InferRequest, RequestedOutput
from penumbra.serving.oip.tensors import SHOWN, Output
from penumbra.serving.telemetry import Request, audit, audited

EXTENSIONS = ("binary_tensor_data", "classification", "model_configuration", "model_repository", "parameters",
              "statistics")  # fmt: skip
OWN_FIELDS = ("model", "version", "outputs")
"""Options that have their own place in a request of this protocol, and are no parameters."""
PARAMETERS = {spec.name for spec in fields(SegmentOptions)} - set(OWN_FIELDS)
LARGE_BYTES = 2**16
"""Messages from here on are read off the event loop: smaller ones take less time than the change of thread."""
FACTS = ("seed", "samples", "views", "samples_asked", "age_s", "members", "warnings", "abstained", "expected_error",
         "novelty")  # fmt: skip
"""What an answer's parameters say of it, each where it applies."""
PHASES = {
    "queue": ("wait", "queue"), "compute_input": ("decode",), "compute_infer": ("run",),
    "compute_output": ("stitch", "read_out"),
}  # fmt: skip
"""Phases of the statistics, each as the sum of ours (`Prediction.timing_ms`)."""
DURATIONS = ("success", "fail", *PHASES, "cache_hit", "cache_miss")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class InferResponse:
    """Holds what answers a request before a transport writes it."""

    model: str
    version: str
    id: str
    parameters: dict[str, str | int | float]
    outputs: list[Output]
    timing_ms: Mapping[str, float]


class Statistics:
    """Counts and times the requests of each version of a model, in the event loop alone."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, int, str]] = Counter()
        self._ns: Counter[tuple[str, int, str]] = Counter()
        self._last_ms: Counter[tuple[str, int]] = Counter()

    def count(self, card: Card, seconds: Mapping[str, float]) -> None:
        for name, spent_s in seconds.items():
            self._counts[card.name, card.version, name] += 1
            self._ns[card.name, card.version, name] += int(1e9 * spent_s)

    def succeeded(self, prediction: Prediction, seconds: float) -> None:
        card, spent_ms = prediction.card, prediction.timing_ms
        self._last_ms[card.name, card.version] = int(1e3 * time.time())
        spent_s = {name: sum(spent_ms.get(phase, 0) for phase in phases) / 1e3 for name, phases in PHASES.items()}
        self.count(card, {"success": seconds} | (spent_s if prediction.age_s is None else {"cache_hit": seconds}))

    def document(self, card: Card) -> dict[str, Any]:
        """Return the statistics of one model; an execution is a request, for its batches are shared by windows."""
        key = (card.name, card.version)
        durations = {name: {"count": self._counts[*key, name], "ns": self._ns[*key, name]} for name in DURATIONS}
        count = durations["success"]["count"]
        return {
            "name": card.name, "version": str(card.version), "last_inference": self._last_ms[key],
            "inference_count": count, "execution_count": count, "inference_stats": durations,
            "response_stats": {}, "batch_stats": [], "memory_usage": [],
        }  # fmt: skip


class Inference:
    """Answers the protocol over a gateway. store: where models are loaded from; None keeps that and unloading off.
    find: which version of a model is served."""

    def __init__(
        self, gateway: Gateway, *, store: Path | None = None, find: Callable[[Path, str], Path] = find_artifact
    ) -> None:
        self.gateway, self._store, self._find = gateway, store, find
        self._statistics = Statistics()
        self._loading = ThreadPoolExecutor(1, thread_name_prefix="load")
        """It loads and unloads one at a time, apart from the threads that read large requests: that may take long."""

    def find(self, model: str, version: str = "") -> Runtime:
        """Return a loaded model. Raises UnknownModel; BadOption for a version that is no number."""
        if version and not (version.isascii() and version.isdigit() and len(version) < 19):
            raise BadOption(f"the version is {version[:SHOWN]!r}; a whole number above 0 is wanted")
        return self.gateway.segmenter.find(model, int(version) if version else None)

    async def infer(
        self, read: Callable[[], InferRequest], write: Callable[[InferResponse], T], *, tracked: Request,
        size_bytes: int, gone: Callable[[], Awaitable[None]] | None = None, timeout_s: float | None = None,
    ) -> T:  # fmt: skip
        """Read, check, answer and write a tracked request; large ones wholly off the event loop. Raises PenumbraError.

        gone: returns when the caller has gone away. timeout_s: what the transport's own timeout leaves, if it has one;
        it counts as `deadline_ms` does.
        """
        self.gateway.check_admission()
        prepare = partial(self._prepare, read)
        request, card, image, options = prepare() if size_bytes < LARGE_BYTES else await asyncio.to_thread(prepare)
        if timeout_s is not None:
            own_ms = math.inf if options.deadline_ms is None else options.deadline_ms
            options = replace(options, deadline_ms=min(own_ms, 1e3 * max(timeout_s, 1e-6)))
        started = time.perf_counter()
        try:
            prediction, body = await self.gateway.answer(
                image, options, lambda prediction: write(response_of(prediction, request)), request=tracked, gone=gone
            )
        except Cancelled:
            raise
        except PenumbraError:
            self._statistics.count(card, {"fail": time.perf_counter() - started})
            raise
        self._statistics.succeeded(prediction, time.perf_counter() - started)
        return body

    def _prepare(self, read: Callable[[], InferRequest]) -> tuple[InferRequest, Card, Any, SegmentOptions]:
        """Read and check a request; returns it with its model's card, its picture and its options."""
        request = read()
        card = self.find(request.model, request.version).card
        options = read_options(request.parameters)
        given = tensors.check_inputs(request.inputs, tensors.inputs_of(card, options.bands), model=card.name)
        known = ("labels", *KNOWN_MAPS, *(extra.name for extra in card.extra_maps), PROBABILITIES)
        names = [output.name for output in request.outputs]
        if unknown := next((name for name in names if name not in known), None):
            raise BadOption(f"{card.name} has no output {unknown[:SHOWN]!r}; it may have {', '.join(known)}")
        for name, reader in tensors.PROMPT_READERS.items():
            if name in given and name in request.parameters:
                raise BadOption(f"{name} is given twice, as input and as parameter; once is enough")
            if name in given:
                options = replace(options, **{name: reader(given[name])})
        maps = tuple(name for name in names or [DEFAULT] if name != "labels")
        options = replace(options, model=card.name, version=card.version, outputs=maps)
        return request, card, tensors.read_image(given["image"]), options

    def server_document(self) -> dict[str, Any]:
        return {"name": "penumbra", "version": VERSION, "extensions": list(EXTENSIONS)}

    def is_model_ready(self, model: str, version: str = "") -> bool:
        """Say whether a model is served and the server ready. Raises BadOption for a version that is no number."""
        try:
            self.find(model, version)
        except UnknownModel:
            return False
        return self.gateway.is_ready

    def metadata(self, model: str, version: str = "") -> dict[str, Any]:
        card = self.find(model, version).card
        loaded = [str(c.version) for c in self.gateway.segmenter.cards() if c.name == card.name]
        return {
            "name": card.name, "versions": loaded, "platform": "penumbra",
            "inputs": [spec.metadata for spec in tensors.inputs_of(card)],
            "outputs": [spec.metadata for spec in tensors.outputs_of(card)],
        }  # fmt: skip

    def config(self, model: str, version: str = "") -> dict[str, Any]:
        """Return Triton's model configuration, as far as it says something of a model here."""
        card = self.find(model, version).card
        facts = {"method": card.method, "units": "nats", "classes": ",".join(c.name for c in card.classes)}
        return {
            "name": card.name, "platform": "penumbra", "backend": "penumbra", "max_batch_size": 0,
            "version_policy": {"latest": {"num_versions": 1}},
            "input": [spec.config for spec in tensors.inputs_of(card)],
            "output": [spec.config for spec in tensors.outputs_of(card)],
            "parameters": {name: {"string_value": text} for name, text in facts.items()},
        }  # fmt: skip

    def statistics(self, model: str = "", version: str = "") -> dict[str, Any]:
        """Return the statistics of one model, or of all. Raises BadOption for one that is not there."""
        cards = self.gateway.segmenter.cards()
        chosen = [c for c in cards if model in ("", c.name) and version in ("", str(c.version))]
        if model and not chosen:
            names = ", ".join(f"{card.name} {card.version}" for card in cards)
            raise BadOption(f"{f'{model} {version}'.strip()[:SHOWN]!r} is not served; statistics are there of {names}")
        return {"model_stats": [self._statistics.document(card) for card in chosen]}

    def index(self, *, ready_only: bool = False) -> list[dict[str, str]]:
        """List the models of the store: served, refused with the reason, and not loaded."""
        segmenter = self.gateway.segmenter
        served = [
            {"name": c.name, "version": str(c.version), "state": "READY"}
            | ({} if segmenter.is_in_memory(c) else {"reason": "not in memory; its next request loads it"})
            for c in segmenter.cards()
        ]
        if ready_only:
            return served
        names = {entry["name"] for entry in served}
        served += self.gateway.shadow.describe() if self.gateway.shadow else []
        others = {**dict.fromkeys(versions(self._store) if self._store else (), "unloaded"), **segmenter.refused}
        return served + [
            {"name": name, "state": "UNAVAILABLE", "reason": why} for name, why in others.items() if name not in names
        ]

    async def load(self, model: str) -> None:
        """Serve the newest version of a model in the store. Raises Restricted where that is off, BadArtifact."""
        await self._in_turn("load", model, lambda line, store: line.update(version=self._load(model, store)))

    def load_newest(self, model: str, store: Path) -> Future[int]:
        """Begin to serve the newest version, whether callers may load or not, and return the one that is served then.
        Any thread may call it."""
        return self._loading.submit(self._load, model, store)

    async def promote(self, model: str, conditions: Sequence[str]) -> str:
        """Serve the version that is in a model's shadow if it meets all conditions; returns what it has shown.

        Raises Restricted, BadOption for a condition that is none, NotPromoted, BadArtifact.
        """
        return await self._in_turn("promote", model, lambda line, _: self._promote(model, conditions, line))

    async def _in_turn(self, action: str, model: str, work: Callable[[dict[str, int], Path], T]) -> T:
        """Do something to a model in the thread that loads. The audit line is that thread's: what it has begun it ends,
        also where the caller has gone. Raises Restricted where there is no store to load from."""
        store = self._store
        if store is None:
            audit(action, model, outcome=Restricted.__name__)
            raise Restricted(
                "loading and unloading models is off; start the server with PENUMBRA_MODEL_CONTROL=true to allow it"
            )

        def audited_work() -> T:
            with audited(action, model) as line:
                return work(line, store)

        future = self._loading.submit(copy_context().run, audited_work)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if future.cancel():  # it had not begun
                audit(action, model, outcome=Cancelled.__name__)
            raise

    def _promote(self, model: str, conditions: Sequence[str], line: dict[str, int]) -> str:
        if not self.gateway.shadow:
            raise Restricted("no version is in a shadow here; start the server with PENUMBRA_SHADOW_SHARE=0.1")
        candidate = self.gateway.shadow.check(model, conditions)
        directory = candidate.directory
        if candidate.has_changed:
            self._load(model, directory.parents[1])
            raise NotPromoted(f"{candidate} has changed since it was measured; let it run again")
        try:
            self.gateway.segmenter.load(directory)
        except BadArtifact as error:
            why = self.gateway.segmenter.refuse(directory, error)
            raise BadArtifact(f"failed to load {model!r}: {why}") from None
        try:
            promote(directory)
        except BadArtifact:
            self.gateway.segmenter.unload(model, int(directory.name))
            raise
        line["version"] = self._load(model, directory.parents[1])
        return f"{candidate} is served in place of version {candidate.served.name}: {candidate.figures}"

    def _load(self, model: str, store: Path) -> int:
        segmenter = self.gateway.segmenter
        try:
            directory = newest = find_artifact(store, model)
            directory = served = self._find(store, model)
            with self.gateway.lending:
                self.gateway.lent.discard((model, int(served.name)))  # what a job had loaded stays from now on
                loaded = {card.version: card for card in segmenter.cards() if card.name == model}
                if loaded.get(int(served.name)) != artifact_card(served):  # or it was replaced under its number
                    segmenter.load(served)
            if self.gateway.shadow:
                for version in loaded:
                    if version > int(served.name):  # whoever names no version gets the highest
                        segmenter.unload(model, version)
                directory = newest
                self.gateway.shadow.consider(served, newest)
        except UnknownModel:
            raise BadArtifact(f"failed to load {model[:SHOWN]!r}; it is not in the store") from None
        except BadArtifact as error:
            raise BadArtifact(f"failed to load {model!r}: {segmenter.refuse(directory, error)}") from None
        segmenter.accept(model)
        return int(served.name)

    async def unload(self, model: str) -> None:
        """Serve no version of a model any longer, after the loads that were asked for before; one that is not served is
        no error. Raises Restricted."""
        await self._in_turn("unload", model, lambda *_: self._unload(model))

    def _unload(self, model: str) -> None:
        self.gateway.segmenter.unload(model)
        if self.gateway.shadow:
            self.gateway.shadow.forget(model)


def read_options(parameters: Mapping[str, object]) -> SegmentOptions:
    """Read the options among a request's parameters; others are left alone. Raises BadOption."""
    for name in parameters:
        if name in OWN_FIELDS:
            raise BadOption(f"{name} is not a parameter here; it has its own field in the request")
        if name.startswith("triton_") and name != "triton_enable_empty_final_response":
            raise BadOption(f"the parameter {name[:SHOWN]!r} is reserved, as all of triton_ are; leave it out")
    return parse_options({name: str(value) for name, value in parameters.items() if name in PARAMETERS})


def unknown_above(headers: Iterable[str], place: str) -> list[str]:
    """List the options among a request's headers, which are no place for them; `Priority` is HTTP's own (RFC 9218)."""
    options = PARAMETERS - {"priority"}
    return [f"{name} in {place}" for name in headers if name in options or name.startswith("x-penumbra-")]


def response_of(prediction: Prediction, request: InferRequest) -> InferResponse:
    """Make the response to a request, with what its caller should know beside the tensors."""
    warnings = list(prediction.warnings)
    if ignored := [*sorted(set(request.parameters) - PARAMETERS), *request.unknown]:
        names = ", ".join(name[:SHOWN] for name in ignored[:8])
        warnings.append(f"ignored unknown parameters: {names}; known are {', '.join(sorted(PARAMETERS))}")
    facts = prediction.facts | {
        "age_s": prediction.age_s, "members": ",".join(prediction.members), "warnings": "; ".join(warnings),
        **prediction.shares,
    }  # fmt: skip
    arrays: dict[str, Any] = {**prediction.maps, "labels": prediction.labels_HW, PROBABILITIES: prediction.prob_KHW}
    outputs = []
    usual = ("labels", *(name for name in DEFAULT_MAPS if name in prediction.maps))
    for requested in request.outputs or [RequestedOutput(name, request.binary) for name in usual]:
        datatype = "UINT8" if requested.name == "labels" else "FP32"
        output = Output(requested.name, datatype, arrays[requested.name], requested.binary)
        outputs.append(tensors.classify(output, requested.classes) if requested.classes else output)
    parameters = {name: facts[name] for name in FACTS if facts.get(name) not in (None, "")}
    return InferResponse(
        prediction.card.name, str(prediction.card.version), request.id, parameters, outputs, prediction.timing_ms
    )
