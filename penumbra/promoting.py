"""`penumbra promote`: asks a running server to serve the version that it has in a shadow, if its figures are good."""

import json
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.parse import quote

import click

from penumbra import options as shared
from penumbra.models.errors import BadOption, NotPromoted

LONGEST_S = 600
"""A model may load for minutes."""


@click.command()
@click.argument("name")
@click.option("--if", "conditions", multiple=True, required=True, metavar="CONDITION",
              help="'flips < 0.5 %', 'entropy < 0.02', 'latency < 1.2', 'failures < 1 %'; all must hold.")  # fmt: skip
@click.option("--url", default="http://127.0.0.1:3000", show_default=True, help="The server.")
@click.option("--key-file", type=shared.FILE, help="Holds an API key of scope admin.")
def promote(name: str, conditions: tuple[str, ...], url: str, key_file: Path | None) -> None:
    """Serve the version that a server has in the shadow of another, if what it has shown meets all conditions."""
    if not url.startswith(("http://", "https://")):
        raise BadOption(f"--url is {url[:60]!r}; http://HOST:PORT or https://HOST:PORT is wanted")
    key = key_file.read_text(errors="replace").strip() if key_file else ""
    if not (key.isascii() and key.isprintable()):
        raise BadOption(f"{key_file} holds no API key; a line with one key and nothing else is wanted")
    try:
        request = urllib.request.Request(
            f"{url.rstrip('/')}/v2/repository/models/{quote(name, safe='')}/promote",
            json.dumps({"if": conditions}).encode(),
            {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
        )
        with urllib.request.urlopen(request, timeout=LONGEST_S) as answer:
            click.echo(json.load(answer)["promoted"])
    except urllib.error.HTTPError as error:
        raise NotPromoted(_sentence_in(error.read(), error.code)) from None
    except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:  # or something else answers
        why = getattr(error, "reason", error) if isinstance(error, OSError) else type(error).__name__
        raise NotPromoted(f"no server answers at {url} ({why}); give its --url") from None


def _sentence_in(body: bytes, status: int) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return f"what answers there is no Penumbra (HTTP status {status}); give the server's --url"
