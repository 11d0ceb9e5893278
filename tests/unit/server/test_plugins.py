"""Plug-ins of installed packages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fastdeploy_lite import plugins
from fastdeploy_lite.plugins import MODELS, REASONING_PARSERS, load_plugins, warn_about_plugins


def install(folder: Path, name: str, entries: str, source: str) -> Path:
    """A package as pip would leave it, with entry points."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entries)
    (folder / f"{name}.py").write_text(source)
    return folder


SOURCE = "calls = []\ndef register(): calls.append(1)\ndef broken(): raise RuntimeError('ouch')\n"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"fd_fake_{tmp_path.name}"
    entries = (
        f"[{MODELS}]\nbad = {name}:broken\ngood = {name}:register\nother = {name}:register\n"
        f"[fastdeploy.model_runner_plugins]\nrunner = {name}:register\n"
    )
    install(tmp_path, name, entries, SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugins, "_loaded", set())
    return name


def test_plugins_are_called_once_and_one_that_fails_stops_no_other(
    fake: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins._log, "propagate", True)
    assert load_plugins(MODELS) == ["good", "other"]
    assert load_plugins(MODELS) == []
    assert sys.modules[fake].calls == [1, 1]
    assert (
        "Plug-in bad of fastdeploy.model_register_plugins failed: RuntimeError: ouch" in caplog.text
    )
    assert load_plugins(REASONING_PARSERS) == []


def test_fd_plugins_chooses(fake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_PLUGINS", "other, absent")
    assert load_plugins(MODELS) == ["other"]
    monkeypatch.setenv("FD_PLUGINS", "")
    monkeypatch.setattr(plugins, "_loaded", set())
    assert load_plugins(MODELS) == []


def test_what_is_missing_or_useless_is_named(
    fake: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins._log, "propagate", True)
    monkeypatch.setenv("FD_PLUGINS", "other,absent")
    warn_about_plugins()
    assert "no installed plug-in is called absent" in caplog.text
    assert "not available here: runner" in caplog.text
