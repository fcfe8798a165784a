"""The OpenAPI document of the HTTP surface, from one source."""

from collections.abc import Mapping
from typing import Any

from penumbra.models.card import KNOWN_MAPS
from penumbra.serving.engine.options import DEFAULT, DEFAULT_MAPS
from penumbra.serving.http import openapi_v2 as oip_openapi
from penumbra.serving.render import WRITERS
from penumbra.serving.render.pictures import LEVELS

OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"type": "string"}, "Which model; may be left out when one is served."),
    "version": ({"type": "integer"}, "Its version; the newest when left out."),
    "samples": ({"type": "integer", "minimum": 1}, "How many samples to draw; fixed for models with members."),
    "seed": (
        {"type": "integer", "minimum": 0, "default": 0},
        "Seed of the noise; the same seed gives the same answer.",
    ),
    "overlap": ({"type": "number", "minimum": 0, "maximum": 0.9}, "Share of a window that its neighbour covers too."),
    "outputs": (
        {"type": "string", "default": DEFAULT},
        f"Comma-separated maps: {', '.join(KNOWN_MAPS)}, or the model's own (extra_maps of its card). {DEFAULT} stands "
        f"for {', '.join(DEFAULT_MAPS)}, as far as the answer has them: one sample has no mutual_information, and only "
        "one sample has a seam.",
    ),
    "boxes": ({"type": "string"}, "For models that take boxes: JSON list of [x0, y0, x1, y1, class name or id], px."),
    "tags": ({"type": "string"}, "For models that take tags: the classes in the picture, comma-separated or JSON."),
    "alpha": ({"type": "number", "minimum": 0}, "Weight of the network that sees the boxes (self_correcting, linear)."),
    "deadline_ms": (
        {"type": "number", "minimum": 0, "exclusiveMinimum": True},
        "Milliseconds from the request's arrival after which its answer is of no use; 504 then, and its windows leave.",
    ),
    "anytime": (
        {"type": "boolean", "default": False},
        "Rather than miss the deadline, answer with fewer samples, and say how many.",
    ),
    "priority": (
        {"type": "integer", "minimum": 0, "maximum": 3, "default": 0},
        "1 is served first, 3 last, and 0 stands for 2; none waits for ever.",
    ),
    "max_risk": (
        {"type": "number", "minimum": 0, "maximum": 1},
        "Share of the pixels that may be answered and wrong; the most uncertain ones become 255. Calibrated models.",
    ),
    "picture": (
        {"type": "string", "default": "labels"},
        "What a PNG or TIFF shows: labels, overlay, or the name of a map.",
    ),
    "levels": ({"type": "integer", "enum": list(LEVELS), "default": 65536}, "Grey levels of a map's PNG."),
    "min_pixels": ({"type": "integer", "minimum": 1, "default": 1}, "GeoJSON leaves smaller regions out."),
}
REFUSALS = {
    "400": "An option or the image is wrong", "404": "Unknown model", "406": "No acceptable format",
    "413": "Over a limit", "415": "Body of an unknown kind", "429": "Queue full; see Retry-After",
    "500": "The model failed on this request", "503": "Loading or draining", "504": "Deadline passed",
}  # fmt: skip
ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}


def describe(build: Mapping[str, str]) -> dict[str, Any]:
    """The whole document. build: version, and commit if it is known."""
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
                "get": _plain("How a job stands: state, percent, windows.", parameter="id"),
                "delete": _plain("Cancel a job and remove its files.", parameter="id", status="204"),
            },
            "/jobs/{id}/result": {"get": _result()},
            "/models": {"get": _plain("Served models, and those that were refused with the reason.")},
            "/models/{name}": {"get": _plain("The card of a model: every fact but its weights.", parameter="name")},
            "/healthz": {"get": _plain("Liveness.")},
            "/livez": {"get": _plain("Liveness.")},
            "/readyz": {"get": _plain("Readiness: 200 when models are loaded and verified and no drain has begun.")},
            "/metrics": {"get": _plain("Prometheus metrics.", media="text/plain")},
            "/version": {"get": _plain("Version of the server, and the commit that it was made from, where known.")},
            "/docs.json": {"get": _plain("This document.")},
            "/predict": {"post": _predict()},
        } | oip_openapi.paths(),
        "components": {"schemas": {
            "Error": {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]},
        }},
    }  # fmt: skip


