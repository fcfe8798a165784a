"""The playground at `/`: a page without a build step or anything from elsewhere. The rest of it is in the browser.

It asks as any other client does: `GET /models`, the Open Inference Protocol for exact answers, `POST /segment` line by
line for large pictures, `POST /jobs` for those over the limits. Its photographs are CC0: the cat by Stefan van der
Walt, the coffee by Rachel Michetti, both as scikit-image has them. Its street is drawn, with the grain of a camera.
"""

import json
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from penumbra.serving.render.pictures import HEAT

MEDIA = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".jpg": "image/jpeg"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def routes() -> list[BaseRoute]:
    """The page at `/`, and its parts under `/playground/`."""
    folder = Path(__file__).parent
    parts = {path.name: (path.read_bytes(), MEDIA[path.suffix]) for path in folder.iterdir() if path.suffix in MEDIA}
    parts["ramp.js"] = (f"export const STOPS = {json.dumps(HEAT)};".encode(), MEDIA[".js"])  # one table for all maps

    async def part(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in parts:
            raise HTTPException(404, f"there is no GET /playground/{name[:60]}; the playground is at /")
        content, media = parts[name]
        return Response(content, media_type=media, headers=HEADERS)

    return [Route("/", part), Route("/playground/{name}", part)]
