"""The pages: links, pictures as new as their tables, a site without warnings."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from fastdeploy_lite import envs

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"
PAGES = [*DOCS.glob("*.md"), *ROOT.glob("*.md"), *(ROOT / "examples").glob("*.md")]
CONFIGURATION = ROOT / "deploy/site/mkdocs.yml"
EXTERNAL = r'(?:<script[^>]*src|<link[^>]*rel="stylesheet"[^>]*href|<img[^>]*src)="https?://[^"]*"'


def script(name: str) -> Any:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"(?s)```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_every_variable_has_its_line() -> None:
    page = (DOCS / "environment.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = re.findall(r"`([A-Z_0-9]+)`", "".join(rows))
    assert sorted(named) == sorted(envs.VARIABLES)


def test_pictures_are_as_new_as_what_they_show(tmp_path: Path) -> None:
    """After a change of a table: `python docs/draw.py`."""
    draw = script("draw")
    for name, picture in draw.PICTURES.items():
        file = tmp_path / f"{name}.svg"
        picture().save(file)
        ElementTree.parse(file)
        kept = DOCS / "images" / f"{name}.svg"
        assert kept.read_text("utf-8") == file.read_text("utf-8"), "run python docs/draw.py"


def test_plots_hold_the_numbers_of_the_tables() -> None:
    draw = script("draw")
    shown = (DOCS / "images/tokens-and-concurrency.svg").read_text(encoding="utf-8")
    for row in draw.table("performance.md", "concurrency"):
        assert f">{draw.number(row[1]):,.0f}<" in shown
    shown = (DOCS / "images/bits-and-perplexity.svg").read_text(encoding="utf-8")
    for row in draw.table("quantize.md", "experts"):
        assert row[0] in shown


def test_memory_of_the_published_mixture_is_that_of_the_files() -> None:
    """93.8 GB: `test_published_sizes.py` reckons it from the tensors of the files."""
    draw = script("draw")
    sizes = {name: draw.weight_gigabytes(config) for name, config in draw.schemes().items()}
    assert sizes["2Bits"] == pytest.approx(93.8, abs=0.1)
    assert sizes["bf16"] > 1.9 * sizes["wint8"] > 3.5 * sizes["wint4"]


def test_the_recording_is_of_the_commands_and_its_picture_of_the_recording() -> None:
    record = script("record")
    lines = (DOCS / "images/terminal.cast").read_text(encoding="utf-8").splitlines()
    header, *rest = map(json.loads, lines)
    assert header["version"] == 2
    events = [(moment, text) for moment, kind, text in rest if kind == "o"]
    assert [moment for moment, _ in events] == sorted(moment for moment, _ in events)
    typed = {text.rstrip("\r\n") for _, text in events}
    assert set(record.COMMANDS) <= typed
    kept = (DOCS / "images/terminal.svg").read_text(encoding="utf-8")
    assert kept == record.svg(events)
    ElementTree.fromstring(kept)


def test_every_page_is_found_by_the_navigation_or_a_link() -> None:
    def leaves(node: Any) -> list[str]:
        if isinstance(node, str):
            return [node]
        items = node.values() if isinstance(node, dict) else node
        return [leaf for item in items for leaf in leaves(item)]

    nav = set(leaves(yaml.safe_load(CONFIGURATION.read_text(encoding="utf-8"))["nav"]))
    names = {page.name for page in DOCS.glob("*.md")}
    assert len(nav) > 10
    assert nav <= names
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    lost = {name for name in names - nav if f"({name}" not in text and f"docs/{name}" not in text}
    assert not lost


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs mkdocs: pip install 'fastdeploy-lite[docs]'")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    done = subprocess.run(
        [*command, "-f", str(CONFIGURATION), "-d", str(tmp_path / "site")],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").glob("*.html"))
    assert len(pages) > len(list(DOCS.glob("*.md")))
    for page in pages:
        assert not re.findall(EXTERNAL, page.read_text(encoding="utf-8")), page.name
    api = (tmp_path / "site/api.html").read_text(encoding="utf-8")
    for name in ("LLM", "SamplingParams", "RequestOutput", "quantize_checkpoint"):
        assert name in api
