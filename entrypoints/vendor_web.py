"""Renews fastdeploy_lite/entrypoints/openai/web/vendor from the npm registry; needs npm.

python entrypoints/vendor_web.py

Files are exactly the packages' own, compressed reproducibly; `vendor/packages.json` records
version, licence and the SHA-256 of each file before compression. To upgrade, change PACKAGES and
run it.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

VENDOR = Path(__file__).resolve().parent.parent / "fastdeploy_lite/entrypoints/openai/web/vendor"
PACKAGES: dict[str, tuple[str, dict[str, str]]] = {
    "htm": ("3.1.1", {"preact/standalone.module.js": "preact-htm.js"}),
    "preact": ("10.5.15", {}),  # for its licence: htm's file contains it
    "idb-keyval": ("6.3.0", {"dist/index.js": "idb-keyval.js"}),
    "marked": ("18.2.1", {"lib/marked.esm.js": "marked.js"}),
    "dompurify": ("3.4.18", {"dist/purify.min.js": "purify.min.js"}),
    "@highlightjs/cdn-assets": ("11.12.0", {"highlight.min.js": "highlight.min.js"}),
    "katex": (
        "0.19.1",
        {"dist/katex.min.js": "katex.min.js", "dist/katex.min.css": "katex.min.css"},
    ),
    "swagger-ui-dist": (
        "5.35.0",
        {"swagger-ui-bundle.js": "swagger-ui-bundle.js", "swagger-ui.css": "swagger-ui.css"},
    ),
    "lucide-static": ("1.62.0", {}),
}
ICONS = (
    "activity", "arrow-down", "arrow-up", "book-open", "brain", "check", "chevron-right",
    "circle-alert", "copy", "download", "keyboard", "menu", "message-square", "monitor", "moon",
    "panel-left", "pencil", "refresh-cw", "search", "settings-2", "square", "square-pen", "sun",
    "trash-2", "upload", "wrench", "x",
)  # fmt: skip


def fetch(name: str, version: str, folder: Path) -> Path:
    """Download and unpack one package; returns its folder."""
    packed = subprocess.run(
        ["npm", "pack", "--silent", f"{name}@{version}"],
        cwd=folder, check=True, capture_output=True, text=True,
    )  # fmt: skip
    archive = folder / packed.stdout.strip().splitlines()[-1]
    target = folder / archive.stem
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    return target / "package"


def store(name: str, data: bytes) -> str:
    """Write one file, text compressed; returns the digest of what it holds."""
    if name.endswith(".woff2"):
        (VENDOR / name).write_bytes(data)
    else:
        (VENDOR / f"{name}.gz").write_bytes(gzip.compress(data, 9, mtime=0))
    return hashlib.sha256(data).hexdigest()


def sprite(package: Path) -> bytes:
    """The chosen icons as symbols of one SVG file."""
    symbols = []
    for name in ICONS:
        text = (package / "icons" / f"{name}.svg").read_text(encoding="utf-8")
        match = re.search(r"<svg[^>]*>(.*)</svg>", text, re.DOTALL)
        assert match is not None, name
        inner = " ".join(match[1].split())
        symbols.append(f'<symbol id="{name}" viewBox="0 0 24 24">{inner}</symbol>')
    body = "\n".join(symbols)
    return f'<svg xmlns="http://www.w3.org/2000/svg">\n{body}\n</svg>\n'.encode()


def contents(name: str, package: Path, chosen: dict[str, str]) -> dict[str, bytes]:
    """Stored names and bytes of what is taken from a package."""
    files = {target: (package / source).read_bytes() for source, target in chosen.items()}
    if name == "katex":
        fonts = sorted((package / "dist" / "fonts").glob("*.woff2"))
        files |= {f"fonts/{font.name}": font.read_bytes() for font in fonts}
    if name == "lucide-static":
        files["icons.svg"] = sprite(package)
    return files


def licence(package: Path) -> str:
    """The licence's text, with notices of what a bundle contains."""
    names = ("LICENSE", "LICENSE.md", "LICENCE", "NOTICE", "swagger-ui-bundle.js.LICENSE.txt")
    found = [package / name for name in names if (package / name).is_file()]
    assert found, package
    return "\n\n".join(path.read_text(encoding="utf-8").strip() for path in found)


def main() -> None:
    """Rebuild the folder."""
    argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0]).parse_args()
    for old in [*VENDOR.glob("*.*"), *VENDOR.glob("fonts/*")]:
        old.unlink()
    (VENDOR / "fonts").mkdir(parents=True, exist_ok=True)
    manifest, licences = {}, []
    with tempfile.TemporaryDirectory() as scratch:
        for name, (version, chosen) in PACKAGES.items():
            package = fetch(name, version, Path(scratch))
            about = json.loads((package / "package.json").read_text(encoding="utf-8"))
            files = contents(name, package, chosen)
            digests = {target: store(target, data) for target, data in sorted(files.items())}
            manifest[name] = {"version": version, "license": about["license"], "files": digests}
            licences.append(f"# {name} {version}\n\n{licence(package)}\n")
    store("LICENSES.txt", "\n\n".join(licences).encode())
    packages = json.dumps(manifest, indent=2) + "\n"
    (VENDOR / "packages.json").write_text(packages, encoding="utf-8")
    total = sum(path.stat().st_size for path in VENDOR.rglob("*") if path.is_file())
    print(f"{total / 1024:.0f} KiB in {VENDOR}")


if __name__ == "__main__":
    main()
