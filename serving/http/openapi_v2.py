"""The Open Inference Protocol's part of the OpenAPI document."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

from penumbra.serving.oip.tensors import IMAGE, NAMES, PROMPTS

JSON, BINARY = "application/json", "application/octet-stream"
STRING: dict[str, Any] = {"type": "string"}
OBJECT: dict[str, Any] = {"type": "object"}
RAW = {"schema": {"type": "string", "format": "binary"}}
BAD = {"400": "The request is wrong, or the model is not ready"}
UNKNOWN = BAD | {"404": "Unknown model or version"}
LARGE = {"413": "Over a limit"}
FAULTS = UNKNOWN | LARGE | {
    "429": "Queue full; see Retry-After", "500": "The model failed on this request",
    "415": "A Content-Encoding that is not read", "503": "Loading or draining", "504": "Deadline passed",
}  # fmt: skip
CONTROL_FAULTS = {"403": "Loading and unloading is off", "500": "The model cannot be loaded"}


def paths() -> dict[str, Any]:
    """Every path under /v2."""
    found: dict[str, Any] = {
        "/v2": {"get": _operation("Name, version and extensions of the server.")},
        "/v2/health/live": {"get": _operation("Liveness: 200 or 400.", faults=BAD)},
        "/v2/health/ready": {"get": _operation("Readiness: 200 or 400.", faults=BAD)},
        "/v2/models/stats": {"get": _operation("The statistics of every model.")},
        "/v2/repository/index": {"post": _operation("The models of the store and their states.", faults=BAD | LARGE)},
    }
    wish = {JSON: {"schema": OBJECT | {"properties": {"ready": {"type": "boolean"}}}}}
    found["/v2/repository/index"]["post"]["requestBody"] = {"required": False, "content": wish}
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        for verb, text in {
            "": "A model's inputs and outputs.", "/ready": "Whether a model is served: 200 or 400.",
            "/config": "A model's configuration in Triton's form.", "/stats": "Counts and times of its requests.",
        }.items():  # fmt: skip
            found[model + verb] = {"get": _operation(text, path=model, faults=UNKNOWN)}
        found[f"{model}/infer"] = {"post": _infer(model)}
    for verb in ("Load", "Unload"):
        path = f"/v2/repository/models/{{model}}/{verb.lower()}"
        found[path] = {"post": _operation(f"{verb} a model, where that is allowed.", path=path, faults=CONTROL_FAULTS)}
    path = "/v2/repository/models/{model}/promote"
    faults = BAD | CONTROL_FAULTS | LARGE | {"409": "Too little was measured, or a condition does not hold."}
    promote = _operation("Serve the version in a model's shadow, if it meets conditions.", path=path, faults=faults)
    wish = {JSON: {"schema": OBJECT | {"required": ["if"], "properties": {"if": {"type": "array", "items": STRING}}}}}
    found[path] = {"post": promote | {"requestBody": {"required": True, "content": wish}}}
    return found


def _operation(summary: str, *, path: str = "", faults: Mapping[str, str] | None = None) -> dict[str, Any]:
    names = [name for name in ("model", "version") if f"{{{name}}}" in path]
    error = {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "summary": summary,
        "parameters": [{"name": name, "in": "path", "required": True, "schema": STRING} for name in names],
        "responses": {"200": {"description": "OK", "content": {JSON: {"schema": {}}}}}
        | {status: {"description": text, "content": error} for status, text in (faults or {}).items()},
    }


def _infer(path: str) -> dict[str, Any]:
    specs = (IMAGE, *chain(*PROMPTS.values()))
    datatypes = dict.fromkeys(kind for spec in specs for kind in (spec.datatype, *dict(spec.also), *NAMES.values()))
    tensor = OBJECT | {
        "required": ["name", "datatype", "shape"],
        "properties": {
            "name": STRING | {"enum": [spec.name for spec in specs]},
            "datatype": STRING | {"enum": [*datatypes]},
            "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
            "data": {"type": "array", "items": {}}, "parameters": OBJECT,
        },
    }  # fmt: skip
    output = OBJECT | {"required": ["name"], "properties": {"name": STRING, "parameters": OBJECT}}
    members = {
        "id": STRING, "parameters": OBJECT, "inputs": {"type": "array", "items": tensor},
        "outputs": {"type": "array", "items": output},
    }  # fmt: skip
    operation = _operation("Labels and maps of one picture as tensors, in JSON or raw.", path=path, faults=FAULTS)
    operation["parameters"].append({
        "name": "Inference-Header-Content-Length", "in": "header", "schema": STRING,
        "description": "Bytes of JSON before the raw tensors; 0 for a body that is one encoded picture.",
    })  # fmt: skip
    operation["responses"]["200"]["content"][BINARY] = RAW
    request = {"schema": OBJECT | {"required": ["inputs"], "properties": members}}
    return operation | {"requestBody": {"required": True, "content": {JSON: request, BINARY: RAW}}}
