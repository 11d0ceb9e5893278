"""Calibration text: files of every kind, windows, refusals."""

from __future__ import annotations

import builtins
import gzip
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdeploy_lite.calibration import text
from fastdeploy_lite.calibration.text import (
    calibration_windows,
    read_documents,
    read_stream,
    windows,
)
from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer
from fastdeploy_lite.utils.errors import ConfigError

DOCUMENTS = [
    {"text": "床前明月光，\n疑是地上霜。"},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
]


def write_jsonl(path: Path, documents: list[Any] = DOCUMENTS) -> Path:
    path.write_text("".join(json.dumps(d) + "\n" for d in documents), encoding="utf-8")
    return path


def test_jsonl_plain_and_compressed(tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl")
    assert list(read_documents(plain)) == DOCUMENTS
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert list(read_documents(packed)) == DOCUMENTS


def test_plain_text_has_a_document_a_paragraph(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("\n\none\ntwo\n\n \nthree", encoding="utf-8")
    assert list(read_documents(file)) == [{"text": "one\ntwo"}, {"text": "three"}]


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra `parquet` is not installed")
    pyarrow = pytest.importorskip("pyarrow")
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["one", "two"]}), file)
    assert list(read_documents(file)) == [{"text": "one"}, {"text": "two"}]
    parquet.write_table(pyarrow.table({"id": [1]}), file)
    with pytest.raises(ConfigError, match="found columns id, expected text or messages"):
        list(read_documents(file))
    messages = [{"role": "user", "content": "Hi"}]
    for column, row in ((["a", None], 2), ([b"a"], 1), ([1], 1)):
        parquet.write_table(pyarrow.table({"text": column}), file)
        with pytest.raises(ConfigError, match=rf"row {row}: found \{{'text': "):
            list(read_documents(file))
    parquet.write_table(pyarrow.table({"text": ["a", None], "messages": [None, messages]}), file)
    assert list(read_documents(file)) == [{"text": "a"}, {"messages": messages}]
    file.write_bytes(b"PAR1 and so on")
    with pytest.raises(ConfigError, match="not a parquet file"):
        list(read_documents(file))


def test_parquet_without_its_library_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1")
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"pip install 'fastdeploy-lite\[parquet\]"):
        list(read_documents(file))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found no text"),
        (b'{"text": 3}\n', "line 1: found {'text': 3}, expected {\"text\""),
        (b'{"text": null, "messages": null}\n', "line 1: found {'text': None, 'mess"),
        (b'{"content": "a"}\n', "line 1: found {'content': 'a'}, expected"),
        (b'{"text": "a"}\n{"messages": [{"role": "user"}]}\n', "line 2: found {'messages'"),
        (b"[1]\n", r"line 1: found \[1\], expected"),
        (b"{", "line 1: expected one JSON object a line"),
        (b'{"text": "a"}\n' + b"[" * 100000, "line 2: expected one JSON object a line"),
        (b'{"text": ' + b"1" * 5000 + b"}", "line 1: expected one JSON object a line"),
        (b"\xff\xfe\n", "expected text in UTF-8"),
        ('{"text": "a"}'.encode("utf-16-le"), "line 1: found a NUL character, expected text in"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message.replace("{", r"\{")) as caught:
        list(read_documents(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-20], lambda b: b[:-6] + b"??????", lambda b: b[:20] + b"????" + b[24:]],
)
def test_damaged_archives_are_refused(tmp_path: Path, damage: Any) -> None:
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(damage(gzip.compress(b'{"text": "a"}\n' * 1000)))
    with pytest.raises(ConfigError, match=r"a\.jsonl\.gz: found a damaged archive, or none: "):
        list(read_documents(file))


def test_byte_order_marks_and_other_keys_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    messages = [{"role": "assistant", "content": "Hello"}]
    line = {"id": 7, "text": None, "messages": messages}
    file.write_text("\ufeff" + json.dumps(line), encoding="utf-8")
    assert list(read_documents(file)) == [{"messages": messages}]


def test_memory_is_bounded_whatever_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long paragraphs are cut, long lines of JSON refused."""
    monkeypatch.setattr(text, "LONGEST_PARAGRAPH", 10)
    monkeypatch.setattr(text, "LONGEST_LINE", 30)
    plain = tmp_path / "a.txt"
    plain.write_text("x" * 25 + "\n\nyy\nzz", encoding="utf-8")
    found = [document["text"] for document in read_documents(plain)]
    assert found == ["x" * 10, "x" * 10, "x" * 5, "yy\nzz"]
    long = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b" * 30}])
    with pytest.raises(ConfigError, match="line 2: found 30 characters and more, expected"):
        list(read_documents(long))


@pytest.mark.parametrize("words", [1, 15, 16, 17, 300])
def test_of_a_long_text_the_beginning_is_drawn_from(
    tmp_path: Path, demo_dir: Path, monkeypatch: pytest.MonkeyPatch, words: int
) -> None:
    """However documents and windows lie, and even where they are asked for more of it."""
    tokenizer = Ernie4_5Tokenizer.from_pretrained(str(demo_dir))
    documents = [{"text": " ".join(f"{i}-{j}" for j in range(words))} for i in range(40)]
    file = write_jsonl(tmp_path / "a.jsonl", documents)
    stream = read_stream(tokenizer, file)
    for limit in (40, 48, 49, 10**6):
        monkeypatch.setattr(text, "MOST_TOKENS", limit)
        chosen = calibration_windows(tokenizer, file, min(limit, len(stream)), 16, seed=0)
        expected = list(windows(stream, 16, limit))
        assert sorted(map(list, chosen)) == sorted(expected)


def test_a_pipe_is_a_file(tmp_path: Path) -> None:
    """As in `--text <(zstdcat text.zst)`."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("one\n\ntwo",), daemon=True)
    writer.start()
    assert list(read_documents(pipe)) == [{"text": "one"}, {"text": "two"}]
    writer.join()


def test_a_folder_is_called_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"found a folder, expected a \.txt, \.jsonl"):
        list(read_documents(tmp_path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.txt: no such file"):
        list(read_documents(tmp_path / "nowhere.txt"))


def test_windows_are_drawn_from_all_of_the_text(tmp_path: Path, demo_dir: Path) -> None:
    tokenizer = Ernie4_5Tokenizer.from_pretrained(str(demo_dir))
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": f"word {i} " * 20} for i in range(30)])
    stream = read_stream(tokenizer, file)
    chosen = calibration_windows(tokenizer, file, 100, 16, seed=1)
    assert sum(map(len, chosen)) == 100
    text = np.array(stream)
    starts = [
        next(i for i in range(0, len(text), 16) if list(text[i : i + len(w)]) == list(w))
        for w in chosen
    ]
    assert len(set(starts)) == len(starts)
    assert max(starts) > 200
    again = calibration_windows(tokenizer, file, 100, 16, seed=1)
    assert all((a == b).all() for a, b in zip(chosen, again, strict=True))
    other = calibration_windows(tokenizer, file, 100, 16, seed=2)
    assert any(a.shape != b.shape or (a != b).any() for a, b in zip(chosen, other, strict=True))
