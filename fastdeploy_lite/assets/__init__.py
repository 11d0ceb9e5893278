"""Files that are installed with the package: the demo checkpoint."""

from __future__ import annotations

from pathlib import Path


def demo_path() -> Path:
    """Return the folder of the embedded 2-bit demo checkpoint (assets/demo/README.md)."""
    return Path(__file__).resolve().parent / "demo"
