"""What a request sends: a picture's bytes, raw or in a form, and options in its query or the form's fields."""

import asyncio
from collections.abc import AsyncGenerator

from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, Headers
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from penumbra.models.errors import BadImage, BadOption, UnsupportedMedia

RAW = ("application/octet-stream", "application/x-npz", "application/x-npy")
"""Media types of bodies that are pictures, beside images."""
MAX_FIELDS, MAX_FIELD_BYTES = 16, 128 * 1024


async def read_upload(request: Request) -> tuple[bytes, dict[str, str]]:
    """The picture's bytes and the options, from a raw body or a multipart form, plus the query.

    Raises UnsupportedMedia, BadImage and BadOption.
    """
    fields = read_query(request)
    if is_raw(request):
        return await request.body(), fields
    media = _media_of(request)
    if media != "multipart/form-data":
        raise UnsupportedMedia(
            f"the body is {media[:60] or 'of no type'!r}; send multipart/form-data with a file field image, "
            "or an image/* body"
        )
    body = await request.body()
    try:
        form = await run_in_threadpool(parse_form, request.headers, body)
    except MultiPartException as error:
        raise BadImage(f"the multipart body cannot be read: {error.message}") from None
    except UnicodeError:
        raise BadImage("the multipart body cannot be read: its names are not in its charset; send UTF-8") from None
    upload = form.get("image")
    if upload is None or isinstance(upload, str):
        await form.close()
        raise BadImage("the form has no file field image; add one that holds the picture")
    texts = [(name, value) for name, value in form.multi_items() if isinstance(value, str)]
    with upload.file as file:
        return file.read(), _unique([*fields.items(), *texts])


def read_query(request: Request) -> dict[str, str]:
    """The options in a query. Raises BadOption for one that is given twice, or in a header that only answers have."""
    for name in request.headers:
        if name.startswith("x-penumbra-"):
            raise BadOption(f"the header {name[:60]} is of answers; send options in the query or as form fields")
    return _unique(request.query_params.multi_items())


def refuse_options(request: Request) -> None:
    """Refuse a query to a path that takes none: ?version=2 would be answered with the newest. Raises BadOption."""
    for name in request.query_params:
        raise BadOption(f"{request.url.path[:80]} takes no option {name[:40]!r}; leave the query out")


def is_raw(request: Request) -> bool:
    """Whether the body is a picture's bytes and nothing else."""
    return _media_of(request).startswith("image/") or _media_of(request) in RAW


async def disconnected(request: Request) -> None:
    """Wait until the caller has gone away. It takes what the connection says from here on."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class InMemoryParser(MultiPartParser):
    """A parser that keeps files in memory: the guard has bounded the body, and a container may have no other place."""

    spool_max_size = 2**63 - 1
    has_ended = False

    def on_end(self) -> None:
        self.has_ended = True


def parse_form(headers: Headers, body: bytes) -> FormData:
    """Parse a whole multipart body, off the event loop: 50 MB take a quarter of a second.

    A preamble and an epilogue are passed over (RFC 2046 5.1.1). A body that ends before its closing boundary was cut
    off, and its last field with it. Raises MultiPartException and UnicodeError.
    """
    boundary = parse_options_header(headers["content-type"])[1].get(b"boundary", b"")
    start = 0 if body.startswith(b"--" + boundary) else body.find(b"\r\n--" + boundary)
    if not body:
        return FormData()
    if not boundary:
        raise MultiPartException("its Content-Type names no boundary")
    if start < 0:
        raise MultiPartException("the boundary that its Content-Type names does not occur in it")

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body[start:]
        if not parser.has_ended:
            raise MultiPartException("it ends before its closing boundary; send all of it")

    limits = {"max_files": 1, "max_fields": MAX_FIELDS, "max_part_size": MAX_FIELD_BYTES}
    parser = InMemoryParser(headers, stream(), **limits)
    return asyncio.run(parser.parse())


def _media_of(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _unique(items: list[tuple[str, str]]) -> dict[str, str]:
    """Options by name. Raises BadOption where one is given twice."""
    fields: dict[str, str] = {}
    for name, value in items:
        if name in fields:
            raise BadOption(f"the option {name[:40]!r} is given twice; once is enough")
        fields[name] = value
    return fields
