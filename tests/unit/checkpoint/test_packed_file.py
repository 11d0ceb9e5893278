"""A file of packed arrays gives back every bit that was written, or an error of one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastdeploy_lite import _ops_cpu
from fastdeploy_lite.checkpoint import packed_file
from fastdeploy_lite.checkpoint.packed_file import PackedFile, PackedFileError, write_packed_file

PIECE = 4 * _ops_cpu.CHECKSUM_BYTES
SIZES = (0, 1, 7, 8, 9, PIECE // 4 - 1, PIECE // 4 + 1, PIECE - 1, PIECE, PIECE + 5, 3 * PIECE + 77)
CONTENTS = {"order": "natural", "更": [1, None]}


def arrays(seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(seed)
    return {f"a {n}": random.integers(0, 256, n, np.uint8) for n in SIZES}


def read_all(path: Path, fingerprint: str = "f") -> dict[str, np.ndarray[Any, Any]]:
    with PackedFile(path, fingerprint) as file:
        assert file.contents == CONTENTS
        found = {}
        for n in SIZES:
            found[f"a {n}"] = out = np.full(n, 99, np.uint8)
            file.read(f"a {n}", out)
        return found


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "sub" / "folder" / "w.safetensors"
    assert write_packed_file(path, "f", CONTENTS, arrays())
    return path


@pytest.mark.parametrize("set_", ["plain", _ops_cpu.available_isas()[-1]])
def test_checksums_are_crc32c(set_: str) -> None:
    """Known values of RFC 3720, B.4; and pieces computed four at a time or one by one."""
    before = _ops_cpu.current_isa()
    _ops_cpu.set_isa(set_)
    try:
        for data, expected in (
            (b"123456789", 0xE3069283),
            (bytes(32), 0x8A9136AA),
            (b"\xff" * 32, 0x62A8AB43),
            (bytes(range(32)), 0x46DD794E),
        ):
            assert packed_file._crc(data) & 0xFFFFFFFF == expected
        data = np.random.default_rng(1).integers(0, 256, 2 * PIECE + 100, np.uint8)
        sums = np.zeros(9, np.int32)
        _ops_cpu.checksums(packed_file._view(data), packed_file._view(sums))
        step = _ops_cpu.CHECKSUM_BYTES
        pieces = [data[i * step : (i + 1) * step].tobytes() for i in range(9)]
        assert [packed_file._crc(piece) for piece in pieces] == sums.tolist()
    finally:
        _ops_cpu.set_isa(before)


def test_what_was_written_comes_back(written: Path) -> None:
    found = read_all(written)
    for name, array in arrays().items():
        np.testing.assert_array_equal(found[name], array)
    assert [path.name for path in written.parent.iterdir()] == [written.name]
    others = load_file(written)  # the library reads it, too
    for name, array in arrays().items():
        np.testing.assert_array_equal(others[name], array)


def test_every_flipped_bit_is_noticed(written: Path) -> None:
    """In the length, in the header, in data of every size, in the checksums."""
    good = bytearray(written.read_bytes())
    length = 8 + int.from_bytes(good[:8], "little")
    offsets = json.loads(good[8:length])
    spans = [[length + at for at in offsets[f"a {n}"]["data_offsets"]] for n in SIZES]
    assert all(begin % 64 == 0 for begin, _ in spans)
    places = [*range(0, length, 13), *(end - 1 for _, end in spans[1:]), len(good) - 1]
    sums = length + offsets["checksums"]["data_offsets"][0]
    places += [sums + 1, spans[1][0], spans[-1][0] + PIECE + 3]
    for at in places:
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        written.write_bytes(bad)
        with pytest.raises(PackedFileError) as caught:
            read_all(written)
        assert str(caught.value).startswith(f"{written}: ")
        assert "\n" not in str(caught.value)
    written.write_bytes(good)
    read_all(written)


def test_files_cut_short_or_long_are_refused(written: Path) -> None:
    good = written.read_bytes()
    length = 8 + int.from_bytes(good[:8], "little")
    cuts = [0, 1, 7, 8, 9, 100, length - 1, length, length + 1, len(good) // 2, len(good) - 1]
    for size in [*cuts, len(good) - 4]:
        written.write_bytes(good[:size])
        with pytest.raises(PackedFileError):
            read_all(written)
    written.write_bytes(good + b"\0")
    with pytest.raises(PackedFileError):
        read_all(written)


def test_a_file_that_shrinks_while_it_is_open_is_an_error(written: Path) -> None:
    with PackedFile(written, "f") as file:
        os.truncate(written, written.stat().st_size // 2)
        with pytest.raises(PackedFileError, match=r"a \d+: cut short"):
            file.read(f"a {SIZES[-1]}", np.empty(SIZES[-1], np.uint8))


def test_names_and_sizes_must_agree(written: Path) -> None:
    with PackedFile(written, "f") as file:
        with pytest.raises(PackedFileError, match="b: not there"):
            file.read("b", np.empty(1, np.uint8))
        with pytest.raises(PackedFileError, match=r"a 7: found 7 bytes, expected 8"):
            file.read("a 7", np.empty(8, np.uint8))
        with pytest.raises(PackedFileError, match="checksums: not there"):
            file.read("checksums", np.empty(8, np.uint8))


def test_another_fingerprint_and_another_version_are_refused(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PackedFileError, match="fingerprint is 'f', expected 'g'"):
        PackedFile(written, "g")
    monkeypatch.setattr(packed_file, "VERSION", packed_file.VERSION + 1)
    with pytest.raises(PackedFileError, match=r"version is '\d+', expected '\d+'"):
        PackedFile(written, "f")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": packed_file.FORMAT}])
def test_foreign_files_are_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": np.ones(100, np.float32)}, path, metadata=metadata)
    with pytest.raises(PackedFileError, match="not a file of this kind"):
        PackedFile(path, "f")


@pytest.mark.parametrize(
    "header",
    [
        b"[]", b"{}", b"7", b"{", b'{"__metadata__": []}', b'{"__metadata__": {"contents": 5}}',
        b"\xff" * 9,
    ],
)  # fmt: skip
def test_headers_with_a_right_checksum_that_say_nonsense(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "x.safetensors"
    head = len(header).to_bytes(8, "little") + header
    path.write_bytes(head + (packed_file._crc(head) & 0xFFFFFFFF).to_bytes(4, "little"))
    with pytest.raises(PackedFileError, match=rf"^{re.escape(str(path))}: "):
        PackedFile(path, "f")


def test_a_header_that_places_arrays_elsewhere(written: Path) -> None:
    data = written.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["a 9"]["data_offsets"] = [1 << 60, (1 << 60) + 9]
    text = json.dumps(header).encode().ljust(length)[:length]
    head = data[:8] + text
    crc = (packed_file._crc(head) & 0xFFFFFFFF).to_bytes(4, "little")
    written.write_bytes(head + data[8 + length : -4] + crc)
    with pytest.raises(PackedFileError):
        read_all(written)


def test_links_pipes_and_folders_are_refused(tmp_path: Path, written: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(written)
    with pytest.raises(PackedFileError, match="a link, expected the file itself"):
        PackedFile(link, "f")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(PackedFileError, match="not a regular file"):
            PackedFile(path, "f")
    with pytest.raises(FileNotFoundError):
        PackedFile(tmp_path / "nothing", "f")
    # Writing replaces the link and leaves alone what it names.
    before = written.read_bytes()
    assert write_packed_file(link, "f", CONTENTS, arrays(1))
    assert not link.is_symlink()
    assert written.read_bytes() == before


def test_a_link_in_place_of_the_partial_file_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "w.partial").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        write_packed_file(tmp_path / "w", "f", CONTENTS, arrays())
    assert victim.read_text() == "precious"


def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = os.statvfs(tmp_path)

    class Full:
        f_bavail, f_frsize = 1, found.f_frsize

    monkeypatch.setattr(os, "statvfs", lambda _: Full)
    with pytest.raises(OSError, match=r"0\.0\d GB are needed, 0\.00 are free"):
        write_packed_file(tmp_path / "w", "f", CONTENTS, arrays())
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_nothing_and_keeps_the_old_file(written: Path) -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_packed_file(written, "f", CONTENTS, arrays(1), fail)
    assert [path.name for path in written.parent.iterdir()] == [written.name]
    np.testing.assert_array_equal(read_all(written)["a 9"], arrays()["a 9"])


WRITE_SLOWLY = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_packed_file import CONTENTS, arrays
from fastdeploy_lite.checkpoint.packed_file import write_packed_file

def wait():
    print("begun", flush=True)
    sys.stdin.readline()

assert write_packed_file(Path(sys.argv[1]), "f", CONTENTS, arrays(), wait)
"""


