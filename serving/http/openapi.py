"""The OpenAPI document of the HTTP surface, from one source."""

import re
from collections.abc import Mapping
from itertools import chain
from typing import Any

from penumbra.serving.engine.options import OPTIONS
from penumbra.serving.http.segment import header_of
from penumbra.serving.http.stream import LINES
from penumbra.serving.http.upload import RAW
from penumbra.serving.oip.tensors import IMAGE, NAMES, PROMPTS
from penumbra.serving.render import WRITERS

JSON, BINARY = "application/json", "application/octet-stream"
LARGE = {"413": "Over a limit"}
FAULTS = LARGE | {
    "429": "Queue full; see Retry-After", "500": "The model failed on this request", "503": "Loading or draining",
    "504": "Deadline passed",
}  # fmt: skip
REFUSED = FAULTS | {
    "400": "An option or the image is wrong", "404": "Unknown model", "406": "No acceptable format",
    "415": "Body of an unknown kind",
}  # fmt: skip
GONE = {"404": "Unknown"}
BAD = {"400": "The request is wrong, or the model is not ready"}
UNKNOWN = BAD | {"404": "Unknown model or version"}
CONTROL = {"403": "Loading and unloading is off", "500": "The model cannot be loaded"}

SHARE = {"type": "number", "minimum": 0, "maximum": 1}
SCORES = {
    "expected_error": "Share of the picture's pixels that is wrong, as far as the model can tell.",
    "novelty": "Share of the model's reference pictures that were less strange, where it has any.",
}
TEXT, WHOLE = {"type": "string"}, {"type": "integer"}
OBJECT: dict[str, Any] = {"type": "object"}
FACTS = {
    "model": (TEXT, "Which model answered."), "version": (WHOLE, "Its version."), "seed": (WHOLE, "Of the noise."),
    "samples": (WHOLE, "How many were drawn."), "views": (TEXT, "Their name, where there were any."),
    "samples_asked": (WHOLE, "How many were asked for, where anytime may draw fewer."),
    "members": (TEXT, "The samples' names with commas between them, percent-encoded as UTF-8."),
    "abstained": (SHARE, "Share of the pixels that were withheld, where a risk was given."),
    "warning": (TEXT, "What to know of this answer, percent-encoded as UTF-8."),
} | {name: (SHARE, text) for name, text in SCORES.items()}  # fmt: skip
HEADERS = {
    header_of(name): {"description": f"{text} Absent if unknown.", "schema": schema}
    for name, (schema, text) in FACTS.items()
}
TIME = {"type": "number", "description": "Seconds since 1970."}
JOB: dict[str, Any] = {
    "id": TEXT, "state": {"type": "string", "enum": ["queued", "running", "writing", "done", "failed"]},
    "percent": {"type": "number"}, "windows_done": WHOLE, "windows": WHOLE, "media_type": TEXT,
    "options": OBJECT | {"additionalProperties": TEXT}, "error": TEXT | {"nullable": True}, "created": TIME,
    "finished": TIME | {"nullable": True}, "expires": TIME | {"nullable": True}, "target": TEXT | {"nullable": True},
    "url": TEXT, "result": TEXT | {"nullable": True},
}  # fmt: skip
TEXTS = {"type": "array", "items": TEXT}
MODEL: dict[str, Any] = {
    "name": TEXT, "version": WHOLE, "classes": TEXTS, "maps": OBJECT | {"additionalProperties": TEXTS}
}  # fmt: skip
SCORED = OBJECT | {"properties": {"scores": OBJECT | {"required": [*SCORES], "properties": {
    name: SHARE | {"description": f"{text} Null if unknown.", "nullable": True} for name, text in SCORES.items()
}}}}  # fmt: skip
BYTES = {"schema": TEXT | {"format": "binary"}}
CONTENT = dict.fromkeys(WRITERS, BYTES) | {
    JSON: {"schema": SCORED},
    "application/geo+json": {"schema": OBJECT | {"properties": {"penumbra": SCORED}}},
}  # fmt: skip
ANSWER = {"description": "The answer", "headers": HEADERS, "content": CONTENT}
STREAMABLE = {**ANSWER, "content": {**CONTENT, LINES: BYTES}}


