"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def demo_dir() -> Path:
    """The embedded 2-bit demo checkpoint."""
    from fastdeploy_lite.assets import demo_path

    return demo_path()


@pytest.fixture(scope="session")
def demo_bf16_dir() -> Path:
    """The plain bf16 demo checkpoint; not part of the repository: tests may skip."""
    default = REPOSITORY.parent / "shared" / "demo_model" / "bf16"
    folder = Path(os.environ.get("FD_LITE_DEMO_BF16", default))
    if not (folder / "config.json").is_file():
        pytest.skip(f"no bf16 demo checkpoint in {folder}; set FD_LITE_DEMO_BF16 to its folder")
    return folder


@pytest.fixture(scope="session")
def heldout_path(demo_bf16_dir: Path) -> Path:
    """The held-out text that belongs to the bf16 demo checkpoint."""
    path = demo_bf16_dir.parent / "heldout.jsonl"
    if not path.is_file():
        pytest.skip(f"no held-out text at {path}")
    return path
