"""The files of the pages: complete, from here alone, small, what their manifest says."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from fastdeploy_lite.entrypoints.openai import web
from fastdeploy_lite.entrypoints.openai.middleware import OPEN_PATHS, OPEN_PREFIXES

VENDOR = web.FOLDER / "vendor"
OWN = [p for p in web.FOLDER.rglob("*") if p.suffix in (".html", ".css", ".js", ".svg")]
REFERENCE = re.compile(r"""(?:\b(?:href|src)=|\bfrom |\bimport\()["']([^"'#]+)["'#]""")


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI(docs_url=None, redoc_url=None)
    web.add_pages(app)
    return TestClient(app)


@pytest.mark.parametrize(("path", "policy"), [("/", web.CHAT_POLICY), ("/docs", web.DOCS_POLICY)])
def test_pages_forbid_everything_from_elsewhere(client: TestClient, path: str, policy: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert answer.headers["content-security-policy"] == policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert "script-src 'self';" in policy
    assert "<script>" not in answer.text


@pytest.mark.parametrize("path", OWN, ids=lambda p: str(p.relative_to(web.FOLDER)))
def test_own_files_name_files_that_are_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for found in REFERENCE.findall(text):
        assert "//" not in found, f"{path} loads {found}"
        if found in ("docs", "openapi.json") or found.startswith("$"):
            continue
        if path.suffix == ".html":
            assert found.startswith("web/"), found
            name = found.removeprefix("web/")
        else:
            name = (path.parent / found).resolve().relative_to(web.FOLDER.resolve()).as_posix()
        assert name in web.files(), f"{path} names {found}"


def test_addresses_are_relative() -> None:
    """A proxy's prefix must be kept."""
    for path in OWN:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"""(?:href|src)=["']/""", text), path
        assert not re.search(r"""fetch\(\s*["'`]/""", text), path


def test_files_are_sent_compressed_or_plain_and_revalidated(client: TestClient) -> None:
    url = "/web/vendor/katex.min.css"
    packed = client.get(url, headers={"accept-encoding": "gzip"})
    plain = client.get(url, headers={"accept-encoding": "identity"})
    assert packed.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in plain.headers
    assert packed.content == plain.content  # the client unpacked it
    again = client.get(url, headers={"if-none-match": packed.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    head = client.head(url, headers={"accept-encoding": "identity"})
    assert head.headers["content-length"] == str(len(plain.content))


@pytest.mark.parametrize(
    "name", ["nothing.js", "../__init__.py", "__init__.py", "%2e%2e/app.py", "vendor/", ""]
)
def test_nothing_else_is_served(client: TestClient, name: str) -> None:
    assert client.get(f"/web/{name}").status_code == 404


def test_pages_are_open_where_the_interface_needs_a_key() -> None:
    assert {"/", "/docs", "/openapi.json"} <= OPEN_PATHS
    assert web.PREFIX in OPEN_PREFIXES


def test_libraries_are_what_their_manifest_says() -> None:
    packages = json.loads((VENDOR / "packages.json").read_text(encoding="utf-8"))
    named = {
        f"vendor/{name}": digest for p in packages.values() for name, digest in p["files"].items()
    }
    for name, digest in named.items():
        file = web.files()[name]
        data = gzip.decompress(file.body) if file.gzipped else file.body
        assert hashlib.sha256(data).hexdigest() == digest, name
    present = {name for name in web.files() if name.startswith("vendor/")}
    assert present - set(named) == {"vendor/packages.json", "vendor/LICENSES.txt"}
    licences = gzip.decompress(web.files()["vendor/LICENSES.txt"].body).decode()
    for name, package in packages.items():
        assert f"# {name} {package['version']}\n" in licences
        assert package["license"]


def test_all_is_smaller_than_a_mebibyte() -> None:
    total = sum(
        p.stat().st_size for p in web.FOLDER.rglob("*") if p.is_file() and p.suffix != ".pyc"
    )
    assert total < 2**20