def document(build: Mapping[str, str], *, typed: str) -> dict[str, Any]:
    """The whole document. build: version, and commit if it is known. typed: what BentoML's typed route does."""
    return {
        "openapi": "3.0.3",
        "info": {
            "title": "Penumbra", **{{"commit": "x-commit"}.get(name, name): fact for name, fact in build.items()},
            "description": "Segmentation that says, per pixel, how sure it is.",
        },
        "paths": {
            "/segment": {"post": _segment()},
            "/jobs": {"post": _jobs()},
            "/jobs/{id}": {
                "get": _entry("How a job stands: state, percent, windows.", "{id}", GONE, schema=_ref("Job")),
                "delete": _entry("Cancel a job and remove its files.", "{id}", GONE, status="204"),
            },
            "/jobs/{id}/result": {"get": _result()},
            "/models": {"get": _entry(
                "Served models, and those that were refused with the reason.",
                schema=_object({"models": {"type": "array", "items": _ref("Model")}}),
            )},
            "/models/{name}": {"get": _entry("A model's card without its weights, and its maps.", "{name}", GONE)},
            "/healthz": {"get": _entry("Liveness.")},
            "/livez": {"get": _entry("Liveness.")},
            "/readyz": {"get": _entry("Readiness: 200 when models are loaded and verified and no drain has begun.")},
            "/metrics": {"get": _entry("Prometheus metrics.", media="text/plain")},
            "/version": {"get": _entry("Version of the server, and the commit that it was made from, where known.")},
            "/docs.json": {"get": _entry("This document.")},
            "/predict": {"post": _predict(typed)},
        } | _paths_v2(),
        "components": {"schemas": {"Error": _object({"error": TEXT}), "Job": _object(JOB), "Model": _object(MODEL)}},
    }  # fmt: skip


def _segment() -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "query", "schema": option.schema, "description": option.about}
        for name, option in OPTIONS.items()
    ]
    form: dict[str, Any] = {name: {**option.schema, "description": option.about} for name, option in OPTIONS.items()}
    form["image"] = BYTES["schema"]
    return {
        "summary": "Labels and uncertainty of one picture; the Accept header chooses the form of the answer.",
        "parameters": parameters,
        "requestBody": {"required": True, "content": {
            "multipart/form-data": {"schema": OBJECT | {"properties": form, "required": ["image"]}},
        } | dict.fromkeys((*(f"image/{kind}" for kind in ("jpeg", "png", "webp", "tiff", "bmp")), *RAW), BYTES)},
        "responses": {"200": STREAMABLE} | _refusals(REFUSED),
    }  # fmt: skip


def _jobs() -> dict[str, Any]:
    faults = {status: text for status, text in REFUSED.items() if status not in ("500", "504")}
    created = {"description": "Accepted; Location says where to ask", "content": {JSON: {"schema": _ref("Job")}}}
    asked = _segment()
    asked["parameters"] += [
        {"name": name, "in": "query", "schema": TEXT, "description": f"An object's URL. {about}"}
        for name, about in (("source", "The picture, instead of a body."), ("target", "Where the result is copied."))
    ]
    asked["requestBody"] |= {"required": False}
    return asked | {
        "summary": "The same for images of any size: an id at once, the answer later. Large bodies are raw images.",
        "responses": {"202": created} | _refusals(faults | {"507": "No room on the disk"}),
    }


def _result() -> dict[str, Any]:
    operation = _entry("The answer of a finished job, in the format asked for; ranges are possible.", "{id}", GONE)
    operation["responses"] |= _refusals({"409": "There is no result, or none yet"}) | {
        "200": ANSWER,
        "206": {"description": "A part of it"},
        "416": {"description": "A range beyond the answer's end"},
    }
    return operation


def _predict(summary: str) -> dict[str, Any]:
    rows = {"type": "array", "items": {"type": "array", "items": {"type": "array", "items": WHOLE}}}
    request = {"image": rows, "model": TEXT, "samples": WHOLE | {"nullable": True}, "seed": WHOLE}
    schema = OBJECT | {"properties": request, "required": ["image"], "additionalProperties": False}
    answer = (
        "labels, confidence, entropy, mutual_information (of several samples) as nested lists, "
        "scores, and warnings where there are any"
    )
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {JSON: {"schema": schema}}},
        "responses": {"200": {"description": answer}} | _refusals(REFUSED),
    }


