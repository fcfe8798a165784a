"""`POST /segment`: one picture in, and its answer in the format that the caller accepts."""

from collections.abc import Mapping
from dataclasses import replace
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from penumbra.serving.engine.answer import Prediction
from penumbra.serving.gateway import Gateway
from penumbra.serving.http.stream import LINES, stream
from penumbra.serving.http.upload import disconnected, read_upload
from penumbra.serving.render import choose_format, parse_request, render_with_notes
from penumbra.serving.room import Bodies

PRINTABLE = bytes(range(0x20, 0x7F)).decode().replace("%", "")
"""What text in a header is not percent-encoded: any other character, a line's end above all, would break the answer."""


async def segment(gateway: Gateway, bodies: Bodies, request: Request) -> Response:
    """Answer one picture. bodies: what lines that wait are counted in. Raises PenumbraError."""
    if request.headers.get("accept", "").strip().lower() == LINES:
        return await stream(gateway, bodies, request)
    with gateway.telemetry.track("http") as tracked:
        media = choose_format(request.headers.get("accept", ""))
        data, fields = await read_upload(request)
        options, style = parse_request(media, fields)
        prediction, (body, notes) = await gateway.answer(
            data, options, lambda answer: render_with_notes(answer, media, style), request=tracked,
            gone=lambda: disconnected(request),
        )  # fmt: skip
    prediction = replace(prediction, warnings=prediction.warnings + notes)
    return Response(body, media_type=media, headers=answer_headers(prediction, tracked.timing_ms))


def answer_headers(prediction: Prediction, timing_ms: Mapping[str, float] | None = None) -> dict[str, str]:
    """Which model answered, with what seed and members, its scores, what to know, and how long each phase took.

    Texts are percent-encoded as UTF-8 where they are not printable ASCII, and so are the commas in members' names.
    """
    shares = prediction.scored | {"abstained": prediction.abstained}
    facts = prediction.origin | {name: f"{share:.6f}" for name, share in shares.items() if share is not None} | {
        "members": ",".join(_encoded(name).replace(",", "%2C") for name in prediction.members),
        "warning": _encoded("; ".join(prediction.warnings)), "samples_asked": prediction.num_asked or "",
    }  # fmt: skip
    headers = {header_of(name): str(fact) for name, fact in facts.items() if fact != ""}
    age = {} if prediction.age_s is None else {"Age": f"{prediction.age_s:.0f}"}
    return headers | age | {"Server-Timing": server_timing(timing_ms or prediction.timing_ms)}


def header_of(fact: str) -> str:
    """Name the header that has a fact of an answer."""
    return f"X-Penumbra-{fact.replace('_', '-').title()}"


def _encoded(text: str) -> str:
    """A text as a header can hold it."""
    return quote(text, PRINTABLE, errors="replace")


def server_timing(timing_ms: Mapping[str, float]) -> str:
    """Milliseconds by phase, as the header of that name has them."""
    return ", ".join(f"{phase};dur={ms:.2f}" for phase, ms in timing_ms.items())
