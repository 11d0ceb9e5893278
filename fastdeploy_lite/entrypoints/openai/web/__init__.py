"""The chat page at `/`, the API's page at `/docs`, and every file that they load.

Nothing comes from elsewhere. `entrypoints/vendor_web.py` renews the libraries in `vendor/`.
"""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import Response

FOLDER = Path(__file__).parent
PREFIX = "/web/"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".json": "application/json",
    ".txt": "text/plain; charset=utf-8",
    ".woff2": "font/woff2",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
# Only DOMPurify may turn text into HTML; the browser refuses everything else.
CHAT_POLICY = f"{_POLICY}; require-trusted-types-for 'script'; trusted-types dompurify"
# Swagger UI writes style elements.
DOCS_POLICY = _POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")


@dataclass(frozen=True, slots=True)
class StaticFile:
    """One file, ready to be sent.

    Attributes:
        body: Its bytes, compressed where `gzipped`.
        gzipped: Whether `body` is gzip's.
        media_type: Content type.
        etag: Quoted digest of the bytes.
    """

    body: bytes
    gzipped: bool
    media_type: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> StaticFile:
        """Take a file of the package; text is compressed unless it is stored so."""
        data, name = path.read_bytes(), path.name.removesuffix(".gz")
        media_type = _TYPES[Path(name).suffix]
        gzipped = not media_type.startswith("font/")
        if gzipped and name == path.name:
            data = gzip.compress(data, mtime=0)
        return cls(data, gzipped, media_type, f'"{hashlib.sha256(data).hexdigest()[:32]}"')

    def response(self, request: Request, policy: str) -> Response:
        """The answer to a GET or HEAD; 304 when the browser has these bytes already."""
        headers = {
            "cache-control": "no-cache",
            "content-security-policy": policy,
            "cross-origin-opener-policy": "same-origin",
            "etag": self.etag,
            "referrer-policy": "no-referrer",
            "vary": "accept-encoding",
            "x-content-type-options": "nosniff",
        }
        if request.headers.get("if-none-match") == self.etag:
            return Response(status_code=304, headers=headers)
        body = self.body
        if self.gzipped and "gzip" in request.headers.get("accept-encoding", ""):
            headers["content-encoding"] = "gzip"
        elif self.gzipped:
            body = gzip.decompress(body)
        return Response(body, media_type=self.media_type, headers=headers)


@cache
def files() -> dict[str, StaticFile]:
    """Everything that is served, by its name below `/web/`."""
    paths = [path for path in FOLDER.rglob("*") if path.is_file()]
    names = {path: path.relative_to(FOLDER).as_posix().removesuffix(".gz") for path in paths}
    return {n: StaticFile.read(p) for p, n in names.items() if Path(n).suffix in _TYPES}


def add_pages(app: FastAPI) -> None:
    """Add the pages and their files.

    Args:
        app: Where to; made without FastAPI's own documentation pages.
    """

    async def chat(request: Request) -> Response:
        return files()["index.html"].response(request, CHAT_POLICY)

    async def docs(request: Request) -> Response:
        return files()["docs.html"].response(request, DOCS_POLICY)

    async def static(request: Request, name: str) -> Response:
        file = files().get(name)
        if file is None:
            return Response("There is no such file", 404, media_type="text/plain")
        return file.response(request, CHAT_POLICY)

    for path, endpoint in (("/", chat), ("/docs", docs), (PREFIX + "{name:path}", static)):
        app.add_api_route(path, endpoint, methods=["GET", "HEAD"], include_in_schema=False)
