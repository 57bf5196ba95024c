"""The page's files: five small documents, and their scripts and styles, which browsers keep.

They are static and the same for everyone; what a caller may see comes from the routes of ``view_routes``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Coroutine
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, HTTPException
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

FOLDER = Path(__file__).parents[1] / "ui"
PAGES = {"": "list", "job": "job", "compare": "compare", "new": "new", "run": "run"}
"""Path below ``/ui/`` -> document."""

SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
}
KINDS = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
FOR_EVER = "private, max-age=31536000, immutable"
ASK_AGAIN = "private, no-cache"


class _PageRoute(APIRoute):
    """A route that people open: whoever is not logged in is sent to Airflow's login."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's own handler, but for 401."""
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await handle(request)
            except HTTPException as error:
                if error.status_code != 401:
                    raise
                back = quote(request.url.path + (f"?{request.url.query}" if request.url.query else ""))
                return RedirectResponse(f"../../api/v2/auth/login?next={back}", 303)

        return handler


def page_routes() -> APIRouter:
    """Return the routes of the documents and of their files."""
    router = APIRouter(route_class=_PageRoute, include_in_schema=False)
    for path, name in PAGES.items():
        router.get(f"/ui/{path}")(_document(name))

    @router.get("/ui/static/{version}/{name:path}")
    async def static_file(version: str, name: str) -> Response:
        """Return a script, style or icon; of the version that is served it may be kept for ever."""
        files = _files()
        if name not in files:
            raise HTTPException(404, f"no file {name[:80]!r}")
        kept = FOR_EVER if version == _version() else ASK_AGAIN
        kind = KINDS.get(Path(name).suffix, "text/plain")
        return Response(files[name], media_type=kind, headers={**SECURITY, "Cache-Control": kept})

    return router


def _document(name: str) -> Callable[[], Coroutine[Any, Any, Response]]:
    async def document() -> Response:
        text = (FOLDER / f"{name}.html").read_text(encoding="utf-8").replace("{version}", _version())
        return Response(text, media_type="text/html", headers={**SECURITY, "Cache-Control": ASK_AGAIN})

    return document


@cache
def _files() -> dict[str, bytes]:
    """Return every file below ``static``, by its path there."""
    folder = FOLDER / "static"
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@cache
def _version() -> str:
    """Return a name of all files' content: scripts import each other by relative paths, below one version."""
    digest = hashlib.sha256()
    for name, content in _files().items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]
