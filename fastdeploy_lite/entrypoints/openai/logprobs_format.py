"""Log-probabilities in the forms of the two interfaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastdeploy_lite.request.outputs import LogprobsLists


def token_text(tokenizer: Any, token_id: int, decode: bool = True) -> tuple[str, list[int]]:
    r"""A token's own text and bytes.

    Args:
        tokenizer: The model's tokenizer.
        token_id: The token.
        decode: False leaves the text empty.

    Returns:
        The text (`bytes:\xNN…` when it is not UTF-8 alone) and the bytes.
    """
    data = tokenizer.token_bytes(token_id) or tokenizer.convert_ids_to_tokens(token_id).encode()
    if not decode:
        return "", list(data)
    try:
        return data.decode(), list(data)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), list(data)


def chat_logprobs(
    tokenizer: Any, lists: LogprobsLists, top: int, decode: bool = True, in_stream: bool = False
) -> dict[str, Any]:
    """The chat form.

    Args:
        tokenizer: The model's tokenizer.
        lists: One row per token, the sampled one first.
        top: Number of best tokens to list, fewer where fewer can come; -1 lists all there are.
        decode: Whether tokens are shown as text.
        in_stream: Alternatives have no `top_logprobs` of their own there; in whole answers, null.

    Returns:
        `{"content": [...], "refusal": None}`.
    """
    content = []
    inner: dict[str, Any] = {} if in_stream else {"top_logprobs": None}
    rows = zip(lists.logprob_token_ids, lists.logprobs, strict=True)
    for position, (ids, values) in enumerate(rows):
        found = lists.alternatives(position, top)
        best = [{**_entry(tokenizer, i, v, decode), **inner} for i, v in found]
        content.append({**_entry(tokenizer, ids[0], values[0], decode), "top_logprobs": best})
    return {"content": content, "refusal": None}


def _entry(tokenizer: Any, token_id: int, value: float, decode: bool) -> dict[str, Any]:
    text, data = token_text(tokenizer, token_id, decode)
    return {"token": text, "logprob": value, "bytes": data}


class CompletionLogprobs:
    """The completion form, piece by piece.

    Args:
        tokenizer: The model's tokenizer.
        top: Number of best tokens to list, fewer where fewer can come; -1 lists all there are.
        decode: Whether tokens are shown as text.
    """

    def __init__(self, tokenizer: Any, top: int, decode: bool = True) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self._decode = decode
        self._text = tokenizer.detokenizer()
        self._offset = 0

    def rows(self, lists: LogprobsLists) -> dict[str, Any]:
        """Generated tokens.

        Args:
            lists: One row per token, the sampled one first.

        Returns:
            `tokens`, `token_logprobs`, `top_logprobs` (text to value), `text_offset` in the
            answer's text.
        """
        sampled = [ids[0] for ids in lists.logprob_token_ids]
        best = (lists.alternatives(position, self._top) for position in range(len(sampled)))
        return {
            "tokens": [self._name(token) for token in sampled],
            "token_logprobs": [values[0] for values in lists.logprobs],
            "top_logprobs": [{self._name(i): value for i, value in found} for found in best],
            "text_offset": [self._place(token) for token in sampled],
        }

    def prompt(self, token_ids: Sequence[int], entries: Sequence[Any]) -> dict[str, Any]:
        """The prompt's tokens, which `echo` puts before the answer.

        Args:
            token_ids: All of them.
            entries: What the engine says of each (token id to details), None for the first.

        Returns:
            As `rows`; nothing is known of the first token but its text.
        """
        known = [entry[token] for token, entry in zip(token_ids[1:], entries[1:], strict=True)]
        return {
            "tokens": [self._name(token) for token in token_ids],
            "token_logprobs": [None, *(entry.logprob for entry in known)],
            "top_logprobs": [None, *(self._best(entry) for entry in entries[1:])],
            "text_offset": [self._place(token) for token in token_ids],
        }

    def _best(self, entry: Mapping[int, Any]) -> dict[str, float]:
        """The entry holds the token itself, too, which need not be among the best."""
        ranked = sorted(entry.items(), key=lambda item: item[1].rank)
        wanted = [(i, e) for i, e in ranked if self._top < 0 or e.rank <= self._top]
        return {self._name(token): found.logprob for token, found in wanted}

    def _name(self, token_id: int) -> str:
        return token_text(self._tokenizer, token_id, self._decode)[0]

    def _place(self, token_id: int) -> int:
        place = self._offset
        self._offset += len(self._text.feed(token_id))
        return place


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Pieces of the completion form as one; None for none."""
    if not parts:
        return None
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


def join(parts: list[LogprobsLists]) -> LogprobsLists:
    """Concatenate the rows of several steps."""
    whole = LogprobsLists([], [], [])
    for part in parts:
        whole.extend(part)
    return whole


def prompt_logprobs(rows: list[Any] | None, decode: bool = True) -> list[Any] | None:
    """Prompt log-probabilities as plain data: None for the first token, then id to details."""
    if rows is None:
        return None
    return [
        None
        if row is None
        else {
            str(i): {
                "logprob": e.logprob,
                "rank": e.rank,
                "decoded_token": e.decoded_token if decode else None,
            }
            for i, e in row.items()
        }
        for row in rows
    ]