def _paths_v2() -> dict[str, Any]:
    """Every path of the Open Inference Protocol."""
    found: dict[str, Any] = {
        "/v2": {"get": _entry("Name, version and extensions of the server.", "/v2")},
        "/v2/health/live": {"get": _entry("Liveness: 200 or 400.", "/v2", BAD)},
        "/v2/health/ready": {"get": _entry("Readiness: 200 or 400.", "/v2", BAD)},
        "/v2/models/stats": {"get": _entry("The statistics of every model.", "/v2")},
        "/v2/repository/index": {"post": _entry("The models of the store and their states.", "/v2", BAD | LARGE)},
    }
    wish = {JSON: {"schema": OBJECT | {"properties": {"ready": {"type": "boolean"}}}}}
    found["/v2/repository/index"]["post"]["requestBody"] = {"required": False, "content": wish}
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        for verb, text in {
            "": "A model's inputs and outputs.", "/ready": "Whether a model is served: 200 or 400.",
            "/config": "A model's configuration in Triton's form.", "/stats": "Counts and times of its requests.",
        }.items():  # fmt: skip
            found[model + verb] = {"get": _entry(text, model, UNKNOWN)}
        found[f"{model}/infer"] = {"post": _infer(model)}
    for verb in ("Load", "Unload"):
        path = f"/v2/repository/models/{{model}}/{verb.lower()}"
        found[path] = {"post": _entry(f"{verb} a model, where that is allowed.", path, CONTROL)}
    path = "/v2/repository/models/{model}/promote"
    faults = BAD | CONTROL | LARGE | {"409": "Too little was measured, or a condition does not hold."}
    promote = _entry("Serve the version in a model's shadow, if it meets conditions.", path, faults)
    wish = {JSON: {"schema": OBJECT | {"required": ["if"], "properties": {"if": TEXTS}}}}
    found[path] = {"post": promote | {"requestBody": {"required": True, "content": wish}}}
    return found


def _infer(path: str) -> dict[str, Any]:
    specs = (IMAGE, *chain(*PROMPTS.values()))
    datatypes = dict.fromkeys(kind for spec in specs for kind in (spec.datatype, *dict(spec.also), *NAMES.values()))
    tensor = OBJECT | {
        "required": ["name", "datatype", "shape"],
        "properties": {
            "name": TEXT | {"enum": [spec.name for spec in specs]},
            "datatype": TEXT | {"enum": [*datatypes]},
            "shape": {"type": "array", "items": WHOLE | {"minimum": 0}},
            "data": {"type": "array", "items": {}}, "parameters": OBJECT,
        },
    }  # fmt: skip
    output = OBJECT | {"required": ["name"], "properties": {"name": TEXT, "parameters": OBJECT}}
    members = {
        "id": TEXT, "parameters": OBJECT, "inputs": {"type": "array", "items": tensor},
        "outputs": {"type": "array", "items": output},
    }  # fmt: skip
    faults = UNKNOWN | FAULTS | {"415": "A Content-Encoding that is not read"}
    operation = _entry("Labels and maps of one picture as tensors, in JSON or raw.", path, faults)
    operation["parameters"].append({
        "name": "Inference-Header-Content-Length", "in": "header", "schema": TEXT,
        "description": "Bytes of JSON before the raw tensors; 0 for a body that is one encoded picture.",
    })  # fmt: skip
    operation["responses"]["200"]["content"][BINARY] = BYTES
    request = {"schema": OBJECT | {"required": ["inputs"], "properties": members}}
    return operation | {"requestBody": {"required": True, "content": {JSON: request, BINARY: BYTES}}}


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of an object that has all of some properties, and may have more."""
    return OBJECT | {"properties": properties, "required": [*properties]}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _refusals(faults: Mapping[str, str]) -> dict[str, Any]:
    content = {JSON: {"schema": _ref("Error")}}
    return {status: {"description": text, "content": content} for status, text in faults.items()}


def _entry(
    summary: str, path: str = "", faults: Mapping[str, str] = {}, *, media: str = JSON, status: str = "200",
    schema: Mapping[str, Any] = {},
) -> dict[str, Any]:  # fmt: skip
    """One operation. path: the part of it that has its parameters. faults: why it is refused, by status."""
    content: dict[str, Any] = {} if status == "204" else {"content": {media: {"schema": {**schema}}}}
    responses = {status: {"description": "OK"} | content} | _refusals(faults)
    names = re.findall(r"{(\w+)}", path)
    parameters = [{"name": name, "in": "path", "required": True, "schema": TEXT} for name in names]
    return {"summary": summary, "responses": responses} | ({"parameters": parameters} if path else {})
