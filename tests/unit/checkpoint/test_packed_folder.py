"""Files of packed weights in a folder: listed, and deleted when nobody uses them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from fastdeploy_lite.checkpoint.packed_file import PackedFile, write_packed_file
from fastdeploy_lite.checkpoint.packed_folder import delete, file_name, list_packed, older_files
from fastdeploy_lite.entrypoints.cli import main

DAY = 86400


def put(folder: Path, digit: str, days: float = 0.0, model: str = "a model", rank: int = 0) -> Path:
    path = folder / file_name(model, digit * 24, rank, 2)
    arrays = {"x": np.arange(1000, dtype=np.uint8)}
    assert write_packed_file(path, digit * 24, None, arrays)
    age(path, days)
    return path


def age(path: Path, days: float) -> None:
    then = time.time() - days * DAY
    os.utime(path, (then, then))


@pytest.fixture
def others(tmp_path: Path) -> list[str]:
    """What is none of them, or is a link to one."""
    real = put(tmp_path, "e")
    moved = tmp_path.parent / "moved"
    real.rename(moved)
    real.symlink_to(moved)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / file_name("folder", "d" * 24, 0, 1)).mkdir()
    return sorted(path.name for path in tmp_path.iterdir())


def test_files_are_listed_by_their_last_use(tmp_path: Path, others: list[str]) -> None:
    old, new = put(tmp_path, "a", 40), put(tmp_path, "b", 3, rank=1)
    found = list_packed(tmp_path)
    assert [entry.path for entry in found] == [new, old]
    assert [(e.model, e.rank, e.ranks) for e in found] == [("a model", 1, 2), ("a model", 0, 2)]
    assert found[0].nbytes == new.stat().st_size


def test_reading_a_file_is_its_use(tmp_path: Path) -> None:
    path = put(tmp_path, "a", 40)
    with PackedFile(path, "a" * 24) as file:
        file.mark_used()
    assert time.time() - list_packed(tmp_path)[0].used < 60


def test_other_files_of_the_same_model_and_rank(tmp_path: Path) -> None:
    mine, old = put(tmp_path, "a"), put(tmp_path, "b")
    put(tmp_path, "c", model="another")
    put(tmp_path, "c", rank=1)
    assert [entry.path for entry in older_files(mine)] == [old]
    assert older_files(tmp_path / "nowhere" / mine.name) == []


def test_the_command(tmp_path: Path, others: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    old, new = put(tmp_path, "a", 40), put(tmp_path, "b", 3)
    assert main.run(["packed-cache", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"used 3.0 days ago  {new.name}")
    assert lines[1].endswith(f"used 40.0 days ago  {old.name}")
    assert lines[2] == "2 files, 0.00 GB"
    assert main.run(["packed-cache", str(tmp_path), "--delete-unused", "30"]) == 0
    assert "1 files deleted" in capsys.readouterr().out
    assert (old.exists(), new.exists()) == (False, True)
    assert main.run(["packed-cache", str(tmp_path), "--delete-unused", "0"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == others


def test_what_is_open_can_be_read_on(tmp_path: Path) -> None:
    path, out = put(tmp_path, "a"), np.empty(1000, np.uint8)
    with PackedFile(path, "a" * 24) as file:
        assert [entry.path for entry in delete(list_packed(tmp_path))] == [path]
        file.read("x", out)
    np.testing.assert_array_equal(out, np.arange(1000, dtype=np.uint8))


def test_only_leftovers_of_killed_writers_are_deleted(tmp_path: Path) -> None:
    """Not what another process writes at the moment."""
    name = file_name("m", "a" * 24, 0, 1)

    def check() -> None:
        [entry] = list_packed(tmp_path)
        assert entry.is_partial
        assert delete([entry]) == []

    write_packed_file(tmp_path / name, "a" * 24, None, {"x": np.zeros(9, np.uint8)}, check)
    assert (tmp_path / name).is_file()
    left = tmp_path / file_name("m", "b" * 24, 0, 1)
    left = left.with_name(left.name + ".partial")
    left.touch()
    assert [e.path for e in delete([e for e in list_packed(tmp_path) if e.is_partial])] == [left]


@pytest.mark.parametrize("arguments", [[], ["/nonexistent"]])
def test_a_missing_folder_is_named(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FD_LITE_PACKED_CACHE", raising=False)
    assert main.run(["packed-cache", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert (arguments or ["FD_LITE_PACKED_CACHE"])[0] in error