def _segment() -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "query", "schema": schema, "description": text} for name, (schema, text) in OPTIONS.items()
    ]
    form = {name: schema | {"description": text} for name, (schema, text) in OPTIONS.items()}
    form["image"] = {"type": "string", "format": "binary"}
    picture = {"schema": {"type": "string", "format": "binary"}}
    return {
        "summary": "Labels and uncertainty of one picture; the Accept header chooses the form of the answer.",
        "parameters": parameters,
        "requestBody": {"required": True, "content": {
            "multipart/form-data": {"schema": {"type": "object", "properties": form, "required": ["image"]}},
        } | {f"image/{kind}": picture for kind in ("jpeg", "png", "webp", "tiff", "bmp")}},
        "responses": {
            "200": {"description": "The answer", "content": {
                media: {"schema": {"type": "object"}} if media.endswith("json") else picture for media in WRITERS
            }},
        } | {status: {"description": text, "content": ERROR} for status, text in REFUSALS.items()},
    }  # fmt: skip


def _jobs() -> dict[str, Any]:
    segment = _segment()
    refusals = segment["responses"].keys() - {"200", "500", "504"}
    created = {"description": "Accepted; Location says where to ask", "content": {
        "application/json": {"schema": {"type": "object", "required": ["id", "url", "state"]}},
    }}  # fmt: skip
    return segment | {
        "summary": "The same for images of any size: an id at once, the answer later. Large bodies are raw images.",
        "responses": {"202": created, "507": {"description": "No room on the disk", "content": ERROR}}
        | {status: segment["responses"][status] for status in sorted(refusals)},
    }


def _result() -> dict[str, Any]:
    operation = _plain("The answer of a finished job, in the format asked for; ranges are possible.", parameter="id")
    operation["responses"] |= {
        "200": {"description": "The answer", "content": {media: {"schema": {}} for media in WRITERS}},
        "206": {"description": "A part of it"},
        "409": {"description": "There is no result, or none yet", "content": ERROR},
        "416": {"description": "A range beyond the answer's end"},
    }
    return operation


def _predict() -> dict[str, Any]:
    integer = {"type": "integer"}
    request = {"image": {"type": "array", "items": {"type": "array", "items": {"type": "array", "items": integer}}},
               "model": {"type": "string"}, "samples": integer | {"nullable": True}, "seed": integer}  # fmt: skip
    body = {"schema": {
        "type": "object", "properties": request, "required": ["image"], "additionalProperties": False,
    }}  # fmt: skip
    return {
        "summary": "The same as arrays in JSON, for bentoml.SyncHTTPClient.",
        "requestBody": {"required": True, "content": {"application/json": body}},
        "responses": {
            "200": {
                "description": "labels, confidence, entropy, mutual_information (of several samples) as nested lists, "
                "and warnings where there are any"
            }
        }
        | {status: {"description": text, "content": ERROR} for status, text in REFUSALS.items()},
    }


def _plain(
    summary: str, *, media: str = "application/json", parameter: str | None = None, status: str = "200"
) -> dict[str, Any]:
    content: dict[str, Any] = {} if status == "204" else {"content": {media: {"schema": {}}}}
    operation: dict[str, Any] = {"summary": summary, "responses": {status: {"description": "OK"} | content}}
    if parameter:
        operation["parameters"] = [{"name": parameter, "in": "path", "required": True, "schema": {"type": "string"}}]
        operation["responses"]["404"] = {"description": "Unknown", "content": ERROR}
    return operation
