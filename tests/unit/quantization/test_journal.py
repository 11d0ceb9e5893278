"""What a killed conversion leaves, beside what the conversions' own tests see."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fastdeploy_lite.quantization.journal import Journal, LayerResult

RESULT = LayerResult({"a": (np.zeros(1 << 16, np.uint8), "U8")}, {"x": np.zeros(9)}, {"layer": 0})


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: an error without a name, as of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_a_full_disk_cuts_short_is_named_and_gone(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", {"a": 1})
    with pytest.raises(OSError, match=r"layer-00000\.tensors\.partial"), full_disk(1 << 14):
        journal.save(0, RESULT)
    assert journal.load(0) is None
    assert list((tmp_path / "j").glob("*.partial")) == []
    journal.save(0, RESULT)
    found = journal.load(0)
    assert found is not None
    np.testing.assert_array_equal(found.tensors["a"][0], RESULT.tensors["a"][0])


@pytest.mark.parametrize("record", ["[]", "{}", '{"tensors": null, "state": 3}', "nonsense", ""])
def test_a_damaged_record_is_no_finished_layer(tmp_path: Path, record: str) -> None:
    journal = Journal(tmp_path / "j", {"a": 1})
    journal.save(0, RESULT)
    (tmp_path / "j" / "layer-00000.json").write_text(record, encoding="utf-8")
    assert journal.load(0) is None
