"""Which CUDA targets are built, from FD_BUILDING_ARCS, the compiler and the cards."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from custom_ops import build_cuda  # noqa: E402


@pytest.fixture
def nvcc(tmp_path: Path) -> str:
    """A compiler that offers sm_75 to sm_120."""
    tool = tmp_path / "nvcc"
    names = " ".join(f"sm_{arch}" for arch in ("75", "80", "86", "89", "90", "100", "120"))
    tool.write_text(f"#!/bin/sh\nfor n in {names}; do echo $n; done\n", encoding="utf-8")
    tool.chmod(0o755)
    return str(tool)


def test_named_targets_are_sorted_and_checked(nvcc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_BUILDING_ARCS", "120, 80,sm_90")
    assert build_cuda.choose_archs(nvcc) == ["80", "90", "120"]
    monkeypatch.setenv("FD_BUILDING_ARCS", "all")
    assert build_cuda.choose_archs(nvcc) == ["80", "86", "89", "90", "100", "120"]
    monkeypatch.setenv("FD_BUILDING_ARCS", "none")
    assert build_cuda.choose_archs(nvcc) == []


@pytest.mark.parametrize("named", ["75", "70,90", "91"])
def test_a_target_that_cannot_be_built_is_named(
    named: str, nvcc: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FD_BUILDING_ARCS", named)
    with pytest.raises(RuntimeError, match=r"FD_BUILDING_ARCS names (75|70|91), .*80, 86"):
        build_cuda.choose_archs(nvcc)


def test_without_a_request_the_cards_decide(nvcc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FD_BUILDING_ARCS", raising=False)
    monkeypatch.setattr(build_cuda, "present_archs", lambda: ["75", "90"])
    assert build_cuda.choose_archs(nvcc) == ["90"]
    monkeypatch.setattr(build_cuda, "present_archs", list)
    assert build_cuda.choose_archs(nvcc) == []


def test_a_request_without_a_compiler_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build_cuda, "find_nvcc", lambda: None)
    monkeypatch.delenv("FD_BUILDING_ARCS", raising=False)
    build_cuda.build(ROOT, tmp_path, tmp_path)
    assert "nvcc was not found" in capsys.readouterr().out
    monkeypatch.setenv("FD_BUILDING_ARCS", "90")
    with pytest.raises(RuntimeError, match="nvcc is not on PATH"):
        build_cuda.build(ROOT, tmp_path, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_hopper_gets_its_own_instructions_and_later_cards_portable_code() -> None:
    flags = build_cuda.target_flags(["80", "90", "120"])
    assert flags == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
        "-DFD_SM90A",
    ]
    assert build_cuda.target_flags(["90"])[1] == "-gencode=arch=compute_90,code=compute_90"
    assert "-DFD_SM90A" not in build_cuda.target_flags(["80", "100"])
