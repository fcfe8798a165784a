"""The Open Inference Protocol's part of the OpenAPI document."""

from typing import Any

JSON = "application/json"
STRING: dict[str, Any] = {"type": "string"}
FAULTS = {
    "400": "The request is wrong, or the model is not ready", "404": "Unknown model or version",
    "413": "Over a limit", "429": "Queue full; see Retry-After", "500": "The model failed on this request",
    "501": "A Content-Encoding that is not read", "503": "Loading or draining", "504": "Deadline passed",
}  # fmt: skip
OF_DOCUMENTS = ("400", "404")
OF_CONTROL = {"403": "Loading and unloading is off", "500": "The model cannot be loaded"}


def paths() -> dict[str, Any]:
    """Every path under /v2."""
    documents = {
        "": "A model's inputs and outputs.", "/ready": "Whether a model is served: 200 or 400.",
        "/config": "A model's configuration in Triton's form.", "/stats": "Counts and times of its requests.",
    }  # fmt: skip
    found: dict[str, Any] = {
        "/v2": {"get": _operation("Name, version and extensions of the server.")},
        "/v2/health/live": {"get": _operation("Liveness: 200 or 400.", faults=("400",))},
        "/v2/health/ready": {"get": _operation("Readiness: 200 or 400.", faults=("400",))},
        "/v2/models/stats": {"get": _operation("The statistics of every model.")},
        "/v2/repository/index": {"post": _index()},
    }
    for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        found |= {
            path + verb: {"get": _operation(text, path=path, faults=OF_DOCUMENTS)} for verb, text in documents.items()
        }
        found[f"{path}/infer"] = {"post": _infer(path)}
    for verb in ("load", "unload"):
        path = f"/v2/repository/models/{{model}}/{verb}"
        found[path] = {"post": _operation(f"{verb.capitalize()} a model, where that is allowed.", path=path)}
        found[path]["post"]["responses"] |= _refusals(OF_CONTROL)
    return found


def _operation(summary: str, *, path: str = "", faults: tuple[str, ...] = ()) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": STRING}
        for name in ("model", "version") if f"{{{name}}}" in path
    ]  # fmt: skip
    answer = {"description": "OK", "content": {JSON: {"schema": {}}}}
    refusals = _refusals({status: FAULTS[status] for status in faults})
    return {"summary": summary, "parameters": parameters, "responses": {"200": answer} | refusals}


def _refusals(faults: dict[str, str]) -> dict[str, Any]:
    error = {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {status: {"description": text, "content": error} for status, text in faults.items()}


def _index() -> dict[str, Any]:
    schema = {"type": "object", "properties": {"ready": {"type": "boolean"}}}
    operation = _operation("The models of the store and their states.", faults=("400", "413"))
    return operation | {"requestBody": {"required": False, "content": {JSON: {"schema": schema}}}}


def _infer(path: str) -> dict[str, Any]:
    tensor = {
        "type": "object", "required": ["name", "datatype", "shape"],
        "properties": {
            "name": {"type": "string", "enum": ["image", "boxes", "tags"]},
            "datatype": {"type": "string", "enum": ["UINT8", "BYTES", "FP32", "INT32", "INT64"]},
            "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
            "data": {"type": "array", "items": {}}, "parameters": {"type": "object"},
        },
    }  # fmt: skip
    wanted = {"type": "object", "required": ["name"], "properties": {"name": STRING, "parameters": {"type": "object"}}}
    schema = {
        "type": "object", "required": ["inputs"],
        "properties": {
            "id": STRING, "parameters": {"type": "object"}, "inputs": {"type": "array", "items": tensor},
            "outputs": {"type": "array", "items": wanted},
        },
    }  # fmt: skip
    raw = {"schema": {"type": "string", "format": "binary"}}
    operation = _operation(
        "Labels and maps of one picture as tensors, in JSON or raw.", path=path, faults=tuple(FAULTS)
    )
    operation["parameters"].append({
        "name": "Inference-Header-Content-Length", "in": "header", "schema": STRING,
        "description": "Bytes of JSON before the raw tensors; 0 for a body that is one encoded picture.",
    })  # fmt: skip
    operation["responses"]["200"]["content"]["application/octet-stream"] = raw
    body = {"required": True, "content": {JSON: {"schema": schema}, "application/octet-stream": raw}}
    return operation | {"requestBody": body}
