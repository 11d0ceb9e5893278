"""Text for calibration and evaluation: files of several kinds to windows of token ids."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer
from fastdeploy_lite.utils.errors import ConfigError, quote
from fastdeploy_lite.utils.files import check_readable

END_OF_DOCUMENT = "</s>"
SAMPLE = "sample"
"""Name that stands for the packaged text."""
_SAMPLE_FILE = Path(__file__).parents[1] / "assets" / "calibration.jsonl.gz"
Document = dict[str, Any]
MOST_TOKENS = 1 << 24
"""Of a text, from its beginning, that calibration draws from: 64 MiB of ids, read in seconds."""
LONGEST_LINE = 1 << 26
"""Characters of a line of JSON."""
LONGEST_PARAGRAPH = 1 << 20
"""Characters of a document of plain text; a longer one is several."""


def read_documents(source: str | Path) -> Iterator[Document]:
    """Yield documents `{"text"}` or `{"messages"}` of a file.

    `.jsonl` holds one a line, `.parquet` one a row (columns `text` or `messages`; needs pyarrow);
    any other file is plain text, one document a paragraph (blank lines between). `.gz` may follow.
    `sample` is the packaged text.

    Raises:
        ConfigError: the file is missing, empty or not what its name says; names the line.
    """
    path = _SAMPLE_FILE if source == SAMPLE else Path(source)
    check_readable(path, "a .txt, .jsonl or .parquet file of text")
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
    """Windows of at most `length` tokens, drawn from the text until `tokens` are reached.

    Of a long text they are drawn from the first MOST_TOKENS tokens.

    Raises:
        ConfigError: as `read_documents`.
    """
    found = list(_read_windows(tokenizer, source, length, max(MOST_TOKENS, tokens)))
    order = np.random.default_rng(seed).permutation(len(found))
    chosen: list[npt.NDArray[np.int32]] = []
    left = tokens
    for index in order:
        if left < 2:
            break
        chosen.append(found[index][:left])
        left -= len(chosen[-1])
    return chosen


def _read_windows(
    tokenizer: Ernie4_5Tokenizer, source: str | Path, length: int, limit: int
) -> Iterator[npt.NDArray[np.int32]]:
    """Windows of the first `limit` tokens, packed documents; no more of the file is read."""
    left: list[int] = []
    for document in read_documents(source):
        left += encode_document(tokenizer, document)
        whole = min(len(left), limit) // length * length
        for part in windows(left[:whole], length):
            yield np.array(part, np.int32)
        left, limit = left[whole:], limit - whole
        if len(left) >= limit:
            break
    for part in windows(left, length, limit):
        yield np.array(part, np.int32)


def _open(path: Path) -> Any:
    opened = gzip.open if path.suffix == ".gz" else Path.open
    return opened(path, "rt", encoding="utf-8-sig")


def _lines(path: Path, most: int) -> Iterator[str]:
    """Lines of a text file, longer ones in parts of `most` characters.

    Raises:
        ConfigError: it is no text in UTF-8, or a damaged archive.
    """
    try:
        with _open(path) as file:
            for number, line in enumerate(iter(partial(file.readline, most), ""), 1):
                if "\0" in line:  # in UTF-8, but what wrote it meant UTF-16, or is no text
                    raise ConfigError(
                        f"{path}: line {number}: found a NUL character, expected text in UTF-8"
                    )
                yield line
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected text in UTF-8, {error}: convert the file") from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ConfigError(
            f"{path}: found a damaged archive, or none: {error}; expected one of gzip"
        ) from error


def _read_lines(path: Path) -> Iterator[Document]:
    for number, line in enumerate(_lines(path, LONGEST_LINE), 1):
        where = f"{path}: line {number}"
        if len(line) == LONGEST_LINE:
            raise ConfigError(
                f"{where}: found {LONGEST_LINE} characters and more, expected a document a line"
            )
        if line.strip():
            try:
                document = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{where}: expected one JSON object a line, {error}") from error
            yield _checked(document, where)


def _read_paragraphs(path: Path) -> Iterator[Document]:
    lines: list[str] = []
    size = 0
    for line in _lines(path, LONGEST_PARAGRAPH):
        is_blank = not line.strip()
        if not is_blank:
            lines.append(line)
            size += len(line)
        if lines and (is_blank or size >= LONGEST_PARAGRAPH):
            yield {"text": "".join(lines).strip()}
            lines, size = [], 0
    if lines:
        yield {"text": "".join(lines).strip()}


def _read_parquet(path: Path) -> Iterator[Document]:
    try:
        from pyarrow import ArrowException, parquet  # noqa: PLC0415 - an optional extra
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
        number = 0
        for batch in file.iter_batches(columns=names):
            for row in batch.to_pylist():
                number += 1
                yield _checked(row, f"{path}: row {number}")
    except (OSError, ArrowException) as error:
        raise ConfigError(f"{path}: not a parquet file, {error}") from error


def _checked(document: Any, where: str) -> Document:
    """The text or the messages of a document; other keys may hold anything."""
    if isinstance(document, dict):
        if isinstance(document.get("text"), str):
            return {"text": document["text"]}
        messages = document.get("messages")
        if isinstance(messages, list) and all(map(_is_message, messages)):
            return {"messages": messages}
    raise ConfigError(
        f'{where}: found {quote(document)}, expected {{"text": "..."}} or '
        '{"messages": [{"role": "...", "content": "..."}]}'
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(name), str) for name in ("role", "content")
    )
