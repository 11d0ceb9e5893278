"""One source of the version, and a changelog that knows it."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import fastdeploy_lite

ROOT = Path(__file__).resolve().parents[3]
VERSION = r"(?m)^version = \"(\d+\.\d+\.\d+)\"$"


def version() -> str:
    found = re.findall(VERSION, (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert len(found) == 1
    return str(found[0])


def test_the_program_tells_the_version_of_the_project() -> None:
    assert fastdeploy_lite.__version__ == metadata.version("fastdeploy-lite") == version()


def test_the_changelog_has_what_is_coming_and_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"(?m)^## (\S+)", text)
    assert sections[:2] == ["Unreleased", version()]


def test_no_other_file_repeats_the_version() -> None:
    texts = [*(ROOT / "fastdeploy_lite").rglob("*.py"), *(ROOT / "deploy").rglob("*.*")]
    known = re.compile(rf"(?<![\d.]){re.escape(version())}(?![\d.])")
    assert not [p for p in texts if known.search(p.read_text("utf-8", errors="ignore"))]
