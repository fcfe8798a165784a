"""The OpenAPI document of the HTTP surface, from one source."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from penumbra.serving.engine.options import OPTIONS
from penumbra.serving.http import openapi_v2 as oip_openapi
from penumbra.serving.http.segment import header_of
from penumbra.serving.http.stream import LINES
from penumbra.serving.http.upload import RAW
from penumbra.serving.render import WRITERS

ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
REFUSALS = {status: {"description": text, "content": ERROR} for status, text in {
    "400": "An option or the image is wrong", "404": "Unknown model", "406": "No acceptable format",
    "413": "Over a limit", "415": "Body of an unknown kind", "429": "Queue full; see Retry-After",
    "500": "The model failed on this request", "503": "Loading or draining", "504": "Deadline passed",
}.items()}  # fmt: skip

SHARE = {"type": "number", "minimum": 0, "maximum": 1}
SCORES = {
    "expected_error": "Share of the picture's pixels that is wrong, as far as the model can tell.",
    "novelty": "Share of the model's reference pictures that were less strange, where it has any.",
}
TEXT, WHOLE = {"type": "string"}, {"type": "integer"}
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
    "options": {"type": "object", "additionalProperties": TEXT}, "error": TEXT | {"nullable": True}, "created": TIME,
    "finished": TIME | {"nullable": True}, "expires": TIME | {"nullable": True}, "target": TEXT | {"nullable": True},
    "url": TEXT, "result": TEXT | {"nullable": True},
}  # fmt: skip
NAMES = {"type": "array", "items": TEXT}
MODEL: dict[str, Any] = {
    "name": TEXT, "version": WHOLE, "classes": NAMES, "maps": {"type": "object", "additionalProperties": NAMES}
}  # fmt: skip
SCORED = {"type": "object", "properties": {"scores": {
    "type": "object", "required": [*SCORES], "properties": {
        name: SHARE | {"description": f"{text} Null if unknown.", "nullable": True} for name, text in SCORES.items()
    },
}}}  # fmt: skip
BYTES = {"schema": {"type": "string", "format": "binary"}}
CONTENT = dict.fromkeys(WRITERS, BYTES) | {
    "application/json": {"schema": SCORED},
    "application/geo+json": {"schema": {"type": "object", "properties": {"penumbra": SCORED}}},
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
                "get": _plain("How a job stands: state, percent, windows.", parameter="id", schema=_ref("Job")),
                "delete": _plain("Cancel a job and remove its files.", parameter="id", status="204"),
            },
            "/jobs/{id}/result": {"get": _result()},
            "/models": {"get": _plain(
                "Served models, and those that were refused with the reason.",
                schema=_object({"models": {"type": "array", "items": _ref("Model")}}),
            )},
            "/models/{name}": {"get": _plain("A model's card without its weights, and its maps.", parameter="name")},
            "/healthz": {"get": _plain("Liveness.")},
            "/livez": {"get": _plain("Liveness.")},
            "/readyz": {"get": _plain("Readiness: 200 when models are loaded and verified and no drain has begun.")},
            "/metrics": {"get": _plain("Prometheus metrics.", media="text/plain")},
            "/version": {"get": _plain("Version of the server, and the commit that it was made from, where known.")},
            "/docs.json": {"get": _plain("This document.")},
            "/predict": {"post": _predict(typed)},
        } | oip_openapi.paths(),
        "components": {"schemas": {
            "Error": _object({"error": TEXT}), "Job": _object(JOB), "Model": _object(MODEL),
        }},
    }  # fmt: skip


def _segment() -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "query", "schema": option.schema, "description": option.about}
        for name, option in OPTIONS.items()
    ]
    form: dict[str, Any] = {name: {**option.schema, "description": option.about} for name, option in OPTIONS.items()}
    form["image"] = {"type": "string", "format": "binary"}
    return {
        "summary": "Labels and uncertainty of one picture; the Accept header chooses the form of the answer.",
        "parameters": parameters,
        "requestBody": {"required": True, "content": {
            "multipart/form-data": {"schema": {"type": "object", "properties": form, "required": ["image"]}},
        } | dict.fromkeys((*(f"image/{kind}" for kind in ("jpeg", "png", "webp", "tiff", "bmp")), *RAW), BYTES)},
        "responses": {"200": STREAMABLE} | REFUSALS,
    }  # fmt: skip


def _jobs() -> dict[str, Any]:
    refusals = {status: REFUSALS[status] for status in REFUSALS if status not in ("500", "504")}
    created = {"description": "Accepted; Location says where to ask", "content": {
        "application/json": {"schema": _ref("Job")},
    }}  # fmt: skip
    asked = _segment()
    asked["parameters"] += [
        {"name": name, "in": "query", "schema": {"type": "string"}, "description": f"An object's URL. {about}"}
        for name, about in (("source", "The picture, instead of a body."), ("target", "Where the result is copied."))
    ]
    asked["requestBody"] |= {"required": False}
    return asked | {
        "summary": "The same for images of any size: an id at once, the answer later. Large bodies are raw images.",
        "responses": {"202": created, "507": {"description": "No room on the disk", "content": ERROR}} | refusals,
    }


def _result() -> dict[str, Any]:
    operation = _plain("The answer of a finished job, in the format asked for; ranges are possible.", parameter="id")
    operation["responses"] |= {
        "200": ANSWER,
        "206": {"description": "A part of it"},
        "409": {"description": "There is no result, or none yet", "content": ERROR},
        "416": {"description": "A range beyond the answer's end"},
    }
    return operation


def _predict(summary: str) -> dict[str, Any]:
    integer = {"type": "integer"}
    request = {"image": {"type": "array", "items": {"type": "array", "items": {"type": "array", "items": integer}}},
               "model": {"type": "string"}, "samples": integer | {"nullable": True}, "seed": integer}  # fmt: skip
    schema = {"type": "object", "properties": request, "required": ["image"], "additionalProperties": False}
    answer = (
        "labels, confidence, entropy, mutual_information (of several samples) as nested lists, "
        "scores, and warnings where there are any"
    )
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"200": {"description": answer}} | REFUSALS,
    }


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of an object that has all of some properties, and may have more."""
    return {"type": "object", "properties": properties, "required": [*properties]}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _plain(
    summary: str, *, media: str = "application/json", parameter: str | None = None, status: str = "200",
    schema: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:  # fmt: skip
    content: dict[str, Any] = {} if status == "204" else {"content": {media: {"schema": {**schema}}}}
    operation: dict[str, Any] = {"summary": summary, "responses": {status: {"description": "OK"} | content}}
    if parameter:
        operation["parameters"] = [{"name": parameter, "in": "path", "required": True, "schema": {"type": "string"}}]
        operation["responses"]["404"] = {"description": "Unknown", "content": ERROR}
    return operation
