"""Text for calibration and evaluation: files of several kinds to windows of token ids."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer
from fastdeploy_lite.utils.errors import ConfigError

END_OF_DOCUMENT = "</s>"
SAMPLE = "sample"
"""Name that stands for the packaged text."""
_SAMPLE_FILE = Path(__file__).parents[1] / "assets" / "calibration.jsonl.gz"
Document = dict[str, Any]


def read_documents(source: str | Path) -> Iterator[Document]:
    """Yield documents `{"text"}` or `{"messages"}` of a file.

    `.jsonl` holds one a line, `.parquet` one a row (columns `text` or `messages`; needs pyarrow);
    any other file is plain text, one document a paragraph (blank lines between). `.gz` may follow.
    `sample` is the packaged text.

    Raises:
        ConfigError: the file is missing, empty or not what its name says; names the line.
    """
    path = _SAMPLE_FILE if source == SAMPLE else Path(source)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; name a .txt, .jsonl or .parquet file of text")
    kinds = {".jsonl": _read_lines, ".json": _read_lines, ".parquet": _read_parquet}
    suffix = [part for part in path.suffixes if part != ".gz"][-1:]
    count = 0
    for document in kinds.get(suffix[0] if suffix else "", _read_paragraphs)(path):
        count += 1
        yield document
    if not count:
        raise ConfigError(f"{path}: found no text")


def encode_document(tokenizer: Ernie4_5Tokenizer, document: Document) -> list[int]:
    """Token ids of one document, closed by </s>; a dialogue in the chat form of the models."""
    found = tokenizer.token_id(END_OF_DOCUMENT)
    end = [] if found is None else [found]
    if "text" in document:
        return [*tokenizer.encode_text(document["text"]), *end]
    ids: list[int] = []
    prompt = str(tokenizer.cls_token)
    for message in document["messages"]:
        if message["role"] == "assistant":
            # The prompt and the answer are encoded apart, as they are at inference.
            ids += tokenizer.encode_text(prompt + "Assistant: ")
            ids += tokenizer.encode_text(message["content"]) + end
            prompt = ""
        else:
            prompt += f"User: {message['content']}\n"
    return ids


def read_stream(tokenizer: Ernie4_5Tokenizer, source: str | Path, every: int = 1) -> list[int]:
    """The documents 0, `every`, 2 `every` ... of a file, packed one after another."""
    documents = islice(read_documents(source), 0, None, every)
    return [token for document in documents for token in encode_document(tokenizer, document)]


def windows(stream: Sequence[int], length: int, limit: int | None = None) -> Iterator[list[int]]:
    """Cut the first `limit` tokens (default all) into windows of at least two tokens."""
    stop = len(stream) if limit is None else min(limit, len(stream))
    for start in range(0, stop - 1, length):
        yield list(stream[start : min(start + length, stop)])


def calibration_windows(
    tokenizer: Ernie4_5Tokenizer, source: str | Path, tokens: int, length: int, seed: int
) -> list[npt.NDArray[np.int32]]:
    """Windows of at most `length` tokens, drawn from all of the text until `tokens` are reached.

    Raises:
        ConfigError: as `read_documents`.
    """
    found = [np.array(part, np.int32) for part in windows(read_stream(tokenizer, source), length)]
    order = np.random.default_rng(seed).permutation(len(found))
    chosen: list[npt.NDArray[np.int32]] = []
    left = tokens
    for index in order:
        if left < 2:
            break
        chosen.append(found[index][:left])
        left -= len(chosen[-1])
    return chosen


def _open(path: Path) -> Any:
    return (
        gzip.open(path, "rt", encoding="utf-8")
        if path.suffix == ".gz"
        else path.open(encoding="utf-8")
    )


def _read_lines(path: Path) -> Iterator[Document]:
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _checked(json.loads(line), f"{path}: line {number}")
    except (json.JSONDecodeError, UnicodeDecodeError, gzip.BadGzipFile) as error:
        raise ConfigError(f"{path}: expected one JSON object a line, {error}") from error


def _read_paragraphs(path: Path) -> Iterator[Document]:
    lines: list[str] = []
    try:
        with _open(path) as file:
            for line in file:
                if line.strip():
                    lines.append(line)
                elif lines:
                    yield {"text": "".join(lines).strip()}
                    lines = []
    except (UnicodeDecodeError, gzip.BadGzipFile) as error:
        raise ConfigError(f"{path}: expected text in UTF-8, {error}") from error
    if lines:
        yield {"text": "".join(lines).strip()}


def _read_parquet(path: Path) -> Iterator[Document]:
    try:
        from pyarrow import parquet  # noqa: PLC0415 - an optional extra
    except ImportError:
        raise ConfigError(
            f"{path}: reading parquet needs pyarrow: pip install 'fastdeploy-lite[parquet]', or "
            "convert the file to .jsonl"
        ) from None
    try:
        file = parquet.ParquetFile(path)
        names = [name for name in ("text", "messages") if name in file.schema_arrow.names]
        if not names:
            raise ConfigError(
                f"{path}: found columns {', '.join(file.schema_arrow.names)}, expected text or"
                " messages"
            )
        for batch in file.iter_batches(columns=names[:1]):
            for row in batch.to_pylist():
                yield _checked(row, str(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a parquet file, {error}") from error


def _checked(document: Any, where: str) -> Document:
    if isinstance(document, dict):
        if isinstance(document.get("text"), str):
            return document
        messages = document.get("messages")
        if isinstance(messages, list) and all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in messages
        ):
            return document
    raise ConfigError(f'{where}: expected {{"text": ...}} or {{"messages": [...]}}')