def in_new_process(code: str, path: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", code, str(path), str(Path(__file__).parent)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)


def another_writer(path: Path) -> subprocess.Popen[bytes]:
    """A process that has begun to write and waits for the end of its input."""
    process = in_new_process(WRITE_SLOWLY, path)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    return process


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "w"
    process = another_writer(path)
    assert not write_packed_file(path, "f", CONTENTS, arrays(1))
    assert not path.exists()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()
    np.testing.assert_array_equal(read_all(path)["a 9"], arrays()["a 9"])
    assert [p.name for p in tmp_path.iterdir()] == ["w"]


def test_what_a_killed_writer_left_is_used_again(tmp_path: Path) -> None:
    path = tmp_path / "w"
    process = another_writer(path)
    process.kill()
    process.communicate(timeout=300)
    assert [p.name for p in tmp_path.iterdir()] == ["w.partial"]
    assert write_packed_file(path, "f", CONTENTS, arrays(1))
    np.testing.assert_array_equal(read_all(path)["a 9"], arrays(1)["a 9"])
    assert [p.name for p in tmp_path.iterdir()] == ["w"]


READ_AND_WRITE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_packed_file import CONTENTS, arrays, read_all
from fastdeploy_lite.checkpoint.packed_file import write_packed_file

path, seen = Path(sys.argv[1]), 0
for round in range(20):
    write_packed_file(path, "f", CONTENTS, arrays())
    try:
        found = read_all(path)
    except FileNotFoundError:
        continue
    seen += 1
    assert all((found[name] == array).all() for name, array in arrays().items())
assert seen
"""


def test_readers_and_writers_at_once(tmp_path: Path) -> None:
    """Nobody ever sees a part of a file."""
    running = [in_new_process(READ_AND_WRITE, tmp_path / "w") for _ in range(3)]
    for process in running:
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr.decode()
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_a_mapping_is_checked_and_outlives_the_file(written: Path) -> None:
    with PackedFile(written, "f") as file:
        found = {name: file.map(name) for name in arrays() if name != "a 0"}
    good = bytearray(written.read_bytes())
    written.unlink()
    for name, array in found.items():
        np.testing.assert_array_equal(array, arrays()[name])
    good[-5000] ^= 1
    written.write_bytes(good)
    with PackedFile(written, "f") as file:
        with pytest.raises(PackedFileError, match="damaged in the 262144 bytes from"):
            file.map(f"a {SIZES[-1]}")
        os.truncate(written, 5000)
        with pytest.raises(PackedFileError, match="cut short"):
            file.map(f"a {SIZES[-1]}")
