"""Calibration text: files of every kind, windows, refusals."""

from __future__ import annotations

import builtins
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdeploy_lite.calibration.text import calibration_windows, read_documents, read_stream
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
        (b'{"text": 3}\n', 'line 1: expected {"text"'),
        (b'{"text": "a"}\n{"messages": [{"role": "user"}]}\n', "line 2: expected"),
        (b"{", "expected one JSON object a line"),
        (b"\xff\xfe\n", "expected one JSON object a line"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message.replace("{", r"\{")) as caught:
        list(read_documents(file))
    assert "\n" not in str(caught.value)


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
