"""Small checkpoints shared by the tests of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def tiny_2bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2-bit model of three layers."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny_2bits"), kind="2bits", seed=11)


@pytest.fixture(scope="session")
def tiny_w4w2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with int8, int4 and 2-bit weights."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny_w4w2"), kind="w4w2", seed=12)


@pytest.fixture(scope="session")
def tiny_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bf16 model with an untied head."""
    folder = tmp_path_factory.mktemp("tiny_bf16")
    return write_tiny_model(folder, kind="bf16", seed=13, tied=False)
