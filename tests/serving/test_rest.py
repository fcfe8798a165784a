"""Parsing of requests, without a server."""

from starlette.datastructures import Headers, UploadFile

from penumbra.serving.rest import parse_form


def test_a_large_upload_is_parsed_without_a_temporary_file() -> None:
    content = bytes(range(256)) * 12_000
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    form = parse_form(Headers({"Content-Type": "multipart/form-data; boundary=x"}), head + content + b"\r\n--x--\r\n")
    upload = form["image"]
    assert isinstance(upload, UploadFile)
    with upload.file as file:
        assert upload._in_memory, "it went to a file on disk"
        assert file.read() == content
